// What all kernels of attention take.
#pragma once

#include "common.cuh"

// Laid out as `AttentionArgs` of `ops/attention.rs`.
struct AttentionArgs {
    Mat queries, k_cache, v_cache, out;
    const int32_t *sequences, *positions, *tables;
    int64_t table_stride;
    float scale, v_scale; // The scale of the keys is part of `scale`.
    int32_t tokens_per_block, window; // window 0: none
    int32_t heads, kv_heads, head_dim;
};

// Scores are taken to the power of two, which is one instruction.
constexpr float LOG2_E = 1.4426950408889634f;

// A score that weighs nothing, and a maximum that is above it and below all others: their
// differences are finite.
constexpr float MASKED = -3.0e38f, LOWEST = -1.0e38f;

// The row of the caches that holds position `p` of the sequence with this block table.
__device__ inline int64_t cache_row(const AttentionArgs &a, const int32_t *table, int p) {
    return static_cast<int64_t>(table[p / a.tokens_per_block]) * a.tokens_per_block +
           p % a.tokens_per_block;
}

// The first position that the row at position `last` attends to.
__device__ inline int first_key(const AttentionArgs &a, int last) {
    return a.window > 0 ? max(last + 1 - a.window, 0) : 0;
}
