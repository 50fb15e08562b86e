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
//   their order by whoever reads them: no zeroing and no atomics, and chunks depend on the site alone, so
//   that with this shrink a row's bits do not depend on its batch. z is split into bf16 hi + lo for the
//   expand.
// Chosen when: ops/lora.rs, all factors bf16 and ranks <= 256. Shrink: below 512 rows, or with tiles of 8
//   rows; above, lora_shrink.cu is faster. Expand: whatever linear_stream.cu and linear_tiles.cu do not
//   fuse, such as many adapters in a batch of up to 64 rows, or DoRA gains above that. `begin`: above 64
//   rows without gains, as it is cheaper if cuBLASLt reads the LoRA term while it multiplies than to read
//   and write the output once more.
#include "lora_factors.cuh"

constexpr int RANKS = 16;   // ranks in a tile of the shrink
constexpr int WARPS = 8;
constexpr int SHRINK_WARPS = 4;
constexpr int OUTPUTS = 64; // outputs of a warp in the expand
constexpr int MAX_RANK = 256;

// Some rows, and their adapter's part.
struct Tile {
    const int32_t *rows;
    int count;
    SlotRow part;
};

// Reads tile number `index`; false if there are fewer, or the adapter leaves the slice alone.
__device__ bool read_tile(const LoraArgs &a, int index, int slice, Tile &tile) {
    // Read before the number is known, as there is room for a tile of every row.
    int4 found = a.tiles[index];
    if (index >= a.sizes[2]) return false;
    tile.rows = a.order + found.x, tile.count = found.y;
    tile.part = a.table[found.z * a.slices + slice];
    return tile.part.active != 0;
}

// As `read_tile` where outputs are begun: tiles of all rows, as what no adapter changes begins as zero.
__device__ bool read_first_tile(const LoraArgs &a, int index, int slice, int rows, Tile &tile) {
    if (read_tile(a, index, slice, tile)) return true;
    tile.part = {};
    if (index < a.sizes[2]) return true;
    int from = (index - a.sizes[2]) * rows;
    tile.rows = a.idle + from, tile.count = min(a.out.rows - a.sizes[1] - from, rows);
    return tile.count > 0;
}

// Vec8 neighbours of a row; zeros where there is none, or behind `end`.
__device__ uint4 load_eight(const bf16 *row, int k, int end) {
    return row && k < end ? *reinterpret_cast<const uint4 *>(row + k) : make_uint4(0, 0, 0, 0);
}
__device__ uint32_t bits(uint4 v) { return v.x | v.y | v.z | v.w; }

// Sixteen ranks of an adapter for eight rows of a tile: what a block of the shrink works on.
struct Piece {
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

    // The factors of a rank.
    __device__ const bf16 *factors(const LoraArgs &a, int rank) const {
        return static_cast<const bf16 *>(tile.part.a) + int64_t(first_rank + rank) * a.in_dim;
    }

    // Asks for the block's columns, up to `end`, of all ranks: those of a rank lie in one piece.
    __device__ void prefetch(const LoraArgs &a, int end) const {
        int begin = blockIdx.z * a.chunk;
        if (threadIdx.x < min(tile.part.rank - first_rank, RANKS))
            prefetch_l2(factors(a, threadIdx.x) + begin, (end - begin) * sizeof(bf16));
    }
};

// The columns of K of a warp, which takes some of them in a turn, two times 32: a line of the caches.
struct Columns {
    int begin, end;

    __device__ explicit Columns(const LoraArgs &a) {
        begin = blockIdx.z * a.chunk + threadIdx.x / WARP * TIMES * 32;
        end = min(int(blockIdx.z + 1) * a.chunk, a.in_dim);
    }
    static constexpr int TIMES = 2, STEP = SHRINK_WARPS * TIMES * 32;
};

// Sums of a warp. Fragments take eight neighbours of K from a thread where the instruction has them
// elsewhere; as both operands do, the sum is the same.
__device__ void multiply(const bf16 *x, const bf16 *low, const bf16 *high, Columns columns, float (&sums)[4]) {
    constexpr int TIMES = Columns::TIMES;
    // All lanes take every turn, as the instruction needs all of them.
#pragma unroll 1
    for (int base = columns.begin; base < columns.end; base += Columns::STEP) {
        uint4 v[TIMES], p[TIMES], r[TIMES];
        uint32_t any = 0;
#pragma unroll
        for (int i = 0; i < TIMES; i++) {
            int k = base + i * 32 + threadIdx.x % 4 * VEC8;
            v[i] = load_eight(x, k, columns.end);
            p[i] = load_eight(low, k, columns.end), r[i] = load_eight(high, k, columns.end);
        }
        // All loads are looked at before the first product, as the compiler would else put off each until its
        // own, and they would be waited for one after another.
#pragma unroll
        for (int i = 0; i < TIMES; i++) any |= bits(v[i]) | bits(p[i]) | bits(r[i]);
        if (!__any_sync(ALL_LANES, any != 0)) continue;
#pragma unroll
        for (int i = 0; i < TIMES; i++) {
            mma(sums, p[i].x, r[i].x, p[i].y, r[i].y, v[i].x, v[i].y);
            mma(sums, p[i].z, r[i].z, p[i].w, r[i].w, v[i].z, v[i].w);
        }
    }
}

// Adds up the sums of all warps for a plane of z.
__device__ void store(const LoraArgs &a, const Piece &piece, const float (&sums)[4]) {
    __shared__ float partial[SHRINK_WARPS][RANKS][VEC8];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, row = lane % 4 * 2;
    partial[warp][group][row] = sums[0], partial[warp][group][row + 1] = sums[1];
    partial[warp][group + 8][row] = sums[2], partial[warp][group + 8][row + 1] = sums[3];
    __syncthreads();
    int64_t plane = int64_t(a.x.rows) * a.slices * a.max_rank;
    int rank = threadIdx.x % RANKS, r = threadIdx.x / RANKS;
    if (piece.first_rank + rank >= piece.tile.part.rank || r >= piece.tile.count) return;
    float z = 0.0f;
    for (int w = 0; w < SHRINK_WARPS; w++) z += partial[w][rank][r];
    z_of(a, piece.tile.rows[r], piece.slice, piece.first_rank + rank)[blockIdx.z * plane] = z;
}

// Blocks (eight rows of a tile, slice and 16 of its ranks, chunk of K), small enough to run beside the product
// that follows.
extern "C" __global__ void __launch_bounds__(SHRINK_WARPS * WARP, 8) lora_shrink_mma(LoraArgs a) {
    int32_t announced = announce_inputs(a.inputs);
    pdl_launch_dependents();
    Piece piece;
    // Nobody ends before the kernels before this one have: what comes next relies on that.
    if (!piece.read(a)) {
        pdl_wait();
        return signal_ready(a.inputs, announced);
    }
    // Who uses which adapter was handed over before the first kernel of the step, so that factors are on
    // their way before the inputs are there.
    Columns columns(a);
    int lane = threadIdx.x % WARP, group = lane / 4;
    int ranks = piece.tile.part.rank - piece.first_rank;
    const bf16 *low = group < ranks ? piece.factors(a, group) : nullptr;
    const bf16 *high = group + 8 < ranks ? piece.factors(a, group + 8) : nullptr;
    piece.prefetch(a, columns.end);
    const bf16 *x = group < piece.tile.count ? a.x.row<bf16>(piece.tile.rows[group]) : nullptr;
    pdl_wait();
    signal_ready(a.inputs, announced);
    float sums[4] = {};
    multiply(x, low, high, columns, sums);
    store(a, piece, sums);
}

// Vec8 neighbouring outputs of a row.
struct Outputs {
    bf16 *place; // null: there is no such row
    bf16 values[8];

    __device__ bool whole(int left) const {
        return left >= 8 && reinterpret_cast<uint64_t>(place) % 16 == 0;
    }
    __device__ void load(int left) {
        if (!place) return;
        if (whole(left)) {
            *reinterpret_cast<uint4 *>(values) = *reinterpret_cast<const uint4 *>(place);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < left) values[i] = place[i];
    }
    __device__ void store(int left) const {
        if (whole(left)) {
            *reinterpret_cast<uint4 *>(place) = *reinterpret_cast<const uint4 *>(values);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < left) place[i] = values[i];
    }
    // `base`: whether what was loaded is the base layer's.
    __device__ void add(const SlotRow &part, int n, int left, const float (&sums)[8], bool base) {
        if (!place) return;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = part.scale * sums[i] + (base ? __bfloat162float(values[i]) : 0.0f);
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

// z of the tile's rows, in halves.
template <int ROWS> struct ZTile {
    bf16 hi[ROWS][MAX_RANK + 8], lo[ROWS][MAX_RANK + 8];
    int32_t rows[ROWS]; // -1: there is no such row

    __device__ void fill(const LoraArgs &a, Tile &tile, int slice, int padded) {
        if (threadIdx.x < ROWS)
            rows[threadIdx.x] = threadIdx.x < tile.count ? tile.rows[threadIdx.x] : -1;
        if (a.partials > 0) add_partials(a, tile, slice, padded);
        else copy(a, tile, slice, padded);
    }

    // The sum of the partials that the shrink of few rows left.
    __device__ void add_partials(const LoraArgs &a, const Tile &tile, int slice, int padded) {
        int64_t plane = int64_t(a.out.rows) * a.slices * a.max_rank;
        for (int i = threadIdx.x; i < ROWS * padded; i += blockDim.x) {
            int row = i / padded, j = i % padded;
            float z = 0.0f;
            if (row < tile.count && j < tile.part.rank) {
                const float *from = z_of(a, tile.rows[row], slice, j);
#pragma unroll 8
                for (int p = 0; p < a.partials; p++) z += from[p * plane];
            }
            Halves halves(z);
            hi[row][j] = halves.hi, lo[row][j] = halves.lo;
        }
    }

    // The halves that the shrink of many rows left, with the scale in them; zeros behind the rank.
    __device__ void copy(const LoraArgs &a, Tile &tile, int slice, int padded) {
        int vec8 = padded / VEC8;
        for (int i = threadIdx.x; i < ROWS * 2 * vec8; i += blockDim.x) {
            int row = i / (2 * vec8), half = i / vec8 % 2, j = i % vec8 * VEC8;
            if (row >= tile.count) continue;
            const bf16 *z = reinterpret_cast<const bf16 *>(a.z);
            z += ((int64_t(tile.rows[row]) * a.slices + slice) * 2 + half) * a.max_rank + j;
            bf16 *to = half ? lo[row] : hi[row];
            *reinterpret_cast<uint4 *>(to + j) = *reinterpret_cast<const uint4 *>(z);
        }
        tile.part.scale = 1.0f;
    }
};

// A warp's 64 outputs of a tile's rows, and more of them in turns. A thread's are eight neighbours: two of each of four
// instructions.
template <int EIGHTS, bool BEGIN> struct Expander {
    const LoraArgs &a;
    const Tile &tile;
    const ZTile<EIGHTS * VEC8> &z;
    int begin, width, group, quad, n;
    Factors<4> next;

    // Asks for the first factors.
    __device__ Expander(const LoraArgs &a, const Tile &tile, const ZTile<EIGHTS * VEC8> &z, int slice)
        : a(a), tile(tile), z(z), begin(a.columns[slice]), width(a.columns[slice + 1] - begin),
          group(threadIdx.x % WARP / 4), quad(threadIdx.x % 4) {
        n = (blockIdx.z * WARPS + threadIdx.x / WARP) * OUTPUTS + group * 8;
        load_factors(n, 0);
    }

    // All lanes take every turn, as the instruction needs all of them.
    __device__ void run(int padded) {
        int turns = (width + gridDim.z * STEP - 1 - blockIdx.z * STEP) / (gridDim.z * STEP);
#pragma unroll 1
        for (; turns > 0; turns--, n += gridDim.z * STEP) change(padded);
    }
    static constexpr int STEP = WARPS * OUTPUTS;

    // Leaves the first factors of the next turn.
    __device__ void change(int padded) {
        float sums[EIGHTS][4][4] = {};
        Outputs out[2] = {outputs(0), outputs(1)};
        multiply(padded, sums);
#pragma unroll
        for (int i = 0; i < EIGHTS * 2; i++) {
            float of_row[8];
#pragma unroll
            for (int j = 0; j < 8; j++) of_row[j] = sums[i / 2][j / 2][i % 2 + j % 2 * 2];
            out[i % 2].add(tile.part, n, width - n, of_row, !BEGIN);
            // The next but one, while the next is added.
            if (i + 2 < EIGHTS * 2) out[i % 2] = outputs(i + 2);
        }
    }

    __device__ void load_factors(int n, int k) {
        int rank = tile.part.rank;
        next.load(static_cast<const bf16 *>(tile.part.b) + int64_t(n) * rank, rank, width - n, k + quad * 4);
    }

    __device__ void multiply(int padded, float (&sums)[EIGHTS][4][4]) {
        for (int k = 0; k < padded; k += 16) {
            Factors<4> b = next;
            bool last = k + 16 >= padded;
            load_factors(last ? n + gridDim.z * STEP : n, last ? 0 : k + 16);
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                int row = e * VEC8 + group;
                uint2 hi = *reinterpret_cast<const uint2 *>(&z.hi[row][k + quad * 4]);
                uint2 lo = *reinterpret_cast<const uint2 *>(&z.lo[row][k + quad * 4]);
                b.multiply(hi, lo, sums[e]);
            }
        }
    }

    // The outputs of a thread's row number `i`.
    __device__ Outputs outputs(int i) const {
        Outputs out;
        int row = z.rows[i / 2 * VEC8 + 2 * quad + i % 2];
        out.place = row >= 0 && n < width ? a.out.row<bf16>(row) + begin + n : nullptr;
        if (!BEGIN) out.load(width - n);
        return out;
    }
};

// Blocks (tile, slice, some of its outputs, 512 at a time). What does not depend on z is asked for before
// z is there.
template <int EIGHTS, bool BEGIN> __device__ void expand(const LoraArgs &a) {
    __shared__ ZTile<EIGHTS * VEC8> z;
    pdl_launch_dependents();
    Tile tile;
    int slice = blockIdx.y;
    bool there = BEGIN ? read_first_tile(a, blockIdx.x, slice, EIGHTS * VEC8, tile)
                       : read_tile(a, blockIdx.x, slice, tile);
    if (!there) return pdl_wait();
    int padded = (tile.part.rank + 15) / 16 * 16;
    Expander<EIGHTS, BEGIN> expander(a, tile, z, slice);
    pdl_wait();
    z.fill(a, tile, slice, padded);
    __syncthreads();
    expander.run(padded);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 3) lora_expand_mma8(LoraArgs a) {
    expand<1, false>(a);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 2) lora_expand_mma32(LoraArgs a) {
    expand<4, false>(a);
}

// The same where the output is to be begun, as the base layer's is added later.
extern "C" __global__ void __launch_bounds__(WARPS * WARP, 3) lora_begin_mma8(LoraArgs a) {
    expand<1, true>(a);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 2) lora_begin_mma32(LoraArgs a) {
    expand<4, true>(a);
}
