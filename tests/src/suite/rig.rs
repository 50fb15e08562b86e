//! Matrices on the host, and transfers to a backend and back.

use std::ops::Range;

use lora_core::{Backend, DType, HostTensor, MatLayout, Pool, Tensor, View, ViewMut};
use proptest::test_runner::TestCaseError;

use super::num::Num;

/// A backend with a queue.
pub struct Rig<B: Backend> {
    /// The backend.
    pub be: B,
    /// Its queue.
    pub q: B::Queue,
}

/// A matrix on the host; its values are representable in its dtype.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// The elements, `[rows, cols]`.
    pub data: HostTensor,
}

/// Elements around a matrix in its buffer, as if it were a slice of a larger one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gaps {
    /// Rows above and below.
    pub outer_rows: usize,
    /// Columns to the left.
    pub left: usize,
    /// Columns to the right.
    pub right: usize,
}

/// A matrix in a backend's memory, with [`Gaps`] full of NaN (-1 for integers) around it.
pub struct Placed<B: Backend> {
    tensor: Tensor<B>,
    layout: MatLayout,
    before: Vec<u8>,
}

impl Matrix {
    /// `values` rounded to `dtype`.
    ///
    /// # Panics
    /// If there are not `rows * cols` values.
    pub fn floats(rows: usize, cols: usize, dtype: DType, values: &[f32]) -> Self {
        let data = HostTensor::from_f32(dtype, vec![rows, cols], values);
        Self { rows, cols, data: data.expect("one value for each element") }
    }

    /// A matrix of integers.
    ///
    /// # Panics
    /// If there are not `rows * cols` values.
    pub fn ints(rows: usize, cols: usize, values: &[i32]) -> Self {
        Self::from_bytes(rows, cols, DType::I32, bytemuck::cast_slice(values).to_vec())
    }

    fn from_bytes(rows: usize, cols: usize, dtype: DType, bytes: Vec<u8>) -> Self {
        let data = HostTensor::new(dtype, vec![rows, cols], bytes);
        Self { rows, cols, data: data.expect("one value for each element") }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// Element `c` of row `r`.
    pub fn at(&self, r: usize, c: usize) -> f32 {
        self.data.get_f32(r * self.cols + c)
    }

    /// The elements of row `r`, for computing with them.
    pub fn nums(&self, r: usize) -> Vec<Num> {
        (0..self.cols).map(|c| Num::of(self.at(r, c).into())).collect()
    }

    /// The matrix of the given rows, unchanged.
    pub fn pick(&self, rows: &[usize]) -> Self {
        let bytes = rows.iter().flat_map(|r| self.row_bytes(*r)).copied().collect();
        Self::from_bytes(rows.len(), self.cols, self.dtype(), bytes)
    }

    /// Some columns of row `r`, unchanged.
    pub fn cut(&self, r: usize, cols: Range<usize>) -> Self {
        let size = self.dtype().size();
        let bytes = self.row_bytes(r)[cols.start * size..cols.end * size].to_vec();
        Self::from_bytes(1, cols.len(), self.dtype(), bytes)
    }

    /// The same values rounded to `dtype`.
    pub fn cast(&self, dtype: DType) -> Self {
        Self::floats(self.rows, self.cols, dtype, &self.data.to_f32())
    }

    /// The elements as integers.
    pub fn to_ints(&self) -> Vec<i32> {
        self.data.bytes().as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
    }

    /// The bytes of row `r`.
    pub fn row_bytes(&self, r: usize) -> &[u8] {
        let width = self.cols * self.dtype().size();
        &self.data.bytes()[r * width..(r + 1) * width]
    }
}

impl<B: Backend> Rig<B> {
    /// A queue of `be`.
    ///
    /// # Panics
    /// If the backend refuses.
    pub fn new(be: B) -> Self {
        match be.queue() {
            Ok(q) => Self { be, q },
            Err(e) => panic!("{} backend: {e}", B::NAME),
        }
    }

    /// Uploads a matrix into its own buffer.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn place(&mut self, matrix: &Matrix, gaps: Gaps) -> lora_core::Result<Placed<B>> {
        let rows = matrix.rows + 2 * gaps.outer_rows;
        let cols = gaps.left + matrix.cols + gaps.right;
        let mut tensor = Tensor::zeros(&self.be, Pool::Activations, rows, cols, matrix.dtype())?;
        let layout = tensor.layout();
        let layout = layout.slice_rows(gaps.outer_rows..gaps.outer_rows + matrix.rows);
        let layout = layout.slice_cols(gaps.left..gaps.left + matrix.cols);
        let size = layout.dtype.size();
        let mut before = vec![0xff; rows * cols * size];
        for r in 0..matrix.rows {
            let start = (layout.offset + r * layout.row_stride) * size;
            before[start..start + matrix.cols * size].copy_from_slice(matrix.row_bytes(r));
        }
        self.be.upload(&mut self.q, &before, tensor.view_mut())?;
        Ok(Placed { tensor, layout, before })
    }

    /// Uploads integers into their own buffer, as one row.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn ids(&mut self, ids: &[i32]) -> lora_core::Result<Placed<B>> {
        self.place(&Matrix::ints(1, ids.len(), ids), Gaps::default())
    }

    /// The bytes of a matrix in the backend's memory.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn download(&mut self, view: View<'_, B>) -> lora_core::Result<Vec<u8>> {
        let download = self.be.download(&mut self.q, view)?;
        self.be.wait(download)
    }
}

impl<B: Backend> Placed<B> {
    /// To read.
    pub fn view(&self) -> View<'_, B> {
        View { layout: self.layout, ..self.tensor.view() }
    }

    /// To write.
    pub fn view_mut(&mut self) -> ViewMut<'_, B> {
        ViewMut { layout: self.layout, ..self.tensor.view_mut() }
    }

    /// To read as if it had another dtype.
    pub fn mistyped(&self, dtype: DType) -> View<'_, B> {
        View { layout: MatLayout { dtype, ..self.layout }, ..self.tensor.view() }
    }

    /// To write as if it had another dtype.
    pub fn mistyped_mut(&mut self, dtype: DType) -> ViewMut<'_, B> {
        ViewMut { layout: MatLayout { dtype, ..self.layout }, ..self.tensor.view_mut() }
    }

    /// Downloads the matrix.
    ///
    /// # Errors
    /// If anything around the matrix has changed.
    pub fn read(&self, rig: &mut Rig<B>) -> Result<Matrix, TestCaseError> {
        let after = rig.download(self.tensor.view())?;
        let (layout, size) = (self.layout, self.layout.dtype.size());
        let (mut around, mut inside) = (after.clone(), Vec::new());
        for r in 0..layout.rows {
            let start = (layout.offset + r * layout.row_stride) * size;
            let bytes = start..start + layout.cols * size;
            inside.extend_from_slice(&after[bytes.clone()]);
            around[bytes.clone()].copy_from_slice(&self.before[bytes]);
        }
        match around.iter().zip(&self.before).position(|(a, b)| a != b) {
            None => Ok(Matrix::from_bytes(layout.rows, layout.cols, layout.dtype, inside)),
            Some(byte) => Err(TestCaseError::fail(format!(
                "element {} of the buffer has changed, which is outside {layout:?}",
                byte / size
            ))),
        }
    }

    /// Restores the initial contents of the buffer.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn restore(&mut self, rig: &mut Rig<B>) -> lora_core::Result<()> {
        rig.be.upload(&mut rig.q, &self.before, self.tensor.view_mut())
    }

    /// Whether the buffer has its initial contents.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn is_untouched(&self, rig: &mut Rig<B>) -> lora_core::Result<bool> {
        Ok(rig.download(self.tensor.view())? == self.before)
    }
}
