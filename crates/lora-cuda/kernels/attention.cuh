// Arguments of the attention kernels, and helpers that they share.
#pragma once

#include "mma.cuh"

// Laid out as `AttentionArgs` of ops/attention/mod.rs.
struct AttentionArgs {
    Mat queries, k_cache, v_cache, out;
    const int32_t *sequences, *positions; // By row.
    const int32_t *tables;                // Block table by sequence.
    int64_t table_stride;
    float scale, v_scale;             // `scale` includes the scale of the keys.
    int32_t tokens_per_block, window; // window 0: none
    int32_t heads, kv_heads, head_dim;
    int32_t apart; // Whether prefill leaves rows that are alone to a decode kernel after it.
};
static_assert(sizeof(AttentionArgs) == 192 && offsetof(AttentionArgs, out) == 96 &&
              offsetof(AttentionArgs, sequences) == 128 && offsetof(AttentionArgs, table_stride) == 152 &&
              offsetof(AttentionArgs, scale) == 160 && offsetof(AttentionArgs, heads) == 176 &&
              offsetof(AttentionArgs, apart) == 188);

// Whether a row is the only one of its sequence: the rows beside it are of others.
__device__ inline bool is_alone(const AttentionArgs &a, int r) {
    int sequence = a.sequences[r];
    return (r == 0 || a.sequences[r - 1] != sequence) &&
           (r + 1 == a.queries.rows || a.sequences[r + 1] != sequence);
}

// Softmax uses powers of two, which are one instruction if subnormal results may be zero.
constexpr float LOG2_E = 1.4426950408889634f;

__device__ inline float exp2_approx(float v) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
    return power;
}

// The score of a masked key, and the initial row maximum: above it and below all other scores. Finite, so
// that their differences are.
constexpr float MASKED = -3.0e38f, LOWEST = -1.0e38f;

// The row of the KV cache that holds position `p` of the sequence with this block table.
__device__ inline int64_t cache_row(const AttentionArgs &a, const int32_t *table, int p) {
    return static_cast<int64_t>(table[p / a.tokens_per_block]) * a.tokens_per_block + p % a.tokens_per_block;
}

// The first position that a row at position `last` may see.
__device__ inline int first_key(const AttentionArgs &a, int last) {
    return a.window > 0 ? max(last + 1 - a.window, 0) : 0;
}

// Converts two e4m3 in the low bits of `codes` to 16-bit numbers, which hold them exactly.
template <class T> __device__ uint32_t fp8x2_to_16bit(T t, uint32_t codes) {
    auto low = static_cast<__nv_fp8x2_storage_t>(codes);
    float2 both = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(low, __NV_E4M3)));
    return pack2(t, both.x, both.y);
}

// Eight adjacent elements of a cache, as loaded.
template <class C> struct RawVec8 {
    using Type = uint4;
};
template <> struct RawVec8<f8> {
    using Type = uint2;
};
template <class C> using Raw = typename RawVec8<C>::Type;

// Converts eight elements of a cache to the queries' type.
template <class T> __device__ uint4 convert_vec8(T, uint4 v) { return v; }
template <class T> __device__ uint4 convert_vec8(T t, uint2 codes) {
    return make_uint4(fp8x2_to_16bit(t, codes.x), fp8x2_to_16bit(t, codes.x >> 16),
                      fp8x2_to_16bit(t, codes.y), fp8x2_to_16bit(t, codes.y >> 16));
}
