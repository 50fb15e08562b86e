//! Element types of tensors, on the host and on devices.

use std::fmt;

/// Element type of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
    /// 8 bits: sign, 4 of exponent, 3 of mantissa, no infinities; see [`crate::device::fp8`].
    F8E4m3,
    /// Signed 32-bit integer: token ids, positions, slots.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4m3 => 1,
        }
    }

    /// Whether elements are floats that need no scale, which excludes e4m3.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Whether every element of a little-endian array is a finite number.
    pub(crate) fn all_finite(self, elements: &[u8]) -> bool {
        // A float is finite unless all bits of its exponent are set. The loops below have no early exit, so
        // that they are vectorised.
        const fn infinite16(bits: [u8; 2], exponent: u16) -> bool {
            u16::from_le_bytes(bits) & exponent == exponent
        }
        const EXPONENT_F32: u32 = 0x7f80_0000;
        const EXPONENT_F16: u16 = 0x7c00;
        const EXPONENT_BF16: u16 = 0x7f80;
        let halves = elements.as_chunks::<2>().0.iter();
        match self {
            Self::F32 => {
                let words = elements.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b));
                !words.fold(false, |any, word| any | (word & EXPONENT_F32 == EXPONENT_F32))
            }
            Self::F16 => !halves.fold(false, |any, b| any | infinite16(*b, EXPONENT_F16)),
            Self::Bf16 => !halves.fold(false, |any, b| any | infinite16(*b, EXPONENT_BF16)),
            Self::F8E4m3 => !elements.iter().fold(false, |any, b| any | (b & 0x7f == 0x7f)),
            Self::I32 => true,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F8E4m3 => "float8_e4m3fn",
            Self::I32 => "int32",
        })
    }
}
