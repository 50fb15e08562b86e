//! Tensors that are described first and built when they are written.

use std::borrow::Cow;
use std::ops::Range;

use safetensors::tensor::{Dtype, View};

use crate::device::{DType, HostTensor};

/// A stack of matrices `[experts, rows, columns]` that is assembled from rows of tensors. The rest is zero.
#[derive(Clone, Debug)]
pub(super) struct Stack {
    dtype: DType,
    extents: [usize; 3],
    patches: Vec<Patch>,
}

/// The place of a tensor's rows in a stack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Rows {
    /// The rows of the tensor.
    pub taken: Range<usize>,
    /// Row of the stack for the first of them.
    pub first: usize,
    /// Rows of the stack from one of them to the next.
    pub step: usize,
}

impl Rows {
    /// All `count` rows of a tensor, contiguous from row `first` of the stack.
    pub fn together(count: usize, first: usize) -> Self {
        Self { taken: 0..count, first, step: 1 }
    }
}

/// Rows of one tensor and their place. A tensor of one matrix applies to every expert.
#[derive(Clone, Debug)]
struct Patch {
    tensor: HostTensor,
    /// The expert of the tensor that is the first of the stack.
    expert: usize,
    rows: Rows,
    column: usize,
}

/// Extents of a tensor seen as a stack: a matrix is one expert, a vector is one row.
fn extents(tensor: &HostTensor) -> [usize; 3] {
    match *tensor.shape() {
        [experts, rows, columns] => [experts, rows, columns],
        [rows, columns] => [1, rows, columns],
        _ => [1, 1, tensor.len()],
    }
}

impl Stack {
    /// A stack of zeros.
    pub fn zeros(dtype: DType, extents: [usize; 3]) -> Self {
        Self { dtype, extents, patches: Vec::new() }
    }

    /// The tensor, unchanged.
    pub fn of(tensor: &HostTensor) -> Self {
        let extents = extents(tensor);
        let mut stack = Self::zeros(tensor.dtype(), extents);
        stack.place(tensor, Rows::together(extents[1], 0), 0);
        stack
    }

    /// Places rows of a tensor, starting at `column`. The tensor must have the element type of the stack, and
    /// one matrix or as many as the stack.
    pub fn place(&mut self, tensor: &HostTensor, rows: Rows, column: usize) {
        self.patches.push(Patch { tensor: tensor.clone(), expert: 0, rows, column });
    }

    /// Repeats the matrix of a stack with one expert for each of `count` experts.
    pub fn for_experts(mut self, count: usize) -> Self {
        if self.extents[0] == 1 {
            self.extents[0] = count;
        }
        self
    }

    /// The matrix of one expert.
    pub fn expert(&self, expert: usize) -> Self {
        let mut one = self.clone();
        one.extents[0] = 1;
        one.patches.iter_mut().for_each(|patch| patch.expert += expert);
        one
    }

    /// Experts, rows and columns.
    pub fn extents(&self) -> [usize; 3] {
        self.extents
    }

    /// The stack in row-major order, reshaped.
    pub fn dense(self, shape: impl Into<Vec<usize>>) -> LazyTensor {
        let [_, rows, columns] = self.extents;
        self.with_strides(shape, [rows * columns, columns, 1])
    }

    /// The stack as a tensor of `shape` in which consecutive experts, rows and columns are `strides` elements
    /// apart.
    pub fn with_strides(self, shape: impl Into<Vec<usize>>, strides: [usize; 3]) -> LazyTensor {
        let shape = shape.into();
        debug_assert_eq!(shape.iter().product::<usize>(), self.extents.iter().product::<usize>());
        LazyTensor { stack: self, shape, strides }
    }
}

/// A tensor of a file whose bytes are built on demand.
#[derive(Clone, Debug)]
pub(super) struct LazyTensor {
    stack: Stack,
    shape: Vec<usize>,
    strides: [usize; 3],
}

impl LazyTensor {
    /// A tensor, unchanged.
    pub fn whole(tensor: &HostTensor) -> Self {
        Stack::of(tensor).dense(tensor.shape())
    }

    /// Element type.
    pub fn element(&self) -> DType {
        self.stack.dtype
    }

    /// Extents, outermost first.
    pub fn extents(&self) -> &[usize] {
        &self.shape
    }

    /// Number of bytes.
    pub fn size(&self) -> usize {
        self.shape.iter().product::<usize>() * self.stack.dtype.size()
    }

    /// The elements, little-endian; not copied if the tensor is unchanged.
    pub fn bytes(&self) -> Cow<'_, [u8]> {
        if let Some(tensor) = self.unchanged() {
            return Cow::Borrowed(tensor.bytes());
        }
        let mut bytes = vec![0; self.size()];
        for patch in &self.stack.patches {
            match self.stack.dtype.size() {
                2 => self.scatter::<2>(patch, &mut bytes),
                _ => self.scatter::<4>(patch, &mut bytes),
            }
        }
        Cow::Owned(bytes)
    }

    /// The only tensor of the stack, if its elements are not rearranged.
    fn unchanged(&self) -> Option<&HostTensor> {
        let [patch] = &self.stack.patches[..] else { return None };
        let [_, rows, columns] = self.stack.extents;
        let whole = extents(&patch.tensor) == self.stack.extents
            && (patch.expert, patch.column) == (0, 0)
            && patch.rows == Rows::together(rows, 0);
        let dense = self.strides == [rows * columns, columns, 1];
        (whole && dense).then_some(&patch.tensor)
    }

    fn scatter<const N: usize>(&self, patch: &Patch, bytes: &mut [u8]) {
        let (source, out) = (patch.tensor.bytes().as_chunks::<N>().0, bytes.as_chunks_mut::<N>().0);
        let [matrices, rows, columns] = extents(&patch.tensor);
        let [by_expert, by_row, by_column] = self.strides;
        for expert in 0..self.stack.extents[0] {
            let matrix = if matrices == 1 { 0 } else { patch.expert + expert };
            for (nth, row) in patch.rows.taken.clone().enumerate() {
                let from = &source[(matrix * rows + row) * columns..][..columns];
                let row = patch.rows.first + nth * patch.rows.step;
                let start = expert * by_expert + row * by_row + patch.column * by_column;
                if by_column == 1 {
                    out[start..start + columns].copy_from_slice(from);
                } else {
                    let places = out[start..].iter_mut().step_by(by_column);
                    places.zip(from).for_each(|(to, from)| *to = *from);
                }
            }
        }
    }
}

impl View for LazyTensor {
    fn dtype(&self) -> Dtype {
        match self.element() {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::Bf16 => Dtype::BF16,
            DType::F8E4m3 => Dtype::F8_E4M3,
            DType::I32 => Dtype::I32,
        }
    }

    fn shape(&self) -> &[usize] {
        self.extents()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes()
    }

    fn data_len(&self) -> usize {
        self.size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(shape: &[usize]) -> HostTensor {
        let count = shape.iter().product::<usize>() as u8;
        let values: Vec<f32> = (1..=count).map(f32::from).collect();
        HostTensor::from_f32(DType::F16, shape.to_vec(), &values).unwrap()
    }

    fn values(tensor: &LazyTensor) -> Vec<f32> {
        let bytes = tensor.bytes().into_owned();
        HostTensor::new(tensor.element(), tensor.extents().to_vec(), bytes).unwrap().to_f32()
    }

    #[test]
    fn a_tensor_that_stays_as_it_is_is_not_copied() {
        let tensor = counted(&[2, 3, 2]);
        assert!(matches!(LazyTensor::whole(&tensor).bytes(), Cow::Borrowed(_)));
        assert!(matches!(LazyTensor::whole(&counted(&[3])).bytes(), Cow::Borrowed(_)));
        assert!(matches!(Stack::of(&tensor).expert(1).dense([3, 2]).bytes(), Cow::Owned(_)));
    }

    #[test]
    fn axes_go_where_the_strides_say() {
        let stack = || Stack::of(&counted(&[2, 2, 3]));
        assert_eq!(values(&stack().expert(1).dense([2, 3])), [7., 8., 9., 10., 11., 12.]);
        let experts_fastest = stack().with_strides([2, 6], [1, 6, 2]);
        assert_eq!(values(&experts_fastest), [1., 7., 2., 8., 3., 9., 4., 10., 5., 11., 6., 12.]);
        let shared = Stack::of(&counted(&[1, 1, 2])).for_experts(2).dense([2, 1, 2]);
        assert_eq!(values(&shared), [1., 2., 1., 2.]);
    }

    #[test]
    fn what_no_tensor_covers_is_zero() {
        let mut stack = Stack::zeros(DType::F16, [1, 4, 3]);
        stack.place(&counted(&[2, 1]), Rows { taken: 0..2, first: 0, step: 2 }, 0);
        stack.place(&counted(&[3, 2]), Rows { taken: 1..2, first: 3, step: 1 }, 1);
        let expected = [1., 0., 0., 0., 0., 0., 2., 0., 0., 0., 3., 4.];
        assert_eq!(values(&stack.dense([4, 3])), expected);
    }
}
