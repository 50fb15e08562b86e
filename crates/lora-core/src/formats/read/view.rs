//! Strided views of tensors in files, which are read in the order of the view.

use std::ops::Range;
use std::sync::Arc;

use crate::device::DType;
use crate::formats::{AdapterError, ElementType, RawTensor, Source, io_error};

/// Contiguous runs of at least this many bytes are read one by one; shorter ones are gathered.
const LONG_RUN: usize = 4 << 10;

/// A tensor of a file as a strided array, as in NumPy: it can be sliced, split and transposed without
/// reading it.
#[derive(Clone, Debug)]
pub(crate) struct View {
    name: Arc<str>,
    dtype: DType,
    /// Whether the file holds `f64`, which is read as [`DType::F32`].
    is_wide: bool,
    source: Source,
    /// Index of the first element in the source.
    start: usize,
    shape: Vec<usize>,
    /// Elements from one index to the next, along each axis.
    strides: Vec<usize>,
}

impl View {
    /// A whole tensor; `dtype` is the file's own, or [`DType::F32`] for [`ElementType::Float64`].
    pub fn new(name: &str, dtype: DType, raw: &RawTensor) -> Self {
        let shape = raw.shape().to_vec();
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        let is_wide = *raw.element() == ElementType::Float64;
        let (name, source) = (name.into(), raw.source().clone());
        Self { name, dtype, is_wide, source, start: 0, shape, strides }
    }

    /// The tensor's name in its file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Splits an axis into two, the outer one of extent `outer`.
    ///
    /// # Panics
    /// If `outer` does not divide the axis.
    pub fn split(mut self, axis: usize, outer: usize) -> Self {
        let inner = self.shape[axis].checked_div(outer).unwrap_or(0);
        assert_eq!(outer * inner, self.shape[axis], "the parts of an axis make up the axis");
        self.shape[axis] = inner;
        self.shape.insert(axis, outer);
        self.strides.insert(axis, self.strides[axis] * inner);
        self
    }

    /// Adds an outermost axis of extent 1.
    pub fn unsqueeze(mut self) -> Self {
        self.shape.insert(0, 1);
        self.strides.insert(0, 0);
        self
    }

    /// Reorders the axes: axis `i` of the result is axis `order[i]` of this one.
    pub fn permute<const AXES: usize>(mut self, order: [usize; AXES]) -> Self {
        self.shape = order.map(|axis| self.shape[axis]).to_vec();
        self.strides = order.map(|axis| self.strides[axis]).to_vec();
        self
    }

    /// The elements of `range` along an axis.
    pub fn narrow(mut self, axis: usize, range: Range<usize>) -> Self {
        self.start += range.start * self.strides[axis];
        self.shape[axis] = range.len();
        self
    }

    /// Every `step`th element along an axis, starting with `first`.
    pub fn every(mut self, axis: usize, first: usize, step: usize) -> Self {
        self.start += first * self.strides[axis];
        self.shape[axis] = self.shape[axis].saturating_sub(first).div_ceil(step);
        self.strides[axis] *= step;
        self
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether elements are rounded as they are read.
    pub fn is_rounded(&self) -> bool {
        self.is_wide
    }

    /// Whether another view has the same shape, type and bytes; false if either cannot be read.
    pub fn equals(&self, other: &Self) -> bool {
        let bytes = |view: &Self| {
            let mut bytes = vec![0; view.len() * view.dtype.size()];
            view.read(&mut bytes).is_ok().then_some(bytes)
        };
        let alike = (&self.shape, self.dtype) == (&other.shape, other.dtype);
        alike && bytes(self).is_some_and(|own| Some(own) == bytes(other))
    }

    /// Reads the elements in the order of the view into `out`, which has exactly their size.
    pub fn read(&self, out: &mut [u8]) -> Result<(), AdapterError> {
        if !self.is_wide {
            return self.read_stored(self.dtype.size(), out);
        }
        let mut stored = vec![0; self.len() * size_of::<f64>()];
        self.read_stored(size_of::<f64>(), &mut stored)?;
        let wide = stored.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
        for (narrow, wide) in out.as_chunks_mut().0.iter_mut().zip(wide) {
            *narrow = (wide as f32).to_le_bytes();
        }
        Ok(())
    }

    /// Reads the elements, of `size` bytes each, without conversion.
    fn read_stored(&self, size: usize, out: &mut [u8]) -> Result<(), AdapterError> {
        if out.is_empty() {
            return Ok(());
        }
        let (outer, run) = self.runs();
        let failed = |error| io_error(self.source.path(), error);
        if outer == 0 || run * size >= LONG_RUN {
            for (chunk, start) in out.chunks_exact_mut(run * size).zip(self.starts(outer)) {
                self.source.read_at((start * size) as u64, chunk).map_err(failed)?;
            }
            return Ok(());
        }
        let span = self.span();
        let mut scratch = vec![0; (span.end - span.start) * size];
        self.source.read_at((span.start * size) as u64, &mut scratch).map_err(failed)?;
        match size {
            2 => self.gather::<2>(&scratch, span.start, out),
            8 => self.gather::<8>(&scratch, span.start, out),
            _ => self.gather::<4>(&scratch, span.start, out),
        }
        Ok(())
    }

    /// The number of axes in front of those that are contiguous in the source, and the number of elements in
    /// one contiguous run.
    fn runs(&self) -> (usize, usize) {
        let mut run = 1;
        let mut outer = self.shape.len();
        while outer > 0 && (self.strides[outer - 1] == run || self.shape[outer - 1] == 1) {
            run *= self.shape[outer - 1];
            outer -= 1;
        }
        (outer, run)
    }

    /// Where each run begins in the source, in the order of the view.
    fn starts(&self, outer: usize) -> impl Iterator<Item = usize> {
        let start = self.start;
        offsets(&self.shape[..outer], &self.strides[..outer]).map(move |offset| start + offset)
    }

    /// The range of the source from the first to the last element of the view.
    fn span(&self) -> Range<usize> {
        let reach = self.shape.iter().zip(&self.strides).map(|(n, stride)| (n - 1) * stride);
        self.start..self.start + reach.sum::<usize>() + 1
    }

    /// Copies element by element. Neighbours in the source may be far apart in the result, so the copy is
    /// tiled: the source lines of a tile stay in the cache while they are written out.
    fn gather<const N: usize>(&self, scratch: &[u8], base: usize, out: &mut [u8]) {
        // Elements of a cache line, and lines that fit into the L1 cache.
        const LINE: usize = 32;
        const LINES: usize = 256;
        let (source, out) = (scratch.as_chunks::<N>().0, out.as_chunks_mut::<N>().0);
        let long = (0..self.shape.len()).filter(|axis| self.shape[*axis] > 1);
        let Some(near) = long.min_by_key(|axis| self.strides[*axis]) else {
            out[0] = source[self.start - base];
            return;
        };
        let (shape, strides, places) = (&self.shape, &self.strides, self.dense_strides());
        let (count, step, run) = (shape[near], strides[near], places[near]);
        let inner: Vec<usize> = offsets(&shape[near + 1..], &strides[near + 1..]).collect();
        let outer = offsets(&shape[..near], &strides[..near]);
        for (from, plane) in outer.zip(out.chunks_exact_mut(count * run)) {
            let from = self.start - base + from;
            for (first, offsets) in (0..run).step_by(LINES).zip(inner.chunks(LINES)) {
                for left in (0..count).step_by(LINE) {
                    for i in left..count.min(left + LINE) {
                        let row = &mut plane[i * run + first..][..offsets.len()];
                        let source = &source[from + i * step..];
                        row.iter_mut().zip(offsets).for_each(|(to, at)| *to = source[*at]);
                    }
                }
            }
        }
    }

    /// Row-major strides of the result.
    fn dense_strides(&self) -> Vec<usize> {
        let mut strides = vec![1; self.shape.len()];
        for axis in (1..self.shape.len()).rev() {
            strides[axis - 1] = strides[axis] * self.shape[axis];
        }
        strides
    }
}

/// Offsets of all elements of a strided array, in row-major order of its indices.
fn offsets(shape: &[usize], strides: &[usize]) -> impl Iterator<Item = usize> {
    let count: usize = shape.iter().product();
    (0..count).map(move |mut index| {
        let mut offset = 0;
        for (extent, stride) in shape.iter().zip(strides).rev() {
            offset += index % extent * stride;
            index /= extent;
        }
        offset
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    /// An i32 tensor with elements 0, 1, 2, ...
    fn counted(shape: &[usize]) -> View {
        let count: usize = shape.iter().product();
        let bytes: Vec<u8> = (0..count as u32).flat_map(u32::to_le_bytes).collect();
        let source = Source::in_memory(Path::new("test"), bytes);
        let element = ElementType::Known(DType::I32);
        View::new("t", DType::I32, &RawTensor::new(element, shape.to_vec(), source).unwrap())
    }

    fn values(view: &View) -> Vec<usize> {
        let mut out = vec![0; view.len() * 4];
        view.read(&mut out).unwrap();
        out.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b) as usize).collect()
    }

    #[test]
    fn parts_are_read_in_the_order_of_the_view() {
        assert_eq!(values(&counted(&[2, 3]).narrow(1, 1..3)), [1, 2, 4, 5]);
        assert_eq!(values(&counted(&[5, 1]).every(0, 1, 2)), [1, 3]);
        assert_eq!(values(&counted(&[4]).split(0, 2).unsqueeze()), [0, 1, 2, 3]);
        assert_eq!(values(&counted(&[])), [0]);
        assert!(values(&counted(&[0, 3])).is_empty());
    }

    proptest! {
        #[test]
        fn a_permuted_slice_has_the_elements_of_its_indices(
            shape in [1..6usize, 1..40, 1..70],
            cut in [0..6usize, 0..40, 0..70],
            order in Just([0usize, 1, 2]).prop_shuffle(),
        ) {
            let cut: Vec<usize> = cut.iter().zip(shape).map(|(c, n)| c % n).collect();
            let mut view = counted(&shape);
            for axis in 0..3 {
                view = view.narrow(axis, cut[axis]..shape[axis]);
            }
            let view = view.permute(order);
            let found = values(&view);
            let [_, n1, n2] = *view.shape() else { unreachable!() };
            for (position, value) in found.into_iter().enumerate() {
                let index = [position / (n1 * n2), position / n2 % n1, position % n2];
                let mut source = [0; 3];
                for (axis, i) in order.into_iter().zip(index) {
                    source[axis] = i + cut[axis];
                }
                let [i, j, k] = source;
                prop_assert_eq!(value, (i * shape[1] + j) * shape[2] + k);
            }
        }
    }
}
