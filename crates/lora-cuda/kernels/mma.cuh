// Tensor-core instructions of a warp (mma.sync), and loads, stores and transposes of their fragments.
#pragma once

#include "common.cuh"

// Two 16-bit numbers as one register; the first has the low bits.
__device__ inline uint32_t pack2(bf16 a, bf16 b) {
    return uint32_t(__bfloat16_as_ushort(a)) | uint32_t(__bfloat16_as_ushort(b)) << 16;
}

// Two floats, rounded to 16 bits, as one register.
__device__ inline uint32_t pack2(bf16, float a, float b) {
    __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&both);
}
__device__ inline uint32_t pack2(f16, float a, float b) {
    __half2 both = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&both);
}

// d += a b for tiles a [16, 16] and b [16, 8] of 16-bit numbers, in the fragments of `mma.m16n8k16`.
#define DEFINE_MMA(T, TYPE)                                                                                  \
    __device__ inline void mma(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {         \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                          \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                        \
    }

DEFINE_MMA(bf16, "bf16")
DEFINE_MMA(f16, "f16")

// Loads four [8, 8] matrices of 16-bit elements from shared memory; each lane gives the address of one row.
__device__ inline void ldmatrix_x4(uint32_t (&v)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(smem_address(row))
                 : "memory");
}

// Stores four [8, 8] matrices of 16-bit elements to shared memory; each lane gives the address of one row.
__device__ inline void stmatrix_x4(void *row, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(row)),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

// Transposes an [8, 8] matrix of 16-bit elements; lane i has elements i % 4 * 2 and the next of row i / 4.
__device__ inline uint32_t movmatrix_trans(uint32_t v) {
    uint32_t t;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v));
    return t;
}
