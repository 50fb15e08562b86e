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

// Laid out as `RopeArgs` of `ops/rope.rs`.
struct RopeArgs {
    Mat qkv, rotations, k_cache, v_cache;
    NormWeight q_norm, k_norm; // Both without a base where the model has no such norms.
    const int32_t *positions, *slots;
    float eps, k_scale, v_scale;
    int32_t heads, kv_heads, head_dim;
};

// Turns a pair of elements. Which product is rounded first is written out: all kernels must agree.
__device__ void turn(float &low, float &high, float cosine, float sine) {
    float turned = __fmaf_rn(low, cosine, -__fmul_rn(high, sine));
    high = __fmaf_rn(high, cosine, __fmul_rn(low, sine));
    low = turned;
}

template <class C, class T>
__device__ void store_head(Mat cache, int64_t slot, int from, const T *head, int dim, float scale) {
    for (int i = threadIdx.x % WARP; i < dim; i += WARP)
        cache.row<C>(slot)[from + i] = from_float<C>(to_float(head[i]) / scale);
}

// Blocks (row, some of its heads), one warp a head, those of keys behind those of queries and those of
// values last; `shared` holds a head of f32 for each warp.
extern "C" __global__ void qk_norm_rope_append(RopeArgs a) {
    pdl_prologue();
    extern __shared__ float shared[];
    int64_t r = blockIdx.x, slot = a.slots[r];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, dim = a.head_dim, half = dim / 2;
    int h = blockIdx.y * (blockDim.x / WARP) + warp, keys = h - a.heads, values = keys - a.kv_heads;
    if (values >= a.kv_heads) return;
    float *head = shared + warp * dim;
    const float *cosines = a.rotations.row<float>(a.positions[r]), *sines = cosines + half;
    with_float(a.qkv.dtype, [&](auto t) {
        using T = decltype(t);
        T *place = a.qkv.row<T>(r) + h * dim;
        if (values >= 0) {
            if (slot < 0) return;
            with_float_or_fp8(a.v_cache.dtype, [&](auto c) {
                store_head<decltype(c)>(a.v_cache, slot, values * dim, place, dim, a.v_scale);
            });
            return;
        }
        for (int i = lane; i < dim; i += WARP) head[i] = to_float(place[i]);
        __syncwarp();
        const float *w = keys < 0 ? a.q_norm.of(r) : a.k_norm.of(r);
        if (w) {
            float square = 0.0f;
            for (int i = lane; i < dim; i += WARP) square = __fmaf_rn(head[i], head[i], square);
            float root = sqrtf(warp_reduce(square, Sum()) / dim + a.eps);
            for (int i = lane; i < dim; i += WARP) head[i] = head[i] / root * w[i];
            __syncwarp();
        }
        for (int i = lane; i < half; i += WARP) turn(head[i], head[i + half], cosines[i], sines[i]);
        __syncwarp();
        for (int i = lane; i < dim; i += WARP) place[i] = from_float<T>(head[i]);
        if (keys < 0 || slot < 0) return;
        with_float_or_fp8(a.k_cache.dtype, [&](auto c) {
            store_head<decltype(c)>(a.k_cache, slot, keys * dim, head, dim, a.k_scale);
        });
    });
}

// Below, four lanes share a head: a lane has every fourth eight of its elements, so both elements of a
// pair, and all that one sum of squares of the kernel above begins with.
constexpr int LANES = 4;
constexpr int STEP = LANES * VEC8; // between the vectors of 8 of a lane

// Eight numbers at a multiple of 16 bytes.
__device__ void load_floats(const float *from, float (&to)[VEC8]) {
    reinterpret_cast<float4 *>(to)[0] = reinterpret_cast<const float4 *>(from)[0];
    reinterpret_cast<float4 *>(to)[1] = reinterpret_cast<const float4 *>(from)[1];
}

// The root mean square of a head, summed in the order of the kernel above. All lanes must call it.
template <int EIGHTS> __device__ float root_of(const float (&head)[EIGHTS][VEC8], const RopeArgs &a) {
    float square[VEC8];
#pragma unroll
    for (int i = 0; i < VEC8; i++) {
        square[i] = 0.0f;
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) square[i] = __fmaf_rn(head[e][i], head[e][i], square[i]);
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

template <class C, int EIGHTS>
__device__ void store_eights(C *to, const float (&head)[EIGHTS][VEC8]) {
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        Vec8<C> out;
#pragma unroll
        for (int i = 0; i < VEC8; i++) out.v[i] = from_float<C>(head[e][i]);
        out.store(to + e * STEP);
    }
}

// As `qk_norm_rope_append`, for 16-bit numbers and caches of the same type or of e4m3. The heads of all
// rows follow each other.
template <int DIM, class T> __device__ void rotate_and_append(const RopeArgs &a) {
    constexpr int EIGHTS = DIM / STEP, PAIRS = EIGHTS / 2;
    int column = threadIdx.x % LANES * VEC8, heads = a.heads + 2 * a.kv_heads;
    int place = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, last = a.qkv.rows * heads - 1;
    // Lanes behind the last head read it too, as shuffles need all of them.
    int64_t r = min(place, last) / heads, slot = a.slots[r];
    int h = min(place, last) % heads, keys = h - a.heads, values = keys - a.kv_heads;
    T *from = a.qkv.row<T>(r) + h * DIM + column;
    const float *rotation = a.rotations.row<float>(a.positions[r]) + column;
    float head[EIGHTS][VEC8], cosines[PAIRS][VEC8], sines[PAIRS][VEC8];
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        Vec8<T> eight = Vec8<T>::load(from + e * STEP);
#pragma unroll
        for (int i = 0; i < VEC8; i++) head[e][i] = to_float(eight.v[i]);
    }
#pragma unroll
    for (int e = 0; e < PAIRS; e++) {
        load_floats(rotation + e * STEP, cosines[e]);
        load_floats(rotation + DIM / 2 + e * STEP, sines[e]);
    }
    float root = a.q_norm.base ? root_of(head, a) : 1.0f;
    if (place > last) return;
    if (values < 0) {
        const float *w = keys < 0 ? a.q_norm.of(r) : a.k_norm.of(r);
        if (a.q_norm.base)
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                float weights[VEC8];
                load_floats(w + column + e * STEP, weights);
#pragma unroll
                for (int i = 0; i < VEC8; i++) head[e][i] = head[e][i] / root * weights[i];
            }
#pragma unroll
        for (int e = 0; e < PAIRS; e++)
#pragma unroll
            for (int i = 0; i < VEC8; i++)
                turn(head[e][i], head[e + PAIRS][i], cosines[e][i], sines[e][i]);
        store_eights(from, head);
    }
    if (keys < 0 || slot < 0) return;
    const Mat &cache = values < 0 ? a.k_cache : a.v_cache;
    float scale = values < 0 ? a.k_scale : a.v_scale;
    if (scale != 1.0f) // Divisions take long.
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int i = 0; i < VEC8; i++) head[e][i] /= scale;
    int to = (values < 0 ? keys : values) * DIM + column;
    if (cache.dtype == DTYPE_F8) store_eights(cache.row<f8>(slot) + to, head);
    else store_eights(cache.row<T>(slot) + to, head);
}

extern "C" __global__ void qk_norm_rope_append_64(RopeArgs a) {
    pdl_prologue();
    with_16bit(a.qkv.dtype, [&](auto t) { rotate_and_append<64, decltype(t)>(a); });
}

extern "C" __global__ void qk_norm_rope_append_128(RopeArgs a) {
    pdl_prologue();
    with_16bit(a.qkv.dtype, [&](auto t) { rotate_and_append<128, decltype(t)>(a); });
}

extern "C" __global__ void qk_norm_rope_append_256(RopeArgs a) {
    pdl_prologue();
    with_16bit(a.qkv.dtype, [&](auto t) { rotate_and_append<256, decltype(t)>(a); });
}
