// Attention of rows that each have a sequence of their own: the keys of a row are read once for
// the query heads that share them, and are split among the blocks of a cluster where rows are few
// (Dao et al., Flash-Decoding, 2023), which read each other's sums from shared memory.
#include <cooperative_groups.h>

#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int GROUP = 4; // query heads of a block
constexpr int TURN = 4;  // keys that a lane has under way at a time

// Eight neighbours as f32.
__device__ void load_eight(const float *from, float (&to)[EIGHT]) {
    reinterpret_cast<float4 *>(to)[0] = reinterpret_cast<const float4 *>(from)[0];
    reinterpret_cast<float4 *>(to)[1] = reinterpret_cast<const float4 *>(from)[1];
}

template <class T> __device__ void load_eight(const T *from, float (&to)[EIGHT]) {
    Eight<T> eight = Eight<T>::load(from);
#pragma unroll
    for (int i = 0; i < EIGHT; i++) to[i] = to_float(eight.v[i]);
}

// Running maximum, sum and weighted values of the heads of a block.
struct State {
    float best[GROUP], total[GROUP], sum[GROUP][EIGHT];

    __device__ State() {
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            best[g] = LOWEST, total[g] = 0.0f;
#pragma unroll
            for (int i = 0; i < EIGHT; i++) sum[g][i] = 0.0f;
        }
    }

    // Makes room for scores up to `larger`.
    __device__ void raise(int g, float larger) {
        float fade = exp2f(best[g] - larger);
        best[g] = larger;
        total[g] *= fade;
#pragma unroll
        for (int i = 0; i < EIGHT; i++) sum[g][i] *= fade;
    }

    // Adds what lanes `step` apart have.
    __device__ void merge(int step) {
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            raise(g, fmaxf(best[g], __shfl_xor_sync(ALL_LANES, best[g], step)));
            total[g] += __shfl_xor_sync(ALL_LANES, total[g], step);
#pragma unroll
            for (int i = 0; i < EIGHT; i++) sum[g][i] += __shfl_xor_sync(ALL_LANES, sum[g][i], step);
        }
    }
};

// Keys `from` to `to` of a sequence; `LANES` neighbouring lanes share a key.
template <int LANES, class C>
__device__ void attend(const AttentionArgs &a, const float (&query)[GROUP][EIGHT],
                       const int32_t *table, int from, int to, int column, State &state) {
    constexpr int KEYS = WARP / LANES;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // All lanes take every turn, as shuffles need all of them.
    for (int turn = from + warp * KEYS * TURN; turn < to; turn += WARPS * KEYS * TURN) {
        int first = turn + lane / LANES * TURN;
        float key[TURN][EIGHT], value[TURN][EIGHT], score[TURN][GROUP];
#pragma unroll
        for (int u = 0; u < TURN; u++) {
            // Behind the end there may be anything, which must not be read.
            int64_t row = first + u < to ? cache_row(a, table, first + u) : -1;
            if (row < 0) {
#pragma unroll
                for (int i = 0; i < EIGHT; i++) key[u][i] = value[u][i] = 0.0f;
                continue;
            }
            load_eight(a.k_cache.row<C>(row) + column, key[u]);
            load_eight(a.v_cache.row<C>(row) + column, value[u]);
        }
#pragma unroll
        for (int u = 0; u < TURN; u++)
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float dot = 0.0f;
#pragma unroll
                for (int i = 0; i < EIGHT; i++) dot += query[g][i] * key[u][i];
#pragma unroll
                for (int step = LANES / 2; step > 0; step /= 2)
                    dot += __shfl_xor_sync(ALL_LANES, dot, step);
                score[u][g] = first + u < to ? dot : MASKED;
            }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float larger = state.best[g];
#pragma unroll
            for (int u = 0; u < TURN; u++) larger = fmaxf(larger, score[u][g]);
            state.raise(g, larger);
#pragma unroll
            for (int u = 0; u < TURN; u++) {
                float weight = exp2f(score[u][g] - larger);
                state.total[g] += weight;
#pragma unroll
                for (int i = 0; i < EIGHT; i++) state.sum[g][i] += weight * value[u][i];
            }
        }
    }
}

// What the warps of a block leave for each other and for the other blocks of the cluster.
template <int DIM> struct Parts {
    float best[WARPS][GROUP], total[WARPS][GROUP], sum[WARPS][GROUP][DIM];
};

// Element `i` of head `g`: the sum of all parts, in their order.
template <int DIM>
__device__ float combined(const cooperative_groups::cluster_group &cluster, Parts<DIM> &mine, int g,
                          int i) {
    float best = LOWEST, total = 0.0f, sum = 0.0f;
    for (unsigned b = 0; b < cluster.num_blocks(); b++) {
        const Parts<DIM> *parts = cluster.map_shared_rank(&mine, b);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float larger = fmaxf(best, parts->best[w][g]);
            float fade = exp2f(best - larger), weight = exp2f(parts->best[w][g] - larger);
            total = total * fade + parts->total[w][g] * weight;
            sum = sum * fade + parts->sum[w][g][i] * weight;
            best = larger;
        }
    }
    return sum / total;
}

// Blocks (row, some heads that share keys, part of the keys); the blocks of a row's heads are a cluster.
template <int DIM> __device__ void decode(const AttentionArgs &a) {
    constexpr int LANES = DIM / EIGHT;
    __shared__ Parts<DIM> parts;
    auto cluster = cooperative_groups::this_cluster();
    int64_t r = blockIdx.x;
    int shared_by = a.heads / a.kv_heads, chunks = (shared_by + GROUP - 1) / GROUP;
    int kv_head = blockIdx.y / chunks, first_head = blockIdx.y % chunks * GROUP;
    int heads = min(GROUP, shared_by - first_head);
    first_head += kv_head * shared_by;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = lane % LANES * EIGHT;
    float query[GROUP][EIGHT] = {};
    with_float(a.queries.dtype, [&](auto t) {
        using T = decltype(t);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            if (g >= heads) continue;
            load_eight(a.queries.row<T>(r) + (first_head + g) * DIM + column, query[g]);
#pragma unroll
            for (int i = 0; i < EIGHT; i++) query[g][i] *= a.scale * LOG2_E;
        }
    });
    int last = a.positions[r], first = first_key(a, last), keys = last + 1 - first;
    int share = (keys + int(gridDim.z) - 1) / int(gridDim.z);
    int from = first + int(blockIdx.z) * share, to = min(from + share, last + 1);
    State state;
    with_any(a.k_cache.dtype, [&](auto c) {
        const int32_t *table = a.tables + a.sequences[r] * a.table_stride;
        attend<LANES, decltype(c)>(a, query, table, from, to, kv_head * DIM + column, state);
    });
#pragma unroll
    for (int step = LANES; step < WARP; step *= 2) state.merge(step);
    if (lane < LANES)
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            parts.best[warp][g] = state.best[g], parts.total[warp][g] = state.total[g];
#pragma unroll
            for (int i = 0; i < EIGHT; i++) parts.sum[warp][g][column + i] = state.sum[g][i];
        }
    cluster.sync();
    with_float(a.out.dtype, [&](auto o) {
        using O = decltype(o);
        O *out = a.out.row<O>(r) + first_head * DIM;
        int index = blockIdx.z * blockDim.x + threadIdx.x, threads = gridDim.z * blockDim.x;
        for (int i = index; i < heads * DIM; i += threads)
            out[i] = from_float<O>(combined(cluster, parts, i / DIM, i % DIM) * a.v_scale);
    });
    cluster.sync(); // Nobody leaves while others read its parts.
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP) attention_decode_64(AttentionArgs a) {
    enter();
    decode<64>(a);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP) attention_decode_128(AttentionArgs a) {
    enter();
    decode<128>(a);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP) attention_decode_256(AttentionArgs a) {
    enter();
    decode<256>(a);
}
