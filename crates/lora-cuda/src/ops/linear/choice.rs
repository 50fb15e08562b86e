//! Which kernel computes a GEMM. Nothing here touches a device.

use lora_core::{DType, MatLayout};

use super::stream_cut;
use crate::ops::common::is_aligned;

/// What the choice of a kernel depends on: `out = x wᵀ + bias`.
#[derive(Clone, Copy, Debug)]
pub struct GemmShape {
    /// The input as the op gets it.
    pub x: MatLayout,
    /// Weights and bias.
    pub w: Weights,
    /// The output.
    pub out: MatLayout,
}

/// Weights and bias of a GEMM.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// Extents and dtype of the weights.
    pub layout: MatLayout,
    /// The bias.
    pub bias: Bias,
}

/// The bias of a GEMM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bias {
    /// No bias.
    None,
    /// All of its values are exact in bf16.
    ExactInBf16,
    /// It needs f32.
    F32,
}

/// The kernels for GEMMs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gemm {
    /// `linear_stream.cu`: few rows, bound by reading weights.
    Stream,
    /// cuBLASLt, or [`Gemm::Any`] where cuBLASLt turns out to have no algorithm.
    Lt,
    /// `linear.cu`: any shape and dtype, without tensor cores.
    Any,
}

impl GemmShape {
    /// The kernel for these operands.
    pub fn choose(&self) -> Gemm {
        if self.suits_stream() {
            Gemm::Stream
        } else if self.suits_lt() {
            Gemm::Lt
        } else {
            Gemm::Any
        }
    }

    /// Whether `linear_stream.cu` takes these operands.
    pub fn suits_stream(&self) -> bool {
        let x = self.operand();
        let suited = x.dtype == self.w.layout.dtype && x.rows <= stream_cut::MAX_ROWS;
        let aligned = is_aligned(x) && is_aligned(self.out);
        stream_cut::takes_weights(self.w.layout) && suited && aligned && !self.needs_f32_sums()
    }

    /// Whether cuBLASLt is asked: operands of one 16-bit dtype or in e4m3, at addresses that its kernels like,
    /// and no bias but one that its epilogue adds.
    pub fn suits_lt(&self) -> bool {
        let (x, w, out) = (self.operand(), self.w.layout, self.out);
        let output = match w.dtype {
            DType::Bf16 | DType::F16 => out.dtype == w.dtype || out.dtype == DType::F32,
            DType::F8E4m3 => matches!(out.dtype, DType::Bf16 | DType::F16 | DType::F32),
            _ => false,
        };
        let bias = match self.w.bias {
            Bias::None => true,
            Bias::ExactInBf16 => out.dtype == DType::Bf16,
            Bias::F32 => false,
        };
        // 16 bytes.
        let step = 16 / w.dtype.size();
        let even = w.cols.is_multiple_of(step) && w.rows.is_multiple_of(step);
        let aligned = is_aligned(x) && is_aligned(w) && is_aligned(out);
        x.dtype == w.dtype && output && bias && even && aligned && !self.needs_f32_sums()
    }

    /// The input as kernels read it: rounded to e4m3 where the weights are.
    fn operand(&self) -> MatLayout {
        match self.w.layout.dtype {
            DType::F8E4m3 => MatLayout::dense(self.x.rows, self.x.cols, DType::F8E4m3),
            _ => self.x,
        }
    }

    /// Tensor cores of Hopper keep about 14 bits of a sum of e4m3 products: as good as 16-bit
    /// activations are, but less than callers with f32 activations expect.
    fn needs_f32_sums(&self) -> bool {
        self.w.layout.dtype == DType::F8E4m3 && self.x.dtype == DType::F32
    }
}
