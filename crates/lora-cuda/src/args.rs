//! What kernels are called with. Every kernel takes one struct, which it declares with the same
//! fields in the same order.
#![allow(unsafe_code)]

use lora_core::{DType, MatLayout};

use crate::{CudaBuf, View, ViewMut};

/// Arguments of kernels.
///
/// # Safety
/// The type must be `repr(C)` and have the fields of the kernels' struct, pointers as [`Address`];
/// a kernel called with pointers and extents that belong together stays inside of them.
pub unsafe trait KernelArgs: Copy {
    /// The kernels that take them.
    const KERNELS: &'static [Kernel];
}

macro_rules! kernels {
    ($($variant:ident: $name:literal in $unit:literal),* $(,)?) => {
        /// A kernel.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Kernel { $(#[doc = $name] $variant),* }

        impl Kernel {
            /// Every kernel.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name in the source.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// The source file.
            pub const fn unit(self) -> &'static str {
                match self { $(Self::$variant => $unit),* }
            }
        }
    };
}

kernels! {
    GatherRows: "gather_rows" in "rows.cu",
    GatherRowsEights: "gather_rows_eights" in "rows.cu",
    SiluMul: "silu_mul" in "rows.cu",
    SiluMulEights: "silu_mul_eights" in "rows.cu",
    RmsNorm: "rms_norm" in "norm.cu",
    AddRmsNorm: "add_rms_norm" in "norm.cu",
    RmsNormEights: "rms_norm_eights" in "norm.cu",
    QkNormRopeAppend: "qk_norm_rope_append" in "rope.cu",
    QkNormRopeAppend64: "qk_norm_rope_append_64" in "rope.cu",
    QkNormRopeAppend128: "qk_norm_rope_append_128" in "rope.cu",
    QkNormRopeAppend256: "qk_norm_rope_append_256" in "rope.cu",
    Attention: "attention" in "attention.cu",
    AttentionDecode64: "attention_decode_64" in "attention_decode.cu",
    AttentionDecode96: "attention_decode_96" in "attention_decode.cu",
    AttentionDecode128: "attention_decode_128" in "attention_decode.cu",
    AttentionDecode256: "attention_decode_256" in "attention_decode.cu",
    AttentionPrefill64: "attention_prefill_64" in "attention_prefill.cu",
    AttentionPrefill128: "attention_prefill_128" in "attention_prefill.cu",
    Linear: "linear" in "linear.cu",
    LinearStream: "linear_stream" in "linear_stream.cu",
    LinearTiles: "linear_tiles" in "linear_tiles.cu",
    LinearTilesBegin: "linear_tiles_begin" in "linear_tiles.cu",
    LinearTilesGate: "linear_tiles_gate" in "linear_tiles.cu",
    LinearTilesGateAdded: "linear_tiles_gate_added" in "linear_tiles.cu",
    QuantiseRows: "quantise_rows" in "linear.cu",
    QuantiseRowsEights: "quantise_rows_eights" in "linear.cu",
    RowNorms: "row_norms" in "linear.cu",
    LoraShrink: "lora_shrink" in "lora.cu",
    LoraExpand: "lora_expand" in "lora.cu",
    LoraRows: "lora_rows" in "lora.cu",
    LoraShrinkMma: "lora_shrink_mma" in "lora_mma.cu",
    LoraShrinkRows1: "lora_shrink_rows1" in "lora_shrink.cu",
    LoraShrinkRows2: "lora_shrink_rows2" in "lora_shrink.cu",
    LoraShrinkRows4: "lora_shrink_rows4" in "lora_shrink.cu",
    LoraExpandMma8: "lora_expand_mma8" in "lora_mma.cu",
    LoraExpandMma32: "lora_expand_mma32" in "lora_mma.cu",
    LoraBeginMma8: "lora_begin_mma8" in "lora_mma.cu",
    LoraBeginMma32: "lora_begin_mma32" in "lora_mma.cu",
    Sample: "sample" in "sample.cu",
    Logprobs: "logprobs" in "logprobs.cu",
}

/// An address in device memory; 0 is null.
pub type Address = u64;

/// `Mat` of `common.cuh`.
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

impl MatArg {
    /// No matrix, where a kernel does not look at one.
    pub const NONE: Self = Self { data: 0, row_stride: 0, rows: 0, cols: 0, dtype: 0, padding: 0 };

    /// A matrix in `buf`.
    pub fn new(buf: &CudaBuf, layout: MatLayout) -> Self {
        Self::at(buf.address() + (layout.offset * layout.dtype.size()) as u64, layout)
    }

    /// A matrix whose first element is at `data`.
    pub fn at(data: Address, layout: MatLayout) -> Self {
        Self {
            data,
            row_stride: layout.row_stride as i64,
            rows: layout.rows as i32,
            cols: layout.cols as i32,
            dtype: dtype_number(layout.dtype),
            padding: 0,
        }
    }

    /// Where its first element is.
    pub fn data(&self) -> Address {
        self.data
    }
}

impl From<View<'_>> for MatArg {
    fn from(view: View<'_>) -> Self {
        Self::new(view.buf, view.layout)
    }
}

impl From<&ViewMut<'_>> for MatArg {
    fn from(view: &ViewMut<'_>) -> Self {
        Self::new(view.buf, view.layout)
    }
}

/// The number of a dtype in `common.cuh`.
pub fn dtype_number(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Bf16 => 2,
        DType::I32 => 3,
        // Ops refuse what they do not know before they come here.
        _ => 4,
    }
}
