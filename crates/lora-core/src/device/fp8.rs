//! 8-bit floats in the format e4m3 (Micikevicius et al., 2022), which are used with a scale.

use float8::F8E4M3;
use rayon::prelude::*;

use super::{DType, HostTensor};

/// The largest number of the format.
pub const MAX: f32 = 448.0;

/// The value of every code.
static VALUES: [f32; 256] = {
    let (mut values, mut code) = ([0.0; 256], 0u8);
    loop {
        values[code as usize] = F8E4M3::from_bits(code).to_f32();
        if code == u8::MAX {
            break values;
        }
        code += 1;
    }
};

/// The value of a code.
pub fn decode(code: u8) -> f32 {
    VALUES[usize::from(code)]
}

/// The code of the nearest number, ties to even; numbers beyond [`MAX`] become it.
pub fn encode(value: f32) -> u8 {
    F8E4M3::from_f32(value).to_bits()
}

/// The scale at which the largest of `values` fills the format; 1 where all are zero.
pub fn scale_of(values: impl IntoIterator<Item = f32>) -> f32 {
    let largest = values.into_iter().fold(0f32, |most, value| most.max(value.abs()));
    // Numbers too small to be divided by 448 count as zero.
    Some(largest / MAX).filter(|scale| scale.is_normal()).unwrap_or(1.0)
}

/// Quantises a tensor to e4m3 with one scale, by its largest element; `None` for integers.
pub fn quantise(tensor: &HostTensor) -> Option<(HostTensor, f32)> {
    let dtype = tensor.dtype();
    if !dtype.is_float() {
        return None;
    }
    let parts: Vec<HostTensor> = tensor
        .bytes()
        .par_chunks(PART * dtype.size())
        .filter_map(|part| HostTensor::new(dtype, vec![part.len() / dtype.size()], part.to_vec()))
        .collect();
    let largest = |part: &HostTensor| part.iter_f32().fold(0f32, |most, v| most.max(v.abs()));
    let scale = scale_of(parts.par_iter().map(largest).collect::<Vec<_>>());
    let codes: Vec<u8> = match dtype.size() {
        2 => {
            let table = codes_of_all(dtype, scale)?;
            let code = |bits: &[u8; 2]| table[usize::from(u16::from_le_bytes(*bits))];
            tensor.bytes().as_chunks::<2>().0.par_iter().map(code).collect()
        }
        _ => parts
            .par_iter()
            .flat_map_iter(|part| part.iter_f32().map(|v| encode(v / scale)))
            .collect(),
    };
    Some((HostTensor::new(DType::F8E4m3, tensor.shape().to_vec(), codes)?, scale))
}

/// Elements of one task.
const PART: usize = 1 << 16;

/// The code for each bit pattern of a 16-bit dtype; a lookup is faster than rounding.
fn codes_of_all(dtype: DType, scale: f32) -> Option<Vec<u8>> {
    let bits: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let all = HostTensor::new(dtype, vec![bits.len() / 2], bits)?;
    Some(all.iter_f32().map(|value| encode(value / scale)).collect())
}

/// Scales of an e4m3 weight matrix whose parts are stacked by rows.
#[derive(Clone, PartialEq, Debug)]
pub struct Fp8Scales {
    /// Scale of each part, by which its elements are multiplied; positive.
    pub parts: Vec<f32>,
    /// Scale by which the input is divided before it is rounded to e4m3.
    pub input: InputScale,
}

/// Scale of the activations for an e4m3 matrix.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum InputScale {
    /// Fixed; positive.
    Static(f32),
    /// [`scale_of`] each row, so that a row's result does not depend on others.
    Dynamic,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back_and_are_in_order() {
        for code in 0..=u8::MAX {
            let value = decode(code);
            assert_eq!(value.is_nan(), code & 0x7f == 0x7f);
            assert!(value.is_nan() || encode(value) == code, "{code}");
        }
        assert!((0..0x7e).all(|code| decode(code) < decode(code + 1)));
        assert_eq!((decode(0x7e), decode(1)), (MAX, 1.0 / 512.0));
    }

    #[test]
    fn numbers_go_to_the_nearest_code_and_ties_to_the_even_one() {
        for code in 0..0x7eu8 {
            let (low, high) = (decode(code), decode(code + 1));
            let middle = (low + high) / 2.0;
            assert_eq!(encode(middle), code + code % 2);
            assert_eq!(encode(middle.next_down()), code);
            assert_eq!(encode(middle.next_up()), code + 1);
            assert_eq!(encode(-middle), 0x80 | encode(middle));
        }
    }

    #[test]
    fn large_numbers_saturate() {
        for value in [448.1, 1e9, f32::MAX, f32::INFINITY] {
            assert_eq!((decode(encode(value)), decode(encode(-value))), (MAX, -MAX));
        }
    }

    #[test]
    fn a_quantised_tensor_fills_the_format() {
        let t = HostTensor::from_f32(DType::Bf16, vec![2, 2], &[0.5, -2.0, 0.25, 0.0]).unwrap();
        let (q, scale) = quantise(&t).unwrap();
        assert_eq!(scale, 2.0 / MAX);
        assert_eq!(q.to_f32(), [112.0, -448.0, 56.0, 0.0]);
        assert_eq!(q.dtype(), DType::F8E4m3);
        let zero = HostTensor::from_f32(DType::F32, vec![1], &[0.0]).unwrap();
        assert_eq!(quantise(&zero).unwrap().1, 1.0);
        assert!(quantise(&HostTensor::new(DType::I32, vec![1], vec![0; 4]).unwrap()).is_none());
    }
}
