//! Matrices in a backend's memory: an owning [`Tensor`] and the views that ops take.

use std::ops::Range;

use super::{Backend, DType, Error, Pool, Result};

/// Layout of a row-major matrix inside a buffer, in elements.
///
/// `row_stride >= cols`, so that a packed projection (q, k and v side by side) can be sliced by
/// column without a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MatLayout {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from the start of a row to the start of the next.
    pub row_stride: usize,
    /// Elements from the start of the buffer to the first row.
    pub offset: usize,
    /// Element type.
    pub dtype: DType,
}

impl MatLayout {
    /// A matrix without gaps at the start of its buffer.
    pub const fn dense(rows: usize, cols: usize, dtype: DType) -> Self {
        Self { rows, cols, row_stride: cols, offset: 0, dtype }
    }

    /// The same matrix cut to some rows.
    ///
    /// # Panics
    /// If the range leaves the matrix: the caller's sizes are inconsistent, which is a bug.
    #[must_use]
    pub fn slice_rows(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "{range:?} of {self:?}");
        Self { rows: range.len(), offset: self.offset + range.start * self.row_stride, ..self }
    }

    /// The same matrix cut to some columns.
    ///
    /// # Panics
    /// If the range leaves the matrix: the caller's sizes are inconsistent, which is a bug.
    #[must_use]
    pub fn slice_cols(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.cols, "{range:?} of {self:?}");
        Self { cols: range.len(), offset: self.offset + range.start, ..self }
    }

    /// Elements from the first to the last one of the matrix, including gaps.
    pub fn span(&self) -> usize {
        if self.rows == 0 { 0 } else { (self.rows - 1) * self.row_stride + self.cols }
    }
}

/// A matrix that owns its device memory.
pub struct Tensor<B: Backend> {
    buf: B::Buf,
    layout: MatLayout,
}

impl<B: Backend> Tensor<B> {
    /// Allocates a matrix; its contents are zero.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] if the pool has no room.
    pub fn zeros(be: &B, pool: Pool, rows: usize, cols: usize, dtype: DType) -> Result<Self> {
        let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
        let refused = Error::OutOfMemory { pool, requested: usize::MAX, available: None };
        let buf = be.alloc(pool, bytes.ok_or(refused)?)?;
        Ok(Self { buf, layout: MatLayout::dense(rows, cols, dtype) })
    }

    /// Layout of the whole matrix.
    pub fn layout(&self) -> MatLayout {
        self.layout
    }

    /// The whole matrix, to read.
    pub fn view(&self) -> View<'_, B> {
        View { buf: &self.buf, layout: self.layout }
    }

    /// The whole matrix, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, B> {
        ViewMut { buf: &mut self.buf, layout: self.layout }
    }

    /// The first `n` rows, to read. Panics as [`MatLayout::slice_rows`].
    pub fn first_rows(&self, n: usize) -> View<'_, B> {
        self.view().slice_rows(0..n)
    }

    /// The first `n` rows, to write. Panics as [`MatLayout::slice_rows`].
    pub fn first_rows_mut(&mut self, n: usize) -> ViewMut<'_, B> {
        let layout = self.layout.slice_rows(0..n);
        ViewMut { buf: &mut self.buf, layout }
    }
}

/// A matrix to read.
pub struct View<'a, B: Backend> {
    /// Its memory.
    pub buf: &'a B::Buf,
    /// Where it lies.
    pub layout: MatLayout,
}

impl<B: Backend> Clone for View<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for View<'_, B> {}

impl<B: Backend> View<'_, B> {
    /// Cut to some rows. Panics as [`MatLayout::slice_rows`].
    #[must_use]
    pub fn slice_rows(self, range: Range<usize>) -> Self {
        Self { layout: self.layout.slice_rows(range), ..self }
    }

    /// Cut to some columns. Panics as [`MatLayout::slice_cols`].
    #[must_use]
    pub fn slice_cols(self, range: Range<usize>) -> Self {
        Self { layout: self.layout.slice_cols(range), ..self }
    }
}

/// A matrix to write.
pub struct ViewMut<'a, B: Backend> {
    /// The memory it lies in.
    pub buf: &'a mut B::Buf,
    /// Where it lies.
    pub layout: MatLayout,
}

impl<B: Backend> ViewMut<'_, B> {
    /// The same matrix, to read.
    pub fn as_view(&self) -> View<'_, B> {
        View { buf: self.buf, layout: self.layout }
    }

    /// The same matrix for a shorter time, so that two ops can write it in turn.
    pub fn reborrow(&mut self) -> ViewMut<'_, B> {
        ViewMut { buf: &mut *self.buf, layout: self.layout }
    }
}
