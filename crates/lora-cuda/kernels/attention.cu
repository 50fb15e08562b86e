// Causal attention over a paged KV cache, for operands that the tensor-core kernels do not take.
//
// Problem: out[r, h] = softmax(scale * q[r, h] K^T) V over the keys that row r may see. Queries in f32, f16
//   or bf16, caches in any of these or e4m3, head_dim up to 256.
// Grid: one CTA of four warps per (row, query head); the warps take keys in turn.
// Pipeline: none. A lane keeps its elements of q and of the output in registers; the warps' partial
//   softmaxes are merged through shared memory at the end.
// Numerics: f32 throughout, with expf; online softmax (Milakov & Gimelshein, 2018). Warps are merged in
//   their order.
// Chosen when: `choose` in ops/attention/mod.rs finds no tensor-core kernel: f32 queries, rows that are not
//   16-byte aligned, a cache dtype other than the queries' or e4m3, or a head_dim without an instantiation.
#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int MAX_HEAD_DIM = 256;
constexpr int PER_LANE = MAX_HEAD_DIM / WARP; // elements of the head in a lane's registers

// Online softmax over every WARPSth key from `first + warp` on: row maximum, row sum, and weighted values.
template <class C>
__device__ void attend(const AttentionArgs &a, const float *query, int64_t sequence, int first, int last,
                       int column, float &row_max, float &row_sum, float *acc) {
    int lane = threadIdx.x % WARP;
    const int32_t *table = a.tables + sequence * a.table_stride;
    for (int p = first + threadIdx.x / WARP; p <= last; p += WARPS) {
        int64_t cached = cache_row(a, table, p);
        const C *key = a.k_cache.row<C>(cached) + column;
        float score = 0.0f;
#pragma unroll
        for (int e = 0; e < PER_LANE; e++)
            if (lane + e * WARP < a.head_dim) score += query[e] * to_float(key[lane + e * WARP]);
        score = warp_reduce(score, Sum());
        float new_max = fmaxf(row_max, score);
        float rescale = expf(row_max - new_max), weight = expf(score - new_max);
        const C *value = a.v_cache.row<C>(cached) + column;
        row_sum = row_sum * rescale + weight;
#pragma unroll
        for (int e = 0; e < PER_LANE; e++)
            if (lane + e * WARP < a.head_dim)
                acc[e] = acc[e] * rescale + weight * to_float(value[lane + e * WARP]);
        row_max = new_max;
    }
}

// Grid (row, query head).
extern "C" __global__ void attention(AttentionArgs a) {
    pdl_prologue();
    __shared__ float maxima[WARPS], sums[WARPS], accs[WARPS][MAX_HEAD_DIM];
    int64_t r = blockIdx.x;
    int head = blockIdx.y, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, dim = a.head_dim;
    int last = a.positions[r];
    int first = first_key(a, last);
    int column = head / (a.heads / a.kv_heads) * dim;
    float query[PER_LANE], acc[PER_LANE] = {}, row_max = -INFINITY, row_sum = 0.0f;
    with_float(a.queries.dtype, [&](auto t) {
        using T = decltype(t);
        const T *row = a.queries.row<T>(r) + head * dim;
#pragma unroll
        for (int e = 0; e < PER_LANE; e++)
            query[e] = lane + e * WARP < dim ? to_float(row[lane + e * WARP]) * a.scale : 0.0f;
    });
    with_float_or_fp8(a.k_cache.dtype, [&](auto c) {
        attend<decltype(c)>(a, query, a.sequences[r], first, last, column, row_max, row_sum, acc);
    });
    if (lane == 0) maxima[warp] = row_max, sums[warp] = row_sum;
#pragma unroll
    for (int e = 0; e < PER_LANE; e++)
        if (lane + e * WARP < dim) accs[warp][lane + e * WARP] = acc[e];
    __syncthreads();
    float total_max = maxima[0], total = 0.0f, rescale[WARPS];
    for (int w = 1; w < WARPS; w++) total_max = fmaxf(total_max, maxima[w]);
    for (int w = 0; w < WARPS; w++) {
        rescale[w] = expf(maxima[w] - total_max);
        total += sums[w] * rescale[w];
    }
    with_float(a.out.dtype, [&](auto o) {
        using O = decltype(o);
        O *out = a.out.row<O>(r) + head * dim;
        for (int i = threadIdx.x; i < dim; i += blockDim.x) {
            float value = 0.0f;
            for (int w = 0; w < WARPS; w++) value += accs[w][i] * rescale[w];
            out[i] = from_float<O>(value / total * a.v_scale);
        }
    });
}
