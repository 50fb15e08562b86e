// Integers that are ordered as floats are, and (float, index) pairs in one integer.
#pragma once

#include "common.cuh"

// An integer that is ordered as the float is; zeros of both signs are equal.
__device__ inline uint32_t ordered_key(float v) {
    uint32_t bits = __float_as_uint(v + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float float_of_key(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A pair that is ordered by `v`, equal ones by descending index: the maximum is the largest float, and of
// equal ones the one with the lowest index.
__device__ inline u64 ordered_pair(float v, int index) {
    return static_cast<u64>(ordered_key(v)) << 32 | (0xffffffffu - index);
}

__device__ inline float float_of_pair(u64 pair) { return float_of_key(static_cast<uint32_t>(pair >> 32)); }

__device__ inline int index_of_pair(u64 pair) {
    return static_cast<int>(0xffffffffu - static_cast<uint32_t>(pair));
}
