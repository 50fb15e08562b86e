// Attention of several rows of a sequence (prompts), by wgmma (Shah et al., FlashAttention-3, 2024).
//
// Problem: softmax(scale * q K^T) V for a tile of rows and all query heads that share a KV head. Queries in
//   f16 or bf16, caches in the same dtype or e4m3, head_dim 64 or 128.
// Grid: (KV head, tile of rows), the last rows first as they have the most keys. Three warpgroups a CTA
//   with 64 (row, head) pairs each; all of them both copy and multiply. A tile may hold rows of several
//   sequences, which are taken one run after another.
// Pipeline: K and V tiles of 64 keys, double-buffered in shared memory by cp.async (e4m3 through
//   registers). Keys are two tiles and values one tile ahead of the values that are multiplied; block-table
//   lookups are one more ahead. The softmax of a tile overlaps the P V GEMM of the tile before.
// Numerics: wgmma with f32 accumulators; ex2.approx; probabilities are rounded to the queries' dtype.
// Chosen when: a sequence has several rows and FlashInfer's kernel does not fit (`choose` in
//   ops/attention.rs): f16, FP8 caches, rows that the host has not planned, steps that are recorded. Where
//   both fit, FlashInfer's takes 0.5 to 0.8 of the time (bench/evidence, "attention of prompts").
#include "attention.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int GROUPS = 3;           // groups of four warps, which issue products together
constexpr int GROUP_M = 64;         // pairs of row and head of a group
constexpr int M = GROUPS * GROUP_M; // pairs of a block
constexpr int KEYS = 64;            // keys of a tile
constexpr int GROUP_THREADS = 4 * WARP, THREADS = GROUPS * GROUP_THREADS;

// Tiles of shared memory have columns of 64 elements, 128 bytes a row; the vectors of 8 of a row are
// swapped by its number, as the instructions expect ("128-byte swizzling"). Eight rows are 1024 bytes.
constexpr int COLUMN = 64, ALIGNMENT = 1024;

// Place of eight neighbours in a tile of `rows` rows, in elements.
__device__ int place(int rows, int row, int eight) {
    return eight / 8 * rows * COLUMN + row * COLUMN + ((eight ^ row) & 7) * VEC8;
}

// Describes an operand in shared memory that begins at `p`; `apart` is the distance of its columns in
// bytes, of which only operands that are transposed have several.
__device__ uint64_t operand(const void *p, int apart) {
    uint64_t start = (smem_address(p) & 0x3ffff) >> 4, swizzled = uint64_t(1) << 62;
    return start | uint64_t(apart >> 4) << 16 | uint64_t(ALIGNMENT >> 4) << 32 | swizzled;
}

// What was written to shared memory, or is on its way there, is seen by the instructions of groups.
__device__ void cp_async_wait_and_fence() {
    asm volatile("cp.async.wait_all;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

#define FOUR(v, i) "+f"(v[i]), "+f"(v[i + 1]), "+f"(v[i + 2]), "+f"(v[i + 3])
#define SIXTEEN(v, i) FOUR(v, i), FOUR(v, i + 4), FOUR(v, i + 8), FOUR(v, i + 12)
#define REGISTERS_32                                                                               \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "  \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                               \
    REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "   \
                 "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Waits for all batches but the last `LATER`, whose sums may not be touched.
template <int LATER> __device__ void await(float (&sums)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;"
                 : SIXTEEN(sums, 0), SIXTEEN(sums, 16)
                 : "n"(LATER)
                 : "memory");
}

template <int LATER> __device__ void await(float (&sums)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned %64;"
                 : SIXTEEN(sums, 0), SIXTEEN(sums, 16), SIXTEEN(sums, 32), SIXTEEN(sums, 48)
                 : "n"(LATER)
                 : "memory");
}

// Products of a group, for both types: `score` is sums = a b^T (+ sums) for a [64, 16] and b [64, 16]
// in shared memory, `add` is sums += a b for a [64, 16] in registers, laid out as the sums of `score`,
// and b [16, 64] or [16, 128] in shared memory.
#define PRODUCTS(T, NAME)                                                                          \
    __device__ void score(T, float(&sums)[32], uint64_t a, uint64_t b, bool add) {                 \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"                            \
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " REGISTERS_32  \
                     "}, %32, %33, p, 1, 1, 0, 0;\n\t}"                                            \
                     : SIXTEEN(sums, 0), SIXTEEN(sums, 16)                                         \
                     : "l"(a), "l"(b), "r"(int(add)));                                             \
    }                                                                                              \
    __device__ void add(T, float(&sums)[32], const uint32_t(&a)[4], uint64_t b) {                  \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " REGISTERS_32  \
                     "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                   \
                     : SIXTEEN(sums, 0), SIXTEEN(sums, 16)                                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }                                                                                              \
    __device__ void add(T, float(&sums)[64], const uint32_t(&a)[4], uint64_t b) {                  \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " REGISTERS_64 \
                     "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                   \
                     : SIXTEEN(sums, 0), SIXTEEN(sums, 16), SIXTEEN(sums, 32), SIXTEEN(sums, 48)   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }
PRODUCTS(bf16, "bf16")
PRODUCTS(f16, "f16")

// Neighbouring rows of one sequence, and the keys that any of them attends to.
struct Run {
    int begin, end;               // rows of the tile
    int least, first, last;       // the earliest position, and the keys
    const int32_t *table;
};

// The sequence of rows that are left to another kernel.
constexpr int NOT_OURS = -1;

// Rows of a tile.
struct Rows {
    int sequence[M], position[M];

    // Every warp finds it for itself.
    __device__ Run run(const AttentionArgs &a, int begin, int count) const {
        int lane = threadIdx.x % WARP, end = count, least = position[begin], most = least;
        for (int i = begin + lane; i < count; i += WARP)
            if (sequence[i] != sequence[begin]) end = min(end, i);
        end = __reduce_min_sync(ALL_LANES, end);
        for (int i = begin + lane; i < end; i += WARP) {
            least = min(least, position[i]);
            most = max(most, position[i]);
        }
        least = __reduce_min_sync(ALL_LANES, least), most = __reduce_max_sync(ALL_LANES, most);
        const int32_t *table = a.tables + sequence[begin] * a.table_stride;
        return {begin, end, least, first_key(a, least), most, table};
    }
};

// A thread's parts of a tile of keys or values: the same eight of every `STEP`th row.
template <int DIM, class T, class C> struct KvLoader {
    static constexpr int EIGHTS = DIM / VEC8, STEP = THREADS / EIGHTS, PARTS = (KEYS + STEP - 1) / STEP;
    static constexpr bool DIRECT = sizeof(C) == sizeof(T);
    static_assert(STEP % 8 == 0, "vectors of 8 of all parts are swapped alike");
    Raw<C> raw[PARTS]; // What is not brought directly.

    __device__ static int first() { return threadIdx.x / EIGHTS; }
    __device__ static bool has(int part) {
        return (part + 1) * STEP <= KEYS || first() + part * STEP < KEYS;
    }

    // Starts to bring the rows `rows` of a cache to `to`.
    __device__ void start(const Mat &cache, const int *rows, int column, T *to) {
        int eight = threadIdx.x % EIGHTS;
        const C *from = static_cast<const C *>(cache.data) + column + eight * VEC8;
        to += place(KEYS, first(), eight);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            if (!has(i)) continue;
            const C *row = from + rows[first() + i * STEP] * cache.row_stride;
            if constexpr (DIRECT) cp_async_16(to + i * STEP * COLUMN, row, true);
            else raw[i] = *reinterpret_cast<const Raw<C> *>(row);
        }
    }

    __device__ void finish(T *to) const {
        if constexpr (DIRECT) return;
        to += place(KEYS, first(), threadIdx.x % EIGHTS);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (has(i)) *reinterpret_cast<uint4 *>(to + i * STEP * COLUMN) = convert_vec8(T{}, raw[i]);
    }
};

// A group's pairs of row and head; a thread has parts of two of them, eight apart.
template <int DIM, class T> struct Pairs {
    float best[2], total[2], sums[DIM / 2];
    uint32_t taken[KEYS / 16][4]; // Weights.
    int row[2], position[2]; // Rows of the tile; behind them, numbers that no run has.

    // Starts the products of the queries and a tile of keys.
    __device__ void score(float (&scores)[KEYS / 2], const T *queries, const T *keys) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DIM; k += 16) {
            int inside = k % COLUMN, column = k / COLUMN;
            ::score(T{}, scores, operand(queries + column * M * COLUMN + inside, 16),
                    operand(keys + column * KEYS * COLUMN + inside, 16), k > 0);
        }
        wgmma_commit();
    }

    __device__ void mask(float (&scores)[KEYS / 2], const Run &run, int base, int window) {
        int quad = threadIdx.x % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bool ours = row[half] >= run.begin && row[half] < run.end;
            // The keys of the tile from `from` to before `to` are seen.
            int to = ours ? position[half] - base + 1 : 0, from = window > 0 ? to - window : 0;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int key = n * 8 + quad * 2 + i;
                    if (key >= to || key < from) scores[n * 4 + half * 2 + i] = MASKED;
                }
        }
    }

    // Turns scores into weights, once they are multiplied by `factor`, which is not negative. What was
    // summed with a smaller maximum is to be multiplied by `rescale`.
    __device__ void online_softmax(float (&scores)[KEYS / 2], float factor, float (&rescale)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float larger = MASKED;
#pragma unroll
            for (int n = 0; n < KEYS / 2; n += 4)
                larger = fmaxf(larger, fmaxf(scores[n + 2 * half], scores[n + 2 * half + 1]));
            larger = fmaxf(larger, __shfl_xor_sync(ALL_LANES, larger, 1));
            larger = fmaxf(larger, __shfl_xor_sync(ALL_LANES, larger, 2));
            larger = fmaxf(larger * factor, best[half]);
            rescale[half] = exp2_approx(best[half] - larger);
            best[half] = larger;
            total[half] *= rescale[half];
#pragma unroll
            for (int n = 0; n < KEYS / 2; n += 4)
#pragma unroll
                for (int i = n + 2 * half; i < n + 2 * half + 2; i++) {
                    scores[i] = exp2_approx(fmaf(scores[i], factor, -larger));
                    total[half] += scores[i];
                }
        }
    }

    // Takes weights for the next `add`.
    __device__ void take(const float (&weights)[KEYS / 2], const float (&rescale)[2]) {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) sums[i] *= rescale[i / 2 % 2];
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            taken[i / 4][i % 4] = pack2(T{}, weights[2 * i], weights[2 * i + 1]);
    }

    // Starts the product of the weights and a tile of values.
    __device__ void add(const T *values) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
            ::add(T{}, sums, taken[k], operand(values + k * 16 * COLUMN, KEYS * COLUMN * sizeof(T)));
        wgmma_commit();
    }
};

// Operands in shared memory, all of which begin at multiples of `ALIGNMENT`.
template <int DIM, class T> struct Tiles {
    T queries[M * DIM], keys[2][KEYS * DIM], values[2][KEYS * DIM];
};

// Rows of the caches of four tiles of keys in turn.
using Places = int[4][KEYS];

// The keys of a run, tile by tile. Keys are brought two tiles ahead of the values that are added, values
// one, and rows are read from the block table one more ahead.
template <int DIM, class T, class C> struct Pass {
    const AttentionArgs &a;
    const Run &run;
    Tiles<DIM, T> &tiles;
    Places &places;
    int column, count; // `count`: rows of the block
    KvLoader<DIM, T, C> keys, values;

    // Behind the end there may be anything, which must not be read; the last key may, and its copies are
    // masked.
    __device__ int row(int tile) const {
        int key = min(run.first + tile * KEYS + int(threadIdx.x), run.last);
        return threadIdx.x < KEYS ? int(cache_row(a, run.table, key)) : 0;
    }

    __device__ void start_keys(int tile) {
        keys.start(a.k_cache, places[tile % 4], column, tiles.keys[tile % 2]);
    }

    __device__ void start_values(int tile) {
        values.start(a.v_cache, places[tile % 4], column, tiles.values[tile % 2]);
    }

    // Products of queries and keys become weights.
    __device__ void online_softmax(int tile, float (&scores)[KEYS / 2], float (&rescale)[2], Pairs<DIM, T> &pairs) {
        int base = run.first + tile * KEYS;
        float factor = a.scale * LOG2_E;
        bool whole = run.begin == 0 && run.end == count && base + KEYS - 1 <= run.least &&
                     (a.window == 0 || run.last - base < a.window);
        if (!whole || factor < 0.0f) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) scores[i] *= factor;
            pairs.mask(scores, run, base, a.window);
            factor = 1.0f;
        }
        pairs.online_softmax(scores, factor, rescale);
    }

    __device__ void attend(Pairs<DIM, T> &pairs) {
        const T *queries = tiles.queries + threadIdx.x / GROUP_THREADS * GROUP_M * COLUMN;
        int last = (run.last - run.first) / KEYS, upcoming = row(2);
        float scores[KEYS / 2], rescale[2];
        for (int tile = 0; tile < 2; tile++) {
            int first = row(tile);
            if (threadIdx.x < KEYS) places[tile][threadIdx.x] = first;
        }
        __syncthreads();
        start_keys(0);
        keys.finish(tiles.keys[0]);
        cp_async_wait_and_fence();
        __syncthreads();
        if (last > 0) start_keys(1);
        start_values(0);
        pairs.score(scores, queries, tiles.keys[0]);
        await<0>(scores);
        online_softmax(0, scores, rescale, pairs);
        // The last products of a turn are awaited in the next: the compiler would not let what comes
        // between them and their end run beside them.
        for (int tile = 0; tile < last; tile++) {
            await<0>(pairs.sums);
            pairs.take(scores, rescale);
            if (threadIdx.x < KEYS) places[(tile + 2) % 4][threadIdx.x] = upcoming;
            keys.finish(tiles.keys[(tile + 1) % 2]);
            values.finish(tiles.values[tile % 2]);
            cp_async_wait_and_fence();
            __syncthreads(); // What was brought is there, and what was used may be overwritten.
            pairs.score(scores, queries, tiles.keys[(tile + 1) % 2]);
            pairs.add(tiles.values[tile % 2]);
            if (tile + 2 <= last) start_keys(tile + 2);
            start_values(tile + 1);
            upcoming = row(tile + 3);
            await<1>(scores);
            online_softmax(tile + 1, scores, rescale, pairs);
        }
        await<0>(pairs.sums);
        pairs.take(scores, rescale);
        values.finish(tiles.values[last % 2]);
        cp_async_wait_and_fence();
        __syncthreads();
        pairs.add(tiles.values[last % 2]);
        await<0>(pairs.sums);
        __syncthreads(); // The next run may bring its own.
    }
};

// Two neighbours.
__device__ void store_pair(float *to, float a, float b) {
    *reinterpret_cast<float2 *>(to) = make_float2(a, b);
}

template <class O> __device__ void store_pair(O *to, float a, float b) {
    *reinterpret_cast<uint32_t *>(to) = pack2(O{}, a, b);
}

// Blocks (head of keys, tile of rows). Tiles behind have more keys, and start first.
template <int DIM, class T, class C>
__device__ void prefill(const AttentionArgs &a, void *memory, Rows &rows, Places &places) {
    auto &tiles = *static_cast<Tiles<DIM, T> *>(memory);
    int group = a.heads / a.kv_heads, of_tile = M / group, kv_head = blockIdx.x;
    int first_row = int(gridDim.y - 1 - blockIdx.y) * of_tile;
    int count = min(of_tile, a.queries.rows - first_row);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        bool left = a.apart && is_alone(a, first_row + i);
        rows.sequence[i] = left ? NOT_OURS : a.sequences[first_row + i];
        rows.position[i] = a.positions[first_row + i];
    }
    for (int i = threadIdx.x; i < M * (DIM / VEC8); i += THREADS) {
        int m = i / (DIM / VEC8), eight = i % (DIM / VEC8), row = m / group;
        const T *from = a.queries.row<T>(first_row + row) + (kv_head * group + m % group) * DIM;
        cp_async_16(tiles.queries + place(M, m, eight), from + eight * VEC8, row < count);
    }
    __syncthreads();
    Pairs<DIM, T> pairs;
    int lane = threadIdx.x % WARP, first_m = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = (first_m + half * 8) / group;
        bool ours = row < count && rows.sequence[row] != NOT_OURS;
        pairs.row[half] = ours ? row : M;
        pairs.position[half] = ours ? rows.position[row] : 0;
        pairs.best[half] = LOWEST, pairs.total[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) pairs.sums[i] = 0.0f;
    for (int begin = 0; begin < count;) {
        Run run = rows.run(a, begin, count);
        if (rows.sequence[begin] != NOT_OURS)
            Pass<DIM, T, C>{a, run, tiles, places, kv_head * DIM, count}.attend(pairs);
        begin = run.end;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = pairs.total[half];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        if (pairs.row[half] == M) continue;
        int head = kv_head * group + (first_m + half * 8) % group;
        float factor = a.v_scale / total;
        with_float(a.out.dtype, [&](auto o) {
            using O = decltype(o);
            O *out = a.out.row<O>(first_row + pairs.row[half]) + head * DIM + lane % 4 * 2;
            const float *sums = pairs.sums + 2 * half;
#pragma unroll
            for (int d = 0; d < DIM / 2; d += 4)
                store_pair(out + d * 2, sums[d] * factor, sums[d + 1] * factor);
        });
    }
}

// Keys and values are of the queries' type or in e4m3.
template <int DIM> __device__ void prefill_any(const AttentionArgs &a) {
    extern __shared__ unsigned char unaligned[];
    __shared__ Rows rows;
    __shared__ Places places;
    unsigned char *memory = unaligned + (-smem_address(unaligned) & (ALIGNMENT - 1));
    with_16bit(a.queries.dtype, [&](auto t) {
        using T = decltype(t);
        if (a.k_cache.dtype == DTYPE_F8) prefill<DIM, T, f8>(a, memory, rows, places);
        else prefill<DIM, T, T>(a, memory, rows, places);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_64(AttentionArgs a) {
    pdl_prologue();
    prefill_any<64>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_128(AttentionArgs a) {
    pdl_prologue();
    prefill_any<128>(a);
}
