// Instructions of compute capability 9.0: barriers in shared memory, bulk copies of tiles, and products by
// groups of four warps.
#pragma once

#include "common.cuh"

constexpr int WARPGROUP = 4 * WARP;

// Bytes of a row of a tile; the swizzle of copies and products works on eight such rows.
constexpr int SWIZZLE = 128;
constexpr int SWIZZLE_BLOCK = 8 * SWIZZLE;

// A `CUtensorMap`, which only the TMA reads.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

__device__ inline uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The address of the same place in the shared memory of block `rank` of the cluster.
__device__ inline uint32_t address_at(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

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

// Four neighbours in the shared memory of block `rank` of the cluster.
__device__ inline float4 load_at(uint32_t address, uint32_t rank) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address_at(address, rank)));
    return v;
}

// What blocks of a cluster tell each other lies in shared memory. Fences for that alone are cheap; others wait
// for device memory, too, which takes longer than many a kernel.
__device__ inline void publish_to_cluster() {
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
}
__device__ inline void see_cluster() {
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}

// Waits for all threads of the cluster, and for what they wrote to shared memory.
__device__ inline void cluster_sync() {
    publish_to_cluster();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
    see_cluster();
}

// A barrier of shared memory; its phases end one after another.
struct Barrier {
    uint64_t state;

    __device__ void init(uint32_t arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)),
                     "r"(arrivals));
    }
    __device__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state))
                     : "memory");
    }
    // Arrives; the phase does not end before so many bytes were copied.
    __device__ void expect(uint32_t bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                         shared_address(&state)),
                     "r"(bytes)
                     : "memory");
    }
    // Arrives at the barrier of block `rank` of the cluster. What was written to shared memory before must have
    // been published.
    __device__ void arrive_at(uint32_t rank) {
        asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                         address_at(shared_address(&state), rank))
                     : "memory");
    }
    // Waits for the end of the phase of this parity.
    __device__ void wait(uint32_t parity) {
        asm volatile("{\n\t.reg .pred done;\n"
                     "again:\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                     "@!done bra again;\n\t}" ::"r"(shared_address(&state)),
                     "r"(parity)
                     : "memory");
    }
    // As `wait`, for what other blocks of the cluster published before they arrived.
    __device__ void wait_for_cluster(uint32_t parity) {
        asm volatile("{\n\t.reg .pred done;\n"
                     "again:\n\t"
                     "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                     "@!done bra again;\n\t}" ::"r"(shared_address(&state)),
                     "r"(parity)
                     : "memory");
        see_cluster();
    }
};

// Makes initialised barriers known to the TMA and to the cluster; a barrier of all threads
// must follow.
__device__ inline void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

// How long the L2 keeps what is copied.
enum class Keep : uint64_t { EVICT_FIRST = 0x12f0000000000000ull, EVICT_LAST = 0x14f0000000000000ull, AS_USUAL = 0x1000000000000000ull };

// Copies the tile whose first element is at (column, row) to `to`; zeros where the matrix has none.
__device__ inline void copy_tile(void *to, const TensorMap &map, int column, int row, Barrier &done,
                                 Keep keep) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
                 "l"(&map), "r"(column), "r"(row), "r"(shared_address(&done.state)),
                 "l"(static_cast<uint64_t>(keep))
                 : "memory");
}

// As `copy_tile`, to the same place in every block of `blocks`, a bit each, whose barriers are told.
__device__ inline void copy_tile_to(uint16_t blocks, void *to, const TensorMap &map, int column, int row,
                                    Barrier &done, Keep keep) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(
                     shared_address(to)),
                 "l"(&map), "r"(column), "r"(row), "r"(shared_address(&done.state)), "h"(blocks),
                 "l"(static_cast<uint64_t>(keep))
                 : "memory");
}

// Copies 16 bytes from device memory to shared memory, or zeros.
__device__ inline void copy_chunk(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}

// Arrives at a barrier when what this thread copied by `copy_chunk` is there.
__device__ inline void arrive_after_copies(Barrier &barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier.state))
                 : "memory");
}

// Where chunk `chunk` of 16 bytes of row `row` lies in a swizzled tile.
__device__ inline int swizzled(int row, int chunk) { return row * SWIZZLE + ((chunk ^ (row & 7)) << 4); }

// A place in a ring of stages, and the parity of its turn.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void next(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// Makes what this thread wrote to shared memory, or knows to be written, known to the TMA and to
// products.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Stores the tile at `from` to the matrix, as far as it has such rows and columns.
__device__ inline void store_tile(const TensorMap &map, int column, int row, const void *from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n\t"
                 "cp.async.bulk.commit_group;" ::"l"(&map),
                 "r"(column), "r"(row), "r"(shared_address(from))
                 : "memory");
}

// Waits until all but the last LEFT tiles that this thread stored were read from shared memory.
template <int LEFT> __device__ inline void stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}

// Waits until all tiles that this thread stored have arrived.
__device__ inline void stores_end() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Names a tile of rows of 128 bytes, swizzled, as an operand of a product.
__device__ inline uint64_t operand(const void *tile) {
    uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
    return address | uint64_t{SWIZZLE_BLOCK >> 4} << 32 | uint64_t{1} << 62;
}

// To be called before the first of several products, after anything else used their sums.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits for all but the last LEFT batches of products.
template <int LEFT> __device__ inline void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
__device__ inline void products_end() {
    products_commit();
    products_wait<0>();
}

#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_64(i) SUMS_16(i), SUMS_16(i + 16), SUMS_16(i + 32), SUMS_16(i + 48)
#define PRODUCT(SHAPE, TYPES, FLAGS, LIST, A, B, ADD, ...)                                             \
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, " ADD ", 0;\n\t"                            \
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPES " {" LIST "}, " A ", " B         \
                 ", add, 1, 1" FLAGS ";\n\t}"                                                          \
                 : __VA_ARGS__                                                                         \
                 : "l"(a), "l"(b), "r"(add))
#define LIST_4 "%0, %1, %2, %3"
#define LIST_8 LIST_4 ", %4, %5, %6, %7"
#define LIST_16 LIST_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST_32                                                                                        \
    LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_64                                                                                        \
    LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "       \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LIST_128                                                                                       \
    LIST_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "       \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "       \
    "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "         \
    "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// sums (+)= a bᵀ for 64 rows of `a` and N rows of `b`, 32 bytes of each. A thread has of every 8 rows of
// `b` four sums: rows lane / 4 and 8 more of its warp's 16 of `a`, two neighbours of `b` each.
#define PRODUCTS_OF(T, K, TYPES, FLAGS)                                                                \
    __device__ inline void product(T, float (&d)[4], uint64_t a, uint64_t b, int add) {                \
        PRODUCT("m64n8" K, TYPES, FLAGS, LIST_4, "%4", "%5", "%6", SUMS_4(0));                         \
    }                                                                                                  \
    __device__ inline void product(T, float (&d)[8], uint64_t a, uint64_t b, int add) {                \
        PRODUCT("m64n16" K, TYPES, FLAGS, LIST_8, "%8", "%9", "%10", SUMS_4(0), SUMS_4(4));            \
    }                                                                                                  \
    __device__ inline void product(T, float (&d)[16], uint64_t a, uint64_t b, int add) {               \
        PRODUCT("m64n32" K, TYPES, FLAGS, LIST_16, "%16", "%17", "%18", SUMS_16(0));                   \
    }                                                                                                  \
    __device__ inline void product(T, float (&d)[32], uint64_t a, uint64_t b, int add) {               \
        PRODUCT("m64n64" K, TYPES, FLAGS, LIST_32, "%32", "%33", "%34", SUMS_16(0), SUMS_16(16));      \
    }                                                                                                  \
    __device__ inline void product(T, float (&d)[64], uint64_t a, uint64_t b, int add) {               \
        PRODUCT("m64n128" K, TYPES, FLAGS, LIST_64, "%64", "%65", "%66", SUMS_64(0));                  \
    }                                                                                                  \
    __device__ inline void product(T, float (&d)[128], uint64_t a, uint64_t b, int add) {              \
        PRODUCT("m64n256" K, TYPES, FLAGS, LIST_128, "%128", "%129", "%130", SUMS_64(0), SUMS_64(64)); \
    }

PRODUCTS_OF(bf16, "k16", "bf16.bf16", ", 0, 0")
PRODUCTS_OF(f16, "k16", "f16.f16", ", 0, 0")
PRODUCTS_OF(f8, "k32", "e4m3.e4m3", "")
