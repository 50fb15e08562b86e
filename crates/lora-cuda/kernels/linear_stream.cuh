// What the warp roles of linear_stream.cu share: arguments, shared memory, order of work.
#pragma once

#include "lora_factors.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// Laid out as `StreamArgs` of ops/linear/stream.rs.
struct StreamArgs {
    TensorMap w, x;
    Mat out;
    const float *x_scales; // By row; null: 1.
    const float *w_scales; // By output; null: 1.
    const float *bias;     // By output; null: 0.
    FewRows lora;          // No slices: no LoRA.
    int32_t dtype;         // Of w and x.
    int32_t steps;         // Of K, 128 bytes each.
    int32_t stages;        // Of the ring of weights: as many as shared memory has room for.
};
static_assert(sizeof(StreamArgs) == 448 && offsetof(StreamArgs, x) == 128 &&
              offsetof(StreamArgs, out) == 256 && offsetof(StreamArgs, x_scales) == 288 &&
              offsetof(StreamArgs, lora) == 312 && offsetof(StreamArgs, dtype) == 392 &&
              offsetof(StreamArgs, stages) == 400);

constexpr int OUTPUTS = 64;                 // of a consumer warpgroup: the M of wgmma, as weights are its `a`
constexpr int EPILOGUE_THREADS = WARPGROUP; // in four warps
constexpr int EPILOGUE_BARRIER = 2;         // named barrier of the epilogue warps
constexpr int MAX_STAGES = 24;  // of weights; their mbarriers are initialised by the lanes of one warp
constexpr int MAX_X_STAGES = 8; // of x
constexpr int MAX_CLUSTER = 2;  // Clusters of four leave SMs idle: not every GPC has a multiple of four.
static_assert(MAX_STAGES <= WARP && MAX_X_STAGES <= WARP);

// What the epilogue needs of an adapter's slice, in shared memory.
struct SliceFactors {
    const bf16 *b;
    const float *gain, *shift;
    float scale;
    int32_t rank, active;
};
static_assert(sizeof(SliceFactors) == 40, "`PART_BYTES` of ops/linear/stream_cut.rs");

// N: rows of x, rounded up to what wgmma takes. GROUPS: consumer warpgroups, of 64 outputs each.
template <int N, int GROUPS> struct TileShape {
    static constexpr int ROWS = N, WIDTH = OUTPUTS * GROUPS;
    static constexpr int W_BYTES = WIDTH * SWIZZLE, X_BYTES = N * SWIZZLE;
    static constexpr int X_STAGES = MAX_X_STAGES / GROUPS;
    static constexpr int BATCH = 4 / GROUPS; // K steps between two waits for wgmma
    // Weight tiles in flight. With more, weights would not arrive sooner, and other reads would queue behind.
    static constexpr int MAX_IN_FLIGHT = 8 / GROUPS;
    static constexpr int STRIDE = WIDTH + 4; // Padded, so that a warp's stores hit all banks.
    static constexpr int CONSUMERS = GROUPS * WARPGROUP;
};

// A barrier at which one role of every CTA of the cluster arrives. Every thread arrives for itself, in its
// own CTA by the instructions of CTA scope, which race checkers follow.
struct ClusterBarrier {
    Mbarrier own, peer;

    __device__ void init(int threads) {
        own.init(threads);
        peer.init(threads);
    }
    __device__ void arrive() {
        static_assert(MAX_CLUSTER == 2, "there is one peer");
        own.arrive();
        if (cluster_size() == 1) return;
        fence_release_cluster();
        peer.arrive_cluster(cluster_rank() ^ 1);
    }
    __device__ void wait(uint32_t parity) {
        own.wait(parity);
        if (cluster_size() > 1) peer.wait_cluster(parity);
    }
};

struct Barriers {
    Mbarrier w_full[MAX_STAGES], w_empty[MAX_STAGES], x_full[MAX_X_STAGES], x_empty[MAX_X_STAGES];
    ClusterBarrier sums_full, sums_empty;
};
static_assert(sizeof(Barriers) + SWIZZLE_ATOM <= 2048, "`CONTROL_BYTES` of ops/linear/stream_cut.rs");

// Shared memory of a CTA. S: the `TileShape`.
template <class S> struct Smem {
    uint8_t *w, *x;
    Barriers *barriers;
    float *sums;         // [rows, STRIDE]
    float *deltas;       // The LoRA term of the outputs that this CTA stores: [rows, their number + 4]
    SliceFactors *parts; // [tiles of rows, slices]
    int4 *tiles;
    int32_t *order, *tile_of_row; // -1: no adapter
    float *row_scales;

    __device__ Smem(uint8_t *memory, int stages) {
        memory += padding_to_atom(memory);
        w = memory;
        x = w + stages * S::W_BYTES;
        barriers = reinterpret_cast<Barriers *>(x + S::X_STAGES * S::X_BYTES);
        sums = reinterpret_cast<float *>(barriers + 1);
        deltas = sums + S::ROWS * S::STRIDE;
        tiles = reinterpret_cast<int4 *>(deltas + S::ROWS * (S::WIDTH / cluster_size() + 4));
        order = reinterpret_cast<int32_t *>(tiles + S::ROWS), tile_of_row = order + S::ROWS;
        row_scales = reinterpret_cast<float *>(tile_of_row + S::ROWS);
        parts = reinterpret_cast<SliceFactors *>(row_scales + S::ROWS);
    }
    // By one warp.
    __device__ void init(int stages, int lane) const {
        if (lane < stages) {
            barriers->w_full[lane].init(1);
            barriers->w_empty[lane].init(S::CONSUMERS / WARP);
        }
        if (lane < S::X_STAGES) {
            barriers->x_full[lane].init(1);
            barriers->x_empty[lane].init(S::CONSUMERS / WARP);
        }
        if (lane == 0) {
            barriers->sums_full.init(S::CONSUMERS);
            barriers->sums_empty.init(EPILOGUE_THREADS);
        }
        fence_mbarrier_init();
        __syncwarp();
    }
};

// The work of this CTA: every `clusters`th tile, and of each the K steps from `from` to before `to`.
struct Work {
    int tile, tiles, clusters, from, to;

    __device__ Work(const StreamArgs &a, int width) {
        int size = cluster_size(), rank = cluster_rank();
        clusters = gridDim.x, tile = blockIdx.x;
        tiles = (a.out.cols + width - 1) / width;
        from = a.steps * rank / size, to = a.steps * (rank + 1) / size;
    }
    __device__ int steps() const {
        int own_tiles = tile < tiles ? (tiles - tile + clusters - 1) / clusters : 0;
        return own_tiles * (to - from);
    }
};

// Iterates over the K steps of one tile, then of the next. Incremented rather than computed from a number, as
// a producer has few cycles for each step.
struct StepIterator {
    int tile, step, left;

    __device__ StepIterator(const Work &work) : tile(work.tile), step(work.from), left(work.steps()) {}

    __device__ void next(const Work &work) {
        left--;
        if (++step == work.to) step = work.from, tile += work.clusters;
    }
};
