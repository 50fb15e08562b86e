//! Dense products by cuBLASLt, planned once for each shape.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::CudaContext;
use lora_core::{DType, Error, Mat, Pool, Result};

use crate::args::MatArg;
use crate::{CudaBuf, CudaError, CudaQueue};

/// Bytes of scratch that plans may use; NVIDIA recommends 32 MiB for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Of `cublasOperation_t`, which the bindings of cuBLASLt leave out.
const CUBLAS_OP_T: i32 = 1;

/// What a plan depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Shape {
    rows: usize,
    n: usize,
    k: usize,
    x_stride: usize,
    out_stride: usize,
    dtypes: [DType; 2],
}

/// A handle of cuBLASLt with its plans.
pub struct Lt {
    handle: sys::cublasLtHandle_t,
    workspace: CudaBuf,
    /// `None`: cuBLASLt has no algorithm for the shape.
    plans: HashMap<Shape, Option<Plan>>,
}

/// A product ready to run.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn failed(call: &'static str) -> impl Fn(result::CublasError) -> Error {
    move |cause| Error::Device(format!("{call}: {cause:?}"))
}

impl Lt {
    /// A handle in the current context.
    ///
    /// # Errors
    /// [`CudaError`] if cuBLASLt refuses or its workspace does not fit.
    pub fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, CudaError> {
        let remedy = "free memory on the device and check that cuBLAS is of CUDA 13";
        let refused = || CudaError::Library { library: "libcublasLt", remedy };
        let workspace = CudaBuf::zeroed(context, Pool::Activations, WORKSPACE);
        let workspace = workspace.map_err(|_| refused())?;
        let handle = result::create_handle().map_err(|_| refused())?;
        Ok(Self { handle, workspace, plans: HashMap::new() })
    }

    /// `out = x wᵀ`, `w` being `[n, k]` without gaps; `false` where cuBLASLt cannot do it. Which
    /// algorithm runs depends on the number of rows.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn product(
        &mut self,
        q: &mut CudaQueue,
        (x, x_geo): (MatArg, Mat),
        (w, w_geo): (MatArg, Mat),
        (out, out_geo): (MatArg, Mat),
    ) -> Result<bool> {
        let shape = Shape {
            rows: x_geo.rows,
            n: w_geo.rows,
            k: w_geo.cols,
            x_stride: x_geo.row_stride,
            out_stride: out_geo.row_stride,
            dtypes: [x_geo.dtype, out_geo.dtype],
        };
        let handle = self.handle;
        let plan = match self.plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(Plan::new(handle, &shape)?),
        };
        let Some(plan) = plan else { return Ok(false) };
        let (one, zero) = (1f32, 0f32);
        let at = |address: u64| address as *mut c_void;
        // SAFETY: layouts and pointers describe the operands, whose extents the op has checked; the
        // factors are read before the call returns, as they lie on the host.
        let done = unsafe {
            result::matmul(
                handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const zero).cast(),
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

impl Drop for Lt {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: the handle is not used after this. A failure can be told to nobody.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn cuda_type(dtype: DType) -> Option<sys::cudaDataType> {
    match dtype {
        DType::F32 => Some(sys::cudaDataType::CUDA_R_32F),
        DType::F16 => Some(sys::cudaDataType::CUDA_R_16F),
        DType::Bf16 => Some(sys::cudaDataType::CUDA_R_16BF),
        _ => None,
    }
}

impl Plan {
    /// Rows of ours are columns of theirs: `outᵀ [n, rows] = w [n, k] xᵀ [k, rows]`.
    fn new(handle: sys::cublasLtHandle_t, shape: &Shape) -> Result<Option<Self>> {
        let [Some(input), Some(output)] = shape.dtypes.map(cuda_type) else { return Ok(None) };
        let layout = |dtype, rows: usize, cols: usize, stride: usize| {
            result::create_matrix_layout(dtype, rows as u64, cols as u64, stride as i64)
                .map_err(failed("cublasLtMatrixLayoutCreate"))
        };
        let f32_sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let product = result::create_matmul_desc(f32_sums, sys::cudaDataType::CUDA_R_32F);
        let product = product.map_err(failed("cublasLtMatmulDescCreate"))?;
        let transposed = CUBLAS_OP_T;
        // SAFETY: the attribute is a value of that type.
        let set = unsafe {
            result::set_matmul_desc_attribute(
                product,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of_val(&transposed),
            )
        };
        set.map_err(failed("cublasLtMatmulDescSetAttribute"))?;
        let w = layout(input, shape.k, shape.n, shape.k)?;
        let x = layout(input, shape.k, shape.rows, shape.x_stride.max(shape.k))?;
        let out = layout(output, shape.n, shape.rows, shape.out_stride.max(shape.n))?;
        let workspace = WORKSPACE;
        let preference = result::create_matmul_pref();
        let preference = preference.map_err(failed("cublasLtMatmulPreferenceCreate"))?;
        // SAFETY: the attribute is a number of bytes; the layouts were made above.
        let best = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of_val(&workspace),
            )
            .map_err(failed("cublasLtMatmulPreferenceSetAttribute"))?;
            let best =
                result::get_matmul_algo_heuristic(handle, product, w, x, out, out, preference);
            let destroyed = result::destroy_matmul_pref(preference);
            destroyed.map_err(failed("cublasLtMatmulPreferenceDestroy"))?;
            best
        };
        let plan = |found: sys::cublasLtMatmulHeuristicResult_t| Self {
            product,
            w,
            x,
            out,
            algorithm: found.algo,
        };
        Ok(best.ok().map(plan))
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: the descriptors were made by `new` and are not used after this. Failures can be
        // told to nobody.
        unsafe {
            for layout in [self.w, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.product);
        }
    }
}
