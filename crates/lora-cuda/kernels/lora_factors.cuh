// B z by tensor cores, for up to eight rows of one adapter.
#pragma once

#include "lora.cuh"

// sums += a b for tiles [16, 16] and [16, 8] of bf16, in the fragments of `mma.m16n8k16`.
__device__ inline void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A pair of neighbours as one register.
__device__ inline uint32_t pair(bf16 a, bf16 b) {
    return uint32_t(__bfloat16_as_ushort(a)) | uint32_t(__bfloat16_as_ushort(b)) << 16;
}

// Four neighbours of a row of B, of `count` that there are; zeros behind them.
__device__ inline uint2 load_some(const bf16 *from, int count) {
    bf16 v[4];
    for (int i = 0; i < 4; i++) v[i] = i < count ? from[i] : __float2bfloat16_rn(0.0f);
    return make_uint2(pair(v[0], v[1]), pair(v[2], v[3]));
}

// Two rows of B for each of T instructions: what a thread needs for 16 ranks. The outputs of a thread
// are 2 T neighbours, of which an instruction has two, as its rows `group` and `group + 8`.
template <int T> struct Factors {
    uint2 even[T], odd[T];

    // Four ranks of each row, `from` a rank on; zeros behind the end. `first`: the thread's first row, of `left` that
    // there are.
    __device__ void load(const bf16 *first, int rank, int left, int from) {
        if (from >= rank) left = 0;
        first += from;
        if (rank % 4 == 0) {
            each(rank, left, [&](const bf16 *row) { return __ldg(reinterpret_cast<const uint2 *>(row)); }, first);
        } else {
            each(rank, left, [&](const bf16 *row) { return load_some(row, rank - from); }, first);
        }
    }
    template <class Load> __device__ void each(int rank, int left, Load load, const bf16 *row) {
#pragma unroll
        for (int t = 0; t < T; t++, row += int64_t(2) * rank) {
            even[t] = odd[t] = make_uint2(0, 0);
            if (2 * t < left) even[t] = load(row);
            if (2 * t + 1 < left) odd[t] = load(row + rank);
        }
    }

    // Adds the products with 16 ranks of z, which is the sum of `hi` and `lo`. Sums are those of
    // the even output and two rows, then of the odd one.
    __device__ void multiply(uint2 hi, uint2 lo, float (&sums)[T][4]) const {
#pragma unroll
        for (int t = 0; t < T; t++) {
            mma(sums[t], even[t].x, odd[t].x, even[t].y, odd[t].y, hi.x, hi.y);
            mma(sums[t], even[t].x, odd[t].x, even[t].y, odd[t].y, lo.x, lo.y);
        }
    }
};

// A number as a sum of two in bf16, so that it keeps 16 bits on its way through the tensor cores.
struct Halves {
    bf16 hi, lo;

    __device__ explicit Halves(float v)
        : hi(__float2bfloat16_rn(v)), lo(__float2bfloat16_rn(v - __bfloat162float(hi))) {}
};
