// Thread block clusters: ranks, distributed shared memory, and fences that order it.
#pragma once

#include "common.cuh"

__device__ inline uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ inline uint32_t cluster_size() {
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// The cluster address of the same place in the shared memory of CTA `rank`.
__device__ inline uint32_t mapa(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// Four adjacent floats from the shared memory of CTA `rank`.
__device__ inline float4 ld_shared_cluster(uint32_t address, uint32_t rank) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(mapa(address, rank)));
    return v;
}

// CTAs of a cluster communicate through shared memory only. Fences restricted to it are cheap; unrestricted
// ones wait for global memory too, which takes longer than many a kernel.
__device__ inline void fence_release_cluster() {
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
}
__device__ inline void fence_acquire_cluster() {
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}

// A barrier of all threads of the cluster that makes their writes to shared memory visible to each other.
__device__ inline void cluster_sync() {
    fence_release_cluster();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
    fence_acquire_cluster();
}
