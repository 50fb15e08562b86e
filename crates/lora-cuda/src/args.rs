//! What kernels take. Every kernel takes one struct, which CUDA declares with the same fields in the same
//! order.
#![allow(unsafe_code)]

use std::ops::Range;

use lora_core::{Backend, DType, MatLayout, View, ViewMut};

use crate::library::functions::Kernel;
use crate::memory::buffer::CudaBuf;

/// Arguments of kernels.
///
/// # Safety
/// The type must be `repr(C)` and have the fields of the kernels' struct, pointers as [`Address`];
/// a kernel called with pointers and extents that belong together stays inside of them.
pub unsafe trait KernelArgs: Copy {
    /// The kernels that take them.
    const KERNELS: &'static [Kernel];
}

/// Stops compilation where a struct is not laid out as its CUDA twin, for which the kernels' sources state the
/// same numbers.
macro_rules! assert_layout {
    ($type:ident is $size:literal bytes: $($field:ident at $offset:literal),+ $(,)?) => {
        const _: () = {
            assert!(size_of::<$type>() == $size);
            $(assert!(std::mem::offset_of!($type, $field) == $offset);)+
        };
    };
}
pub(crate) use assert_layout;

/// An address in device memory; 0 is null.
pub type Address = u64;

/// A matrix in device memory, as ops and the libraries that they call take it.
#[derive(Clone, Copy, Debug)]
pub struct DeviceMat {
    data: Address,
    layout: MatLayout,
}

impl DeviceMat {
    /// A matrix in `buf`.
    pub fn new(buf: &CudaBuf, layout: MatLayout) -> Self {
        let offset = layout.offset * layout.dtype.size();
        Self { data: buf.address() + offset as u64, layout }
    }

    /// A matrix whose first element is at `data`, wherever `layout` says that it lies in a buffer.
    pub fn at(data: Address, layout: MatLayout) -> Self {
        Self { data, layout }
    }

    /// Where its first element is.
    pub fn data(&self) -> Address {
        self.data
    }

    /// Its extents.
    pub fn layout(&self) -> MatLayout {
        self.layout
    }

    /// The same matrix cut to some rows.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    #[must_use]
    pub fn slice_rows(self, rows: Range<usize>) -> Self {
        let skipped = rows.start * self.layout.row_stride * self.layout.dtype.size();
        Self { data: self.data + skipped as u64, layout: self.layout.slice_rows(rows) }
    }

    /// The same elements, read as another dtype of the same size.
    #[must_use]
    pub fn as_dtype(self, dtype: DType) -> Self {
        Self { layout: MatLayout { dtype, ..self.layout }, ..self }
    }
}

impl<B: Backend<Buf = CudaBuf>> From<View<'_, B>> for DeviceMat {
    fn from(view: View<'_, B>) -> Self {
        Self::new(view.buf, view.layout)
    }
}

impl<B: Backend<Buf = CudaBuf>> From<&ViewMut<'_, B>> for DeviceMat {
    fn from(view: &ViewMut<'_, B>) -> Self {
        Self::new(view.buf, view.layout)
    }
}

/// A [`DeviceMat`] as kernels take it: `Mat` of `common.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MatArg {
    data: Address,
    row_stride: i64,
    rows: i32,
    cols: i32,
    dtype: i32,
    padding: i32,
}

assert_layout!(MatArg is 32 bytes: data at 0, row_stride at 8, rows at 16, cols at 20, dtype at 24, padding at 28);

impl MatArg {
    /// No matrix, where a kernel does not look at one.
    pub const NONE: Self = Self { data: 0, row_stride: 0, rows: 0, cols: 0, dtype: 0, padding: 0 };
}

impl From<DeviceMat> for MatArg {
    fn from(mat: DeviceMat) -> Self {
        let layout = mat.layout;
        Self {
            data: mat.data,
            row_stride: layout.row_stride as i64,
            rows: layout.rows as i32,
            cols: layout.cols as i32,
            dtype: dtype_number(layout.dtype),
            padding: 0,
        }
    }
}

impl<B: Backend<Buf = CudaBuf>> From<View<'_, B>> for MatArg {
    fn from(view: View<'_, B>) -> Self {
        DeviceMat::from(view).into()
    }
}

impl<B: Backend<Buf = CudaBuf>> From<&ViewMut<'_, B>> for MatArg {
    fn from(view: &ViewMut<'_, B>) -> Self {
        DeviceMat::from(view).into()
    }
}

/// Where a matrix begins, for kernels that know its extents from another.
pub fn address<B: Backend<Buf = CudaBuf>>(view: View<'_, B>) -> Address {
    DeviceMat::from(view).data()
}

/// The number of a dtype in `common.cuh`.
pub fn dtype_number(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Bf16 => 2,
        DType::I32 => 3,
        // Ops refuse dtypes that kernels do not know before they come here.
        _ => 4,
    }
}
