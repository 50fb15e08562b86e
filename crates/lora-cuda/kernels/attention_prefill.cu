// Attention of many rows of a sequence by tensor cores (Dao, FlashAttention-2, 2023): a block takes a
// tile of rows and the query heads that share their keys, and brings tiles of keys and values into
// shared memory, the next ones while it computes.
#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int M = 16 * WARPS; // pairs of row and head of a block
constexpr int KEYS = 64;      // keys of a tile

// Place of eight neighbours in a tile of shared memory, in elements. Neighbouring rows have theirs
// in other banks.
template <int DIM> __device__ int place(int row, int eight) {
    return row * DIM + (eight ^ (row & 7)) * EIGHT;
}

__device__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four matrices [8, 8] of 16 bits; lane i gives the address of row i % 8 of matrix i / 8.
__device__ void load_matrices(uint32_t (&to)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

// As `load_matrices`, each matrix transposed.
__device__ void load_transposed(uint32_t (&to)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

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

__device__ uint32_t pair(bf16, float a, float b) {
    __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&both);
}

__device__ uint32_t pair(f16, float a, float b) {
    __half2 both = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&both);
}

// Neighbouring rows of one sequence, and the keys that any of them attends to.
struct Run {
    int begin, end;            // rows of the tile
    int least, first, last;    // the earliest position, and the keys
    const int32_t *table;
};

// Rows of a tile.
struct Rows {
    int sequence[M], position[M];

    __device__ Run run(const AttentionArgs &a, int begin, int count) const {
        int end = begin, least = position[begin], most = least;
        for (; end < count && sequence[end] == sequence[begin]; end++) {
            least = min(least, position[end]);
            most = max(most, position[end]);
        }
        const int32_t *table = a.tables + sequence[begin] * a.table_stride;
        return {begin, end, least, first_key(a, least), most, table};
    }
};

// Starts to bring eight elements into shared memory; zeros where there are none.
template <class T> __device__ void bring(T *to, const T *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(from ? 16 : 0));
}

// From e4m3, which both 16-bit types hold exactly.
template <class T> __device__ void bring(T *to, const f8 *from) {
    Eight<T> eight;
    uint2 codes = from ? *reinterpret_cast<const uint2 *>(from) : make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < EIGHT; i++) {
        f8 code;
        code.__x = (i < 4 ? codes.x : codes.y) >> (i % 4 * 8) & 0xff;
        eight.v[i] = from_float<T>(to_float(code));
    }
    eight.store(to);
}

// Starts to bring the tile of keys and values that begins at `base`. What is masked must be zero, as
// the caches may hold anything there.
template <int DIM, class T, class C>
__device__ void bring_tile(const AttentionArgs &a, const Run &run, int base, int column, T *keys,
                           T *values) {
    constexpr int EIGHTS = DIM / EIGHT;
    for (int i = threadIdx.x; i < KEYS * EIGHTS; i += WARPS * WARP) {
        int key = i / EIGHTS, eight = i % EIGHTS, at = column + eight * EIGHT;
        bool there = base + key <= run.last;
        int64_t row = there ? cache_row(a, run.table, base + key) : 0;
        bring(keys + place<DIM>(key, eight), there ? a.k_cache.row<C>(row) + at : nullptr);
        bring(values + place<DIM>(key, eight), there ? a.v_cache.row<C>(row) + at : nullptr);
    }
    asm volatile("cp.async.commit_group;");
}

// A warp's 16 pairs of row and head; a thread has parts of two of them, eight apart.
template <int DIM, class T> struct Warp {
    uint32_t query[DIM / 16][4];
    float best[2], total[2], sums[DIM / 8][4];
    int row[2], position[2]; // Rows of the tile; behind them, numbers that no run has.

    // Scores of a tile of keys, in powers of two.
    __device__ void score(float (&scores)[KEYS / 8][4], const T *keys, float scale) {
        int lane = threadIdx.x % WARP;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] = scores[n + 1][i] = 0.0f;
#pragma unroll
            for (int k = 0; k < DIM / 16; k++) {
                uint32_t b[4];
                int key = n * 8 + lane / 16 * 8 + lane % 8, eight = k * 2 + lane / 8 % 2;
                load_matrices(b, keys + place<DIM>(key, eight));
                mma(T{}, scores[n], query[k], b[0], b[1]);
                mma(T{}, scores[n + 1], query[k], b[2], b[3]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] *= scale, scores[n + 1][i] *= scale;
        }
    }

    __device__ void mask(float (&scores)[KEYS / 8][4], const Run &run, int base, int window) {
        int quad = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = base + n * 8 + quad * 2 + i % 2, behind = position[i / 2] - key;
                bool seen = behind >= 0 && (window == 0 || behind < window);
                bool ours = row[i / 2] >= run.begin && row[i / 2] < run.end;
                if (!seen || !ours) scores[n][i] = MASKED;
            }
    }

    // Turns scores into weights, and fades what was summed with a smaller maximum.
    __device__ void weigh(float (&scores)[KEYS / 8][4]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float larger = best[half];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                larger = fmaxf(larger, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
            larger = fmaxf(larger, __shfl_xor_sync(ALL_LANES, larger, 1));
            larger = fmaxf(larger, __shfl_xor_sync(ALL_LANES, larger, 2));
            float fade = exp2f(best[half] - larger);
            best[half] = larger;
            total[half] *= fade;
#pragma unroll
            for (int d = 0; d < DIM / 8; d++)
                sums[d][2 * half] *= fade, sums[d][2 * half + 1] *= fade;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    scores[n][i] = exp2f(scores[n][i] - larger);
                    total[half] += scores[n][i];
                }
        }
    }

    // The sums of two instructions are laid out as the first operand of the next.
    __device__ void add(const float (&weights)[KEYS / 8][4], const T *values) {
        int lane = threadIdx.x % WARP;
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            const float(&low)[4] = weights[2 * k], (&high)[4] = weights[2 * k + 1];
            uint32_t a[4] = {pair(T{}, low[0], low[1]), pair(T{}, low[2], low[3]),
                             pair(T{}, high[0], high[1]), pair(T{}, high[2], high[3])};
#pragma unroll
            for (int d = 0; d < DIM / 8; d += 2) {
                uint32_t b[4];
                int key = k * 16 + lane / 8 % 2 * 8 + lane % 8, eight = d + lane / 16;
                load_transposed(b, values + place<DIM>(key, eight));
                mma(T{}, sums[d], a, b[0], b[1]);
                mma(T{}, sums[d + 1], a, b[2], b[3]);
            }
        }
    }
};

// The keys of a run, tile by tile; `tiles` holds two of keys and two of values.
template <int DIM, class T, class C>
__device__ void attend(const AttentionArgs &a, const Run &run, int count, int column, T *tiles,
                       Warp<DIM, T> &warp) {
    constexpr int TILE = KEYS * DIM;
    int stage = 0;
    bring_tile<DIM, T, C>(a, run, run.first, column, tiles, tiles + TILE);
    for (int base = run.first; base <= run.last; base += KEYS, stage ^= 1) {
        T *keys = tiles + stage * 2 * TILE, *next = tiles + (stage ^ 1) * 2 * TILE;
        bool more = base + KEYS <= run.last;
        if (more) bring_tile<DIM, T, C>(a, run, base + KEYS, column, next, next + TILE);
        if (more) asm volatile("cp.async.wait_group 1;");
        else asm volatile("cp.async.wait_group 0;");
        __syncthreads();
        float scores[KEYS / 8][4];
        warp.score(scores, keys, a.scale * LOG2_E);
        bool whole = run.begin == 0 && run.end == count && base + KEYS - 1 <= run.least;
        if (!whole || a.window > 0) warp.mask(scores, run, base, a.window);
        warp.weigh(scores);
        warp.add(scores, keys + TILE);
        __syncthreads();
    }
}

// Blocks (tile of rows, head of keys). Tiles behind have more keys, and start first.
template <int DIM, class T, class C> __device__ void prefill(const AttentionArgs &a) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ Rows rows;
    T *tiles = reinterpret_cast<T *>(memory);
    int group = a.heads / a.kv_heads, of_tile = M / group, kv_head = blockIdx.y;
    int first_row = int(gridDim.x - 1 - blockIdx.x) * of_tile;
    int count = min(of_tile, a.queries.rows - first_row);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        rows.sequence[i] = a.sequences[first_row + i];
        rows.position[i] = a.positions[first_row + i];
    }
    // Queries go through the place of the first keys.
    for (int i = threadIdx.x; i < M * (DIM / EIGHT); i += blockDim.x) {
        int m = i / (DIM / EIGHT), eight = i % (DIM / EIGHT), head = kv_head * group + m % group;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (m / group < count) {
            const T *row = a.queries.row<T>(first_row + m / group) + head * DIM;
            v = *reinterpret_cast<const uint4 *>(row + eight * EIGHT);
        }
        *reinterpret_cast<uint4 *>(tiles + place<DIM>(m, eight)) = v;
    }
    __syncthreads();
    int lane = threadIdx.x % WARP, first_m = threadIdx.x / WARP * 16;
    Warp<DIM, T> warp;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++)
        load_matrices(warp.query[k], tiles + place<DIM>(first_m + lane % 16, k * 2 + lane / 16));
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = (first_m + half * 8 + lane / 4) / group;
        warp.row[half] = row < count ? row : M;
        warp.position[half] = row < count ? rows.position[row] : 0;
        warp.best[half] = LOWEST, warp.total[half] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < DIM / 8; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) warp.sums[d][i] = 0.0f;
    for (int begin = 0; begin < count;) {
        Run run = rows.run(a, begin, count);
        attend<DIM, T, C>(a, run, count, kv_head * DIM, tiles, warp);
        begin = run.end;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = warp.total[half];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        if (warp.row[half] == M) continue;
        int head = kv_head * group + (first_m + half * 8 + lane / 4) % group;
        float factor = a.v_scale / total;
        with_float(a.out.dtype, [&](auto o) {
            using O = decltype(o);
            O *out = a.out.row<O>(first_row + warp.row[half]) + head * DIM + lane % 4 * 2;
#pragma unroll
            for (int d = 0; d < DIM / 8; d++) {
                out[d * 8] = from_float<O>(warp.sums[d][2 * half] * factor);
                out[d * 8 + 1] = from_float<O>(warp.sums[d][2 * half + 1] * factor);
            }
        });
    }
}

// Keys and values are of the queries' type or in e4m3.
template <int DIM> __device__ void prefill_any(const AttentionArgs &a) {
    bool codes = a.k_cache.dtype == DTYPE_F8;
    if (a.queries.dtype == DTYPE_BF16)
        codes ? prefill<DIM, bf16, f8>(a) : prefill<DIM, bf16, bf16>(a);
    else
        codes ? prefill<DIM, f16, f8>(a) : prefill<DIM, f16, f16>(a);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP) attention_prefill_64(AttentionArgs a) {
    enter();
    prefill_any<64>(a);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP) attention_prefill_128(AttentionArgs a) {
    enter();
    prefill_any<128>(a);
}
