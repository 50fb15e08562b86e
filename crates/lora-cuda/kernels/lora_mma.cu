// Adapters in bf16 by tensor cores: rows of one adapter share its factors, eight rows to a tile.
//
// Shrink cuts K into chunks of a fixed size, a block each, and leaves a plane of partial sums for
// every chunk; expand adds the planes in their order. So nothing is zeroed, nothing is added
// atomically, and a row's bits do not depend on the batch.
#include "common.cuh"
#include "lora.cuh"

constexpr int TILE = 8;     // rows of the batch in a tile
constexpr int RANKS = 16;   // ranks in a tile of the shrink
constexpr int WARPS = 8;
constexpr int OUTPUTS = 64; // outputs of a warp in the expand
constexpr int MAX_RANK = 256;

// What block x works on: rows `from` to `from + count` of the row order, and their adapter's part.
struct Tile {
    int from, count;
    SlotRow part;
};

// Finds tile number `index`; false if there are fewer. All threads of the block must call it.
__device__ bool find_tile(const LoraArgs &a, int index, int slice, Tile &tile) {
    __shared__ int found_from, found_count, found_segment;
    if (threadIdx.x == 0) found_segment = -1;
    __syncthreads();
    if (threadIdx.x < WARP) {
        int lane = threadIdx.x, segments = a.sizes[0], before = 0;
        for (int base = 0; base < segments && before <= index; base += WARP) {
            int segment = base + lane, start = 0, rows = 0;
            if (segment < segments) {
                start = a.starts[segment];
                rows = a.starts[segment + 1] - start;
            }
            int tiles = (rows + TILE - 1) / TILE, last = tiles;
            for (int step = 1; step < WARP; step *= 2) {
                int other = __shfl_up_sync(ALL_LANES, last, step);
                if (lane >= step) last += other;
            }
            int first = before + last - tiles;
            if (first <= index && index < first + tiles) {
                int skipped = (index - first) * TILE;
                found_from = start + skipped, found_count = min(TILE, rows - skipped);
                found_segment = segment;
            }
            before += __shfl_sync(ALL_LANES, last, WARP - 1);
        }
    }
    __syncthreads();
    if (found_segment < 0) return false;
    tile.from = found_from, tile.count = found_count;
    tile.part = a.table[a.slots[found_segment] * a.slices + slice];
    return tile.part.active != 0;
}

// sums += a b for tiles [16, 16] and [16, 8] of bf16, in the fragments of `mma.m16n8k16`.
__device__ void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                    uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Blocks (tile, slice and 16 of its ranks, chunk of K). Fragments take eight neighbours of K from a
// thread where the instruction has them elsewhere; as both operands do, the sum is the same.
extern "C" __global__ void __launch_bounds__(WARPS * WARP) lora_shrink_mma(LoraArgs a) {
    __shared__ float partial[WARPS][RANKS][TILE];
    Tile tile;
    int rank_tiles = (a.max_rank + RANKS - 1) / RANKS;
    int slice = blockIdx.y / rank_tiles, first_rank = blockIdx.y % rank_tiles * RANKS;
    if (!find_tile(a, blockIdx.x, slice, tile) || first_rank >= tile.part.rank) return;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, quad = lane % 4;
    const bf16 *factor = static_cast<const bf16 *>(tile.part.a);
    int ranks = tile.part.rank - first_rank;
    const bf16 *low = group < ranks ? factor + int64_t(first_rank + group) * a.in_dim : nullptr;
    const bf16 *high = group + 8 < ranks ? factor + int64_t(first_rank + group + 8) * a.in_dim : nullptr;
    const bf16 *x = group < tile.count ? a.x.row<bf16>(a.order[tile.from + group]) : nullptr;
    float sums[4] = {};
    const uint4 zero = make_uint4(0, 0, 0, 0);
    int end = min(int(blockIdx.z + 1) * a.chunk, a.in_dim);
    // All lanes take every turn, as the instruction needs all of them.
#pragma unroll 2
    for (int base = blockIdx.z * a.chunk + warp * 32; base < end; base += WARPS * 32) {
        int k = base + quad * 8;
        bool inside = k < end;
        uint4 p = low && inside ? __ldg(reinterpret_cast<const uint4 *>(low + k)) : zero;
        uint4 r = high && inside ? __ldg(reinterpret_cast<const uint4 *>(high + k)) : zero;
        uint4 v = x && inside ? *reinterpret_cast<const uint4 *>(x + k) : zero;
        mma(sums, p.x, r.x, p.y, r.y, v.x, v.y);
        mma(sums, p.z, r.z, p.w, r.w, v.z, v.w);
    }
    partial[warp][group][2 * quad] = sums[0];
    partial[warp][group][2 * quad + 1] = sums[1];
    partial[warp][group + 8][2 * quad] = sums[2];
    partial[warp][group + 8][2 * quad + 1] = sums[3];
    __syncthreads();
    int rank = threadIdx.x % RANKS, row = threadIdx.x / RANKS;
    if (threadIdx.x >= RANKS * TILE || row >= tile.count || rank >= ranks) return;
    float z = 0.0f;
    for (int w = 0; w < WARPS; w++) z += partial[w][rank][row];
    int64_t columns = int64_t(a.slices) * a.max_rank;
    int64_t place = (int64_t(blockIdx.z) * a.x.rows + tile.from + row) * columns;
    a.z[place + slice * a.max_rank + first_rank + rank] = z;
}

// A pair of neighbours as one register.
__device__ uint32_t pair(bf16 a, bf16 b) {
    return uint32_t(__bfloat16_as_ushort(a)) | uint32_t(__bfloat16_as_ushort(b)) << 16;
}

// Four neighbours `from` of a row of B; zeros behind its end, or where there is no row.
__device__ uint2 load_four(const bf16 *row, int from, int rank) {
    if (!row || from >= rank) return make_uint2(0, 0);
    if (rank % 4 == 0) return __ldg(reinterpret_cast<const uint2 *>(row + from));
    bf16 v[4];
    for (int i = 0; i < 4; i++) v[i] = from + i < rank ? row[from + i] : __float2bfloat16_rn(0.0f);
    return make_uint2(pair(v[0], v[1]), pair(v[2], v[3]));
}

// Blocks (tile, slice, 512 of its outputs). z goes through the tensor cores as a sum of two bf16, so
// that it keeps 16 bits.
extern "C" __global__ void __launch_bounds__(WARPS * WARP) lora_expand_mma(LoraArgs a) {
    __shared__ bf16 coarse[TILE][MAX_RANK + 8], fine[TILE][MAX_RANK + 8];
    Tile tile;
    int slice = blockIdx.y;
    if (!find_tile(a, blockIdx.x, slice, tile)) return;
    int begin = a.columns[slice], width = a.columns[slice + 1] - begin, rank = tile.part.rank;
    if (int(blockIdx.z) * WARPS * OUTPUTS >= width) return;
    int64_t columns = int64_t(a.slices) * a.max_rank, plane = columns * a.x.rows;
    int padded = (rank + 15) / 16 * 16;
    for (int i = threadIdx.x; i < TILE * padded; i += blockDim.x) {
        int row = i / padded, j = i % padded;
        float z = 0.0f;
        if (row < tile.count && j < rank) {
            const float *from = a.z + (tile.from + row) * columns + slice * a.max_rank + j;
            for (int p = 0; p < a.planes; p++) z += from[p * plane];
        }
        bf16 high = __float2bfloat16_rn(z);
        coarse[row][j] = high;
        fine[row][j] = __float2bfloat16_rn(z - __bfloat162float(high));
    }
    __syncthreads();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, quad = lane % 4;
    // A thread's outputs are eight neighbours: two of each of the warp's four tiles.
    int n = (blockIdx.z * WARPS + warp) * OUTPUTS + group * 8;
    const bf16 *factor = static_cast<const bf16 *>(tile.part.b);
    float sums[4][4] = {};
    for (int k = 0; k < padded; k += 16) {
        uint2 c = *reinterpret_cast<const uint2 *>(&coarse[group][k + quad * 4]);
        uint2 f = *reinterpret_cast<const uint2 *>(&fine[group][k + quad * 4]);
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const bf16 *even = n + 2 * t < width ? factor + int64_t(n + 2 * t) * rank : nullptr;
            const bf16 *odd = n + 2 * t + 1 < width ? factor + int64_t(n + 2 * t + 1) * rank : nullptr;
            uint2 p = load_four(even, k + quad * 4, rank), r = load_four(odd, k + quad * 4, rank);
            mma(sums[t], p.x, r.x, p.y, r.y, c.x, c.y);
            mma(sums[t], p.x, r.x, p.y, r.y, f.x, f.y);
        }
    }
#pragma unroll
    for (int side = 0; side < 2; side++) {
        int row = 2 * quad + side;
        if (row >= tile.count || n >= width) continue;
        bf16 *out = a.out.row<bf16>(a.order[tile.from + row]) + begin + n;
        bf16 values[8];
        bool whole = n + 8 <= width && reinterpret_cast<uint64_t>(out) % 16 == 0;
        if (whole) *reinterpret_cast<uint4 *>(values) = *reinterpret_cast<const uint4 *>(out);
        else
            for (int i = 0; i < 8 && n + i < width; i++) values[i] = out[i];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (n + i >= width) break;
            float v = __bfloat162float(values[i]) + tile.part.scale * sums[i / 2][side + i % 2 * 2];
            if (tile.part.gain) v *= tile.part.gain[n + i];
            if (tile.part.shift) v += tile.part.shift[n + i];
            values[i] = __float2bfloat16_rn(v);
        }
        if (whole) *reinterpret_cast<uint4 *>(out) = *reinterpret_cast<const uint4 *>(values);
        else
            for (int i = 0; i < 8 && n + i < width; i++) out[i] = values[i];
    }
}
