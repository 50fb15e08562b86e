// Head norms, rotary positions (Su et al., 2021), and the store into the KV cache.
#include "common.cuh"

// Laid out as `RopeArgs` of `ops/rope.rs`.
struct RopeArgs {
    Mat qkv, rotations, k_cache, v_cache;
    const float *q_norm, *k_norm; // Both null where the model has no such norms.
    const int32_t *positions, *slots;
    float eps, k_scale, v_scale;
    int32_t heads, kv_heads, head_dim;
};

template <class C, class T>
__device__ void store_head(Mat cache, int64_t slot, int from, const T *head, int dim, float scale) {
    for (int i = threadIdx.x % WARP; i < dim; i += WARP)
        cache.row<C>(slot)[from + i] = from_float<C>(to_float(head[i]) / scale);
}

// Blocks (row, some of its heads), one warp a head, those of keys behind those of queries and those of
// values last; `shared` holds a head of f32 for each warp.
extern "C" __global__ void qk_norm_rope_append(RopeArgs a) {
    enter();
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
            with_any(a.v_cache.dtype, [&](auto c) {
                store_head<decltype(c)>(a.v_cache, slot, values * dim, place, dim, a.v_scale);
            });
            return;
        }
        for (int i = lane; i < dim; i += WARP) head[i] = to_float(place[i]);
        __syncwarp();
        const float *w = keys < 0 ? a.q_norm : a.k_norm;
        if (w) {
            float square = 0.0f;
            for (int i = lane; i < dim; i += WARP) square += head[i] * head[i];
            float root = sqrtf(warp_reduce(square, Sum()) / dim + a.eps);
            for (int i = lane; i < dim; i += WARP) head[i] = head[i] / root * w[i];
            __syncwarp();
        }
        for (int i = lane; i < half; i += WARP) {
            float low = head[i], high = head[i + half];
            head[i] = low * cosines[i] - high * sines[i];
            head[i + half] = high * cosines[i] + low * sines[i];
        }
        __syncwarp();
        for (int i = lane; i < dim; i += WARP) place[i] = from_float<T>(head[i]);
        if (keys < 0 || slot < 0) return;
        with_any(a.k_cache.dtype, [&](auto c) {
            store_head<decltype(c)>(a.k_cache, slot, keys * dim, head, dim, a.k_scale);
        });
    });
}
