// The C interface of `libloramux_flashinfer.so`, and what its files share.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

// Attention of rows that the host has planned. Tiles of rows are listed for one block after the other; lists
// of the same number have one entry for each tile and head. Laid out as `PrefillArgs` of `src/flashinfer.rs`.
struct PrefillArgs {
    const void *queries, *keys, *values; // bf16; heads lie side by side in a row
    void *out;
    const int32_t *tables;      // KV blocks of the sequences
    const int32_t *block_ends;  // Where the tiles of each block begin in the lists, and the end.
    const int32_t *heads_of;    // Query head.
    const int32_t *tiles;       // Number of the tile within its run.
    const int32_t *first_rows;  // First row of the run.
    const int32_t *first_blocks; // First KV block of the run's sequence in `tables`.
    const int32_t *rows_of;     // Rows of the run, which has the last positions of its sequence.
    const int32_t *keys_of;     // Positions of the sequence up to the run's end.
    int64_t query_stride, cache_stride, out_stride; // of rows, in elements
    float scale;
    int32_t rows, heads, kv_heads, head_dim, tokens_per_block;
    int32_t before; // Positions before its own that a row attends to; -1: all.
};

// One file each, as each takes a minute to compile.
cudaError_t prefill_64(const PrefillArgs &args, cudaStream_t stream);
cudaError_t prefill_128(const PrefillArgs &args, cudaStream_t stream);
