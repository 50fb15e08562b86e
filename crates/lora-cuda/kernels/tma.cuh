// Asynchronous copies by TMA and cp.async, and the mbarriers on which they complete.
#pragma once

#include "cluster.cuh"

// Bytes of a row of a tile under 128-byte swizzling, and of the eight rows after which its pattern repeats.
constexpr int SWIZZLE = 128;
constexpr int SWIZZLE_ATOM = 8 * SWIZZLE;

// The byte offset of 16-byte chunk `chunk` of row `row` in a swizzled tile.
__device__ inline int swizzled_offset(int row, int chunk) {
    return row * SWIZZLE + ((chunk ^ (row & 7)) << 4);
}

// Bytes from an address of shared memory to the next one where a swizzled tile may begin: the pattern goes by
// addresses, and dynamic shared memory need not be aligned to it.
__device__ inline uint32_t padding_to_atom(const void *smem) {
    return -smem_address(smem) & (SWIZZLE_ATOM - 1);
}

// A `CUtensorMap`, which only the TMA reads.
struct alignas(64) TensorMap {
    uint64_t words[16];
};
static_assert(sizeof(TensorMap) == 128);

// An mbarrier in shared memory; its phases complete one after another.
struct Mbarrier {
    uint64_t state;

    __device__ void init(uint32_t arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&state)), "r"(arrivals));
    }
    __device__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(&state)) : "memory");
    }
    // Arrives, and lets the phase wait for this many more bytes of copies.
    __device__ void arrive_expect_tx(uint32_t bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&state)),
                     "r"(bytes)
                     : "memory");
    }
    // Arrives at the barrier in CTA `rank` of the cluster. Relaxed: writes that the waiter is to see must be
    // released before, by `fence_release_cluster`.
    __device__ void arrive_cluster(uint32_t rank) {
        asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                         mapa(smem_address(&state), rank))
                     : "memory");
    }
    // Waits for the phase of this parity to complete.
    __device__ void wait(uint32_t parity) {
        asm volatile("{\n\t.reg .pred done;\n"
                     "again:\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                     "@!done bra again;\n\t}" ::"r"(smem_address(&state)),
                     "r"(parity)
                     : "memory");
    }
    // As `wait`, and acquires what other CTAs of the cluster released before they arrived.
    __device__ void wait_cluster(uint32_t parity) {
        asm volatile("{\n\t.reg .pred done;\n"
                     "again:\n\t"
                     "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                     "@!done bra again;\n\t}" ::"r"(smem_address(&state)),
                     "r"(parity)
                     : "memory");
        fence_acquire_cluster();
    }
};

// Makes initialised mbarriers visible to the TMA and to the cluster; a barrier of all threads must follow.
__device__ inline void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

// Orders this thread's accesses to shared memory before those of the asynchronous proxy: TMA and wgmma.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Stage and phase parity of one side of a pipeline.
struct PipelineState {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// L2 eviction priority of a TMA load, in the encoding of the instruction's cache hint.
enum class CacheHint : uint64_t {
    EVICT_NORMAL = 0x1000000000000000ull,
    EVICT_FIRST = 0x12f0000000000000ull,
    EVICT_LAST = 0x14f0000000000000ull
};

// Loads the box whose first element is at (column, row); elements outside of the matrix are zeros.
__device__ inline void tma_load(void *to, const TensorMap &map, int column, int row, Mbarrier &full,
                                CacheHint hint) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem_address(to)),
                 "l"(&map), "r"(column), "r"(row), "r"(smem_address(&full.state)),
                 "l"(static_cast<uint64_t>(hint))
                 : "memory");
}

// As `tma_load`, to the same place in every CTA of the mask, each of which completes on its own mbarrier.
__device__ inline void tma_load_multicast(uint16_t ctas, void *to, const TensorMap &map, int column, int row,
                                          Mbarrier &full, CacheHint hint) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(smem_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(smem_address(&full.state)), "h"(ctas),
        "l"(static_cast<uint64_t>(hint))
        : "memory");
}

// Stores a box, as far as it lies inside of the matrix, as a bulk group of its own.
__device__ inline void tma_store(const TensorMap &map, int column, int row, const void *from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n\t"
                 "cp.async.bulk.commit_group;" ::"l"(&map),
                 "r"(column), "r"(row), "r"(smem_address(from))
                 : "memory");
}

// Waits until all but the last PENDING stores of this thread have read shared memory.
template <int PENDING> __device__ inline void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Waits until all stores of this thread are complete.
__device__ inline void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Copies 16 bytes from global to shared memory, or writes zeros if not `valid`.
__device__ inline void cp_async_16(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Arrives at an mbarrier once all earlier cp.async of this thread are complete. It counts as one of the
// arrivals that the mbarrier expects.
__device__ inline void cp_async_arrive(Mbarrier &barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(&barrier.state))
                 : "memory");
}
