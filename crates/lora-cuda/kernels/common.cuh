// Shared by all kernels: matrices by value, element types, vectors of eight, reductions in a fixed order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

using bf16 = __nv_bfloat16;
using f16 = __half;
using f8 = __nv_fp8_e4m3;
using u64 = unsigned long long;

// Programmatic dependent launch: lets the next kernel of the stream start. It waits, by `pdl_wait`, for the
// end of this one before it reads what this one writes.
__device__ inline void pdl_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

// Waits for the end of the kernels before this one, whose writes are visible then. Before it, a kernel may
// read only what no kernel writes, such as weights.
__device__ inline void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The start of kernels that have nothing to do before their inputs are ready.
__device__ inline void pdl_prologue() {
    pdl_launch_dependents();
    pdl_wait();
}

// Dtypes as numbered by `dtype_number` in args.rs.
enum : int32_t { DTYPE_F32 = 0, DTYPE_F16 = 1, DTYPE_BF16 = 2, DTYPE_I32 = 3, DTYPE_F8 = 4 };

// A row-major matrix; `data` points at its first element. Laid out as `MatArg` of args.rs. The static_assert
// behind each struct that the host fills has a counterpart in Rust.
struct Mat {
    void *data;
    int64_t row_stride;
    int32_t rows, cols, dtype, padding;

    template <class T> __device__ T *row(int64_t r) const { return static_cast<T *>(data) + r * row_stride; }
};
static_assert(sizeof(Mat) == 32 && offsetof(Mat, row_stride) == 8 && offsetof(Mat, rows) == 16 &&
              offsetof(Mat, dtype) == 24 && offsetof(Mat, padding) == 28);

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(f16 v) { return __half2float(v); }
__device__ inline float to_float(bf16 v) { return __bfloat162float(v); }
__device__ inline float to_float(f8 v) { return static_cast<float>(v); }

template <class T> __device__ T from_float(float v);
template <> __device__ inline float from_float<float>(float v) { return v; }
template <> __device__ inline f16 from_float<f16>(float v) { return __float2half_rn(v); }
template <> __device__ inline bf16 from_float<bf16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ inline f8 from_float<f8>(float v) {
    f8 code;
    code.__x = __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
    return code;
}

// Calls `f` with a value of the element type that `dtype` names; the branch is uniform.
template <class F> __device__ inline void with_float(int dtype, F &&f) {
    switch (dtype) {
    case DTYPE_F32: return f(float{});
    case DTYPE_F16: return f(f16{});
    case DTYPE_BF16: return f(bf16{});
    }
}

// As `with_float`, with e4m3 among the types.
template <class F> __device__ inline void with_float_or_fp8(int dtype, F &&f) {
    if (dtype == DTYPE_F8) return f(f8{});
    with_float(dtype, f);
}

// As `with_float`, for the two 16-bit types.
template <class F> __device__ inline void with_16bit(int dtype, F &&f) {
    if (dtype == DTYPE_BF16) f(bf16{});
    else f(f16{});
}

// silu(gate) * up.
__device__ inline float swiglu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// The same to about 20 bits in a few instructions, for results that are rounded to 16 bits.
__device__ inline float swiglu_fast(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

// Eight adjacent elements that are loaded and stored at once; their address must be a multiple of their size.
constexpr int VEC8 = 8;
template <class T> struct alignas(VEC8 * sizeof(T)) Vec8 {
    T v[VEC8];

    __device__ static Vec8 load(const T *from) { return *reinterpret_cast<const Vec8 *>(from); }
    __device__ void store(T *to) const { *reinterpret_cast<Vec8 *>(to) = *this; }
};

// Starts to bring bytes into the L2. Both address and size must be multiples of 16.
__device__ inline void prefetch_l2(const void *from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// An address in the shared memory of this CTA, as instructions take it.
__device__ inline uint32_t smem_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Waits for THREADS threads at one of the CTA's sixteen barriers, of which `__syncthreads` uses number 0.
template <int NUMBER, int THREADS> __device__ inline void named_barrier_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(NUMBER), "n"(THREADS) : "memory");
}
template <int THREADS> __device__ inline void named_barrier_sync(int number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory");
}

struct Sum {
    template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Max {
    template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// Reduces the lanes' values; every lane gets the result.
template <class T, class Op> __device__ inline T warp_reduce(T v, Op op) {
    for (int step = WARP / 2; step > 0; step /= 2) v = op(v, __shfl_xor_sync(ALL_LANES, v, step));
    return v;
}

// Reduces the threads' values; every thread gets the result. All threads of the CTA must call it.
template <class T, class Op> __device__ inline T block_reduce(T v, T empty, Op op) {
    __shared__ T parts[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    v = warp_reduce(v, op);
    __syncthreads(); // Another thread may still read the parts of an earlier reduction.
    if (lane == 0) parts[warp] = v;
    __syncthreads();
    return warp_reduce(lane < warps ? parts[lane] : empty, op);
}
