// What all kernels share: matrices by value, element types, reductions in a fixed order.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

using bf16 = __nv_bfloat16;
using f16 = __half;
using f8 = __nv_fp8_e4m3;

// Lets the next kernel of the stream be made ready, which waits for this one before it reads.
__device__ inline void pdl_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

// Waits for what the kernels before this one wrote. Only what no kernel writes, such as weights, may be
// read before.
__device__ inline void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// What a kernel begins with.
__device__ inline void enter() {
    pdl_launch_dependents();
    pdl_wait();
}

// The numbers of `DType` in the crate's `args.rs`.
enum : int32_t { DTYPE_F32 = 0, DTYPE_F16 = 1, DTYPE_BF16 = 2, DTYPE_I32 = 3, DTYPE_F8 = 4 };

// A row-major matrix; `data` points at its first element. Laid out as `MatArg` of `args.rs`.
struct Mat {
    void *data;
    int64_t row_stride;
    int32_t rows, cols, dtype, padding;

    template <class T> __device__ T *row(int64_t r) const {
        return static_cast<T *>(data) + r * row_stride;
    }
};

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

// Calls `f` with a value of the element type that `dtype` names. All threads take the same branch.
template <class F> __device__ inline void with_float(int dtype, F &&f) {
    switch (dtype) {
    case DTYPE_F32: return f(float{});
    case DTYPE_F16: return f(f16{});
    case DTYPE_BF16: return f(bf16{});
    }
}

// As `with_float`, with e4m3 among the types.
template <class F> __device__ inline void with_any(int dtype, F &&f) {
    if (dtype == DTYPE_F8) return f(f8{});
    with_float(dtype, f);
}

// silu(gate) * up.
__device__ inline float gated(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// The same to about 20 bits, which is plenty for a result in 16, by a few instructions.
__device__ inline float gated_nearly(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

// Eight neighbours that are loaded and stored together; their address must be a multiple of their size.
constexpr int EIGHT = 8;
template <class T> struct alignas(EIGHT * sizeof(T)) Eight {
    T v[EIGHT];

    __device__ static Eight load(const T *from) { return *reinterpret_cast<const Eight *>(from); }
    __device__ void store(T *to) const { *reinterpret_cast<Eight *>(to) = *this; }
};

// Calls `f` with a value of the 16-bit type that `dtype` names.
template <class F> __device__ inline void with_narrow(int dtype, F &&f) {
    if (dtype == DTYPE_BF16) f(bf16{});
    else f(f16{});
}

// Asks for bytes in the L2: a multiple of 16, from such an address on.
__device__ inline void prefetch_bytes(const void *from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct Sum {
    template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Max {
    template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// The combination of all lanes' values, in every lane.
template <class T, class Op> __device__ inline T warp_reduce(T v, Op op) {
    for (int step = WARP / 2; step > 0; step /= 2) v = op(v, __shfl_xor_sync(ALL_LANES, v, step));
    return v;
}

// The combination of all threads' values, in every thread. Every thread of the block must call it.
template <class T, class Op> __device__ inline T block_reduce(T v, T empty, Op op) {
    __shared__ T parts[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    v = warp_reduce(v, op);
    __syncthreads(); // An earlier reduction may still be read.
    if (lane == 0) parts[warp] = v;
    __syncthreads();
    return warp_reduce(lane < warps ? parts[lane] : empty, op);
}
