//! Conversions between 16-bit floats and `f32` without branches, so that loops over them become
//! vector code. They give the bits of the `half` crate's conversions, which branch on NaN.

use half::bf16;

/// bfloat16 bits to `f32`; exact.
#[inline(always)]
pub(super) fn bf16_to_f32(bits: u32) -> f32 {
    f32::from_bits(bits << 16)
}

/// binary16 bits to `f32`; exact, subnormals included.
#[inline(always)]
pub(super) fn f16_to_f32(bits: u32) -> f32 {
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = (bits & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * REBIAS).to_bits();
    let special = magnitude | 0x7f80_0000;
    let value = if magnitude >= 0x0f80_0000 { special } else { finite };
    f32::from_bits(value | (bits & 0x8000) << 16)
}

/// `f32` to the nearest bfloat16, ties to even; NaN stays a quiet NaN.
#[inline(always)]
pub(super) fn bf16_round(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let nan = bits >> 16 | 0x40;
    bf16::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded } as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    #[test]
    fn every_f16_decodes_as_half_does_up_to_nan_payload() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(bits.into()), f16::from_bits(bits).to_f32());
            let same = ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan();
            assert!(same, "{bits:#06x}: {ours} {theirs}");
        }
    }

    proptest::proptest! {
        #[test]
        fn rounding_to_bf16_gives_the_bits_of_half(bits: u32) {
            let value = f32::from_bits(bits);
            assert_eq!(bf16_round(value).to_bits(), bf16::from_f32(value).to_bits());
        }
    }
}
