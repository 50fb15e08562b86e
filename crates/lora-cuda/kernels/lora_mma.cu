// LoRA shrink and expand in bf16 by tensor cores; the rows of one adapter share its factors.
//
// Problem: `lora_shrink_mma`: split-K partials of z = A x. `lora_expand_mma*`: y = gain * (y + scale * B z)
//   + shift. `lora_begin_mma*`: the same where y does not exist yet and a GEMM adds to it later. Ranks up
//   to 256.
// Grid: shrink: (eight rows of one adapter, slice and 16 ranks, chunk of K), four warps. Expand: (tile of 8
//   or 32 rows of one adapter, slice, 512 outputs at a time), eight warps of 64 outputs.
// Pipeline: operands go from global memory straight into mma fragments. Factors are requested before the
//   kernels ahead of this one end: A by L2 prefetch, the first of B into registers. In the expand, the
//   factors of the next 16 ranks or the next outputs are in flight while these are multiplied.
// Numerics: mma.sync m16n8k16 with f32 accumulators. Split-K partials are stored side by side and added in
//   their order by the kernel that reads them: no zeroing and no atomics, and chunks depend on the site
//   alone, so that with this shrink a row's bits do not depend on its batch. z is split into bf16 hi + lo for
//   the expand.
// Chosen when (ops/lora/route.rs): all factors bf16 and ranks <= 256. Shrink: below 512 rows, or with tiles
//   of 8 rows; above, lora_shrink.cu is faster. Expand: whatever linear_stream.cu and linear_tiles.cu do not
//   fuse, such as many adapters in a batch of up to 64 rows, or DoRA gains above that. `begin`: above 64
//   rows without gains, as it is cheaper if cuBLASLt reads the LoRA term while it multiplies than to read
//   and write the output once more.
#include "lora_factors.cuh"

constexpr int RANKS = 16;       // ranks of a CTA of the shrink: the rows of one mma
constexpr int SHRINK_WARPS = 4; // of a CTA of the shrink; each takes every fourth piece of K
constexpr int SHRINK_THREADS = SHRINK_WARPS * WARP;
constexpr int SHRINK_CTAS = 8;  // per SM: small enough to run beside the GEMM that follows
constexpr int EXPAND_WARPS = 8; // of a CTA of the expand
constexpr int EXPAND_THREADS = EXPAND_WARPS * WARP;
constexpr int EXPAND_OUTPUTS = 64;                   // of a warp of the expand: 8 per thread group
constexpr int EXPAND_CTAS_8 = 3, EXPAND_CTAS_32 = 2; // per SM, for tiles of 8 and 32 rows
constexpr int MAX_RANK = 256;                        // rows of z in shared memory

// Rows of one adapter, and the adapter's part of a slice.
struct Tile {
    const int32_t *rows;
    int count;
    SlotRow part;
};

// Reads tile `index`; false if there are fewer tiles, or the adapter does not change the slice.
__device__ bool read_tile(const LoraArgs &a, int index, int slice, Tile &tile) {
    // The list has room for a tile per row, so it is read before the number of tiles is known.
    int4 found = a.tiles[index];
    if (index >= a.sizes[2]) return false;
    tile.rows = a.order + found.x, tile.count = found.y;
    tile.part = a.table[found.z * a.slices + slice];
    return tile.part.active != 0;
}

// As `read_tile` for the `begin` kernels, which write every output: tiles without an effect, and tiles of the
// rows without an adapter, are to be filled with zeros.
__device__ bool read_tile_or_zeros(const LoraArgs &a, int index, int slice, int rows, Tile &tile) {
    if (read_tile(a, index, slice, tile)) return true;
    tile.part = {};
    if (index < a.sizes[2]) return true;
    int from = (index - a.sizes[2]) * rows;
    tile.rows = a.idle + from, tile.count = min(a.out.rows - a.sizes[1] - from, rows);
    return tile.count > 0;
}

// Eight adjacent elements of a row; zeros if `row` is null or `k` not below `end`.
__device__ uint4 load_vec8(const bf16 *row, int k, int end) {
    return row && k < end ? *reinterpret_cast<const uint4 *>(row + k) : make_uint4(0, 0, 0, 0);
}
__device__ uint32_t or_of(uint4 v) { return v.x | v.y | v.z | v.w; }

// What a CTA of the shrink computes: 16 ranks of an adapter for up to eight rows of a tile.
struct ShrinkTile {
    Tile tile;
    int slice, first_rank;

    // False if there are no such rows or ranks.
    __device__ bool read(const LoraArgs &a) {
        int rank_tiles = (a.max_rank + RANKS - 1) / RANKS, parts = a.tile_rows / VEC8;
        slice = blockIdx.y / rank_tiles, first_rank = blockIdx.y % rank_tiles * RANKS;
        if (!read_tile(a, blockIdx.x / parts, slice, tile)) return false;
        int from = blockIdx.x % parts * VEC8;
        tile.rows += from, tile.count = min(tile.count - from, VEC8);
        return tile.count > 0 && first_rank < tile.part.rank;
    }

    // The row of A of a rank.
    __device__ const bf16 *factors(const LoraArgs &a, int rank) const {
        return static_cast<const bf16 *>(tile.part.a) + int64_t(first_rank + rank) * a.in_dim;
    }

    // Prefetches the CTA's chunk of A, up to column `end`: one contiguous piece per rank.
    __device__ void prefetch(const LoraArgs &a, int end) const {
        int begin = blockIdx.z * a.chunk;
        if (threadIdx.x < min(tile.part.rank - first_rank, RANKS))
            prefetch_l2(factors(a, threadIdx.x) + begin, (end - begin) * sizeof(bf16));
    }
};

// The columns of K of a warp: in each iteration two mma's of 32 columns, which are a cache line of 128 bytes.
struct Columns {
    int begin, end;

    __device__ explicit Columns(const LoraArgs &a) {
        begin = blockIdx.z * a.chunk + threadIdx.x / WARP * UNROLL * 32;
        end = min(int(blockIdx.z + 1) * a.chunk, a.in_dim);
    }
    static constexpr int UNROLL = 2, STEP = SHRINK_WARPS * UNROLL * 32;
};

// acc += A x over a warp's columns; `low` and `high` are the thread's rows of A. A thread holds eight
// adjacent columns where the fragment has others; as both operands do so alike, the sum is the same.
__device__ void multiply(const bf16 *x, const bf16 *low, const bf16 *high, Columns columns, float (&acc)[4]) {
    constexpr int UNROLL = Columns::UNROLL;
    // Lanes without data iterate too, as mma needs the whole warp.
#pragma unroll 1
    for (int base = columns.begin; base < columns.end; base += Columns::STEP) {
        uint4 v[UNROLL], p[UNROLL], r[UNROLL];
        uint32_t any = 0;
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            int k = base + i * 32 + threadIdx.x % 4 * VEC8;
            v[i] = load_vec8(x, k, columns.end);
            p[i] = load_vec8(low, k, columns.end), r[i] = load_vec8(high, k, columns.end);
        }
        // Makes every load a dependency of the branch before the first mma. The compiler would otherwise move
        // each load to its mma, and their latencies would add up.
#pragma unroll
        for (int i = 0; i < UNROLL; i++) any |= or_of(v[i]) | or_of(p[i]) | or_of(r[i]);
        if (!__any_sync(ALL_LANES, any != 0)) continue;
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            mma(bf16{}, acc, {p[i].x, r[i].x, p[i].y, r[i].y}, v[i].x, v[i].y);
            mma(bf16{}, acc, {p[i].z, r[i].z, p[i].w, r[i].w}, v[i].z, v[i].w);
        }
    }
}

// Adds the sums of the CTA's warps and stores them as a split-K partial of z.
__device__ void store_partial(const LoraArgs &a, const ShrinkTile &shrink, const float (&acc)[4]) {
    __shared__ float partial[SHRINK_WARPS][RANKS][VEC8];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, row = lane % 4 * 2;
    partial[warp][group][row] = acc[0], partial[warp][group][row + 1] = acc[1];
    partial[warp][group + 8][row] = acc[2], partial[warp][group + 8][row + 1] = acc[3];
    __syncthreads();
    int64_t partial_stride = int64_t(a.x.rows) * a.slices * a.max_rank;
    int rank = threadIdx.x % RANKS, r = threadIdx.x / RANKS;
    if (shrink.first_rank + rank >= shrink.tile.part.rank || r >= shrink.tile.count) return;
    float z = 0.0f;
    for (int w = 0; w < SHRINK_WARPS; w++) z += partial[w][rank][r];
    z_of(a, shrink.tile.rows[r], shrink.slice, shrink.first_rank + rank)[blockIdx.z * partial_stride] = z;
}

// Grid (eight rows of a tile, slice and 16 of its ranks, chunk of K).
extern "C" __global__ void __launch_bounds__(SHRINK_THREADS, SHRINK_CTAS) lora_shrink_mma(LoraArgs a) {
    int32_t epoch = begin_epoch(a.inputs);
    pdl_launch_dependents();
    ShrinkTile shrink;
    // CTAs without work wait too: a kernel that has ended means that those before it have ended.
    if (!shrink.read(a)) {
        pdl_wait();
        return signal_ready(a.inputs, epoch);
    }
    // The tables of adapters were written before the first kernel of the step: A need not wait for x.
    Columns columns(a);
    int lane = threadIdx.x % WARP, group = lane / 4;
    int ranks = shrink.tile.part.rank - shrink.first_rank;
    const bf16 *low = group < ranks ? shrink.factors(a, group) : nullptr;
    const bf16 *high = group + 8 < ranks ? shrink.factors(a, group + 8) : nullptr;
    shrink.prefetch(a, columns.end);
    const bf16 *x = group < shrink.tile.count ? a.x.row<bf16>(shrink.tile.rows[group]) : nullptr;
    pdl_wait();
    signal_ready(a.inputs, epoch);
    float acc[4] = {};
    multiply(x, low, high, columns, acc);
    store_partial(a, shrink, acc);
}

// Eight adjacent outputs of a row.
struct Outputs {
    bf16 *place; // null: there is no such row
    bf16 values[8];

    __device__ bool is_vec8(int left) const {
        return left >= 8 && reinterpret_cast<uint64_t>(place) % 16 == 0;
    }
    __device__ void load(int left) {
        if (!place) return;
        if (is_vec8(left)) {
            *reinterpret_cast<uint4 *>(values) = *reinterpret_cast<const uint4 *>(place);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < left) values[i] = place[i];
    }
    __device__ void store(int left) const {
        if (is_vec8(left)) {
            *reinterpret_cast<uint4 *>(place) = *reinterpret_cast<const uint4 *>(values);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < left) place[i] = values[i];
    }
    // Adds the LoRA term and stores. `base`: whether `values` holds the base layer's outputs.
    __device__ void add(const SlotRow &part, int n, int left, const float (&acc)[8], bool base) {
        if (!place) return;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = part.scale * acc[i] + (base ? __bfloat162float(values[i]) : 0.0f);
        if (part.gain) {
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < left) v[i] *= part.gain[n + i];
        }
        if (part.shift) {
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < left) v[i] += part.shift[n + i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = __float2bfloat16_rn(v[i]);
        store(left);
    }
};

// z of a tile's rows in shared memory, as bf16 hi + lo. Rows are padded by 16 bytes against bank conflicts.
template <int ROWS> struct ZTile {
    bf16 hi[ROWS][MAX_RANK + 8], lo[ROWS][MAX_RANK + 8];
    int32_t rows[ROWS]; // -1: there is no such row

    // `padded` is the rank rounded up to a whole mma.
    __device__ void fill(const LoraArgs &a, Tile &tile, int slice, int padded) {
        if (threadIdx.x < ROWS) rows[threadIdx.x] = threadIdx.x < tile.count ? tile.rows[threadIdx.x] : -1;
        if (a.partials > 0) add_partials(a, tile, slice, padded);
        else copy(a, tile, slice, padded);
    }

    // Adds the split-K partials of `lora_shrink_mma`.
    __device__ void add_partials(const LoraArgs &a, const Tile &tile, int slice, int padded) {
        int64_t partial_stride = int64_t(a.out.rows) * a.slices * a.max_rank;
        for (int i = threadIdx.x; i < ROWS * padded; i += blockDim.x) {
            int row = i / padded, j = i % padded;
            float z = 0.0f;
            if (row < tile.count && j < tile.part.rank) {
                const float *from = z_of(a, tile.rows[row], slice, j);
#pragma unroll 8
                for (int p = 0; p < a.partials; p++) z += from[p * partial_stride];
            }
            HiLo split(z);
            hi[row][j] = split.hi, lo[row][j] = split.lo;
        }
    }

    // Copies what lora_shrink.cu left: hi and lo, already scaled, zeros behind the rank.
    __device__ void copy(const LoraArgs &a, Tile &tile, int slice, int padded) {
        int vecs = padded / VEC8;
        for (int i = threadIdx.x; i < ROWS * 2 * vecs; i += blockDim.x) {
            int row = i / (2 * vecs), half = i / vecs % 2, j = i % vecs * VEC8;
            if (row >= tile.count) continue;
            const bf16 *z = reinterpret_cast<const bf16 *>(a.z);
            z += ((int64_t(tile.rows[row]) * a.slices + slice) * 2 + half) * a.max_rank + j;
            bf16 *to = half ? lo[row] : hi[row];
            *reinterpret_cast<uint4 *>(to + j) = *reinterpret_cast<const uint4 *>(z);
        }
        tile.part.scale = 1.0f;
    }
};

// Computes 64 outputs of a tile's rows per warp and iteration. A thread has eight adjacent outputs, two of
// each of four instructions. ROW_GROUPS: groups of eight rows, an mma's columns.
template <int ROW_GROUPS, bool BEGIN> struct Expander {
    const LoraArgs &a;
    const Tile &tile;
    const ZTile<ROW_GROUPS * VEC8> &z;
    int begin, width, group, quad, n;
    Factors<4> next;

    // Requests the first factors.
    __device__ Expander(const LoraArgs &a, const Tile &tile, const ZTile<ROW_GROUPS * VEC8> &z, int slice)
        : a(a), tile(tile), z(z), begin(a.columns[slice]), width(a.columns[slice + 1] - begin),
          group(threadIdx.x % WARP / 4), quad(threadIdx.x % 4) {
        n = (blockIdx.z * EXPAND_WARPS + threadIdx.x / WARP) * EXPAND_OUTPUTS + group * 8;
        load_factors(n, 0);
    }

    // Warps without outputs iterate too, as mma needs the whole warp.
    __device__ void run(int padded) {
        int iterations = (width + gridDim.z * STEP - 1 - blockIdx.z * STEP) / (gridDim.z * STEP);
#pragma unroll 1
        for (; iterations > 0; iterations--, n += gridDim.z * STEP) expand_outputs(padded);
    }
    static constexpr int STEP = EXPAND_WARPS * EXPAND_OUTPUTS;

    // Leaves the first factors of the next iteration in `next`.
    __device__ void expand_outputs(int padded) {
        float acc[ROW_GROUPS][4][4] = {};
        Outputs out[2] = {outputs(0), outputs(1)};
        multiply(padded, acc);
#pragma unroll
        for (int i = 0; i < ROW_GROUPS * 2; i++) {
            float of_row[8];
#pragma unroll
            for (int j = 0; j < 8; j++) of_row[j] = acc[i / 2][j / 2][i % 2 + j % 2 * 2];
            out[i % 2].add(tile.part, n, width - n, of_row, !BEGIN);
            // Double-buffered: the row after next is loaded while the next one is added.
            if (i + 2 < ROW_GROUPS * 2) out[i % 2] = outputs(i + 2);
        }
    }

    __device__ void load_factors(int n, int k) {
        int rank = tile.part.rank;
        next.load(static_cast<const bf16 *>(tile.part.b) + int64_t(n) * rank, rank, width - n, k + quad * 4);
    }

    __device__ void multiply(int padded, float (&acc)[ROW_GROUPS][4][4]) {
        for (int k = 0; k < padded; k += 16) {
            Factors<4> b = next;
            bool last = k + 16 >= padded;
            load_factors(last ? n + gridDim.z * STEP : n, last ? 0 : k + 16);
#pragma unroll
            for (int e = 0; e < ROW_GROUPS; e++) {
                int row = e * VEC8 + group;
                uint2 hi = *reinterpret_cast<const uint2 *>(&z.hi[row][k + quad * 4]);
                uint2 lo = *reinterpret_cast<const uint2 *>(&z.lo[row][k + quad * 4]);
                b.multiply(hi, lo, acc[e]);
            }
        }
    }

    // The outputs of the thread's row number `i`.
    __device__ Outputs outputs(int i) const {
        Outputs out;
        int row = z.rows[i / 2 * VEC8 + 2 * quad + i % 2];
        out.place = row >= 0 && n < width ? a.out.row<bf16>(row) + begin + n : nullptr;
        if (!BEGIN) out.load(width - n);
        return out;
    }
};

// Grid (tile, slice, 512 outputs at a time). Everything but z is read before the shrink has ended.
template <int ROW_GROUPS, bool BEGIN> __device__ void expand(const LoraArgs &a) {
    __shared__ ZTile<ROW_GROUPS * VEC8> z;
    pdl_launch_dependents();
    Tile tile;
    int slice = blockIdx.y;
    bool found = BEGIN ? read_tile_or_zeros(a, blockIdx.x, slice, ROW_GROUPS * VEC8, tile)
                       : read_tile(a, blockIdx.x, slice, tile);
    if (!found) return pdl_wait();
    int padded = (tile.part.rank + 15) / 16 * 16;
    Expander<ROW_GROUPS, BEGIN> expander(a, tile, z, slice);
    pdl_wait();
    z.fill(a, tile, slice, padded);
    __syncthreads();
    expander.run(padded);
}

extern "C" __global__ void __launch_bounds__(EXPAND_THREADS, EXPAND_CTAS_8) lora_expand_mma8(LoraArgs a) {
    expand<1, false>(a);
}

extern "C" __global__ void __launch_bounds__(EXPAND_THREADS, EXPAND_CTAS_32) lora_expand_mma32(LoraArgs a) {
    expand<4, false>(a);
}

// The LoRA term alone, to which a GEMM adds the base layer later.
extern "C" __global__ void __launch_bounds__(EXPAND_THREADS, EXPAND_CTAS_8) lora_begin_mma8(LoraArgs a) {
    expand<1, true>(a);
}

extern "C" __global__ void __launch_bounds__(EXPAND_THREADS, EXPAND_CTAS_32) lora_begin_mma32(LoraArgs a) {
    expand<4, true>(a);
}
