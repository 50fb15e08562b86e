//! Rows of views, which are decoded to `f32` and rounded when they are stored.

use std::ops::Range;

use bytemuck::Pod;
use half::{bf16, f16};
use lora_core::{DType, Result, check, fp8};
use rayon::prelude::*;

use crate::inner::{Float, Isa, narrow, widen};
use crate::{View, ViewMut};

/// Outputs with fewer elements are computed on the calling thread. Handing work to another thread costs a few
/// microseconds, in which a core converts about this many.
const SERIAL_ELEMENTS: usize = 8 * 1024;

/// The range of row `r` in the buffer, in elements.
fn span(layout: lora_core::MatLayout, r: usize) -> Range<usize> {
    let start = layout.offset + r * layout.row_stride;
    start..start + layout.cols
}

/// The elements of row `r`, which must be of type `T`.
pub fn typed_row<'a, T: Pod>(view: &View<'a>, r: usize) -> &'a [T] {
    &view.buf.as_slice::<T>()[span(view.layout, r)]
}

/// The i32 elements of a one-row view.
///
/// # Errors
/// [`lora_core::Error::DType`] or [`lora_core::Error::Shape`] unless the view is `[1, cols]` i32.
pub fn indices<'a>(op: &'static str, what: &'static str, view: &View<'a>) -> Result<&'a [i32]> {
    check::id_row(op, what, view.layout)?;
    Ok(typed_row(view, 0))
}

/// Decodes row `r` of a float view into `out`, which is resized.
pub fn read_row(isa: Isa, view: &View<'_>, r: usize, out: &mut Vec<f32>) {
    out.resize(view.layout.cols, 0.0);
    match view.layout.dtype {
        DType::Bf16 => widen(isa, typed_row::<bf16>(view, r), out),
        DType::F16 => widen(isa, typed_row::<f16>(view, r), out),
        DType::F8E4m3 => {
            let codes = typed_row::<u8>(view, r);
            out.iter_mut().zip(codes).for_each(|(value, code)| *value = fp8::decode(*code));
        }
        _ => out.copy_from_slice(typed_row::<f32>(view, r)),
    }
}

/// One row of an output: bytes that only one thread writes.
pub struct RowMut<'a> {
    bytes: &'a mut [u8],
    dtype: DType,
    isa: Isa,
}

impl RowMut<'_> {
    /// Decodes the current contents of the row.
    pub fn read(&self, out: &mut Vec<f32>) {
        fn fill<T: Float>(isa: Isa, bytes: &[u8], out: &mut Vec<f32>) {
            let values: &[T] = bytemuck::cast_slice(bytes);
            out.resize(values.len(), 0.0);
            widen(isa, values, out);
        }
        match self.dtype {
            DType::Bf16 => fill::<bf16>(self.isa, self.bytes, out),
            DType::F16 => fill::<f16>(self.isa, self.bytes, out),
            _ => fill::<f32>(self.isa, self.bytes, out),
        }
    }

    /// Stores `values`, rounded to the view's dtype.
    pub fn store(&mut self, values: &[f32]) {
        match self.dtype {
            DType::Bf16 => narrow::<bf16>(self.isa, values, bytemuck::cast_slice_mut(self.bytes)),
            DType::F16 => narrow::<f16>(self.isa, values, bytemuck::cast_slice_mut(self.bytes)),
            DType::F8E4m3 => {
                let codes = self.bytes.iter_mut();
                codes.zip(values).for_each(|(code, value)| *code = fp8::encode(*value));
            }
            _ => narrow::<f32>(self.isa, values, bytemuck::cast_slice_mut(self.bytes)),
        }
    }

    /// Number of columns.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Some columns of the row.
    pub fn slice(&mut self, columns: Range<usize>) -> RowMut<'_> {
        let size = self.dtype.size();
        let bytes = &mut self.bytes[columns.start * size..columns.end * size];
        RowMut { bytes, dtype: self.dtype, isa: self.isa }
    }
}

/// The bytes from the first to the last element of `out`; none for a view without rows, which may start
/// beyond the end of its buffer.
fn spanned_bytes<'a>(out: &'a mut ViewMut<'_>) -> &'a mut [u8] {
    let (layout, size) = (out.layout, out.layout.dtype.size());
    if layout.rows == 0 {
        return &mut [];
    }
    &mut out.buf.as_mut_slice::<u8>()[layout.offset * size..(layout.offset + layout.span()) * size]
}

/// The rows of `out` as disjoint byte slices.
fn split_rows<'a>(
    isa: Isa,
    out: &'a mut ViewMut<'_>,
) -> impl IndexedParallelIterator<Item = RowMut<'a>> {
    let (layout, size) = (out.layout, out.layout.dtype.size());
    let bytes = spanned_bytes(out);
    bytes.par_chunks_mut((layout.row_stride * size).max(1)).map(move |row| RowMut {
        bytes: &mut row[..layout.cols * size],
        dtype: layout.dtype,
        isa,
    })
}

/// Minimum rows per thread, so that small outputs are computed on the calling thread.
fn rows_at_least(layout: lora_core::MatLayout) -> usize {
    SERIAL_ELEMENTS.div_ceil(layout.cols.max(1))
}

/// Calls `f(row number, row, scratch)` for every row of `out`, in parallel if it is large enough.
pub fn for_rows(
    isa: Isa,
    out: &mut ViewMut<'_>,
    f: impl Fn(usize, RowMut<'_>, &mut Vec<f32>) + Sync,
) {
    let least = rows_at_least(out.layout);
    split_rows(isa, out)
        .enumerate()
        .with_min_len(least)
        .for_each_init(Vec::new, |scratch, (r, row)| f(r, row, scratch));
}

/// As [`for_rows`] for corresponding rows of two outputs.
pub fn for_row_pairs(
    isa: Isa,
    a: &mut ViewMut<'_>,
    b: &mut ViewMut<'_>,
    f: impl Fn(usize, RowMut<'_>, RowMut<'_>, &mut Vec<f32>) + Sync,
) {
    let least = rows_at_least(a.layout);
    split_rows(isa, a)
        .zip(split_rows(isa, b))
        .enumerate()
        .with_min_len(least)
        .for_each_init(Vec::new, |scratch, (r, (x, y))| f(r, x, y, scratch));
}

/// Row `r` of an output.
pub fn row_mut<'a>(isa: Isa, out: &'a mut ViewMut<'_>, r: usize) -> RowMut<'a> {
    let (range, size) = (span(out.layout, r), out.layout.dtype.size());
    let bytes = &mut out.buf.as_mut_slice::<u8>()[range.start * size..range.end * size];
    RowMut { bytes, dtype: out.layout.dtype, isa }
}

/// Calls `f(row number, piece number, piece, scratch)` for every `width` columns of a dense output, in
/// parallel. `S` is the scratch that a thread reuses between calls.
pub fn for_pieces<S: Default + Send>(
    isa: Isa,
    out: &mut ViewMut<'_>,
    width: usize,
    least: usize,
    f: impl Fn(usize, usize, RowMut<'_>, &mut S) + Sync,
) {
    let (layout, size) = (out.layout, out.layout.dtype.size());
    let bytes = spanned_bytes(out);
    let per_row = layout.cols / width.max(1);
    bytes.par_chunks_mut((width * size).max(1)).enumerate().with_min_len(least).for_each_init(
        S::default,
        |scratch, (i, bytes)| {
            let piece = RowMut { bytes, dtype: layout.dtype, isa };
            f(i / per_row, i % per_row, piece, scratch);
        },
    );
}

/// All rows of an output, to be handed out one by one.
pub fn all_rows<'a>(isa: Isa, out: &'a mut ViewMut<'_>) -> Vec<Option<RowMut<'a>>> {
    split_rows(isa, out).map(Some).collect()
}
