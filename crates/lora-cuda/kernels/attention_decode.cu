// Attention of rows that each are the only one of their sequence (decode), by tensor cores.
//
// Problem: softmax(scale * q K^T) V for up to eight query heads that share a KV head, so that keys are read
//   once for all of them. Queries in f16 or bf16, caches in the same dtype or e4m3, head_dim 64, 96, 128 or
//   256.
// Grid: (chunk of eight query heads, row, split of the keys), four warps a CTA, 16 keys a warp at a time.
//   The CTAs of one row and chunk form a cluster of up to eight (Dao et al., Flash-Decoding, 2023). With
//   `apart` the second extent counts sequences, and a CTA looks for the rows of its sequences that are
//   alone.
// Pipeline: keys and values go from global memory straight into mma fragments, without shared memory. The
//   next keys are loaded once the scores of this tile exist, the next values once these are added. Warps
//   merge their partial softmaxes through shared memory, CTAs through that of the cluster.
// Numerics: mma.sync m16n8k16 with f32 accumulators; ex2.approx; probabilities are rounded to the queries'
//   dtype. Partials are merged in a fixed order.
// Chosen when: no sequence has more than one row, or for single rows beside prompts (`choose_decode` and
//   `choose_for_rest` in ops/attention/mod.rs), which would keep a prefill tile busy one after the other.
//   Keys are split up to about 512 CTAs, which keep the device busy, but not finer than one turn of 64 keys.
//
// GEMMs sum over the head's elements (or the keys) in any order, and any row of a tile may be any key: so a
// thread may hold eight adjacent elements where the instruction's fragment has them elsewhere, which makes
// its loads wide.
#include <cooperative_groups.h>

#include "attention.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int HEADS = 8;       // query heads of a CTA: the columns of an mma
constexpr int KEYS = 16;       // keys of a tile, which a warp takes at a time: the rows of an mma
constexpr int KEY_STEP = 32;   // elements of a key that four lanes load at once, eight each
constexpr int VALUE_STEP = 64; // elements of a value that eight lanes load at once, eight each
// CTAs per SM by head_dim, which bound the registers that keys, values and accumulators may take.
constexpr int CTAS_64 = 4, CTAS_96 = 3, CTAS_128 = 3, CTAS_256 = 2;

// Loads that take no line of the L1, for data that is used once. `volatile` keeps them where the program has
// them, well before their use.
__device__ void load_once(uint4 &to, const void *from) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "l"(from));
}

__device__ void load_once(uint2 &to, const void *from) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(from));
}

// Of two pairs of 16-bit numbers: the low ones as a pair, and the high ones.
__device__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// The query heads of a CTA in shared memory, rows padded by 16 banks so that two of them are read at once.
template <int DIM> struct Queries {
    static constexpr int VECS = DIM / VEC8;
    uint4 rows[HEADS][VECS + 4];

    // `from` is the first of `heads` heads.
    __device__ void fill(const void *from, int heads) {
        for (int i = threadIdx.x; i < HEADS * VECS; i += THREADS)
            rows[i / VECS][i % VECS] =
                i / VECS < heads ? static_cast<const uint4 *>(from)[i] : make_uint4(0, 0, 0, 0);
    }
};

// A thread's fragments of a tile of keys: of two keys, eight of every 32 adjacent elements.
template <int DIM, class C> struct Keys {
    Raw<C> low[DIM / KEY_STEP], high[DIM / KEY_STEP];

    // `row` is the cache row of key `lane % KEYS`.
    __device__ void load(const Mat &cache, int row, int column) {
        int lane = threadIdx.x % WARP, at = column + lane % 4 * VEC8;
        const C *first = cache.row<C>(__shfl_sync(ALL_LANES, row, lane / 4)) + at;
        const C *second = cache.row<C>(__shfl_sync(ALL_LANES, row, lane / 4 + 8)) + at;
#pragma unroll
        for (int k = 0; k < DIM / KEY_STEP; k++) {
            load_once(low[k], first + k * KEY_STEP);
            load_once(high[k], second + k * KEY_STEP);
        }
    }

    // scores = keys queries^T: for keys `lane / 4` and `lane / 4 + 8`, two heads each.
    template <class T> __device__ void score(T, float (&scores)[4], const Queries<DIM> &queries) {
        int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < 4; i++) scores[i] = 0.0f;
#pragma unroll
        for (int k = 0; k < DIM / KEY_STEP; k++) {
            uint4 q = queries.rows[lane / 4][k * 4 + lane % 4];
            uint4 l = convert_vec8(T{}, low[k]), h = convert_vec8(T{}, high[k]);
            mma(T{}, scores, {l.x, h.x, l.y, h.y}, q.x, q.y);
            mma(T{}, scores, {l.z, h.z, l.w, h.w}, q.z, q.w);
        }
    }
};

// A thread's fragments of a tile of values: of four values, eight of every 64 adjacent elements.
template <int DIM, class C> struct Values {
    static constexpr int PARTS = (DIM + VALUE_STEP - 1) / VALUE_STEP;
    Raw<C> v[PARTS][4];

    // Whether head_dim has the thread's elements of a part.
    __device__ static bool has(int part) {
        return DIM % VALUE_STEP == 0 || part * VALUE_STEP + threadIdx.x % WARP / 4 * VEC8 < DIM;
    }

    __device__ void load(const Mat &cache, int row, int column) {
        int lane = threadIdx.x % WARP, at = column + lane / 4 * VEC8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = lane % 4 * 2 + i / 2 * 8 + i % 2;
            const C *from = cache.row<C>(__shfl_sync(ALL_LANES, row, key)) + at;
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                if (has(p)) load_once(v[p][i], from + p * VALUE_STEP);
                else v[p][i] = {};
            }
        }
    }
};

// A partial softmax, by which warps and CTAs exchange their results: the row maximum, row sum and weighted
// values of each head.
template <int DIM> struct Partial {
    float row_max[HEADS], row_sum[HEADS], acc[HEADS][DIM];
};

template <int DIM> struct Smem {
    Queries<DIM> queries;
    Partial<DIM> partials[WARPS], merged; // By warp, and of the CTA.
};

// A thread's online softmax of two heads: row maximum, row sum, and of every 64 adjacent elements of the
// weighted values eight, two per mma.
template <int DIM, class T, class C> struct State {
    static constexpr int PARTS = Values<DIM, C>::PARTS;
    float row_max[2] = {LOWEST, LOWEST}, row_sum[2] = {0.0f, 0.0f}, acc[PARTS][4][4] = {};

    // Turns scores into unnormalised probabilities, and rescales the accumulators to the new row maximum.
    __device__ void online_softmax(float (&scores)[4]) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float new_max = fmaxf(scores[h], scores[h + 2]);
#pragma unroll
            for (int step = 4; step < WARP; step *= 2)
                new_max = fmaxf(new_max, __shfl_xor_sync(ALL_LANES, new_max, step));
            new_max = fmaxf(new_max, row_max[h]);
            float rescale = exp2_approx(row_max[h] - new_max);
            row_max[h] = new_max;
            scores[h] = exp2_approx(scores[h] - new_max);
            scores[h + 2] = exp2_approx(scores[h + 2] - new_max);
            row_sum[h] = row_sum[h] * rescale + scores[h] + scores[h + 2];
#pragma unroll
            for (int p = 0; p < PARTS; p++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[p][i][h] *= rescale, acc[p][i][h + 2] *= rescale;
        }
    }

    // acc += P V for a tile.
    __device__ void add(const float (&weights)[4], const Values<DIM, C> &values) {
        uint32_t low = movmatrix_trans(pack2(T{}, weights[0], weights[1]));
        uint32_t high = movmatrix_trans(pack2(T{}, weights[2], weights[3]));
        auto multiply = [&](float (&to)[4], uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
            mma(T{}, to, {low_halves(v0, v1), high_halves(v0, v1), low_halves(v2, v3), high_halves(v2, v3)},
                low, high);
        };
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            uint4 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = convert_vec8(T{}, values.v[p][i]);
            multiply(acc[p][0], v[0].x, v[1].x, v[2].x, v[3].x);
            multiply(acc[p][1], v[0].y, v[1].y, v[2].y, v[3].y);
            multiply(acc[p][2], v[0].z, v[1].z, v[2].z, v[3].z);
            multiply(acc[p][3], v[0].w, v[1].w, v[2].w, v[3].w);
        }
    }

    __device__ void store(Partial<DIM> &to) const {
        int lane = threadIdx.x % WARP;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int head = lane % 4 * 2 + h;
            float sum = row_sum[h];
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
            if (lane < 4) to.row_max[head] = row_max[h], to.row_sum[head] = sum;
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                if (!Values<DIM, C>::has(p)) continue;
                float *out = &to.acc[head][p * VALUE_STEP + lane / 4 * VEC8];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    out[2 * i] = acc[p][i][h];
                    out[2 * i + 1] = acc[p][i][h + 2];
                }
            }
        }
    }
};

// The keys of a row that a warp takes: tiles that are `step` keys apart.
struct Span {
    int base, last, step;

    // The warps of a cluster take tiles in turn, CTA by CTA, so that few tiles are spread over all CTAs.
    __device__ Span(const AttentionArgs &a, int position) {
        int turn = threadIdx.x / WARP * gridDim.z + blockIdx.z;
        base = first_key(a, position) + turn * KEYS, last = position, step = WARPS * gridDim.z * KEYS;
    }

    // The cache row of key `lane % KEYS` of the tile at `from`. Behind the last key, block table and cache
    // may hold anything, so the last key is read again; its copies are masked.
    __device__ int row(const AttentionArgs &a, const int32_t *table, int from) const {
        int p = min(from + int(threadIdx.x % KEYS), last);
        return static_cast<int>(cache_row(a, table, p));
    }
};

// The main loop of a warp. The next keys and values are loaded as soon as their registers are free.
template <int DIM, class T, class C>
__device__ void attend(const AttentionArgs &a, const Queries<DIM> &queries, Span span, const int32_t *table,
                       int column, State<DIM, T, C> &state) {
    Keys<DIM, C> keys;
    Values<DIM, C> values;
    int next = 0;
    if (span.base <= span.last) {
        int row = span.row(a, table, span.base);
        next = span.row(a, table, span.base + span.step);
        keys.load(a.k_cache, row, column);
        values.load(a.v_cache, row, column);
    }
    __syncthreads(); // The queries are in shared memory.
    for (; span.base <= span.last; span.base += span.step) {
        bool more = span.base + span.step <= span.last;
        float scores[4];
        keys.score(T{}, scores, queries);
        if (more) keys.load(a.k_cache, next, column);
        int after = span.row(a, table, span.base + 2 * span.step);
        int left = span.last - span.base - threadIdx.x % WARP / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) scores[i] = left >= i / 2 * 8 ? scores[i] * (a.scale * LOG2_E) : MASKED;
        state.online_softmax(scores);
        state.add(scores, values);
        if (more) values.load(a.v_cache, next, column);
        next = after;
    }
}

// Merges element `i` of head `g` of several partial softmaxes, in their order.
struct Merged {
    float row_max = LOWEST, row_sum = 0.0f, acc = 0.0f;

    template <class F> __device__ Merged(int count, int g, int i, F &&part) {
#pragma unroll 4
        for (int n = 0; n < count; n++) row_max = fmaxf(row_max, part(n)->row_max[g]);
#pragma unroll 4
        for (int n = 0; n < count; n++) {
            float weight = exp2_approx(part(n)->row_max[g] - row_max);
            row_sum += part(n)->row_sum[g] * weight;
            acc += part(n)->acc[g][i] * weight;
        }
    }
};

// Attention of row `r`, for up to eight query heads and a split of the keys.
template <int DIM, class T, class C>
__device__ void decode(const AttentionArgs &a, Smem<DIM> &smem, int r) {
    int group = a.heads / a.kv_heads, chunks = (group + HEADS - 1) / HEADS;
    int kv_head = blockIdx.x / chunks, first_head = blockIdx.x % chunks * HEADS;
    int heads = min(HEADS, group - first_head);
    first_head += kv_head * group;
    int position = a.positions[r], sequence = a.sequences[r];
    smem.queries.fill(a.queries.row<T>(r) + first_head * DIM, heads);
    State<DIM, T, C> state;
    attend<DIM, T, C>(a, smem.queries, Span(a, position), a.tables + sequence * a.table_stride, kv_head * DIM,
                      state);
    state.store(smem.partials[threadIdx.x / WARP]);
    __syncthreads();
    auto of_warp = [&](int n) { return &smem.partials[n]; };
    with_float(a.out.dtype, [&](auto o) {
        using O = decltype(o);
        O *out = a.out.row<O>(r) + first_head * DIM;
        auto write = [&](int e, const Merged &m) { out[e] = from_float<O>(m.acc / m.row_sum * a.v_scale); };
        if (gridDim.z == 1) {
            for (int e = threadIdx.x; e < heads * DIM; e += THREADS)
                write(e, Merged(WARPS, e / DIM, e % DIM, of_warp));
            return;
        }
        auto cluster = cooperative_groups::this_cluster();
        for (int e = threadIdx.x; e < heads * DIM; e += THREADS) {
            Merged m(WARPS, e / DIM, e % DIM, of_warp);
            smem.merged.acc[e / DIM][e % DIM] = m.acc;
            if (e % DIM > 0) continue;
            smem.merged.row_max[e / DIM] = m.row_max, smem.merged.row_sum[e / DIM] = m.row_sum;
        }
        cluster.sync();
        auto of_block = [&](int n) { return cluster.map_shared_rank(&smem.merged, n); };
        int index = blockIdx.z * THREADS + threadIdx.x, threads = gridDim.z * THREADS;
        for (int e = index; e < heads * DIM; e += threads)
            write(e, Merged(gridDim.z, e / DIM, e % DIM, of_block));
        cluster.sync(); // A CTA must not exit while others read its shared memory.
    });
}

// The next row after `r` that is alone and of one of this CTA's sequences, or else the number of rows.
__device__ int next_alone(const AttentionArgs &a, int r) {
    int rows = a.queries.rows, found = rows;
#pragma unroll 8
    for (int i = r + 1 + threadIdx.x; i < rows; i += THREADS)
        if (a.sequences[i] % int(gridDim.y) == int(blockIdx.y) && is_alone(a, i)) found = min(found, i);
    return -block_reduce(-found, -rows, Max());
}

// Grid (chunk of eight query heads, row, split of the keys); with `apart` the second extent counts sequences.
// A CTA goes on with other rows if the grid has fewer. All heads of a row run together, as their keys are
// adjacent in memory.
template <int DIM, class T, class C>
__device__ void decode_rows(const AttentionArgs &a, Smem<DIM> &smem) {
    int r = a.apart ? next_alone(a, -1) : int(blockIdx.y);
    while (r < a.queries.rows) {
        decode<DIM, T, C>(a, smem, r);
        r = a.apart ? next_alone(a, r) : r + int(gridDim.y);
        __syncthreads(); // The last row's partials have been read.
    }
}

// Keys and values are of the queries' dtype or e4m3.
template <int DIM> __device__ void decode_any(const AttentionArgs &a) {
    __shared__ Smem<DIM> smem;
    with_16bit(a.queries.dtype, [&](auto t) {
        using T = decltype(t);
        if (a.k_cache.dtype == DTYPE_F8) decode_rows<DIM, T, f8>(a, smem);
        else decode_rows<DIM, T, T>(a, smem);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_64) attention_decode_64(AttentionArgs a) {
    pdl_prologue();
    decode_any<64>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_96) attention_decode_96(AttentionArgs a) {
    pdl_prologue();
    decode_any<96>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_128) attention_decode_128(AttentionArgs a) {
    pdl_prologue();
    decode_any<128>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_256) attention_decode_256(AttentionArgs a) {
    pdl_prologue();
    decode_any<256>(a);
}
