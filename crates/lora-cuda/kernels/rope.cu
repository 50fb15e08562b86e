// QK norms, rotary positions (Su et al., 2021), and the append to the KV cache, in one pass over qkv.
//
// Problem: per row and head of qkv: RMS norm (queries and keys, if the model has it), rotation in place by
//   a table of cosines and sines, and for keys and values the store into the row's cache slot, divided by
//   the cache's scale.
// Grid: `qk_norm_rope_append`: (row, eight heads), a warp per head. `_64`, `_128`, `_256`: four lanes per
//   head, the heads of all rows one after another.
// Pipeline: none; a head stays in shared memory, or in the registers of its four lanes.
// Numerics: f32; fused multiply-adds and the order of sums are written out, so that all kernels give the
//   same bits.
// Chosen when: `choose` in ops/rope.rs: by head_dim for 16-bit qkv and caches of the same dtype or e4m3,
//   all 16-byte aligned; the general kernel for the rest.
#include "common.cuh"
#include "lora.cuh"

// Laid out as `RopeArgs` of ops/rope.rs.
struct RopeArgs {
    Mat qkv, cos_sin_table, k_cache, v_cache; // cos_sin_table: [positions, cosines then sines]
    NormWeight q_norm, k_norm;                // Their base is null where the model has no QK norms.
    const int32_t *positions, *slots;
    float eps, k_scale, v_scale;
    int32_t heads, kv_heads, head_dim;
};
static_assert(sizeof(RopeArgs) == 216 && offsetof(RopeArgs, q_norm) == 128 &&
              offsetof(RopeArgs, positions) == 176 && offsetof(RopeArgs, eps) == 192 &&
              offsetof(RopeArgs, head_dim) == 212);

// Rotates a pair of elements. The order of roundings is written out, so that all kernels agree.
__device__ void rotate(float &low, float &high, float cosine, float sine) {
    float rotated = __fmaf_rn(low, cosine, -__fmul_rn(high, sine));
    high = __fmaf_rn(high, cosine, __fmul_rn(low, sine));
    low = rotated;
}

// Stores a head to the cache, divided by its scale. By one warp.
template <class C, class T>
__device__ void store_head(Mat cache, int64_t slot, int from, const T *head, int dim, float scale) {
    for (int i = threadIdx.x % WARP; i < dim; i += WARP)
        cache.row<C>(slot)[from + i] = from_float<C>(to_float(head[i]) / scale);
}

// Grid (row, some of its heads); a warp per head: those of queries, then of keys, then of values. `shared`
// holds a head in f32 per warp.
extern "C" __global__ void qk_norm_rope_append(RopeArgs a) {
    pdl_prologue();
    extern __shared__ float shared[];
    int64_t r = blockIdx.x, slot = a.slots[r];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, dim = a.head_dim, half = dim / 2;
    int h = blockIdx.y * (blockDim.x / WARP) + warp, keys = h - a.heads, values = keys - a.kv_heads;
    if (values >= a.kv_heads) return;
    float *head = shared + warp * dim;
    const float *cosines = a.cos_sin_table.row<float>(a.positions[r]), *sines = cosines + half;
    with_float(a.qkv.dtype, [&](auto t) {
        using T = decltype(t);
        T *in_place = a.qkv.row<T>(r) + h * dim;
        if (values >= 0) {
            if (slot < 0) return;
            with_float_or_fp8(a.v_cache.dtype, [&](auto c) {
                store_head<decltype(c)>(a.v_cache, slot, values * dim, in_place, dim, a.v_scale);
            });
            return;
        }
        for (int i = lane; i < dim; i += WARP) head[i] = to_float(in_place[i]);
        __syncwarp();
        const float *w = keys < 0 ? a.q_norm.of(r) : a.k_norm.of(r);
        if (w) {
            float square = 0.0f;
            for (int i = lane; i < dim; i += WARP) square = __fmaf_rn(head[i], head[i], square);
            float root = sqrtf(warp_reduce(square, Sum()) / dim + a.eps);
            for (int i = lane; i < dim; i += WARP) head[i] = head[i] / root * w[i];
            __syncwarp();
        }
        for (int i = lane; i < half; i += WARP) rotate(head[i], head[i + half], cosines[i], sines[i]);
        __syncwarp();
        for (int i = lane; i < dim; i += WARP) in_place[i] = from_float<T>(head[i]);
        if (keys < 0 || slot < 0) return;
        with_float_or_fp8(a.k_cache.dtype, [&](auto c) {
            store_head<decltype(c)>(a.k_cache, slot, keys * dim, head, dim, a.k_scale);
        });
    });
}

// The kernels below have four lanes per head. A lane has every fourth vec8 of it: both elements of a rotated
// pair, and the elements that eight lanes of the kernel above sum first, so that sums of squares can be added
// in the same order.
constexpr int LANES = 4;
constexpr int STEP = LANES * VEC8; // elements between the vec8's of a lane

// Eight floats from a 16-byte aligned address.
__device__ void load_floats(const float *from, float (&to)[VEC8]) {
    reinterpret_cast<float4 *>(to)[0] = reinterpret_cast<const float4 *>(from)[0];
    reinterpret_cast<float4 *>(to)[1] = reinterpret_cast<const float4 *>(from)[1];
}

// The root mean square of a head, summed in the order of the kernel above. By whole warps.
template <int VECS> __device__ float root_of(const float (&head)[VECS][VEC8], const RopeArgs &a) {
    float square[VEC8];
#pragma unroll
    for (int i = 0; i < VEC8; i++) {
        square[i] = 0.0f;
#pragma unroll
        for (int e = 0; e < VECS; e++) square[i] = __fmaf_rn(head[e][i], head[e][i], square[i]);
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2)
            square[i] += __shfl_xor_sync(ALL_LANES, square[i], step);
    }
#pragma unroll
    for (int step = VEC8 / 2; step > 0; step /= 2)
#pragma unroll
        for (int i = 0; i < step; i++) square[i] += square[i + step];
    return sqrtf(square[0] / a.head_dim + a.eps);
}

template <class C, int VECS>
__device__ void store_vecs(C *to, const float (&head)[VECS][VEC8]) {
#pragma unroll
    for (int e = 0; e < VECS; e++) {
        Vec8<C> out;
#pragma unroll
        for (int i = 0; i < VEC8; i++) out.v[i] = from_float<C>(head[e][i]);
        out.store(to + e * STEP);
    }
}

// As `qk_norm_rope_append`, for 16-bit numbers and caches of the same dtype or e4m3. Grid: the heads of all
// rows, one after another.
template <int DIM, class T> __device__ void norm_rope_append(const RopeArgs &a) {
    constexpr int VECS = DIM / STEP, PAIRS = VECS / 2;
    int column = threadIdx.x % LANES * VEC8, heads = a.heads + 2 * a.kv_heads;
    int number = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, last = a.qkv.rows * heads - 1;
    // Lanes behind the last head read it too, as the shuffles need whole warps.
    int64_t r = min(number, last) / heads, slot = a.slots[r];
    int h = min(number, last) % heads, keys = h - a.heads, values = keys - a.kv_heads;
    T *from = a.qkv.row<T>(r) + h * DIM + column;
    const float *cos_sin = a.cos_sin_table.row<float>(a.positions[r]) + column;
    float head[VECS][VEC8], cosines[PAIRS][VEC8], sines[PAIRS][VEC8];
#pragma unroll
    for (int e = 0; e < VECS; e++) {
        Vec8<T> loaded = Vec8<T>::load(from + e * STEP);
#pragma unroll
        for (int i = 0; i < VEC8; i++) head[e][i] = to_float(loaded.v[i]);
    }
#pragma unroll
    for (int e = 0; e < PAIRS; e++) {
        load_floats(cos_sin + e * STEP, cosines[e]);
        load_floats(cos_sin + DIM / 2 + e * STEP, sines[e]);
    }
    float root = a.q_norm.base ? root_of(head, a) : 1.0f;
    if (number > last) return;
    if (values < 0) {
        const float *w = keys < 0 ? a.q_norm.of(r) : a.k_norm.of(r);
        if (a.q_norm.base)
#pragma unroll
            for (int e = 0; e < VECS; e++) {
                float weights[VEC8];
                load_floats(w + column + e * STEP, weights);
#pragma unroll
                for (int i = 0; i < VEC8; i++) head[e][i] = head[e][i] / root * weights[i];
            }
#pragma unroll
        for (int e = 0; e < PAIRS; e++)
#pragma unroll
            for (int i = 0; i < VEC8; i++) rotate(head[e][i], head[e + PAIRS][i], cosines[e][i], sines[e][i]);
        store_vecs(from, head);
    }
    if (keys < 0 || slot < 0) return;
    const Mat &cache = values < 0 ? a.k_cache : a.v_cache;
    float scale = values < 0 ? a.k_scale : a.v_scale;
    if (scale != 1.0f) // Divisions are slow.
#pragma unroll
        for (int e = 0; e < VECS; e++)
#pragma unroll
            for (int i = 0; i < VEC8; i++) head[e][i] /= scale;
    int to = (values < 0 ? keys : values) * DIM + column;
    if (cache.dtype == DTYPE_F8) store_vecs(cache.row<f8>(slot) + to, head);
    else store_vecs(cache.row<T>(slot) + to, head);
}

extern "C" __global__ void qk_norm_rope_append_64(RopeArgs a) {
    pdl_prologue();
    with_16bit(a.qkv.dtype, [&](auto t) { norm_rope_append<64, decltype(t)>(a); });
}

extern "C" __global__ void qk_norm_rope_append_128(RopeArgs a) {
    pdl_prologue();
    with_16bit(a.qkv.dtype, [&](auto t) { norm_rope_append<128, decltype(t)>(a); });
}

extern "C" __global__ void qk_norm_rope_append_256(RopeArgs a) {
    pdl_prologue();
    with_16bit(a.qkv.dtype, [&](auto t) { norm_rope_append<256, decltype(t)>(a); });
}
