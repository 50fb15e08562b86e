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
// Chosen when: 512 rows and more in tiles of 32 (`MIN_ROWS_FOR_CLUSTER` in ops/lora/route.rs). K is split
// until the
//   device is filled once, not finer than four steps.
#include "lora_factors.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// Laid out as `ShrinkArgs` of ops/lora/cluster_shrink.rs.
struct ShrinkArgs {
    Mat x;
    const SlotRow *table;
    const int32_t *order, *starts, *slots; // As in `LoraArgs`.
    const int32_t *sizes;                  // The first is the number of segments.
    bf16 *z;                               // [rows, slices, 2 (hi, lo), max_rank]
    int32_t slices, max_rank;
    int32_t steps; // of K per CTA
};
static_assert(sizeof(ShrinkArgs) == 96 && offsetof(ShrinkArgs, table) == 32 &&
              offsetof(ShrinkArgs, z) == 72 && offsetof(ShrinkArgs, slices) == 80 &&
              offsetof(ShrinkArgs, steps) == 88);

constexpr int ROWS = 128;   // of a tile
constexpr int RANKS = 16;   // of a rank block, which belongs to one slice
constexpr int COLUMNS = 64; // of K in a step: 128 bytes, a row under 128-byte swizzling
constexpr int CHUNK = 8;    // columns of one cp.async of 16 bytes
constexpr int CHUNKS = COLUMNS / CHUNK;
constexpr int STAGES = 4;          // of the ring
constexpr int WARPGROUP_ROWS = 64; // of a consumer warpgroup: the M of wgmma
constexpr int CONSUMERS = 2 * WARPGROUP, LOADERS = WARPGROUP, THREADS = CONSUMERS + LOADERS;
constexpr int CTAS_PER_SM = 2;
constexpr int ROWS_PER_PASS = LOADERS / CHUNKS; // rows that the loaders copy at once
constexpr int X_BYTES = ROWS * SWIZZLE;
static_assert(ROWS_PER_PASS == RANKS && ROWS_PER_PASS % 8 == 0,
              "a loader has one row of each rank block, and rows that are swizzled alike");

// Rows of one adapter. No rows: there is no such tile.
struct Tile {
    int start, rows, slot; // `start` in `order`
};

// Sixteen ranks of a slice. No ranks: there is no such block.
struct RankBlock {
    const bf16 *a; // The first row.
    float scale;
    int slice, first, count;

    __device__ RankBlock(const ShrinkArgs &args, int slot, int number) : a(nullptr), scale(0), count(0) {
        int blocks_per_slice = args.max_rank / RANKS;
        slice = number / blocks_per_slice, first = number % blocks_per_slice * RANKS;
        if (slice >= args.slices) return;
        const SlotRow &part = args.table[slot * args.slices + slice];
        a = static_cast<const bf16 *>(part.a) + int64_t(first) * args.x.cols;
        scale = part.scale, count = max(min(part.rank - first, RANKS), 0);
    }
};

// Finds tile `number`, where each segment is cut into tiles and the tiles of all segments are numbered in
// turn. By one warp, 32 segments at a time: a prefix sum of their tiles, and a vote for the one with it.
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

// The pipeline's mbarriers, and the tile that warp 0 has found.
struct Control {
    Mbarrier full[STAGES], empty[STAGES];
    Tile tile;

    __device__ void init() {
        for (int i = 0; i < STAGES; i++) full[i].init(LOADERS), empty[i].init(CONSUMERS / WARP);
        fence_mbarrier_init();
    }
};

// Shared memory of a CTA: the ring, whose place the sums [ROWS, STRIDE] take in the end. T: rank blocks.
template <int T> struct Smem {
    static constexpr int STAGE_BYTES = X_BYTES + T * RANKS * SWIZZLE;
    static constexpr int STRIDE = T * RANKS + 4; // Padded, so that a warp's stores hit all banks.
    static_assert(ROWS * STRIDE * sizeof(float) <= STAGES * STAGE_BYTES);
    uint8_t *stages;
    Control *control;

    __device__ explicit Smem(uint8_t *memory) {
        stages = memory + padding_to_atom(memory);
        control = reinterpret_cast<Control *>(stages + STAGES * STAGE_BYTES);
    }
    __device__ uint8_t *x(int stage) const { return stages + stage * STAGE_BYTES; }
    __device__ uint8_t *factors(int stage) const { return x(stage) + X_BYTES; }
    __device__ float *sums() const { return reinterpret_cast<float *>(stages); }
};

// The CTA's split of K, in steps.
struct KSplit {
    int first, count;

    __device__ explicit KSplit(const ShrinkArgs &a) : first(blockIdx.z * a.steps) {
        count = min(a.steps, (a.x.cols + COLUMNS - 1) / COLUMNS - first);
    }
};

// Copies x and A. A thread has the same eight columns of one row of each rank block and of every sixteenth
// row of the tile.
template <int T> struct Loader {
    const ShrinkArgs &a;
    const Smem<T> &smem;
    KSplit split;
    int row, column, offset;                          // The first row, and its offset in a swizzled tile.
    const bf16 *x[ROWS / ROWS_PER_PASS], *factors[T]; // null: zeros

    __device__ Loader(const ShrinkArgs &a, const Smem<T> &smem, Tile tile)
        : a(a), smem(smem), split(a), row((threadIdx.x - CONSUMERS) / CHUNKS) {
        int chunk = threadIdx.x % CHUNKS;
        column = chunk * CHUNK, offset = swizzled_offset(row, chunk);
#pragma unroll
        for (int i = 0; i < ROWS / ROWS_PER_PASS; i++) {
            int r = row + i * ROWS_PER_PASS;
            x[i] = r < tile.rows ? a.x.row<bf16>(a.order[tile.start + r]) + column : nullptr;
        }
#pragma unroll
        for (int t = 0; t < T; t++) {
            RankBlock block(a, tile.slot, blockIdx.y * T + t);
            factors[t] = row < block.count ? block.a + int64_t(row) * a.x.cols + column : nullptr;
        }
    }

    // No kernel writes A, so the first stages get theirs before x is ready.
    __device__ void run() const {
        int ahead = min(split.count, STAGES);
        for (int step = 0; step < ahead; step++) load_factors(step, step);
        pdl_wait();
        PipelineState ring;
        for (int step = 0; step < split.count; step++, ring.advance(STAGES)) {
            if (step >= STAGES) {
                smem.control->empty[ring.stage].wait(ring.parity ^ 1);
                load_factors(ring.stage, step);
            }
            load_inputs(ring.stage, step);
            cp_async_arrive(smem.control->full[ring.stage]);
        }
    }

    __device__ void load_factors(int stage, int step) const {
#pragma unroll
        for (int t = 0; t < T; t++) load(smem.factors(stage) + t * RANKS * SWIZZLE, factors[t], step);
    }
    __device__ void load_inputs(int stage, int step) const {
#pragma unroll
        for (int i = 0; i < ROWS / ROWS_PER_PASS; i++)
            load(smem.x(stage) + i * ROWS_PER_PASS * SWIZZLE, x[i], step);
    }
    __device__ void load(uint8_t *to, const bf16 *from, int step) const {
        int k = (split.first + step) * COLUMNS;
        bool valid = from && k + column < a.x.cols;
        // cp.async needs a valid address even if it reads nothing.
        cp_async_16(to + offset, valid ? from + k : static_cast<const void *>(a.table), valid);
    }
};

// A consumer warpgroup: the sums of 64 rows.
template <int T> struct Consumer {
    const Smem<T> &smem;
    float acc[T * RANKS / 2];

    __device__ void multiply(int steps) {
        PipelineState ring;
        int group = threadIdx.x / WARPGROUP, last = 0;
#pragma unroll 1
        for (int step = 0; step < steps; step++, ring.advance(STAGES)) {
            smem.control->full[ring.stage].wait(ring.parity);
            fence_proxy_async(); // cp.async writes by the generic proxy.
            uint64_t x = smem_descriptor(smem.x(ring.stage) + group * WARPGROUP_ROWS * SWIZZLE);
            uint64_t factors = smem_descriptor(smem.factors(ring.stage));
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) wgmma(bf16{}, acc, x + 2 * k, factors + 2 * k, step + k > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0) release(last);
            last = ring.stage;
        }
        wgmma_wait<0>();
    }
    __device__ void release(int stage) const {
        if (threadIdx.x % WARP == 0) smem.control->empty[stage].arrive();
    }

    // Stores the sums where all CTAs of the cluster read them.
    __device__ void store() const {
        int row = threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4, rank = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < T * RANKS / 4; i++) {
            float *to = smem.sums() + (row + i % 2 * 8) * Smem<T>::STRIDE + i / 2 * 8 + rank;
            *reinterpret_cast<float2 *>(to) = make_float2(acc[2 * i], acc[2 * i + 1]);
        }
    }
};

// Adds the split-K partials of the cluster, scales them and stores z. Each CTA takes a share of the tile,
// four ranks at a time.
template <int T> __device__ void reduce_and_store(const ShrinkArgs &a, const Smem<T> &smem, Tile tile) {
    constexpr int FLOAT4S_PER_ROW = T * RANKS / 4;
    int ctas = cluster_size(), float4s = tile.rows * FLOAT4S_PER_ROW, share = (float4s + ctas - 1) / ctas;
    int from = cluster_rank() * share, to = min(from + share, float4s);
    for (int i = from + threadIdx.x; i < to; i += THREADS) {
        int row = i / FLOAT4S_PER_ROW, rank = i % FLOAT4S_PER_ROW * 4;
        RankBlock block(a, tile.slot, blockIdx.y * T + rank / RANKS);
        if (block.count == 0) continue;
        float4 v = make_float4(0, 0, 0, 0);
        for (int cta = 0; cta < ctas; cta++) {
            float4 part = ld_shared_cluster(smem_address(smem.sums() + row * Smem<T>::STRIDE + rank), cta);
            v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
        }
        HiLo x(block.scale * v.x), y(block.scale * v.y), z(block.scale * v.z), w(block.scale * v.w);
        int64_t part = (int64_t(a.order[tile.start + row]) * a.slices + block.slice) * 2;
        bf16 *out = a.z + part * a.max_rank + block.first + rank % RANKS;
        *reinterpret_cast<uint2 *>(out) = make_uint2(pack2(x.hi, y.hi), pack2(z.hi, w.hi));
        *reinterpret_cast<uint2 *>(out + a.max_rank) = make_uint2(pack2(x.lo, y.lo), pack2(z.lo, w.lo));
    }
}

// Whether the tile's adapter has any of this CTA's ranks; uniform across the cluster.
template <int T> __device__ bool has_ranks(const ShrinkArgs &a, Tile tile) {
    bool any = false;
    for (int t = 0; t < T; t++) any |= RankBlock(a, tile.slot, blockIdx.y * T + t).count > 0;
    return any;
}

// Grid (tile, T rank blocks, CTA of the cluster). The tables of adapters were written before the first kernel
// of the step, so they may be read before `pdl_wait`.
template <int T> __device__ void shrink_rows(const ShrinkArgs &a) {
    extern __shared__ uint8_t shared[];
    pdl_launch_dependents();
    Smem<T> smem(shared);
    if (threadIdx.x < WARP) {
        Tile found = find_tile(a, blockIdx.x);
        if (threadIdx.x == 0) smem.control->tile = found, smem.control->init();
    }
    __syncthreads();
    Tile tile = smem.control->tile;
    if (tile.rows == 0 || !has_ranks<T>(a, tile)) return pdl_wait();
    Consumer<T> consumer{smem};
    if (threadIdx.x < CONSUMERS) consumer.multiply(KSplit(a).count);
    else Loader<T>(a, smem, tile).run();
    pdl_wait();
    __syncthreads();
    if (threadIdx.x < CONSUMERS) consumer.store();
    cluster_sync();
    reduce_and_store<T>(a, smem, tile);
    cluster_sync(); // A CTA must not exit while others read its shared memory.
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) lora_shrink_rows1(ShrinkArgs a) {
    shrink_rows<1>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) lora_shrink_rows2(ShrinkArgs a) {
    shrink_rows<2>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) lora_shrink_rows4(ShrinkArgs a) {
    shrink_rows<4>(a);
}
