// The adapters of a site, and which rows use them.
#pragma once

#include "common.cuh"

// What one adapter does to one slice. Laid out as `SlotRow` of `ops/lora_table.rs`.
struct SlotRow {
    const void *a, *b, *replacement;
    const float *gain, *shift;
    float scale;
    int32_t rank, a_dtype, b_dtype, replacement_dtype, active;
};

// Laid out as `LoraArgs` of `ops/lora.rs`.
struct LoraArgs {
    Mat x;              // Input of the base layer; of an embedding, `ids` stands for it.
    Mat out;
    const int32_t *ids; // Null unless the site is an embedding.
    const SlotRow *table;
    const int32_t *order, *starts, *slots;
    const int32_t *idle;    // Rows without an adapter.
    const int4 *tiles;      // Rows of one adapter: start in `order`, number, slot.
    const int32_t *sizes;   // Number of segments, of rows in `order`, and of tiles.
    const int32_t *columns; // Where slices begin, and the end.
    float *z;               // Parts of A x: [planes, rows, slices, max_rank]
    int32_t slices, max_rank, in_dim;
    int32_t chunk, planes;  // Columns of K that a plane sums, and their number.
};

__device__ inline float *z_of(const LoraArgs &a, int64_t row, int slice, int rank) {
    return a.z + (row * a.slices + slice) * a.max_rank + rank;
}

// The adapters of a site for a batch of few rows, which the shrink has seen before. Laid out as
// `FewRows` of `ops/lora.rs`.
struct FewRows {
    const SlotRow *table;
    const int32_t *order;
    const int4 *tiles;
    const int32_t *sizes;
    const float *z;
    int32_t starts[4]; // Where slices begin.
    int32_t slices, max_rank, planes;
};
