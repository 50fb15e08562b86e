// What the warp roles of linear_tiles.cu share: arguments, shared memory, tile order.
#pragma once

#include "lora.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// The adapters of a site, z of which is computed. Laid out as `ManyRows` of ops/linear/fused_args.rs.
struct ManyRows {
    const SlotRow *table;           // [slots, slices]
    const int32_t *slot_of_row;     // -1: no adapter
    const int32_t *group_starts;    // By group of 256 rows: its first entry in `group_slots`, and the end.
    const int32_t *group_slots;     // The slots that the rows of a group use.
    const bf16 *z;                  // scale * A x: [rows, slices, 2 (hi, lo), max_rank]
    int32_t starts[MAX_SLICES + 1]; // First output of each slice, and the end of the last.
    int32_t slices, max_rank;
};
static_assert(sizeof(ManyRows) == 72 && offsetof(ManyRows, z) == 32 && offsetof(ManyRows, starts) == 40 &&
              offsetof(ManyRows, slices) == 60 && offsetof(ManyRows, max_rank) == 64);

// Laid out as `TilesArgs` of ops/linear/tiles.rs.
struct TilesArgs {
    TensorMap w, x;    // Boxes of 128 rows by 128 bytes. In mode GATE_ADDED `x` is the output of the GEMM.
    TensorMap out;     // Boxes of 64 rows by 128 bytes.
    const float *bias; // By output; null: 0.
    ManyRows lora;     // No slices: no LoRA.
    int32_t rows, cols;
    int32_t width;  // Outputs that a tile stores: 256, or 128 of SwiGLU.
    int32_t second; // Outputs from a tile's first half to its second: 128, or those from gate to up.
    int32_t steps;  // Of K, 128 bytes each.
    int32_t bases;  // Boxes per half that are loaded from the output of the GEMM, in mode GATE_ADDED.
};
static_assert(sizeof(TilesArgs) == 512 && offsetof(TilesArgs, out) == 256 &&
              offsetof(TilesArgs, bias) == 384 && offsetof(TilesArgs, lora) == 392 &&
              offsetof(TilesArgs, rows) == 464 && offsetof(TilesArgs, bases) == 484);

constexpr int ROWS = 128, OUTPUTS = 256; // of a CTA's tile
constexpr int HALF = OUTPUTS / 2;
constexpr int CLUSTER = 2;                   // CTAs, which compute the same outputs of different rows
constexpr int CLUSTER_ROWS = CLUSTER * ROWS; // also the rows of a group in `ManyRows`
constexpr int MAX_ROW_TILES = 64;            // of a cluster: what `Control` has counters for
constexpr int STAGES = 4;                    // of the ring: 48 KiB each, so that four fit beside the boxes
constexpr int COLUMNS = 64;                  // of K in a step, and of a box of outputs: 128 bytes
constexpr int WARPGROUP_ROWS = 64;           // of a consumer warpgroup: the M of wgmma
constexpr int CONSUMERS = 2 * WARPGROUP;
constexpr int LOADERS = 3 * WARP;
constexpr int THREADS = CONSUMERS + WARP + LOADERS;
constexpr int LOADER_BARRIER = 3;      // named barrier of the loader warps; consumers have 1 and 2
constexpr int ROW_TILES_PER_GROUP = 8; // in the order of tiles: see `TileScheduler`
constexpr int RANKS = 16;              // of a rank block: the K of a bf16 wgmma; of one slot and slice
constexpr int BLOCKS_PER_STEP = 2;     // rank blocks that share a stage
constexpr int CHUNK = 8;               // ranks of one cp.async of 16 bytes
constexpr int NO_SLOT = -2;            // matches no row: -1 is that of rows without an adapter
constexpr int MAX_ENTRIES = 32;        // factors that the loader warps have looked up at a time
constexpr int X_BYTES = ROWS * SWIZZLE, W_BYTES = OUTPUTS * SWIZZLE, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int BOX_BYTES = WARPGROUP_ROWS * SWIZZLE;

// B of a slot at a slice that a tile needs.
struct Entry {
    const bf16 *b;
    int32_t slot, slice, rank;
};

// mbarriers of the stages, and what the loader warps know of adapters.
struct Control {
    Mbarrier full[STAGES];      // TMA has filled the stage with a step of K.
    Mbarrier lora_full[STAGES]; // The loader warps have filled it with rank blocks.
    Mbarrier lora_free[STAGES]; // The producer has handed an empty stage to the loader warps.
    Mbarrier empty[STAGES];     // The consumers of both CTAs have read it.
    Entry entries[MAX_ENTRIES];
    int32_t slots[ROWS];                              // by row of the tile that the loader warps work on
    uint16_t rank_blocks[MAX_ROW_TILES * MAX_SLICES]; // by group of 256 rows and slice
};
static_assert(sizeof(Control) == 1920, "`CONTROL` of ops/linear/tiles.rs");

// Shared memory of a CTA.
struct Smem {
    uint8_t *stages, *boxes; // Two boxes of outputs per consumer warpgroup.
    Control *control;

    __device__ explicit Smem(uint8_t *memory) {
        stages = memory + padding_to_atom(memory);
        boxes = stages + STAGES * STAGE_BYTES;
        control = reinterpret_cast<Control *>(boxes + 4 * BOX_BYTES);
    }
    __device__ uint8_t *x(int stage) const { return stages + stage * STAGE_BYTES; }
    __device__ uint8_t *w(int stage) const { return x(stage) + X_BYTES; }
};

// Phase parities of one kind of mbarrier, a bit per stage, for those that not every turn of the ring uses.
struct PhaseBits {
    uint32_t parities = 0;

    __device__ void wait(Mbarrier (&barriers)[STAGES], int stage) {
        barriers[stage].wait(parities >> stage & 1);
        parities ^= 1u << stage;
    }
};

// A tile: its first row and output, and the first row of the cluster's tiles.
struct Tile {
    int row, output, cluster_row;
};

// The tiles of this CTA: the clusters take them in turn, eight row tiles by all outputs before the next rows.
// So tiles that run at the same time share rows and outputs, and the L2 holds what they read.
struct TileScheduler {
    int row_tiles, output_tiles, width, rank;

    __device__ explicit TileScheduler(const TilesArgs &a) : width(a.width), rank(cluster_rank()) {
        row_tiles = (a.rows + CLUSTER_ROWS - 1) / CLUSTER_ROWS;
        output_tiles = (a.cols + a.width - 1) / a.width;
    }
    __device__ int begin() const { return blockIdx.x; }
    __device__ int step() const { return gridDim.x; }
    __device__ int end() const { return row_tiles * output_tiles; }

    __device__ Tile operator()(int i) const {
        int group_tiles = ROW_TILES_PER_GROUP * output_tiles, group = i / group_tiles;
        int group_rows = min(ROW_TILES_PER_GROUP, row_tiles - group * ROW_TILES_PER_GROUP);
        int row = (group * ROW_TILES_PER_GROUP + i % group_tiles % group_rows) * CLUSTER_ROWS;
        return {row + rank * ROWS, i % group_tiles / group_rows * width, row};
    }
};

__device__ int width_of(const ManyRows &lora, int slice) {
    return lora.starts[slice + 1] - lora.starts[slice];
}

// The first output of half a tile, relative to a slice; it may lie before or behind the slice.
__device__ int in_slice(const TilesArgs &a, int output, int half, int slice) {
    return output + half * a.second - a.lora.starts[slice];
}

// The slices that a tile has outputs of: from `first` to before `end`.
struct Slices {
    int first, end;

    __device__ Slices(const TilesArgs &a, int output) : first(0), end(0) {
        for (int slice = a.lora.slices - 1; slice >= 0; slice--) {
            bool meets = false;
            for (int half = 0; half < 2; half++) {
                int from = in_slice(a, output, half, slice);
                meets |= from > -HALF && from < width_of(a.lora, slice);
            }
            if (meets) first = slice, end = max(end, slice + 1);
        }
    }
};

// Rank blocks of a tile; the same for both CTAs of a cluster.
__device__ int rank_blocks_of(const TilesArgs &a, const Smem &smem, const Tile &tile) {
    int blocks = 0;
    Slices slices(a, tile.output);
    for (int slice = slices.first; slice < slices.end; slice++)
        blocks += smem.control->rank_blocks[tile.cluster_row / CLUSTER_ROWS * a.lora.slices + slice];
    return blocks;
}
__device__ int steps_of(int rank_blocks) { return (rank_blocks + BLOCKS_PER_STEP - 1) / BLOCKS_PER_STEP; }

// Counts the rank blocks of every group of rows and slice. By the loader warps.
__device__ void count_rank_blocks(const TilesArgs &a, const Smem &smem, int thread) {
    int clusters = (a.rows + CLUSTER_ROWS - 1) / CLUSTER_ROWS;
    for (int i = thread; i < clusters * a.lora.slices; i += LOADERS) {
        int blocks = 0, group = i / a.lora.slices, slice = i % a.lora.slices;
        for (int j = a.lora.group_starts[group]; j < a.lora.group_starts[group + 1]; j++)
            blocks += (a.lora.table[a.lora.group_slots[j] * a.lora.slices + slice].rank + RANKS - 1) / RANKS;
        smem.control->rank_blocks[i] = blocks;
    }
}
