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
    int32_t apart; // Whether rows that are alone are left to the kernel for single rows.
};

// Whether both neighbours of a row are of other sequences.
__device__ inline bool is_alone(const AttentionArgs &a, int r) {
    int sequence = a.sequences[r];
    return (r == 0 || a.sequences[r - 1] != sequence) &&
           (r + 1 == a.queries.rows || a.sequences[r + 1] != sequence);
}

// Scores are taken to the power of two, which is one instruction if subnormal results may be zero.
constexpr float LOG2_E = 1.4426950408889634f;

__device__ inline float power_of_two(float v) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
    return power;
}

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

// Two numbers as one register; the first has the low bits.
__device__ inline uint32_t pair(bf16, float a, float b) {
    __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&both);
}

__device__ inline uint32_t pair(f16, float a, float b) {
    __half2 both = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&both);
}

// Two codes of e4m3 in the low bits, which both 16-bit types hold exactly.
template <class T> __device__ uint32_t decoded(T t, uint32_t codes) {
    auto low = static_cast<__nv_fp8x2_storage_t>(codes);
    float2 both = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(low, __NV_E4M3)));
    return pair(t, both.x, both.y);
}

// Vec8 neighbours of a cache, as they lie there.
template <class C> struct RawEight { using Type = uint4; };
template <> struct RawEight<f8> { using Type = uint2; };
template <class C> using Raw = typename RawEight<C>::Type;

// Vec8 neighbours in the queries' type.
template <class T> __device__ uint4 widened(T, uint4 v) { return v; }
template <class T> __device__ uint4 widened(T t, uint2 codes) {
    return make_uint4(decoded(t, codes.x), decoded(t, codes.x >> 16), decoded(t, codes.y),
                      decoded(t, codes.y >> 16));
}
