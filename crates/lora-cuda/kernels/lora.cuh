// The adapters of a site, which rows use them, and the ready flag between shrink and GEMM.
#pragma once

#include "common.cuh"

// One adapter's part of one slice of a site: a fused projection such as qkv has a slice per matrix. Laid out
// as `SlotRow` of ops/lora/table.rs.
struct SlotRow {
    const void *a, *b, *replacement; // replacement: a matrix in the base layer's place; null: none
    const float *gain, *shift;       // Factor and summand of each output; null: none.
    float scale;
    int32_t rank, a_dtype, b_dtype, replacement_dtype, active;
};
static_assert(sizeof(SlotRow) == 64 && offsetof(SlotRow, replacement) == 16 &&
              offsetof(SlotRow, shift) == 32 && offsetof(SlotRow, scale) == 40 &&
              offsetof(SlotRow, active) == 60);

// The weight of an RMS norm by row: its adapter's, or else the base model's. Laid out as `NormWeightArg` of
// ops/norm.rs. No kernel writes any of it.
struct NormWeight {
    const float *base;       // Null where the model has no such norm.
    const SlotRow *adapters; // By slot; null while no adapter has a weight of its own.
    const int32_t *slots;    // By row; negative without an adapter.

    __device__ const float *of(int64_t row) const {
        if (!adapters) return base;
        int32_t slot = slots[row];
        const void *own = slot < 0 ? nullptr : adapters[slot].replacement;
        return own ? static_cast<const float *>(own) : base;
    }
};
static_assert(sizeof(NormWeight) == 24 && offsetof(NormWeight, adapters) == 8 &&
              offsetof(NormWeight, slots) == 16);

// Rows of the vocabulary that an adapter brings along. Laid out as `TokenRows` of ops/lora/token_rows.rs.
struct TokenRows {
    const void *values; // [count, columns]
    const int32_t *ids; // Ascending.
    int32_t count, dtype;
};
static_assert(sizeof(TokenRows) == 24 && offsetof(TokenRows, ids) == 8 && offsetof(TokenRows, count) == 16 &&
              offsetof(TokenRows, dtype) == 20);

// The adapters of a site, and which rows of the batch use them. Laid out as `LoraArgs` of ops/lora/args.rs.
struct LoraArgs {
    Mat x; // Input of the base layer; of an embedding, `ids` stands for it.
    Mat out;
    const int32_t *ids;            // Null unless the site is an embedding.
    const SlotRow *table;          // [slots, slices]
    const int32_t *order;          // Rows sorted by adapter. A segment of it is the rows of one adapter.
    const int32_t *starts, *slots; // By segment: its start in `order` (and the last's end), its slot.
    const int32_t *idle;           // Rows without an adapter.
    const int4 *tiles;             // Rows of one adapter: start in `order`, count, slot.
    const int32_t *sizes;          // Number of segments, of rows in `order`, and of tiles.
    const int32_t *columns;        // First output of each slice, and the end of the last.
    float *z;        // [partials, rows, slices, max_rank] of A x; without partials z of lora_shrink.cu.
    int32_t *inputs; // Two words, see `begin_epoch`.
    int32_t slices, max_rank, in_dim;
    int32_t chunk, partials; // Columns of K per partial, and their number.
    int32_t tile_rows;       // Rows of a full tile.
};
static_assert(sizeof(LoraArgs) == 176 && offsetof(LoraArgs, ids) == 64 && offsetof(LoraArgs, order) == 80 &&
              offsetof(LoraArgs, tiles) == 112 && offsetof(LoraArgs, z) == 136 &&
              offsetof(LoraArgs, inputs) == 144 && offsetof(LoraArgs, slices) == 152 &&
              offsetof(LoraArgs, tile_rows) == 172);

__device__ inline float *z_of(const LoraArgs &a, int64_t row, int slice, int rank) {
    return a.z + (row * a.slices + slice) * a.max_rank + rank;
}

// The most slices of a site whose LoRA is fused into a GEMM.
constexpr int MAX_SLICES = 4;

// The adapters of a site as linear_stream.cu takes them: a subset of `LoraArgs`, by value. Laid out as
// `FewRows` of ops/linear/fused_args.rs.
struct FewRows {
    const SlotRow *table;
    const int32_t *order;
    const int4 *tiles;
    const int32_t *sizes;
    const float *z;
    int32_t starts[MAX_SLICES]; // First output of each slice.
    int32_t slices, max_rank, partials;
    int32_t *inputs; // Two words by which the shrink, the kernel before, signals that x is ready.
};
static_assert(sizeof(FewRows) == 80 && offsetof(FewRows, z) == 32 && offsetof(FewRows, starts) == 40 &&
              offsetof(FewRows, slices) == 56 && offsetof(FewRows, partials) == 64 &&
              offsetof(FewRows, inputs) == 72);

// The GEMM needs x now and z only in its epilogue, so it polls a ready flag instead of waiting for the shrink
// grid. The flag is an epoch, of which there are two words in global memory: the shrink increments the first
// before it lets the GEMM start, and stores the same number to the second once it has itself waited for x.
// The GEMM reads the first word before the kernel after it may start, and polls the second until it reaches
// that epoch. Epochs only grow: several kernels may be resident at once, the next perhaps before this one's x
// is ready. All threads of the first CTA take part.
__device__ inline bool is_first_block() { return blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0; }

// Starts an epoch, before `pdl_launch_dependents`. Returns it to the thread that signals.
__device__ inline int32_t begin_epoch(int32_t *words) {
    if (!is_first_block()) return 0;
    int32_t epoch = 0;
    if (threadIdx.x == 0) {
        auto begun = static_cast<volatile int32_t *>(words);
        epoch = *begun + 1;
        *begun = epoch;
        __threadfence();
    }
    __syncthreads(); // No thread may let the GEMM start before.
    return epoch;
}

// Signals, after `pdl_wait`, that x is ready.
__device__ inline void signal_ready(int32_t *words, int32_t epoch) {
    if (!is_first_block() || threadIdx.x != 0) return;
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(words + 1), "r"(epoch) : "memory");
}

// The epoch of the shrink before this kernel. Must be read before `pdl_launch_dependents`.
__device__ inline int32_t current_epoch(const int32_t *words) {
    return *static_cast<const volatile int32_t *>(words);
}

// Waits until x is ready, also for the TMA.
__device__ inline void wait_ready(const int32_t *words, int32_t epoch) {
    int32_t ready;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(ready) : "l"(words + 1) : "memory");
    while (ready - epoch < 0);
    asm volatile("fence.proxy.async;" ::: "memory");
}
