// B z by tensor cores, for up to eight rows of one adapter.
#pragma once

#include "lora.cuh"
#include "mma.cuh"

// Four adjacent elements of a row of B, of which `count` exist; the rest are zeros.
__device__ inline uint2 load_up_to_4(const bf16 *from, int count) {
    bf16 v[4];
    for (int i = 0; i < 4; i++) v[i] = i < count ? from[i] : __float2bfloat16_rn(0.0f);
    return make_uint2(pack2(v[0], v[1]), pack2(v[2], v[3]));
}

// A thread's fragments of B for T instructions and 16 ranks. The thread computes 2 T adjacent outputs:
// instruction t has outputs 2 t and 2 t + 1, as rows `group` and `group + 8` of its tile of B.
template <int T> struct Factors {
    uint2 even[T], odd[T];

    // Loads four ranks of each row, from rank `from` on; zeros behind `rank`. `first` is the thread's first
    // row, and `left` the number of rows from there to the end.
    __device__ void load(const bf16 *first, int rank, int left, int from) {
        if (from >= rank) left = 0;
        first += from;
        if (rank % 4 == 0) {
            for_each_row(
                rank, left, [&](const bf16 *row) { return __ldg(reinterpret_cast<const uint2 *>(row)); },
                first);
        } else {
            for_each_row(rank, left, [&](const bf16 *row) { return load_up_to_4(row, rank - from); }, first);
        }
    }
    template <class Load> __device__ void for_each_row(int rank, int left, Load load, const bf16 *row) {
#pragma unroll
        for (int t = 0; t < T; t++, row += int64_t(2) * rank) {
            even[t] = odd[t] = make_uint2(0, 0);
            if (2 * t < left) even[t] = load(row);
            if (2 * t + 1 < left) odd[t] = load(row + rank);
        }
    }

    // acc += B z for 16 ranks of z = hi + lo. acc[t] holds output 2 t for the thread's two rows, then output
    // 2 t + 1.
    __device__ void multiply(uint2 hi, uint2 lo, float (&acc)[T][4]) const {
#pragma unroll
        for (int t = 0; t < T; t++) {
            mma(bf16{}, acc[t], {even[t].x, odd[t].x, even[t].y, odd[t].y}, hi.x, hi.y);
            mma(bf16{}, acc[t], {even[t].x, odd[t].x, even[t].y, odd[t].y}, lo.x, lo.y);
        }
    }
};

// A float as the sum of two bf16, so that 16 of its bits survive the tensor cores.
struct HiLo {
    bf16 hi, lo;

    __device__ explicit HiLo(float v)
        : hi(__float2bfloat16_rn(v)), lo(__float2bfloat16_rn(v - __bfloat162float(hi))) {}
};
