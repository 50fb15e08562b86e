//! Products with weight matrices.
#![allow(unsafe_code)]

pub mod lt;
pub mod stream;
pub mod tiles;

use std::ops::Range;

use lora_core::fp8::{Fp8Scales, InputScale};
use lora_core::{DType, HostTensor, MatLayout, Pool, Result, check};

use self::stream::{TensorMap, tiles_of};
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::device::is_aligned;
use crate::memory::queue::Launch;
use crate::ops::linear::lt::Extras;
use crate::ops::{EIGHT, MAX_THREADS, ROW_THREADS, WARP, in_eights};
use crate::{Cuda, CudaBuf, CudaQueue, View, ViewMut};

/// A weight matrix `[out, in]` in device memory.
pub struct CudaLinear {
    weights: CudaBuf,
    layout: MatLayout,
    bias: Option<CudaBuf>,
    /// The bias in bf16, if no value of it loses anything by that.
    narrow_bias: Option<CudaBuf>,
    fp8: Option<Fp8>,
    /// How the TMA reads the weights, if it can.
    tiles: Option<TensorMap>,
}

/// Scales of weights in e4m3.
struct Fp8 {
    /// Of each output.
    of_outputs: CudaBuf,
    input: InputScale,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LinearArgs {
    x: MatArg,
    w: MatArg,
    out: MatArg,
    x_scales: Address,
    w_scales: Address,
    bias: Address,
}

// SAFETY: laid out as `LinearArgs` of `linear.cu`.
unsafe impl KernelArgs for LinearArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::Linear];
}

#[repr(C)]
#[derive(Clone, Copy)]
struct QuantiseArgs {
    x: MatArg,
    codes: MatArg,
    scales: Address,
    scale: f32,
}

// SAFETY: laid out as `QuantiseArgs` of `linear.cu`.
unsafe impl KernelArgs for QuantiseArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::QuantiseRows, Kernel::QuantiseRowsEights];
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RowNormArgs {
    w: MatArg,
    a: MatArg,
    b: MatArg,
    w_scales: Address,
    norms: Address,
    from: i64,
    scale: f32,
}

// SAFETY: laid out as `RowNormArgs` of `linear.cu`.
unsafe impl KernelArgs for RowNormArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::RowNorms];
}

/// What a product reads.
pub(crate) struct Input {
    /// The matrix, in e4m3 where the weights are.
    pub mat: MatArg,
    /// Its extents.
    pub layout: MatLayout,
    /// Of codes, the scale of each row.
    pub scales: Address,
    /// Whether sums must not be those of e4m3 by tensor cores.
    pub exact: bool,
}

/// Bytes that the first code of an input lies at a multiple of.
const CODES_ALIGNMENT: usize = 256;

/// Rows that a warp of the kernel takes together, as in `linear.cu`.
const ROWS: usize = 8;

/// Times that a thread of `quantise_rows_eights` takes eight elements, as in `linear.cu`.
const MAX_EIGHTS: usize = 4;

impl CudaLinear {
    /// The weights, to compute with.
    pub(crate) fn weights(&self) -> MatArg {
        MatArg::new(&self.weights, self.layout)
    }

    /// Extents and dtype.
    pub(crate) fn layout(&self) -> MatLayout {
        self.layout
    }

    /// Scales of the outputs; null where there are none.
    pub(crate) fn w_scales(&self) -> Address {
        self.fp8.as_ref().map_or(0, |fp8| fp8.of_outputs.address())
    }

    /// The bias in f32; null where there is none.
    pub(crate) fn bias(&self) -> Address {
        self.bias.as_ref().map_or(0, CudaBuf::address)
    }

    /// How the TMA reads the weights, if it can.
    pub(crate) fn tiles(&self) -> Option<&TensorMap> {
        self.tiles.as_ref()
    }
}

impl Cuda {
    /// See [`lora_core::Backend::prepare_linear`].
    pub(crate) fn hold_linear(
        &self,
        parts: &[HostTensor],
        bias: Option<&[f32]>,
    ) -> Result<CudaLinear> {
        let op = "prepare_linear";
        let dims = check::weight_parts(op, parts, bias, |d| check::float(op, "weight", d))?;
        self.hold_parts(parts, dims, bias)
    }

    /// See [`lora_core::Backend::prepare_fp8_linear`].
    pub(crate) fn hold_fp8_linear(
        &self,
        parts: &[HostTensor],
        scales: &Fp8Scales,
        bias: Option<&[f32]>,
    ) -> Result<CudaLinear> {
        let dims = check::fp8_parts(parts, scales, bias)?;
        let mut linear = self.hold_parts(parts, dims, bias)?;
        let rows = parts.iter().map(|part| part.shape().first().copied().unwrap_or(0));
        let of_part = |(rows, scale): (usize, &f32)| vec![*scale; rows];
        let of_outputs: Vec<f32> = rows.zip(&scales.parts).flat_map(of_part).collect();
        let of_outputs = self.hold(Pool::Weights, bytemuck::cast_slice(&of_outputs))?;
        linear.fp8 = Some(Fp8 { of_outputs, input: scales.input });
        Ok(linear)
    }

    fn hold_parts(
        &self,
        parts: &[HostTensor],
        [n, k]: [usize; 2],
        bias: Option<&[f32]>,
    ) -> Result<CudaLinear> {
        let dtype = parts.first().map_or(DType::F32, HostTensor::dtype);
        let parts: Vec<&[u8]> = parts.iter().map(|part| &part.bytes()[..]).collect();
        let weights = CudaBuf::holding(&self.context, Pool::Weights, &parts)?;
        let narrow = bias.and_then(exactly_bf16);
        let hold = |bytes: &[u8]| self.hold(Pool::Weights, bytes);
        let layout = MatLayout::dense(n, k, dtype);
        Ok(CudaLinear {
            tiles: tiles_of(MatArg::new(&weights, layout), layout)?,
            weights,
            layout,
            bias: bias.map(|bias| hold(bytemuck::cast_slice(bias))).transpose()?,
            narrow_bias: narrow.map(|tensor| hold(tensor.bytes())).transpose()?,
            fp8: None,
        })
    }

    /// See [`lora_core::Backend::linear`].
    pub(crate) fn multiply(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        check::linear(x.layout, [w.layout.rows, w.layout.cols], out.layout)?;
        if x.layout.rows == 0 {
            return Ok(());
        }
        let input = self.input(q, x, w)?;
        self.multiply_input(q, &input, w, out)
    }

    /// The product, by what suits it best.
    pub(crate) fn multiply_input(
        &self,
        q: &mut CudaQueue,
        x: &Input,
        w: &CudaLinear,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        if self.multiply_stream(q, x, w, None, out)? || self.multiply_by_lt(q, x, w, false, out)? {
            return Ok(());
        }
        self.multiply_any(q, x, w, out)
    }

    /// The input as the product with `w` reads it.
    pub(crate) fn input(&self, q: &mut CudaQueue, x: View<'_>, w: &CudaLinear) -> Result<Input> {
        match &w.fp8 {
            Some(fp8) => self.quantise(q, x, fp8),
            None => Ok(Input { mat: x.into(), layout: x.layout, scales: 0, exact: false }),
        }
    }

    /// The product by cuBLASLt, added to `out` if `adds`; `false` where it cannot do it.
    pub(crate) fn multiply_by_lt(
        &self,
        q: &mut CudaQueue,
        x: &Input,
        w: &CudaLinear,
        adds: bool,
        out: &ViewMut<'_>,
    ) -> Result<bool> {
        let bias = w.narrow_bias.as_ref().filter(|_| out.layout.dtype == DType::Bf16);
        let bias = bias.map(CudaBuf::address);
        if x.exact
            || w.bias.is_some() != bias.is_some()
            || !suits_lt(x.layout, w.layout, out.layout)
        {
            return Ok(false);
        }
        let scales = w.fp8.as_ref().map(|fp8| [fp8.of_outputs.address(), x.scales]);
        let (w, out) = ((w.weights(), w.layout), (out.into(), out.layout));
        self.lt.borrow_mut().product(q, (x.mat, x.layout), w, out, Extras { scales, bias, adds })
    }

    /// The product by the kernel that takes any shape.
    fn multiply_any(
        &self,
        q: &mut CudaQueue,
        x: &Input,
        w: &CudaLinear,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let args = LinearArgs {
            x: x.mat,
            w: w.weights(),
            out: out.into(),
            x_scales: x.scales,
            w_scales: w.w_scales(),
            bias: w.bias(),
        };
        let outputs = out.layout.cols.div_ceil(ROW_THREADS / WARP);
        let launch = Launch::new([outputs, out.layout.rows.div_ceil(ROWS), 1], ROW_THREADS);
        q.launch(&self.modules, Kernel::Linear, launch, args)
    }

    /// Rounds an input to e4m3.
    fn quantise(&self, q: &mut CudaQueue, x: View<'_>, fp8: &Fp8) -> Result<Input> {
        let (rows, cols) = (x.layout.rows, x.layout.cols);
        let for_scales = (rows * size_of::<f32>()).next_multiple_of(CODES_ALIGNMENT);
        let scales = q.scratch(for_scales + rows * cols)?;
        let layout = MatLayout::dense(rows, cols, DType::F8E4m3);
        let mat = MatArg::at(scales + for_scales as u64, layout);
        let scale = match fp8.input {
            InputScale::Static(scale) => scale,
            InputScale::Dynamic => 0.0,
        };
        let args = QuantiseArgs { x: x.into(), codes: mat, scales, scale };
        let (kernel, launch) = choose_quantise(x.layout);
        q.launch(&self.modules, kernel, launch, args)?;
        // Tensor cores of Hopper keep about 14 bits of a sum of e4m3 products: as good as 16-bit
        // activations are, but less than those who ask for f32 expect.
        Ok(Input { mat, layout, scales, exact: x.layout.dtype == DType::F32 })
    }

    /// See [`lora_core::Backend::row_norms`].
    pub(crate) fn norms_of_rows(
        &self,
        w: &CudaLinear,
        rows: &Range<usize>,
        (a, b, scale): (&HostTensor, &HostTensor, f32),
    ) -> Result<Vec<f32>> {
        let rank = check::row_norms([w.layout.rows, w.layout.cols], rows, a, b)?;
        let hold = |tensor: &HostTensor| {
            self.hold(Pool::Activations, bytemuck::cast_slice(&tensor.to_f32()))
        };
        let (a, b) = (hold(a)?, hold(b)?);
        let layout = MatLayout::dense(1, rows.len(), DType::F32);
        let held =
            CudaBuf::zeroed(&self.context, Pool::Activations, size_of::<f32>() * rows.len())?;
        let mut q = CudaQueue::new(&self.context)?;
        let args = RowNormArgs {
            w: w.weights(),
            a: MatArg::new(&a, MatLayout::dense(rank, w.layout.cols, DType::F32)),
            b: MatArg::new(&b, MatLayout::dense(rows.len(), rank, DType::F32)),
            w_scales: w.w_scales(),
            norms: held.address(),
            from: rows.start as i64,
            scale,
        };
        let blocks = rows.len().div_ceil(ROW_THREADS / WARP);
        let launch = Launch::new([blocks, 1, 1], ROW_THREADS);
        q.launch(&self.modules, Kernel::RowNorms, launch, args)?;
        let norms = q.download(View { buf: &held, layout })?.wait()?;
        Ok(bytemuck::pod_collect_to_vec(&norms))
    }
}

/// The same numbers in bf16, unless that changes any.
fn exactly_bf16(values: &[f32]) -> Option<HostTensor> {
    let tensor = HostTensor::from_f32(DType::Bf16, vec![values.len()], values)?;
    let same = tensor.iter_f32().zip(values).all(|(narrow, wide)| narrow == *wide);
    same.then_some(tensor)
}

/// The kernel that keeps rows in registers where they are short enough, else the one for all.
fn choose_quantise(x: MatLayout) -> (Kernel, Launch) {
    let threads = x.cols.div_ceil(EIGHT * MAX_EIGHTS).next_multiple_of(WARP).max(ROW_THREADS);
    let suited = in_eights(&[x]) && x.cols.is_multiple_of(EIGHT) && threads <= MAX_THREADS;
    match suited {
        true => (Kernel::QuantiseRowsEights, Launch::new([x.rows, 1, 1], threads)),
        false => (Kernel::QuantiseRows, Launch::new([x.rows, 1, 1], ROW_THREADS)),
    }
}

/// Whether cuBLASLt is asked: operands of one 16-bit dtype or in e4m3, at addresses that its kernels
/// like.
fn suits_lt(x: MatLayout, w: MatLayout, out: MatLayout) -> bool {
    let output = match w.dtype {
        DType::Bf16 | DType::F16 => out.dtype == w.dtype || out.dtype == DType::F32,
        DType::F8E4m3 => matches!(out.dtype, DType::Bf16 | DType::F16 | DType::F32),
        _ => false,
    };
    // 16 bytes.
    let step = 16 / w.dtype.size();
    let even = w.cols.is_multiple_of(step) && w.rows.is_multiple_of(step);
    let aligned = is_aligned(x) && is_aligned(w) && is_aligned(out);
    x.dtype == w.dtype && output && even && aligned
}
