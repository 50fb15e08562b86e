//! GEMMs by cuBLASLt, planned once for each shape.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::CudaContext;
use lora_core::{DType, Error, Pool, Result};

use crate::args::{Address, DeviceMat};
use crate::error::CudaError;
use crate::memory::buffer::CudaBuf;
use crate::memory::queue::CudaQueue;

use sys::cublasLtMatmulDescAttributes_t as Attribute;

/// Bytes of scratch that plans may use; NVIDIA recommends 32 MiB for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Of `cublasOperation_t`, which the bindings of cuBLASLt leave out.
const CUBLAS_OP_T: i32 = 1;

/// What the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct MatmulShape {
    rows: usize,
    n: usize,
    k: usize,
    x_stride: usize,
    out_stride: usize,
    dtypes: [DType; 2],
    /// Bytes that the addresses of weights, input and output are multiples of.
    alignments: [u32; 3],
    bias: bool,
    beta: Beta,
}

impl MatmulShape {
    fn of(operands: &Operands, extras: &Extras) -> Self {
        let Operands { x, w, out } = operands;
        let (x_layout, w_layout, out_layout) = (x.layout(), w.layout(), out.layout());
        Self {
            rows: x_layout.rows,
            n: w_layout.rows,
            k: w_layout.cols,
            x_stride: x_layout.row_stride,
            out_stride: out_layout.row_stride,
            dtypes: [x_layout.dtype, out_layout.dtype],
            alignments: [w, x, out].map(|operand| alignment_of(operand.data())),
            bias: extras.bias.is_some(),
            beta: extras.beta,
        }
    }
}

/// The alignment that cuBLASLt assumes of addresses unless a preference says less.
const DEFAULT_ALIGNMENT: u32 = 256;

/// Bytes that an address is a multiple of, as far as algorithms depend on it.
fn alignment_of(address: Address) -> u32 {
    1 << address.trailing_zeros().min(DEFAULT_ALIGNMENT.trailing_zeros())
}

/// The matrices of a GEMM: `out = x wᵀ`, `w` being `[n, k]` without gaps.
#[derive(Clone, Copy, Debug)]
pub struct Operands {
    /// `[rows, k]`.
    pub x: DeviceMat,
    /// `[n, k]`.
    pub w: DeviceMat,
    /// `[rows, n]`.
    pub out: DeviceMat,
}

/// What a GEMM takes besides its matrices.
#[derive(Clone, Copy, Debug)]
pub struct Extras {
    /// Scales of operands in e4m3.
    pub scales: Option<Scales>,
    /// Summand of each output, in the output's dtype.
    pub bias: Option<Address>,
    /// Factor of what the output holds before.
    pub beta: Beta,
}

/// Scales of operands in e4m3, all f32.
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    /// One for each output.
    pub of_outputs: Address,
    /// One for each row of the input.
    pub of_rows: Address,
}

/// Factor of what the output holds before a GEMM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Beta {
    /// The output is overwritten.
    Zero,
    /// The product is added to the output.
    One,
}

/// A handle of cuBLASLt with its plans.
pub struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: CudaBuf,
    /// `None`: cuBLASLt has no algorithm for the shape.
    plans: HashMap<MatmulShape, Option<MatmulPlan>>,
}

/// The description of a GEMM.
struct MatmulDesc(sys::cublasLtMatmulDesc_t);

impl MatmulDesc {
    fn new() -> Result<Self> {
        let f32_sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(f32_sums, sys::cudaDataType::CUDA_R_32F);
        desc.map(Self).map_err(failed("cublasLtMatmulDescCreate"))
    }

    /// Sets what all GEMMs of a shape share.
    fn describe(&self, shape: &MatmulShape) -> Result<()> {
        self.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T)?;
        if shape.bias {
            let bias = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            self.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, bias)?;
        }
        if shape.dtypes[0] == DType::F8E4m3 {
            use sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            let of_each = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, of_each)?;
            self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, of_each)?;
        }
        Ok(())
    }

    /// Sets the addresses of one GEMM.
    fn point_at(&self, extras: Extras) -> Result<()> {
        if let Some(Scales { of_outputs, of_rows }) = extras.scales {
            self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, of_outputs)?;
            self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, of_rows)?;
        }
        match extras.bias {
            Some(bias) => self.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias),
            None => Ok(()),
        }
    }

    fn set<T: Copy>(&self, attribute: Attribute, value: T) -> Result<()> {
        let bytes = size_of::<T>();
        // SAFETY: the attribute is a value of that type, which is copied.
        let set = unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, (&raw const value).cast(), bytes)
        };
        set.map_err(failed("cublasLtMatmulDescSetAttribute"))
    }
}

impl Drop for MatmulDesc {
    fn drop(&mut self) {
        // SAFETY: made by `new` and not used after this. A failure cannot be reported from here.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// A GEMM ready to run.
struct MatmulPlan {
    desc: MatmulDesc,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn failed(call: &'static str) -> impl Fn(result::CublasError) -> Error {
    move |cause| Error::Device(format!("{call}: {cause:?}"))
}

impl CublasLt {
    /// A handle in the current context.
    ///
    /// # Errors
    /// [`CudaError`] if cuBLASLt refuses or its workspace does not fit.
    pub fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, CudaError> {
        let remedy = "free memory on the device and check that cuBLAS is of CUDA 13";
        let refused = || CudaError::Library { library: "libcublasLt", remedy };
        let workspace = CudaBuf::zeroed(context, Pool::Activations, WORKSPACE);
        let full = || CudaError::Full { what: "cuBLASLt".to_owned() };
        let workspace = workspace.map_err(|error| match error {
            Error::OutOfMemory { .. } => full(),
            error => CudaError::Opening(error),
        })?;
        let handle = result::create_handle().map_err(|error| match error.0 {
            sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => full(),
            _ => refused(),
        })?;
        Ok(Self { handle, workspace, plans: HashMap::new() })
    }

    /// `out = x wᵀ`, times scales and plus a bias; `false` where cuBLASLt has no algorithm for it. Which algorithm
    /// runs depends on the number of rows.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn gemm(&mut self, q: &mut CudaQueue, operands: Operands, extras: Extras) -> Result<bool> {
        let shape = MatmulShape::of(&operands, &extras);
        let Operands { x, w, out } = operands;
        let handle = self.handle;
        let plan = match self.plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                place.insert(MatmulPlan::new(handle, &shape, self.workspace.address())?)
            }
        };
        let Some(plan) = plan else { return Ok(false) };
        plan.desc.point_at(extras)?;
        let alpha = 1f32;
        let beta = match extras.beta {
            Beta::Zero => 0f32,
            Beta::One => 1f32,
        };
        let at = |address: u64| address as *mut c_void;
        // SAFETY: layouts and pointers describe the operands, whose extents the op has checked; alpha and
        // beta lie on the host and are read before the call returns.
        let done = unsafe {
            result::matmul(
                handle,
                plan.desc.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                at(w.data()),
                plan.w,
                at(x.data()),
                plan.x,
                at(out.data()),
                plan.out,
                at(out.data()),
                plan.out,
                &raw const plan.algorithm,
                at(self.workspace.address()),
                WORKSPACE,
                q.stream().cast(),
            )
        };
        done.map_err(failed("cublasLtMatmul")).map(|()| true)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: the handle is not used after this. A failure cannot be reported from here.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn cuda_type(dtype: DType) -> Option<sys::cudaDataType> {
    match dtype {
        DType::F32 => Some(sys::cudaDataType::CUDA_R_32F),
        DType::F16 => Some(sys::cudaDataType::CUDA_R_16F),
        DType::Bf16 => Some(sys::cudaDataType::CUDA_R_16BF),
        DType::F8E4m3 => Some(sys::cudaDataType::CUDA_R_8F_E4M3),
        _ => None,
    }
}

/// By what algorithms are chosen.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new([w, x, out]: [u32; 3]) -> Result<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t::*;
        let preference = result::create_matmul_pref();
        let preference = Self(preference.map_err(failed("cublasLtMatmulPreferenceCreate"))?);
        preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE)?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, w)?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x)?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out)?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out)?;
        Ok(preference)
    }

    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: T,
    ) -> Result<()> {
        // SAFETY: the attribute is a value of that type, which is copied.
        let set = unsafe {
            let value = (&raw const value).cast();
            result::set_matmul_pref_attribute(self.0, attribute, value, size_of::<T>())
        };
        set.map_err(failed("cublasLtMatmulPreferenceSetAttribute"))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new` and not used after this. A failure cannot be reported from here.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl MatmulPlan {
    /// Rows of ours are columns of theirs: `outᵀ [n, rows] = w [n, k] xᵀ [k, rows]`.
    /// `anywhere` is some address of the device: algorithms are chosen by whether there is a scale or a bias, not by
    /// where it is.
    fn new(
        handle: sys::cublasLtHandle_t,
        shape: &MatmulShape,
        anywhere: Address,
    ) -> Result<Option<Self>> {
        let [Some(input), Some(output)] = shape.dtypes.map(cuda_type) else { return Ok(None) };
        let layout = |dtype, rows: usize, cols: usize, stride: usize| {
            result::create_matrix_layout(dtype, rows as u64, cols as u64, stride as i64)
                .map_err(failed("cublasLtMatrixLayoutCreate"))
        };
        let desc = MatmulDesc::new()?;
        desc.describe(shape)?;
        let codes = shape.dtypes[0] == DType::F8E4m3;
        desc.point_at(Extras {
            scales: codes.then_some(Scales { of_outputs: anywhere, of_rows: anywhere }),
            bias: shape.bias.then_some(anywhere),
            beta: shape.beta,
        })?;
        let w = layout(input, shape.k, shape.n, shape.k)?;
        let x = layout(input, shape.k, shape.rows, shape.x_stride.max(shape.k))?;
        let out = layout(output, shape.n, shape.rows, shape.out_stride.max(shape.n))?;
        let preference = Preference::new(shape.alignments)?;
        // SAFETY: description, layouts and preference were made above.
        let best = unsafe {
            result::get_matmul_algo_heuristic(handle, desc.0, w, x, out, out, preference.0)
        };
        Ok(best.ok().map(|found| Self { desc, w, x, out, algorithm: found.algo }))
    }
}

impl Drop for MatmulPlan {
    fn drop(&mut self) {
        // SAFETY: the descriptors were made by `new` and are not used after this. Failures cannot
        // be reported from here.
        unsafe {
            for layout in [self.w, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
