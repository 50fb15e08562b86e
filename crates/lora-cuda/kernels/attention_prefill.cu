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
//   ops/attention/mod.rs): f16, FP8 caches, rows that the host has not planned, steps that are recorded.
//   Where both fit, FlashInfer's takes 0.5 to 0.8 of the time (bench/evidence, "attention of prompts").
#include "attention.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int GROUPS = 3;      // warpgroups of a CTA
constexpr int M = GROUPS * 64; // (row, head) pairs of a CTA: wgmma's 64 per warpgroup
constexpr int KEYS = 64;       // keys of a tile
constexpr int THREADS = GROUPS * WARPGROUP;
constexpr int SPLIT = 64; // elements of a swizzled row of 128 bytes: head_dim is split into columns of them
constexpr int KV_STAGES = 2; // of keys and of values in shared memory
constexpr int LOOKUPS = 4;   // tiles whose cache rows are known at a time

// The offset in elements of eight adjacent ones, number `vec` of row `row`, in a tile of `rows` rows: one
// column of 64 elements after the other, each under 128-byte swizzling.
__device__ int swizzled_element(int rows, int row, int vec) {
    return vec / 8 * rows * SPLIT + row * SPLIT + ((vec ^ row) & 7) * VEC8;
}

// Waits for the cp.async of this thread, and makes what it wrote to shared memory visible to wgmma.
__device__ void cp_async_wait_and_fence() {
    asm volatile("cp.async.wait_all;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

// Adjacent rows of one sequence in a tile, and the keys that any of them may see.
struct Run {
    int begin, end;                        // rows of the tile
    int min_position, first_key, last_key; // positions
    const int32_t *table;
};

// The sequence of rows that are left to a decode kernel.
constexpr int SKIPPED = -1;

// Rows of a tile.
struct Rows {
    int sequence[M], position[M];

    // The run that starts at row `begin`. Computed by every warp for itself.
    __device__ Run run(const AttentionArgs &a, int begin, int count) const {
        int lane = threadIdx.x % WARP, end = count, lowest = position[begin], highest = lowest;
        for (int i = begin + lane; i < count; i += WARP)
            if (sequence[i] != sequence[begin]) end = min(end, i);
        end = __reduce_min_sync(ALL_LANES, end);
        for (int i = begin + lane; i < end; i += WARP) {
            lowest = min(lowest, position[i]);
            highest = max(highest, position[i]);
        }
        lowest = __reduce_min_sync(ALL_LANES, lowest), highest = __reduce_max_sync(ALL_LANES, highest);
        const int32_t *table = a.tables + sequence[begin] * a.table_stride;
        return {begin, end, lowest, first_key(a, lowest), highest, table};
    }
};

// Copies a tile of keys or values to shared memory; a thread has the same eight elements of every `STEP`th
// row. Caches in the queries' dtype are copied by cp.async; e4m3 is converted in registers.
template <int DIM, class T, class C> struct KvLoader {
    static constexpr int VECS = DIM / VEC8, STEP = THREADS / VECS, PARTS = (KEYS + STEP - 1) / STEP;
    static constexpr bool ASYNC = sizeof(C) == sizeof(T);
    static_assert(STEP % 8 == 0, "all rows of a thread are swizzled alike");
    Raw<C> raw[PARTS]; // Unless ASYNC.

    __device__ static int first() { return threadIdx.x / VECS; }
    __device__ static bool has(int part) { return (part + 1) * STEP <= KEYS || first() + part * STEP < KEYS; }

    // Starts to copy the cache rows `rows` to `to`.
    __device__ void start(const Mat &cache, const int *rows, int column, T *to) {
        int vec = threadIdx.x % VECS;
        const C *from = static_cast<const C *>(cache.data) + column + vec * VEC8;
        to += swizzled_element(KEYS, first(), vec);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            if (!has(i)) continue;
            const C *row = from + rows[first() + i * STEP] * cache.row_stride;
            if constexpr (ASYNC) cp_async_16(to + i * STEP * SPLIT, row, true);
            else raw[i] = *reinterpret_cast<const Raw<C> *>(row);
        }
    }

    // Stores what is in registers.
    __device__ void finish(T *to) const {
        if constexpr (ASYNC) return;
        to += swizzled_element(KEYS, first(), threadIdx.x % VECS);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (has(i)) *reinterpret_cast<uint4 *>(to + i * STEP * SPLIT) = convert_vec8(T{}, raw[i]);
    }
};

// The online softmax of a warpgroup's (row, head) pairs; a thread has fragments of two pairs, eight apart.
template <int DIM, class T> struct Softmax {
    float row_max[2], row_sum[2], acc[DIM / 2];
    uint32_t probabilities[KEYS / 16][4]; // Unnormalised, as the `a` operand of the P V GEMM.
    int row[2], position[2];              // Rows of the tile; pairs behind the last row have row M.

    // Starts scores = Q K^T.
    __device__ void multiply_keys(float (&scores)[KEYS / 2], const T *queries, const T *keys) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DIM; k += 16) {
            int inside = k % SPLIT, column = k / SPLIT;
            wgmma(T{}, scores, smem_descriptor(queries + column * M * SPLIT + inside, 16),
                  smem_descriptor(keys + column * KEYS * SPLIT + inside, 16), k > 0);
        }
        wgmma_commit();
    }

    // Masks scores of rows of other runs, and of keys that a row must not see. `base`: the first key.
    __device__ void mask(float (&scores)[KEYS / 2], const Run &run, int base, int window) {
        int quad = threadIdx.x % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bool in_run = row[half] >= run.begin && row[half] < run.end;
            // The row sees the tile's keys from `from` to before `to`.
            int to = in_run ? position[half] - base + 1 : 0, from = window > 0 ? to - window : 0;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int key = n * 8 + quad * 2 + i;
                    if (key >= to || key < from) scores[n * 4 + half * 2 + i] = MASKED;
                }
        }
    }

    // Turns scores, times `factor` >= 0, into unnormalised probabilities. Returns in `rescale` by what the
    // accumulators must be multiplied for the new row maximum.
    __device__ void online_softmax(float (&scores)[KEYS / 2], float factor, float (&rescale)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float new_max = MASKED;
#pragma unroll
            for (int n = 0; n < KEYS / 2; n += 4)
                new_max = fmaxf(new_max, fmaxf(scores[n + 2 * half], scores[n + 2 * half + 1]));
            new_max = fmaxf(new_max, __shfl_xor_sync(ALL_LANES, new_max, 1));
            new_max = fmaxf(new_max, __shfl_xor_sync(ALL_LANES, new_max, 2));
            new_max = fmaxf(new_max * factor, row_max[half]);
            rescale[half] = exp2_approx(row_max[half] - new_max);
            row_max[half] = new_max;
            row_sum[half] *= rescale[half];
#pragma unroll
            for (int n = 0; n < KEYS / 2; n += 4)
#pragma unroll
                for (int i = n + 2 * half; i < n + 2 * half + 2; i++) {
                    scores[i] = exp2_approx(fmaf(scores[i], factor, -new_max));
                    row_sum[half] += scores[i];
                }
        }
    }

    // Rescales the accumulators and converts the probabilities for `multiply_values`.
    __device__ void rescale_and_convert(const float (&weights)[KEYS / 2], const float (&rescale)[2]) {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) acc[i] *= rescale[i / 2 % 2];
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            probabilities[i / 4][i % 4] = pack2(T{}, weights[2 * i], weights[2 * i + 1]);
    }

    // Starts acc += P V.
    __device__ void multiply_values(const T *values) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
            wgmma(T{}, acc, probabilities[k],
                  smem_descriptor(values + k * 16 * SPLIT, KEYS * SPLIT * sizeof(T)));
        wgmma_commit();
    }
};

// Operands in shared memory, all of which begin at multiples of a swizzle atom.
template <int DIM, class T> struct Smem {
    T queries[M * DIM], keys[KV_STAGES][KEYS * DIM], values[KV_STAGES][KEYS * DIM];
};

// Cache rows of the keys of four tiles, in turn.
using CacheRows = int[LOOKUPS][KEYS];

// The main loop over the keys of a run.
template <int DIM, class T, class C> struct Mainloop {
    const AttentionArgs &a;
    const Run &run;
    Smem<DIM, T> &smem;
    CacheRows &cache_rows;
    int column, count; // `count`: rows of the tile
    KvLoader<DIM, T, C> keys, values;

    // The cache row of the thread's key of a tile. Behind the last key, block table and cache may hold
    // anything, so the last key is read again; its copies are masked.
    __device__ int look_up(int tile) const {
        int key = min(run.first_key + tile * KEYS + int(threadIdx.x), run.last_key);
        return threadIdx.x < KEYS ? int(cache_row(a, run.table, key)) : 0;
    }

    __device__ void start_keys(int tile) {
        keys.start(a.k_cache, cache_rows[tile % LOOKUPS], column, smem.keys[tile % KV_STAGES]);
    }

    __device__ void start_values(int tile) {
        values.start(a.v_cache, cache_rows[tile % LOOKUPS], column, smem.values[tile % KV_STAGES]);
    }

    // Scales, masks where that is needed, and takes the softmax of a tile's scores.
    __device__ void online_softmax(int tile, float (&scores)[KEYS / 2], float (&rescale)[2],
                                   Softmax<DIM, T> &softmax) {
        int base = run.first_key + tile * KEYS;
        float factor = a.scale * LOG2_E;
        bool unmasked = run.begin == 0 && run.end == count && base + KEYS - 1 <= run.min_position &&
                        (a.window == 0 || run.last_key - base < a.window);
        if (!unmasked || factor < 0.0f) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) scores[i] *= factor;
            softmax.mask(scores, run, base, a.window);
            factor = 1.0f;
        }
        softmax.online_softmax(scores, factor, rescale);
    }

    __device__ void attend(Softmax<DIM, T> &softmax) {
        const T *queries = smem.queries + threadIdx.x / WARPGROUP * 64 * SPLIT;
        int last = (run.last_key - run.first_key) / KEYS, upcoming = look_up(2);
        float scores[KEYS / 2], rescale[2];
        for (int tile = 0; tile < 2; tile++) {
            int first = look_up(tile);
            if (threadIdx.x < KEYS) cache_rows[tile][threadIdx.x] = first;
        }
        __syncthreads();
        start_keys(0);
        keys.finish(smem.keys[0]);
        cp_async_wait_and_fence();
        __syncthreads();
        if (last > 0) start_keys(1);
        start_values(0);
        softmax.multiply_keys(scores, queries, smem.keys[0]);
        wgmma_wait<0>(scores);
        online_softmax(0, scores, rescale, softmax);
        // The last P V GEMM of an iteration is awaited in the next one. With the wait at the end, the
        // compiler would not overlap what lies between.
        for (int tile = 0; tile < last; tile++) {
            wgmma_wait<0>(softmax.acc);
            softmax.rescale_and_convert(scores, rescale);
            if (threadIdx.x < KEYS) cache_rows[(tile + 2) % LOOKUPS][threadIdx.x] = upcoming;
            keys.finish(smem.keys[(tile + 1) % KV_STAGES]);
            values.finish(smem.values[tile % KV_STAGES]);
            cp_async_wait_and_fence();
            __syncthreads(); // This iteration's tiles are complete, and the last one's may be overwritten.
            softmax.multiply_keys(scores, queries, smem.keys[(tile + 1) % KV_STAGES]);
            softmax.multiply_values(smem.values[tile % KV_STAGES]);
            if (tile + 2 <= last) start_keys(tile + 2);
            start_values(tile + 1);
            upcoming = look_up(tile + 3);
            wgmma_wait<1>(scores);
            online_softmax(tile + 1, scores, rescale, softmax);
        }
        wgmma_wait<0>(softmax.acc);
        softmax.rescale_and_convert(scores, rescale);
        values.finish(smem.values[last % KV_STAGES]);
        cp_async_wait_and_fence();
        __syncthreads();
        softmax.multiply_values(smem.values[last % KV_STAGES]);
        wgmma_wait<0>(softmax.acc);
        __syncthreads(); // The next run may overwrite the tiles.
    }
};

// Two adjacent outputs.
__device__ void store_pair(float *to, float a, float b) {
    *reinterpret_cast<float2 *>(to) = make_float2(a, b);
}

template <class O> __device__ void store_pair(O *to, float a, float b) {
    *reinterpret_cast<uint32_t *>(to) = pack2(O{}, a, b);
}

// Grid (KV head, tile of rows); the last tiles, which have the most keys, start first.
template <int DIM, class T, class C>
__device__ void prefill(const AttentionArgs &a, void *memory, Rows &rows, CacheRows &cache_rows) {
    auto &smem = *static_cast<Smem<DIM, T> *>(memory);
    int group = a.heads / a.kv_heads, tile_rows = M / group, kv_head = blockIdx.x;
    int first_row = int(gridDim.y - 1 - blockIdx.y) * tile_rows;
    int count = min(tile_rows, a.queries.rows - first_row);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        bool skipped = a.apart && is_alone(a, first_row + i);
        rows.sequence[i] = skipped ? SKIPPED : a.sequences[first_row + i];
        rows.position[i] = a.positions[first_row + i];
    }
    for (int i = threadIdx.x; i < M * (DIM / VEC8); i += THREADS) {
        int m = i / (DIM / VEC8), vec = i % (DIM / VEC8), row = m / group;
        const T *from = a.queries.row<T>(first_row + row) + (kv_head * group + m % group) * DIM;
        cp_async_16(smem.queries + swizzled_element(M, m, vec), from + vec * VEC8, row < count);
    }
    __syncthreads();
    Softmax<DIM, T> softmax;
    int lane = threadIdx.x % WARP, first_m = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = (first_m + half * 8) / group;
        bool valid = row < count && rows.sequence[row] != SKIPPED;
        softmax.row[half] = valid ? row : M;
        softmax.position[half] = valid ? rows.position[row] : 0;
        softmax.row_max[half] = LOWEST, softmax.row_sum[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) softmax.acc[i] = 0.0f;
    for (int begin = 0; begin < count;) {
        Run run = rows.run(a, begin, count);
        if (rows.sequence[begin] != SKIPPED)
            Mainloop<DIM, T, C>{a, run, smem, cache_rows, kv_head * DIM, count}.attend(softmax);
        begin = run.end;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float row_sum = softmax.row_sum[half];
        row_sum += __shfl_xor_sync(ALL_LANES, row_sum, 1);
        row_sum += __shfl_xor_sync(ALL_LANES, row_sum, 2);
        if (softmax.row[half] == M) continue;
        int head = kv_head * group + (first_m + half * 8) % group;
        float factor = a.v_scale / row_sum;
        with_float(a.out.dtype, [&](auto o) {
            using O = decltype(o);
            O *out = a.out.row<O>(first_row + softmax.row[half]) + head * DIM + lane % 4 * 2;
            const float *acc = softmax.acc + 2 * half;
#pragma unroll
            for (int d = 0; d < DIM / 2; d += 4)
                store_pair(out + d * 2, acc[d] * factor, acc[d + 1] * factor);
        });
    }
}

// Keys and values are of the queries' dtype or e4m3.
template <int DIM> __device__ void prefill_any(const AttentionArgs &a) {
    extern __shared__ unsigned char unaligned[];
    __shared__ Rows rows;
    __shared__ CacheRows cache_rows;
    unsigned char *memory = unaligned + padding_to_atom(unaligned);
    with_16bit(a.queries.dtype, [&](auto t) {
        using T = decltype(t);
        if (a.k_cache.dtype == DTYPE_F8) prefill<DIM, T, f8>(a, memory, rows, cache_rows);
        else prefill<DIM, T, T>(a, memory, rows, cache_rows);
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
