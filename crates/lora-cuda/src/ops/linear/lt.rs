//! Dense products by cuBLASLt, planned once for each shape.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::CudaContext;
use lora_core::{DType, Error, MatLayout, Pool, Result};

use crate::args::{Address, MatArg};
use crate::{CudaBuf, CudaError, CudaQueue};

use sys::cublasLtMatmulDescAttributes_t as Attribute;

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
    /// Bytes that the addresses of weights, input and output are multiples of.
    alignments: [u32; 3],
    bias: bool,
    adds: bool,
}

/// What cuBLASLt takes for granted of addresses, unless it is told less.
const USUAL_ALIGNMENT: u32 = 256;

/// Bytes that an address is a multiple of, as far as algorithms depend on it.
fn alignment_of(address: Address) -> u32 {
    1 << address.trailing_zeros().min(USUAL_ALIGNMENT.trailing_zeros())
}

/// What a product is given besides its operands.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras {
    /// Of operands in e4m3: a scale for each output, and one for each row of the input, both f32.
    pub scales: Option<[Address; 2]>,
    /// Summand of each output, in the output's dtype.
    pub bias: Option<Address>,
    /// Whether the product is added to what the output holds.
    pub adds: bool,
}

/// A handle of cuBLASLt with its plans.
pub struct Lt {
    handle: sys::cublasLtHandle_t,
    workspace: CudaBuf,
    /// `None`: cuBLASLt has no algorithm for the shape.
    plans: HashMap<Shape, Option<Plan>>,
}

/// The description of a product.
struct Product(sys::cublasLtMatmulDesc_t);

impl Product {
    fn new() -> Result<Self> {
        let f32_sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let product = result::create_matmul_desc(f32_sums, sys::cudaDataType::CUDA_R_32F);
        product.map(Self).map_err(failed("cublasLtMatmulDescCreate"))
    }

    /// Sets what all products of a shape share.
    fn describe(&self, shape: &Shape) -> Result<()> {
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

    /// Sets the addresses of one product.
    fn point_at(&self, extras: Extras) -> Result<()> {
        if let Some([of_outputs, of_rows]) = extras.scales {
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

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: made by `new` and not used after this. A failure can be told to nobody.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// A product ready to run.
struct Plan {
    product: Product,
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

    /// `out = x wᵀ`, `w` being `[n, k]` without gaps, times scales and plus a bias; `false` where
    /// cuBLASLt cannot do it. Which algorithm runs depends on the number of rows.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn product(
        &mut self,
        q: &mut CudaQueue,
        (x, x_geo): (MatArg, MatLayout),
        (w, w_geo): (MatArg, MatLayout),
        (out, out_geo): (MatArg, MatLayout),
        extras: Extras,
    ) -> Result<bool> {
        let shape = Shape {
            rows: x_geo.rows,
            n: w_geo.rows,
            k: w_geo.cols,
            x_stride: x_geo.row_stride,
            out_stride: out_geo.row_stride,
            dtypes: [x_geo.dtype, out_geo.dtype],
            alignments: [w, x, out].map(|operand| alignment_of(operand.data())),
            bias: extras.bias.is_some(),
            adds: extras.adds,
        };
        let handle = self.handle;
        let plan = match self.plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                place.insert(Plan::new(handle, &shape, self.workspace.address())?)
            }
        };
        let Some(plan) = plan else { return Ok(false) };
        plan.product.point_at(extras)?;
        let (one, of_out) = (1f32, f32::from(u8::from(extras.adds)));
        let at = |address: u64| address as *mut c_void;
        // SAFETY: layouts and pointers describe the operands, whose extents the op has checked; the
        // factors are read before the call returns, as they lie on the host.
        let done = unsafe {
            result::matmul(
                handle,
                plan.product.0,
                (&raw const one).cast(),
                (&raw const of_out).cast(),
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
        DType::F8E4m3 => Some(sys::cudaDataType::CUDA_R_8F_E4M3),
        _ => None,
    }
}

/// What algorithms are chosen by.
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
        // SAFETY: made by `new` and not used after this. A failure can be told to nobody.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl Plan {
    /// Rows of ours are columns of theirs: `outᵀ [n, rows] = w [n, k] xᵀ [k, rows]`.
    /// `anywhere` is an address of the device, for algorithms are chosen by whether there is a scale or
    /// a bias.
    fn new(
        handle: sys::cublasLtHandle_t,
        shape: &Shape,
        anywhere: Address,
    ) -> Result<Option<Self>> {
        let [Some(input), Some(output)] = shape.dtypes.map(cuda_type) else { return Ok(None) };
        let layout = |dtype, rows: usize, cols: usize, stride: usize| {
            result::create_matrix_layout(dtype, rows as u64, cols as u64, stride as i64)
                .map_err(failed("cublasLtMatrixLayoutCreate"))
        };
        let product = Product::new()?;
        product.describe(shape)?;
        let codes = shape.dtypes[0] == DType::F8E4m3;
        product.point_at(Extras {
            scales: codes.then_some([anywhere; 2]),
            bias: shape.bias.then_some(anywhere),
            adds: shape.adds,
        })?;
        let w = layout(input, shape.k, shape.n, shape.k)?;
        let x = layout(input, shape.k, shape.rows, shape.x_stride.max(shape.k))?;
        let out = layout(output, shape.n, shape.rows, shape.out_stride.max(shape.n))?;
        let preference = Preference::new(shape.alignments)?;
        // SAFETY: product, layouts and preference were made above.
        let best = unsafe {
            result::get_matmul_algo_heuristic(handle, product.0, w, x, out, out, preference.0)
        };
        Ok(best.ok().map(|found| Self { product, w, x, out, algorithm: found.algo }))
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
        }
    }
}
