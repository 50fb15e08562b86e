//! Tensors in host memory.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use half::{bf16, f16};

use super::{DType, fp8};

/// A dense row-major tensor in host memory.
///
/// The bytes are reference counted, so a clone is cheap and a tensor may be a window into a
/// memory-mapped file. They are little-endian and need not be aligned.
#[derive(Clone, PartialEq)]
pub struct HostTensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Bytes,
}

impl fmt::Debug for HostTensor {
    /// Shows dtype and shape only, not the elements.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

impl HostTensor {
    /// Wraps `data` as a tensor; `None` unless it has exactly the bytes that `shape` needs.
    pub fn new(dtype: DType, shape: Vec<usize>, data: impl Into<Bytes>) -> Option<Self> {
        let data = data.into();
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        (elements.checked_mul(dtype.size())? == data.len()).then_some(Self { dtype, shape, data })
    }

    /// A tensor of `dtype` holding `values` rounded to it (e4m3 saturates); `None` if the count does not
    /// match.
    pub fn from_f32(dtype: DType, shape: Vec<usize>, values: &[f32]) -> Option<Self> {
        let data: Vec<u8> = match dtype {
            DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            DType::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            DType::F8E4m3 => values.iter().map(|v| fp8::encode(*v)).collect(),
            DType::I32 => return None,
        };
        Self::new(dtype, shape, data)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements, little-endian, possibly unaligned.
    pub fn bytes(&self) -> &Bytes {
        &self.data
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len() / self.dtype.size()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Rows and columns of a matrix; a vector is one row. `None` for other ranks.
    pub fn matrix_dims(&self) -> Option<(usize, usize)> {
        match self.shape[..] {
            [cols] => Some((1, cols)),
            [rows, cols] => Some((rows, cols)),
            _ => None,
        }
    }

    /// Element `i` in row-major order as `f32`; zero beyond the end.
    pub fn get_f32(&self, i: usize) -> f32 {
        let at = |n: usize| self.data.get(i * n..(i + 1) * n);
        match self.dtype {
            DType::F32 | DType::I32 => {
                let word = at(4).and_then(|b| b.try_into().ok()).unwrap_or([0; 4]);
                match self.dtype {
                    DType::F32 => f32::from_le_bytes(word),
                    _ => i32::from_le_bytes(word) as f32,
                }
            }
            DType::F8E4m3 => at(1).map_or(0.0, |code| fp8::decode(code[0])),
            DType::F16 | DType::Bf16 => {
                let word = at(2).and_then(|b| b.try_into().ok()).unwrap_or([0; 2]);
                match self.dtype {
                    DType::F16 => f16::from_le_bytes(word).to_f32(),
                    _ => bf16::from_le_bytes(word).to_f32(),
                }
            }
        }
    }

    /// All elements as `f32` (exact for every smaller float).
    pub fn to_f32(&self) -> Vec<f32> {
        self.iter_f32().collect()
    }

    /// The elements in order as `f32`, without a copy of the whole tensor.
    pub fn iter_f32(&self) -> Box<dyn Iterator<Item = f32> + '_> {
        match self.dtype {
            DType::F32 => Box::new(words::<4>(&self.data).map(f32::from_le_bytes)),
            DType::I32 => Box::new(words::<4>(&self.data).map(|b| i32::from_le_bytes(b) as f32)),
            DType::F16 => Box::new(words::<2>(&self.data).map(|b| f16::from_le_bytes(b).to_f32())),
            DType::F8E4m3 => Box::new(self.data.iter().map(|code| fp8::decode(*code))),
            DType::Bf16 => {
                Box::new(words::<2>(&self.data).map(|b| bf16::from_le_bytes(b).to_f32()))
            }
        }
    }

    /// The same values rounded to `dtype`; no copy if that is the dtype already.
    pub fn cast(&self, dtype: DType) -> Option<Self> {
        if dtype == self.dtype {
            return Some(self.clone());
        }
        Self::from_f32(dtype, self.shape.clone(), &self.to_f32())
    }

    /// A range along the first axis: elements of a vector, rows of a matrix. No copy.
    ///
    /// # Panics
    /// If the range leaves the tensor: the caller's sizes are inconsistent, which is a bug.
    #[must_use]
    pub fn slice_rows(&self, rows: Range<usize>) -> Self {
        let (outer, inner) = (self.shape[0], self.shape[1..].iter().product::<usize>());
        assert!(rows.start <= rows.end && rows.end <= outer, "{rows:?} of {self:?}");
        let row = inner * self.dtype.size();
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        let data = self.data.slice(rows.start * row..rows.end * row);
        Self { dtype: self.dtype, shape, data }
    }

    /// Some columns of a matrix, copied.
    ///
    /// # Panics
    /// As [`HostTensor::slice_rows`]; also if it is not a matrix.
    #[must_use]
    pub fn slice_cols(&self, cols: Range<usize>) -> Self {
        let &[rows, all] = &self.shape[..] else { panic!("columns of {self:?}") };
        assert!(cols.start <= cols.end && cols.end <= all, "{cols:?} of {self:?}");
        let size = self.dtype.size();
        let within = cols.start * size..cols.end * size;
        let row = |row: usize| &self.data[row * all * size..][within.clone()];
        let data = (0..rows).flat_map(row).copied().collect::<Vec<u8>>();
        Self { dtype: self.dtype, shape: vec![rows, cols.len()], data: data.into() }
    }

    /// Whether every element is a finite number.
    pub fn is_finite(&self) -> bool {
        self.dtype.all_finite(&self.data)
    }

    /// Whether every element is zero (of either sign).
    pub fn is_zero(&self) -> bool {
        match self.dtype {
            DType::F32 | DType::F16 | DType::Bf16 | DType::F8E4m3 => {
                self.iter_f32().all(|v| v == 0.0)
            }
            DType::I32 => self.data.iter().all(|&b| b == 0),
        }
    }
}

fn words<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    data.as_chunks::<N>().0.iter().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_count_is_refused() {
        assert!(HostTensor::new(DType::F32, vec![2, 3], vec![0u8; 23]).is_none());
        assert!(HostTensor::new(DType::F32, vec![usize::MAX, 3], vec![0u8; 24]).is_none());
        assert!(HostTensor::new(DType::F32, vec![2, 0], Vec::<u8>::new()).is_some());
    }

    #[test]
    fn slices_are_the_elements_in_question() {
        let values: Vec<f32> = (0..12).map(|v| v as f32).collect();
        let matrix = HostTensor::from_f32(DType::F16, vec![3, 4], &values).unwrap();
        assert_eq!(matrix.slice_rows(1..3).to_f32(), values[4..]);
        assert_eq!(matrix.slice_rows(1..1).shape(), [0, 4]);
        assert_eq!(matrix.slice_cols(1..3).to_f32(), [1.0, 2.0, 5.0, 6.0, 9.0, 10.0]);
        assert_eq!(matrix.slice_cols(2..3).shape(), [3, 1]);
    }

    #[test]
    fn casts_round_to_nearest() {
        let t = HostTensor::from_f32(DType::F32, vec![2], &[1.0, 1.0 + 1.0 / 512.0]).unwrap();
        assert_eq!(t.cast(DType::Bf16).unwrap().to_f32(), [1.0, 1.0]);
        assert_eq!(t.cast(DType::F16).unwrap().to_f32(), [1.0, 1.0 + 1.0 / 512.0]);
    }

    #[test]
    fn non_finite_elements_are_seen_in_every_dtype() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let t = HostTensor::from_f32(dtype, vec![3], &[0.0, f32::NAN, 1.0]).unwrap();
            assert!(!t.is_finite() && !t.is_zero());
            assert!(HostTensor::from_f32(dtype, vec![2], &[0.0, -0.0]).unwrap().is_zero());
        }
    }
}
