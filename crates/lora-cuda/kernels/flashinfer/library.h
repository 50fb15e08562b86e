// The C interface of libloramux_flashinfer.so, and declarations that its files share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

// Attention of rows that the host has planned: lists with an entry per tile and head, CTA by CTA. A run is
// adjacent rows of one sequence. Laid out as `PrefillArgs` of src/library/flashinfer.rs.
struct PrefillArgs {
    const void *queries, *keys, *values; // bf16; the heads of a row are adjacent
    void *out;
    const int32_t *tables;                          // KV blocks of the sequences
    const int32_t *block_ends;                      // First entry of each CTA, and the end of the last.
    const int32_t *heads_of;                        // By entry: query head.
    const int32_t *tiles;                           // Number of the tile in its run.
    const int32_t *first_rows;                      // First row of the run.
    const int32_t *first_blocks;                    // First KV block of its sequence in `tables`.
    const int32_t *rows_of;                         // Rows of the run, which are the last of their sequence.
    const int32_t *keys_of;                         // Positions of the sequence up to the run's end.
    int64_t query_stride, cache_stride, out_stride; // of rows, in elements
    float scale;
    int32_t rows, heads, kv_heads, head_dim, tokens_per_block;
    int32_t before; // Sliding window: positions before its own that a row sees; -1: all.
};
static_assert(sizeof(PrefillArgs) == 152 && offsetof(PrefillArgs, tables) == 32 &&
              offsetof(PrefillArgs, block_ends) == 40 && offsetof(PrefillArgs, keys_of) == 88 &&
              offsetof(PrefillArgs, query_stride) == 96 && offsetof(PrefillArgs, scale) == 120 &&
              offsetof(PrefillArgs, before) == 144);

// One file each, as each takes a minute to compile.
cudaError_t prefill_64(const PrefillArgs &args, cudaStream_t stream);
cudaError_t prefill_128(const PrefillArgs &args, cudaStream_t stream);
