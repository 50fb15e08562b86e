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
//   `choose_for_rest` in ops/attention.rs), which would keep a prefill tile busy one after the other. Keys
//   are split up to about 512 CTAs, which keep the device busy, but not finer than one turn of 64 keys.
//
// GEMMs sum over the head's elements (or the keys) in any order, and any row of a tile may be any key: so a
// thread may hold eight adjacent elements where the instruction's fragment has them elsewhere, which makes
// its loads wide.
#include <cooperative_groups.h>

#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int HEADS = 8; // query heads of a block
constexpr int KEYS = 16; // keys of a tile, which a warp takes at a time

// sums += a b for tiles [16, 16] and [16, 8], in the fragments of `mma.m16n8k16`.
__device__ void mma(bf16, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ void mma(f16, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A matrix [8, 8] of 16 bits transposed; lane i has elements i % 4 * 2 and the next of row i / 4.
__device__ uint32_t transposed(uint32_t v) {
    uint32_t t;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v));
    return t;
}

// Loads of what is used once. They stay in the order of the program, well before their use.
__device__ void fetch(uint4 &to, const void *from) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "l"(from));
}

__device__ void fetch(uint2 &to, const void *from) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(to.x), "=r"(to.y)
                 : "l"(from));
}

// Two neighbours of one row and two of another: the low ones as a register, and the high ones.
__device__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// The query heads of a block, in vectors of 8. Rows begin 16 banks apart, so that two of them are read at
// once.
template <int DIM> struct Queries {
    static constexpr int EIGHTS = DIM / VEC8;
    uint4 rows[HEADS][EIGHTS + 4];

    // `from` is the first of `heads` heads.
    __device__ void fill(const void *from, int heads) {
        for (int i = threadIdx.x; i < HEADS * EIGHTS; i += WARPS * WARP)
            rows[i / EIGHTS][i % EIGHTS] = i / EIGHTS < heads ? static_cast<const uint4 *>(from)[i]
                                                              : make_uint4(0, 0, 0, 0);
    }
};

// A thread's part of a tile of keys: eight of every 32 neighbours of two of them.
template <int DIM, class C> struct Keys {
    Raw<C> low[DIM / 32], high[DIM / 32];

    // `row` is that of key `lane % KEYS`.
    __device__ void load(const Mat &cache, int row, int column) {
        int lane = threadIdx.x % WARP, at = column + lane % 4 * VEC8;
        const C *first = cache.row<C>(__shfl_sync(ALL_LANES, row, lane / 4)) + at;
        const C *second = cache.row<C>(__shfl_sync(ALL_LANES, row, lane / 4 + 8)) + at;
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) {
            fetch(low[k], first + k * 32);
            fetch(high[k], second + k * 32);
        }
    }

    // Their products with the queries: keys `lane / 4` and that plus eight with two heads.
    template <class T> __device__ void score(T, float (&scores)[4], const Queries<DIM> &queries) {
        int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < 4; i++) scores[i] = 0.0f;
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) {
            uint4 q = queries.rows[lane / 4][k * 4 + lane % 4];
            uint4 l = widened(T{}, low[k]), h = widened(T{}, high[k]);
            mma(T{}, scores, {l.x, h.x, l.y, h.y}, q.x, q.y);
            mma(T{}, scores, {l.z, h.z, l.w, h.w}, q.z, q.w);
        }
    }
};

// A thread's part of a tile of values: eight of every 64 neighbours of four of them.
template <int DIM, class C> struct Values {
    static constexpr int PARTS = (DIM + 63) / 64;
    Raw<C> v[PARTS][4];

    // Whether the row has a thread's neighbours of a part.
    __device__ static bool has(int part) {
        return DIM % 64 == 0 || part * 64 + threadIdx.x % WARP / 4 * VEC8 < DIM;
    }

    __device__ void load(const Mat &cache, int row, int column) {
        int lane = threadIdx.x % WARP, at = column + lane / 4 * VEC8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = lane % 4 * 2 + i / 2 * 8 + i % 2;
            const C *from = cache.row<C>(__shfl_sync(ALL_LANES, row, key)) + at;
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                if (has(p)) fetch(v[p][i], from + p * 64);
                else v[p][i] = {};
            }
        }
    }
};

// What the warps of a block leave for each other, and the blocks of a cluster.
template <int DIM> struct Part {
    float best[HEADS], total[HEADS], sum[HEADS][DIM];
};

template <int DIM> struct Shared {
    Queries<DIM> queries;
    Part<DIM> parts[WARPS], whole;
};

// Running maximum, sum and weighted values of two heads: of every 64 neighbours eight, two for an
// instruction.
template <int DIM, class T, class C> struct State {
    static constexpr int PARTS = Values<DIM, C>::PARTS;
    float best[2] = {LOWEST, LOWEST}, total[2] = {0.0f, 0.0f}, sums[PARTS][4][4] = {};

    // Turns scores into weights, and fades what was summed with a smaller maximum.
    __device__ void online_softmax(float (&scores)[4]) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float larger = fmaxf(scores[h], scores[h + 2]);
#pragma unroll
            for (int step = 4; step < WARP; step *= 2)
                larger = fmaxf(larger, __shfl_xor_sync(ALL_LANES, larger, step));
            larger = fmaxf(larger, best[h]);
            float rescale = power_of_two(best[h] - larger);
            best[h] = larger;
            scores[h] = power_of_two(scores[h] - larger);
            scores[h + 2] = power_of_two(scores[h + 2] - larger);
            total[h] = total[h] * rescale + scores[h] + scores[h + 2];
#pragma unroll
            for (int p = 0; p < PARTS; p++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[p][i][h] *= rescale, sums[p][i][h + 2] *= rescale;
        }
    }

    __device__ void add(const float (&weights)[4], const Values<DIM, C> &values) {
        uint32_t low = transposed(pair(T{}, weights[0], weights[1]));
        uint32_t high = transposed(pair(T{}, weights[2], weights[3]));
        auto product = [&](float (&to)[4], uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
            mma(T{}, to,
                {low_halves(v0, v1), high_halves(v0, v1), low_halves(v2, v3), high_halves(v2, v3)},
                low, high);
        };
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            uint4 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = widened(T{}, values.v[p][i]);
            product(sums[p][0], v[0].x, v[1].x, v[2].x, v[3].x);
            product(sums[p][1], v[0].y, v[1].y, v[2].y, v[3].y);
            product(sums[p][2], v[0].z, v[1].z, v[2].z, v[3].z);
            product(sums[p][3], v[0].w, v[1].w, v[2].w, v[3].w);
        }
    }

    __device__ void store(Part<DIM> &to) const {
        int lane = threadIdx.x % WARP;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int head = lane % 4 * 2 + h;
            float all = total[h];
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) all += __shfl_xor_sync(ALL_LANES, all, step);
            if (lane < 4) to.best[head] = best[h], to.total[head] = all;
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                if (!Values<DIM, C>::has(p)) continue;
                float *sum = &to.sum[head][p * 64 + lane / 4 * VEC8];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sum[2 * i] = sums[p][i][h];
                    sum[2 * i + 1] = sums[p][i][h + 2];
                }
            }
        }
    }
};

// The keys of a row that a warp takes: tiles `step` keys apart.
struct Span {
    int base, last, step;

    // The warps of a cluster take tiles in turn, so that few of them are spread over its blocks.
    __device__ Span(const AttentionArgs &a, int position) {
        int turn = threadIdx.x / WARP * gridDim.z + blockIdx.z;
        base = first_key(a, position) + turn * KEYS, last = position, step = WARPS * gridDim.z * KEYS;
    }

    // The row of the caches of key `lane % KEYS` of the tile at `from`. Behind the end there may be
    // anything, which must not be read; the last key may, and its copies weigh nothing.
    __device__ int row(const AttentionArgs &a, const int32_t *table, int from) const {
        int p = min(from + int(threadIdx.x % KEYS), last);
        return static_cast<int>(cache_row(a, table, p));
    }
};

// A warp's tiles. The next keys and values are asked for as soon as registers are free.
template <int DIM, class T, class C>
__device__ void attend(const AttentionArgs &a, const Queries<DIM> &queries, Span span,
                       const int32_t *table, int column, State<DIM, T, C> &state) {
    Keys<DIM, C> keys;
    Values<DIM, C> values;
    int next = 0;
    if (span.base <= span.last) {
        int row = span.row(a, table, span.base);
        next = span.row(a, table, span.base + span.step);
        keys.load(a.k_cache, row, column);
        values.load(a.v_cache, row, column);
    }
    __syncthreads(); // The queries are there.
    for (; span.base <= span.last; span.base += span.step) {
        bool more = span.base + span.step <= span.last;
        float scores[4];
        keys.score(T{}, scores, queries);
        if (more) keys.load(a.k_cache, next, column);
        int after = span.row(a, table, span.base + 2 * span.step);
        int left = span.last - span.base - threadIdx.x % WARP / 4;
#pragma unroll
        for (int i = 0; i < 4; i++)
            scores[i] = left >= i / 2 * 8 ? scores[i] * (a.scale * LOG2_E) : MASKED;
        state.online_softmax(scores);
        state.add(scores, values);
        if (more) values.load(a.v_cache, next, column);
        next = after;
    }
}

// Element `i` of head `g` of several parts, in their order.
struct Merged {
    float best = LOWEST, total = 0.0f, sum = 0.0f;

    template <class F> __device__ Merged(int count, int g, int i, F &&part) {
#pragma unroll 4
        for (int n = 0; n < count; n++) best = fmaxf(best, part(n)->best[g]);
#pragma unroll 4
        for (int n = 0; n < count; n++) {
            float weight = power_of_two(part(n)->best[g] - best);
            total += part(n)->total[g] * weight;
            sum += part(n)->sum[g][i] * weight;
        }
    }
};

// Row `r`; blocks (some heads that share keys, any, part of the keys).
template <int DIM, class T, class C>
__device__ void decode(const AttentionArgs &a, Shared<DIM> &shared, int r) {
    int shared_by = a.heads / a.kv_heads, chunks = (shared_by + HEADS - 1) / HEADS;
    int kv_head = blockIdx.x / chunks, first_head = blockIdx.x % chunks * HEADS;
    int heads = min(HEADS, shared_by - first_head);
    first_head += kv_head * shared_by;
    int position = a.positions[r], sequence = a.sequences[r];
    shared.queries.fill(a.queries.row<T>(r) + first_head * DIM, heads);
    State<DIM, T, C> state;
    attend<DIM, T, C>(a, shared.queries, Span(a, position), a.tables + sequence * a.table_stride,
                      kv_head * DIM, state);
    state.store(shared.parts[threadIdx.x / WARP]);
    __syncthreads();
    auto of_warp = [&](int n) { return &shared.parts[n]; };
    with_float(a.out.dtype, [&](auto o) {
        using O = decltype(o);
        O *out = a.out.row<O>(r) + first_head * DIM;
        auto write = [&](int e, const Merged &m) {
            out[e] = from_float<O>(m.sum / m.total * a.v_scale);
        };
        if (gridDim.z == 1) {
            for (int e = threadIdx.x; e < heads * DIM; e += WARPS * WARP)
                write(e, Merged(WARPS, e / DIM, e % DIM, of_warp));
            return;
        }
        auto cluster = cooperative_groups::this_cluster();
        for (int e = threadIdx.x; e < heads * DIM; e += WARPS * WARP) {
            Merged m(WARPS, e / DIM, e % DIM, of_warp);
            shared.whole.sum[e / DIM][e % DIM] = m.sum;
            if (e % DIM > 0) continue;
            shared.whole.best[e / DIM] = m.best, shared.whole.total[e / DIM] = m.total;
        }
        cluster.sync();
        auto of_block = [&](int n) { return cluster.map_shared_rank(&shared.whole, n); };
        int index = blockIdx.z * WARPS * WARP + threadIdx.x, threads = gridDim.z * WARPS * WARP;
        for (int e = index; e < heads * DIM; e += threads)
            write(e, Merged(gridDim.z, e / DIM, e % DIM, of_block));
        cluster.sync(); // Nobody leaves while others read its sums.
    });
}

// The first row behind row `r` that is alone, of a block's sequences; the number of rows if there is none.
__device__ int next_alone(const AttentionArgs &a, int r) {
    int rows = a.queries.rows, found = rows;
#pragma unroll 8
    for (int i = r + 1 + threadIdx.x; i < rows; i += WARPS * WARP)
        if (a.sequences[i] % int(gridDim.y) == int(blockIdx.y) && is_alone(a, i)) found = min(found, i);
    return -block_reduce(-found, -rows, Max());
}

// Blocks (some heads that share keys, row, part of the keys), or, for rows apart, sequences rather than rows, and
// both in turn where there are more of them; those of a row's heads are a cluster. All heads of a row run together,
// as their keys are neighbours in memory.
template <int DIM, class T, class C>
__device__ void decode_rows(const AttentionArgs &a, Shared<DIM> &shared) {
    int r = a.apart ? next_alone(a, -1) : int(blockIdx.y);
    while (r < a.queries.rows) {
        decode<DIM, T, C>(a, shared, r);
        r = a.apart ? next_alone(a, r) : r + int(gridDim.y);
        __syncthreads(); // The last row's sums are read.
    }
}

// Keys and values are of the queries' type or in e4m3.
template <int DIM> __device__ void decode_any(const AttentionArgs &a) {
    __shared__ Shared<DIM> shared;
    with_16bit(a.queries.dtype, [&](auto t) {
        using T = decltype(t);
        if (a.k_cache.dtype == DTYPE_F8) decode_rows<DIM, T, f8>(a, shared);
        else decode_rows<DIM, T, T>(a, shared);
    });
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 4) attention_decode_64(AttentionArgs a) {
    pdl_prologue();
    decode_any<64>(a);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 3) attention_decode_96(AttentionArgs a) {
    pdl_prologue();
    decode_any<96>(a);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 3) attention_decode_128(AttentionArgs a) {
    pdl_prologue();
    decode_any<128>(a);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 2) attention_decode_256(AttentionArgs a) {
    pdl_prologue();
    decode_any<256>(a);
}
