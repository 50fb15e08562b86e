// Asynchronous GEMMs of a warpgroup (wgmma): descriptors, fences, commit and wait, and the instructions.
#pragma once

#include "common.cuh"
#include "tma.cuh"

constexpr int WARPGROUP = 4 * WARP;

// Raises or lowers the registers of each thread of the warpgroup, which takes them from or gives them to a
// pool of the CTA.
template <int REGISTERS> __device__ inline void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ inline void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Descriptor of an operand in shared memory: rows of 128 bytes under 128-byte swizzling. An MN-major operand
// of more than one such column of rows has them `leading_bytes` apart; K-major operands ignore it.
__device__ inline uint64_t smem_descriptor(const void *tile, int leading_bytes = 0) {
    uint64_t address = (smem_address(tile) & 0x3ffff) >> 4;
    return address | uint64_t(leading_bytes >> 4) << 16 | uint64_t{SWIZZLE_ATOM >> 4} << 32 |
           uint64_t{1} << 62;
}

// Must come before the first wgmma, and whenever other instructions have touched the accumulators since.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the last PENDING groups, in the order in which they were committed.
template <int PENDING> __device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
__device__ inline void wgmma_commit_and_wait() {
    wgmma_commit();
    wgmma_wait<0>();
}

#define ACC_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC_16(i) ACC_4(i), ACC_4(i + 4), ACC_4(i + 8), ACC_4(i + 12)
#define ACC_64(i) ACC_16(i), ACC_16(i + 16), ACC_16(i + 32), ACC_16(i + 48)
#define REGS_4 "%0, %1, %2, %3"
#define REGS_8 REGS_4 ", %4, %5, %6, %7"
#define REGS_16 REGS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REGS_32 REGS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGS_64                                                                                              \
    REGS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGS_128                                                                                             \
    REGS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "     \
            "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "       \
            "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// As `wgmma_wait`, where later groups stay pending: as it names the accumulators, the compiler reads them
// only after it.
template <int PENDING> __device__ inline void wgmma_wait(float (&d)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : ACC_16(0), ACC_16(16) : "n"(PENDING) : "memory");
}
template <int PENDING> __device__ inline void wgmma_wait(float (&d)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : ACC_64(0) : "n"(PENDING) : "memory");
}

#define WGMMA(SHAPE, TYPES, FLAGS, REGS, A, B, ACCUMULATE, ...)                                              \
    asm volatile("{\n\t.reg .pred accumulate;\n\tsetp.ne.b32 accumulate, " ACCUMULATE ", 0;\n\t"             \
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPES " {" REGS "}, " A ", " B                \
                 ", accumulate, 1, 1" FLAGS ";\n\t}"                                                         \
                 : __VA_ARGS__                                                                               \
                 : "l"(a), "l"(b), "r"(accumulate))

// d (+)= a b^T for 64 rows of `a` and N rows of `b`, both K-major descriptors, over 32 bytes of K. Of every 8
// rows of `b` a thread has four accumulators: rows lane / 4 and lane / 4 + 8 of its warp's 16 rows of `a`,
// two adjacent rows of `b` each.
#define DEFINE_WGMMA(T, K, TYPES, FLAGS)                                                                     \
    __device__ inline void wgmma(T, float (&d)[4], uint64_t a, uint64_t b, int accumulate) {                 \
        WGMMA("m64n8" K, TYPES, FLAGS, REGS_4, "%4", "%5", "%6", ACC_4(0));                                  \
    }                                                                                                        \
    __device__ inline void wgmma(T, float (&d)[8], uint64_t a, uint64_t b, int accumulate) {                 \
        WGMMA("m64n16" K, TYPES, FLAGS, REGS_8, "%8", "%9", "%10", ACC_4(0), ACC_4(4));                      \
    }                                                                                                        \
    __device__ inline void wgmma(T, float (&d)[16], uint64_t a, uint64_t b, int accumulate) {                \
        WGMMA("m64n32" K, TYPES, FLAGS, REGS_16, "%16", "%17", "%18", ACC_16(0));                            \
    }                                                                                                        \
    __device__ inline void wgmma(T, float (&d)[32], uint64_t a, uint64_t b, int accumulate) {                \
        WGMMA("m64n64" K, TYPES, FLAGS, REGS_32, "%32", "%33", "%34", ACC_16(0), ACC_16(16));                \
    }                                                                                                        \
    __device__ inline void wgmma(T, float (&d)[64], uint64_t a, uint64_t b, int accumulate) {                \
        WGMMA("m64n128" K, TYPES, FLAGS, REGS_64, "%64", "%65", "%66", ACC_64(0));                           \
    }                                                                                                        \
    __device__ inline void wgmma(T, float (&d)[128], uint64_t a, uint64_t b, int accumulate) {               \
        WGMMA("m64n256" K, TYPES, FLAGS, REGS_128, "%128", "%129", "%130", ACC_64(0), ACC_64(64));           \
    }

DEFINE_WGMMA(bf16, "k16", "bf16.bf16", ", 0, 0")
DEFINE_WGMMA(f16, "k16", "f16.f16", ", 0, 0")
DEFINE_WGMMA(f8, "k32", "e4m3.e4m3", "")

// d += a b for `a` [64, 16] in registers, laid out as the accumulators of a wgmma are, and an MN-major
// descriptor `b` [16, N].
#define DEFINE_WGMMA_REGISTERS(T, TYPES)                                                                     \
    __device__ inline void wgmma(T, float (&d)[32], const uint32_t (&a)[4], uint64_t b) {                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " {" REGS_32                        \
                     "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                             \
                     : ACC_16(0), ACC_16(16)                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                  \
    }                                                                                                        \
    __device__ inline void wgmma(T, float (&d)[64], const uint32_t (&a)[4], uint64_t b) {                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {" REGS_64                       \
                     "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                             \
                     : ACC_64(0)                                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                  \
    }

DEFINE_WGMMA_REGISTERS(bf16, "bf16.bf16")
DEFINE_WGMMA_REGISTERS(f16, "f16.f16")
