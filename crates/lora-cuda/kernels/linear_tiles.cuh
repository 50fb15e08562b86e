// What the warp roles of linear_tiles.cu share: arguments, shared memory, tile order.
#pragma once

#include "tma.cuh"
#include "wgmma.cuh"
#include "lora.cuh"


// The adapters of a site for a batch of many rows, of which the shrink has left z. Laid out as `ManyRows` of
// `ops/linear_tiles.rs`.
struct ManyRows {
    const SlotRow *table;
    const int32_t *slot_of_row;  // -1: no adapter
    const int32_t *group_starts; // Of each 256 rows: where their slots begin in `group_slots`, and the end.
    const int32_t *group_slots;
    const bf16 *z;     // scale * A x as sums of two numbers: [rows, slices, 2, max_rank]
    int32_t starts[MAX_SLICES + 1]; // Where slices begin, and the end of the last.
    int32_t slices, max_rank;
};

// Laid out as `TilesArgs` of `ops/linear_tiles.rs`.
struct TilesArgs {
    TensorMap w, x; // Boxes of 128 rows of 128 bytes. Where the product is there, `x` is that.
    TensorMap out;  // Boxes of 64 rows of 128 bytes.
    const float *bias; // Of each output; null: 0.
    ManyRows lora;         // No slices: there are no adapters.
    int32_t rows, cols;
    int32_t width;  // Outputs of a tile: all that it has sums of, or a gate and what it is for.
    int32_t second; // Where weights of the second half of a tile begin, behind the first half's.
    int32_t steps;  // Of K, 128 bytes each.
    int32_t bases;  // Boxes of each half of a tile of the product, where that is there.
};

constexpr int ROWS = 128, OUTPUTS = 256; // of a tile
constexpr int HALF = OUTPUTS / 2;
constexpr int CLUSTER = 2;               // blocks
constexpr int CLUSTER_ROWS = CLUSTER * ROWS; // for which slots are listed
constexpr int MAX_CLUSTERS = 64;        // of so many rows
constexpr int STAGES = 4;                // of the ring
constexpr int COLUMNS = 64;              // of K in a step, and of a box of outputs
constexpr int GROUP_ROWS = 64;           // of a group of consumers
constexpr int CONSUMERS = 2 * WARPGROUP;
constexpr int LOADER_WARPS = 3 * WARP;
constexpr int TOGETHER = 8;              // tiles of rows that go through all weights together
constexpr int UNIT = 16;                 // ranks of one instruction, of one slot at one slice
constexpr int UNITS = 2;                 // of a step
constexpr int CHUNK = 8;                 // ranks of one copy
constexpr int NOBODY = -2;               // a slot that no row has
constexpr int ENTRIES = 32;              // factors that LoRA loader warps know at a time
constexpr int X_BYTES = ROWS * SWIZZLE, W_BYTES = OUTPUTS * SWIZZLE, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int BOX_BYTES = GROUP_ROWS * SWIZZLE;

// A factor B that a tile needs.
struct Entry {
    const bf16 *b;
    int32_t slot, slice, rank;
};

// Barriers of each stage: it holds a step of K, or one of adapters; the producer has given it to the
// LoRA loader warps; all who copy to it may do so again.
struct Control {
    Mbarrier full[STAGES], filled[STAGES], given[STAGES], empty[STAGES];
    Entry entries[ENTRIES];
    int32_t slots[ROWS]; // of the rows that LoRA loader warps work on
    uint16_t units[MAX_CLUSTERS * MAX_SLICES]; // Of each 256 rows at each slice.
};

// The shared memory of a block.
struct Memory {
    uint8_t *stages, *boxes; // Boxes of outputs: two for each group.
    Control *control;

    __device__ explicit Memory(uint8_t *memory) {
        stages = memory + padding_to_atom(memory);
        boxes = stages + STAGES * STAGE_BYTES;
        control = reinterpret_cast<Control *>(boxes + 4 * BOX_BYTES);
    }
    __device__ uint8_t *x(int stage) const { return stages + stage * STAGE_BYTES; }
    __device__ uint8_t *w(int stage) const { return x(stage) + X_BYTES; }
};

// Which turn the barriers of a kind are at, a bit for each stage, where they have fewer turns than the ring.
struct Turns {
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

// The tiles of this block, in turn with other clusters. Those that run at the same time have few rows and few
// outputs among them, so that the L2 holds what they read.
struct Schedule {
    int row_tiles, output_tiles, width, rank;

    __device__ explicit Schedule(const TilesArgs &a) : width(a.width), rank(cluster_rank()) {
        row_tiles = (a.rows + CLUSTER_ROWS - 1) / CLUSTER_ROWS, output_tiles = (a.cols + a.width - 1) / a.width;
    }
    __device__ int begin() const { return blockIdx.x; }
    __device__ int step() const { return gridDim.x; }
    __device__ int end() const { return row_tiles * output_tiles; }

    __device__ Tile operator()(int i) const {
        int in_group = TOGETHER * output_tiles, group = i / in_group;
        int in_turn = min(TOGETHER, row_tiles - group * TOGETHER);
        int row = (group * TOGETHER + i % in_group % in_turn) * CLUSTER_ROWS;
        return {row + rank * ROWS, i % in_group / in_turn * width, row};
    }
};

__device__ int width_of(const ManyRows &lora, int slice) { return lora.starts[slice + 1] - lora.starts[slice]; }

// Where the first output of half a tile lies in a slice; it may lie before or behind it.
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

// Units of the adapters of a tile, the same for both blocks of a cluster.
__device__ int units_of(const TilesArgs &a, const Memory &memory, const Tile &tile) {
    int units = 0;
    Slices slices(a, tile.output);
    for (int slice = slices.first; slice < slices.end; slice++)
        units += memory.control->units[tile.cluster_row / CLUSTER_ROWS * a.lora.slices + slice];
    return units;
}
__device__ int steps_of(int units) { return (units + UNITS - 1) / UNITS; }

// Counts the units of adapters, by the LoRA loader warps.
__device__ void count_units(const TilesArgs &a, const Memory &memory, int thread) {
    int clusters = (a.rows + CLUSTER_ROWS - 1) / CLUSTER_ROWS;
    for (int i = thread; i < clusters * a.lora.slices; i += LOADER_WARPS) {
        int units = 0, group = i / a.lora.slices, slice = i % a.lora.slices;
        for (int j = a.lora.group_starts[group]; j < a.lora.group_starts[group + 1]; j++)
            units += (a.lora.table[a.lora.group_slots[j] * a.lora.slices + slice].rank + UNIT - 1) / UNIT;
        memory.control->units[i] = units;
    }
}
