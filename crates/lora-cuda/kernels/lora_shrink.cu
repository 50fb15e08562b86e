// scale * A x for many rows, as products of many rows take it: sums of two numbers in bf16. A block has a
// tile of rows of one adapter, reads them once for several slices, and shares the terms of their sums with
// the other blocks of its cluster, which add up each other's in a fixed order.
#include "hopper.cuh"
#include "lora_factors.cuh"

// Laid out as `ShrinkArgs` of `ops/lora_shrink.rs`.
struct ShrinkArgs {
    Mat x;
    const SlotRow *table;
    const int32_t *order;
    const int4 *tiles;    // Rows of one adapter: start in `order`, number, slot.
    const int32_t *sizes; // The third is the number of tiles.
    bf16 *z;              // [rows, slices, 2, max_rank]
    int32_t slices, max_rank;
    int32_t chunk;        // Columns of K of a block.
};

constexpr int ROWS = 32, EIGHTS = ROWS / EIGHT; // of a tile
constexpr int RANKS = 16;                       // of an instruction
constexpr int WARPS = 8;
constexpr int QUEUE_BYTES = 24 << 10;           // of a warp
constexpr int STEP = 32;                        // columns of K of a warp
constexpr int STRIDE = RANKS + 4;               // spreads what a warp stores over all banks

// Sixteen ranks of a slice, as a thread reads them: two rows of A.
struct Ranks {
    const bf16 *low, *high; // null: there is no such rank
    float scale;
    int slice, first, count;

    __device__ Ranks(const ShrinkArgs &a, int slot, int number) {
        int of_slice = a.max_rank / RANKS, group = threadIdx.x % WARP / 4;
        slice = number / of_slice, first = number % of_slice * RANKS;
        low = high = nullptr, count = 0;
        if (slice >= a.slices) return;
        const SlotRow &part = a.table[slot * a.slices + slice];
        const bf16 *factor = static_cast<const bf16 *>(part.a) + int64_t(first + group) * a.x.cols;
        scale = part.scale, count = part.rank - first;
        if (group < count) low = factor;
        if (group + 8 < count) high = factor + int64_t(8) * a.x.cols;
    }
};

// Loads on their way, in shared memory. A lane reads only what it asked for itself, so that nobody waits for
// another: it is a queue of registers. An item is 16 bytes of each lane.
template <int T> struct Queue {
    static constexpr int ITEMS = EIGHTS + 2 * T, STAGES = QUEUE_BYTES / (ITEMS * WARP * 16);
    uint4 *lanes;

    __device__ uint4 &at(int stage, int item) const { return lanes[(stage * ITEMS + item) * WARP]; }
    __device__ void ask(int stage, int item, const bf16 *row, int k, bool inside) const {
        bool there = row && inside;
        // An address must be given where nothing is read, too.
        copy_chunk(&at(stage, item), there ? row + k : static_cast<const void *>(lanes), there);
    }
};

// A tile of rows, and T times sixteen ranks.
template <int T> struct Shrink {
    const ShrinkArgs &a;
    int4 tile;
    int lane, warp, group, quad, begin, end;
    float sums[T][EIGHTS][4] = {};

    __device__ Shrink(const ShrinkArgs &a, int4 tile) : a(a), tile(tile) {
        lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, quad = lane % 4;
        begin = blockIdx.z * a.chunk + warp * STEP, end = min(int(blockIdx.z + 1) * a.chunk, a.x.cols);
    }

    // Factors are on their way before the inputs are there.
    __device__ void prefetch(const Ranks (&ranks)[T]) const {
        for (int k = begin + quad * EIGHT; k < end; k += WARPS * STEP)
#pragma unroll
            for (int t = 0; t < T; t++) {
                if (ranks[t].low) asm volatile("prefetch.global.L2 [%0];" ::"l"(ranks[t].low + k));
                if (ranks[t].high) asm volatile("prefetch.global.L2 [%0];" ::"l"(ranks[t].high + k));
            }
    }

    // Asks for the warp's next columns.
    __device__ void ask(const Ranks (&ranks)[T], const Queue<T> &queue, const bf16 *const (&x)[EIGHTS],
                        int base, int stage) const {
        int k = base + quad * EIGHT;
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) queue.ask(stage, e, x[e], k, k < end);
#pragma unroll
        for (int t = 0; t < T; t++) {
            queue.ask(stage, EIGHTS + 2 * t, ranks[t].low, k, k < end);
            queue.ask(stage, EIGHTS + 2 * t + 1, ranks[t].high, k, k < end);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    __device__ void multiply(const Ranks (&ranks)[T], const Queue<T> &queue) {
        constexpr int STAGES = Queue<T>::STAGES;
        const bf16 *x[EIGHTS];
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            int row = e * EIGHT + group;
            x[e] = row < tile.y ? a.x.row<bf16>(a.order[tile.x + row]) : nullptr;
        }
        int base = begin;
        for (int i = 0; i < STAGES - 1; i++, base += WARPS * STEP) ask(ranks, queue, x, base, i);
        for (int at = begin, stage = 0; at < end; at += WARPS * STEP, base += WARPS * STEP) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
            multiply(queue, stage);
            int last = stage == 0 ? STAGES - 1 : stage - 1;
            ask(ranks, queue, x, base, last);
            if (++stage == STAGES) stage = 0;
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
    }

    // Fragments take eight neighbours of K from a thread where the instruction has them elsewhere; as both
    // operands do, the sum is the same.
    __device__ void multiply(const Queue<T> &queue, int stage) {
        uint4 v[EIGHTS];
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) v[e] = queue.at(stage, e);
#pragma unroll
        for (int t = 0; t < T; t++) {
            uint4 p = queue.at(stage, EIGHTS + 2 * t), r = queue.at(stage, EIGHTS + 2 * t + 1);
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                mma(sums[t][e], p.x, r.x, p.y, r.y, v[e].x, v[e].y);
                mma(sums[t][e], p.z, r.z, p.w, r.w, v[e].z, v[e].w);
            }
        }
    }

    // Adds up the sums of all warps; the first has the block's then. `parts`: [warps, T, rows, STRIDE]
    __device__ void reduce(float *parts) const {
        constexpr int COUNT = T * ROWS * STRIDE;
#pragma unroll
        for (int i = 0; i < T * EIGHTS * 4; i++) {
            int t = i / (EIGHTS * 4), e = i / 4 % EIGHTS, row = e * EIGHT + 2 * quad + i % 2;
            parts[warp * COUNT + (t * ROWS + row) * STRIDE + group + i % 4 / 2 * 8] = sums[t][e][i % 4];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < T * ROWS * RANKS; i += blockDim.x) {
            int at = i / RANKS * STRIDE + i % RANKS;
            float sum = parts[at];
            for (int w = 1; w < WARPS; w++) sum += parts[w * COUNT + at];
            parts[at] = sum;
        }
    }

    // Adds up the sums of the cluster's blocks, a share of them each, four at a time.
    __device__ void finish(const float *parts, const Ranks (&ranks)[T]) const {
        constexpr int FOURS = T * ROWS * RANKS / 4;
        int blocks = cluster_size(), share = (FOURS + blocks - 1) / blocks;
        int from = cluster_rank() * share, to = min(from + share, FOURS);
        for (int i = from + threadIdx.x; i < to; i += blockDim.x) {
            int t = i * 4 / (ROWS * RANKS), row = i * 4 / RANKS % ROWS, rank = i * 4 % RANKS;
            float4 sum = make_float4(0, 0, 0, 0);
            for (int block = 0; block < blocks; block++) {
                float4 v = load_at(shared_address(parts + i * 4 / RANKS * STRIDE + rank), block);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            if (row < tile.y) store(ranks, t, a.order[tile.x + row], rank, sum);
        }
    }

    __device__ void store(const Ranks (&ranks)[T], int t, int row, int rank, float4 v) const {
#pragma unroll
        for (int i = 0; i < T; i++) {
            if (i != t || ranks[i].count <= 0) continue;
            float scale = ranks[i].scale;
            Halves x(scale * v.x), y(scale * v.y), z(scale * v.z), w(scale * v.w);
            bf16 *to = a.z + (int64_t(row) * a.slices + ranks[i].slice) * 2 * a.max_rank + ranks[i].first + rank;
            *reinterpret_cast<uint2 *>(to) = make_uint2(pair(x.coarse, y.coarse), pair(z.coarse, w.coarse));
            *reinterpret_cast<uint2 *>(to + a.max_rank) = make_uint2(pair(x.fine, y.fine), pair(z.fine, w.fine));
        }
    }
};

// Whether any of the ranks is there, for all threads of all blocks of the cluster.
template <int T> __device__ bool any(const Ranks (&ranks)[T]) {
    bool found = false;
#pragma unroll
    for (int t = 0; t < T; t++) found |= ranks[t].count > 0;
    return found;
}

// Blocks (tile, sixteen ranks T at a time, block of the cluster). What is known of adapters was handed over
// before the first kernel of the step.
template <int T> __device__ void shrink_tile(const ShrinkArgs &a) {
    extern __shared__ uint4 shared[];
    let_next_start();
    int4 tile = a.tiles[blockIdx.x];
    if (int(blockIdx.x) >= a.sizes[2]) return wait_for_inputs();
    auto ranks_of = [&](int t) { return Ranks(a, tile.z, blockIdx.y * T + t); };
    Shrink<T> shrink(a, tile);
    if constexpr (T == 1) run(shrink, {ranks_of(0)}, shared);
    else if constexpr (T == 2) run(shrink, {ranks_of(0), ranks_of(1)}, shared);
    else run(shrink, {ranks_of(0), ranks_of(1), ranks_of(2), ranks_of(3)}, shared);
}

template <int T> __device__ void run(Shrink<T> &shrink, const Ranks (&ranks)[T], uint4 *shared) {
    if (!any(ranks)) return wait_for_inputs();
    shrink.prefetch(ranks);
    wait_for_inputs();
    shrink.multiply(ranks, Queue<T>{shared + shrink.warp * (QUEUE_BYTES / 16) + shrink.lane});
    // The sums lie where the loads were.
    __syncthreads();
    float *parts = reinterpret_cast<float *>(shared);
    shrink.reduce(parts);
    cluster_sync();
    shrink.finish(parts, ranks);
    // Nobody leaves while others read its sums.
    cluster_sync();
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP) lora_shrink_rows1(ShrinkArgs a) { shrink_tile<1>(a); }
extern "C" __global__ void __launch_bounds__(WARPS * WARP) lora_shrink_rows2(ShrinkArgs a) { shrink_tile<2>(a); }
extern "C" __global__ void __launch_bounds__(WARPS * WARP) lora_shrink_rows4(ShrinkArgs a) { shrink_tile<4>(a); }
