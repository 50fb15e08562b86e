// LoRA shrink of many rows by wgmma.
//
// Problem: z[row, slice] = scale * A x in bf16 hi + lo, as linear_tiles.cu and lora_mma.cu read it; A
//   [max_rank, K] per slice, x [M, K].
// Grid: (tile of 128 rows of one adapter, T blocks of 16 ranks, split of K); the CTAs that split K form a
//   cluster of up to eight. Two consumer warpgroups of 64 rows, one warpgroup that copies.
// Pipeline: a ring of four stages of 64 columns, filled by cp.async (full/empty). The first stages' factors
//   are requested before the kernels ahead of this one end. In the end sums take the ring's place in shared
//   memory, and the CTAs add up those of the whole cluster.
// Numerics: wgmma with f32 accumulators; split-K partials are added in the order of the CTAs, without
//   atomics. How K is split depends on the batch.
// Chosen when: 512 rows and more in tiles of 32 (`MIN_ROWS_TO_SHRINK` in ops/lora.rs). K is split until the
//   device is filled once, not finer than four steps.
#include "tma.cuh"
#include "wgmma.cuh"
#include "lora_factors.cuh"

// Laid out as `ShrinkArgs` of `ops/lora_shrink.rs`.
struct ShrinkArgs {
    Mat x;
    const SlotRow *table;
    const int32_t *order, *starts, *slots; // Segments: where the rows of each slot begin in `order`.
    const int32_t *sizes;                  // The first is the number of segments.
    bf16 *z;                               // [rows, slices, 2, max_rank]
    int32_t slices, max_rank;
    int32_t steps; // of K of a block
};

constexpr int ROWS = 128;    // of a tile
constexpr int RANKS = 16;    // of a unit: of one slice
constexpr int COLUMNS = 64;  // of K in a step
constexpr int CHUNK = 8;     // columns of one copy
constexpr int CHUNKS = COLUMNS / CHUNK;
constexpr int STAGES = 4;    // of the ring
constexpr int GROUP_ROWS = 64; // of a group of consumers
constexpr int CONSUMERS = 2 * WARPGROUP, LOADERS = WARPGROUP, THREADS = CONSUMERS + LOADERS;
constexpr int LOADED = LOADERS / CHUNKS; // rows that loaders copy together
constexpr int X_BYTES = ROWS * SWIZZLE;
static_assert(LOADED == RANKS && LOADED % 8 == 0, "all rows of a loader are swizzled alike, one of each unit");

// Rows of one adapter. No rows: there is no such tile.
struct Tile {
    int start, rows, slot; // `start` in `order`
};

// Sixteen ranks of a slice. No ranks: there is no such unit.
struct Unit {
    const bf16 *a; // The first row.
    float scale;
    int slice, first, count;

    __device__ Unit(const ShrinkArgs &args, int slot, int number) : a(nullptr), scale(0), count(0) {
        int of_slice = args.max_rank / RANKS;
        slice = number / of_slice, first = number % of_slice * RANKS;
        if (slice >= args.slices) return;
        const SlotRow &part = args.table[slot * args.slices + slice];
        a = static_cast<const bf16 *>(part.a) + int64_t(first) * args.x.cols;
        scale = part.scale, count = max(min(part.rank - first, RANKS), 0);
    }
};

// Finds the tile of a number, if segments are cut into tiles one after another. By one warp.
__device__ Tile find_tile(const ShrinkArgs &a, int number) {
    int lane = threadIdx.x % WARP, segments = a.sizes[0];
    for (int base = 0; base < segments; base += WARP) {
        int i = base + lane, start = 0, rows = 0;
        if (i < segments) start = a.starts[i], rows = a.starts[i + 1] - start;
        int tiles = (rows + ROWS - 1) / ROWS, end = tiles;
        for (int step = 1; step < WARP; step *= 2) {
            int before = __shfl_up_sync(ALL_LANES, end, step);
            if (lane >= step) end += before;
        }
        unsigned found = __ballot_sync(ALL_LANES, number < end);
        if (found) {
            int first = (number - (end - tiles)) * ROWS;
            Tile tile = {start + first, min(rows - first, ROWS), i < segments ? a.slots[i] : 0};
            int from = __ffs(found) - 1;
            return {__shfl_sync(ALL_LANES, tile.start, from), __shfl_sync(ALL_LANES, tile.rows, from),
                    __shfl_sync(ALL_LANES, tile.slot, from)};
        }
        number -= __shfl_sync(ALL_LANES, end, WARP - 1);
    }
    return {0, 0, 0};
}

// Barriers of each stage: it holds a step of K; it may be filled again.
struct Control {
    Mbarrier full[STAGES], empty[STAGES];
    Tile tile;

    __device__ void init() {
        for (int i = 0; i < STAGES; i++) full[i].init(LOADERS), empty[i].init(CONSUMERS / WARP);
        fence_mbarrier_init();
    }
};

// The shared memory of a block. Sums take the place of the ring in the end: [ROWS, STRIDE].
template <int T> struct Memory {
    static constexpr int STAGE_BYTES = X_BYTES + T * RANKS * SWIZZLE;
    static constexpr int STRIDE = T * RANKS + 4; // spreads what a warp stores over the banks
    static_assert(ROWS * STRIDE * sizeof(float) <= STAGES * STAGE_BYTES);
    uint8_t *stages;
    Control *control;

    __device__ explicit Memory(uint8_t *memory) {
        stages = memory + padding_to_atom(memory);
        control = reinterpret_cast<Control *>(stages + STAGES * STAGE_BYTES);
    }
    __device__ uint8_t *x(int stage) const { return stages + stage * STAGE_BYTES; }
    __device__ uint8_t *factors(int stage) const { return x(stage) + X_BYTES; }
    __device__ float *sums() const { return reinterpret_cast<float *>(stages); }
};

// The part of K of this block, in steps.
struct Share {
    int first, count;

    __device__ explicit Share(const ShrinkArgs &a) : first(blockIdx.z * a.steps) {
        count = min(a.steps, (a.x.cols + COLUMNS - 1) / COLUMNS - first);
    }
};

// Copies inputs and factors. A thread has the same columns of one row of each unit, and of a row in sixteen
// of the tile.
template <int T> struct Loader {
    const ShrinkArgs &a;
    const Memory<T> &memory;
    Share share;
    int row, column, place; // The first row; `place` in a tile of shared memory.
    const bf16 *x[ROWS / LOADED], *factors[T]; // null: zeros

    __device__ Loader(const ShrinkArgs &a, const Memory<T> &memory, Tile tile)
        : a(a), memory(memory), share(a), row((threadIdx.x - CONSUMERS) / CHUNKS) {
        int chunk = threadIdx.x % CHUNKS;
        column = chunk * CHUNK, place = swizzled_offset(row, chunk);
#pragma unroll
        for (int i = 0; i < ROWS / LOADED; i++) {
            int r = row + i * LOADED;
            x[i] = r < tile.rows ? a.x.row<bf16>(a.order[tile.start + r]) + column : nullptr;
        }
#pragma unroll
        for (int t = 0; t < T; t++) {
            Unit unit(a, tile.slot, blockIdx.y * T + t);
            factors[t] = row < unit.count ? unit.a + int64_t(row) * a.x.cols + column : nullptr;
        }
    }

    // Factors come first: they are there before the inputs.
    __device__ void run() const {
        int ahead = min(share.count, STAGES);
        for (int step = 0; step < ahead; step++) load_factors(step, step);
        pdl_wait();
        PipelineState ring;
        for (int step = 0; step < share.count; step++, ring.advance(STAGES)) {
            if (step >= STAGES) {
                memory.control->empty[ring.stage].wait(ring.parity ^ 1);
                load_factors(ring.stage, step);
            }
            load_inputs(ring.stage, step);
            cp_async_arrive(memory.control->full[ring.stage]);
        }
    }

    __device__ void load_factors(int stage, int step) const {
#pragma unroll
        for (int t = 0; t < T; t++) load(memory.factors(stage) + t * RANKS * SWIZZLE, factors[t], step);
    }
    __device__ void load_inputs(int stage, int step) const {
#pragma unroll
        for (int i = 0; i < ROWS / LOADED; i++) load(memory.x(stage) + i * LOADED * SWIZZLE, x[i], step);
    }
    __device__ void load(uint8_t *to, const bf16 *from, int step) const {
        int k = (share.first + step) * COLUMNS;
        bool there = from && k + column < a.x.cols;
        // An address must be given where nothing is read, too.
        cp_async_16(to + place, there ? from + k : static_cast<const void *>(a.table), there);
    }
};

// Sums of 64 rows, by each of two groups of warps.
template <int T> struct Consumer {
    const Memory<T> &memory;
    float sums[T * RANKS / 2];

    __device__ void multiply(int steps) {
        PipelineState ring;
        int group = threadIdx.x / WARPGROUP, last = 0;
#pragma unroll 1
        for (int step = 0; step < steps; step++, ring.advance(STAGES)) {
            memory.control->full[ring.stage].wait(ring.parity);
            fence_proxy_async();
            uint64_t x = smem_descriptor(memory.x(ring.stage) + group * GROUP_ROWS * SWIZZLE);
            uint64_t factors = smem_descriptor(memory.factors(ring.stage));
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) wgmma(bf16{}, sums, x + 2 * k, factors + 2 * k, step + k > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0) release(last);
            last = ring.stage;
        }
        wgmma_wait<0>();
    }
    __device__ void release(int stage) const {
        if (threadIdx.x % WARP == 0) memory.control->empty[stage].arrive();
    }

    // Leaves the sums for all blocks of the cluster.
    __device__ void keep() const {
        int row = threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4, rank = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < T * RANKS / 4; i++) {
            float *to = memory.sums() + (row + i % 2 * 8) * Memory<T>::STRIDE + i / 2 * 8 + rank;
            *reinterpret_cast<float2 *>(to) = make_float2(sums[2 * i], sums[2 * i + 1]);
        }
    }
};

// Adds up the sums of the cluster's blocks, a share of them each, four at a time.
template <int T> __device__ void finish(const ShrinkArgs &a, const Memory<T> &memory, Tile tile) {
    constexpr int OF_ROW = T * RANKS / 4;
    int blocks = cluster_size(), fours = tile.rows * OF_ROW, share = (fours + blocks - 1) / blocks;
    int from = cluster_rank() * share, to = min(from + share, fours);
    for (int i = from + threadIdx.x; i < to; i += THREADS) {
        int row = i / OF_ROW, rank = i % OF_ROW * 4;
        Unit unit(a, tile.slot, blockIdx.y * T + rank / RANKS);
        if (unit.count == 0) continue;
        float4 v = make_float4(0, 0, 0, 0);
        for (int block = 0; block < blocks; block++) {
            float4 part = ld_shared_cluster(smem_address(memory.sums() + row * Memory<T>::STRIDE + rank), block);
            v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
        }
        Halves x(unit.scale * v.x), y(unit.scale * v.y), z(unit.scale * v.z), w(unit.scale * v.w);
        int64_t part = (int64_t(a.order[tile.start + row]) * a.slices + unit.slice) * 2;
        bf16 *out = a.z + part * a.max_rank + unit.first + rank % RANKS;
        *reinterpret_cast<uint2 *>(out) = make_uint2(pair(x.hi, y.hi), pair(z.hi, w.hi));
        *reinterpret_cast<uint2 *>(out + a.max_rank) = make_uint2(pair(x.lo, y.lo), pair(z.lo, w.lo));
    }
}

// Whether the tile's adapter has any of this block's ranks, the same for all blocks of the cluster.
template <int T> __device__ bool has_units(const ShrinkArgs &a, Tile tile) {
    bool any = false;
    for (int t = 0; t < T; t++) any |= Unit(a, tile.slot, blockIdx.y * T + t).count > 0;
    return any;
}

// Blocks (tile, T units, block of the cluster). What is known of adapters was handed over before the first
// kernel of the step.
template <int T> __device__ void shrink_rows(const ShrinkArgs &a) {
    extern __shared__ uint8_t shared[];
    pdl_launch_dependents();
    Memory<T> memory(shared);
    if (threadIdx.x < WARP) {
        Tile found = find_tile(a, blockIdx.x);
        if (threadIdx.x == 0) memory.control->tile = found, memory.control->init();
    }
    __syncthreads();
    Tile tile = memory.control->tile;
    if (tile.rows == 0 || !has_units<T>(a, tile)) return pdl_wait();
    Consumer<T> consumer{memory};
    if (threadIdx.x < CONSUMERS) consumer.multiply(Share(a).count);
    else Loader<T>(a, memory, tile).run();
    pdl_wait();
    __syncthreads();
    if (threadIdx.x < CONSUMERS) consumer.keep();
    cluster_sync();
    finish<T>(a, memory, tile);
    // Nobody leaves while others read its sums.
    cluster_sync();
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) lora_shrink_rows1(ShrinkArgs a) { shrink_rows<1>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) lora_shrink_rows2(ShrinkArgs a) { shrink_rows<2>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) lora_shrink_rows4(ShrinkArgs a) { shrink_rows<4>(a); }
