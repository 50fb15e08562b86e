// Linear layers of many rows with their LoRA, and the fused SwiGLU GEMM.
//
// Problem: out[M, N] = x w^T + bias + scale * B A x in bf16 (`linear_tiles`); the LoRA term alone, zeros
//   elsewhere (`_begin`); silu(gate) * up of both halves of it (`_gate`); the same where the GEMM's output
//   already exists and only LoRA is missing (`_gate_added`).
// Grid: persistent clusters of two CTAs, which compute the same outputs of different rows. A CTA's tile has
//   128 rows and two 128-column halves: adjacent columns, or matching gate and up columns. Roles: two
//   consumer warpgroups of 64 rows, one producer warp (TMA), three LoRA loader warps (cp.async).
// Pipeline: a ring of four stages of one K step each (full/empty). Each CTA multicasts one half of the
//   weights to both, as the L2 could not serve both at the pace of the tensor cores. LoRA is a few more
//   steps of the same sum: behind the last K step, loader warps fill stages with z and B
//   (lora_free/lora_full). Weights of the first steps are requested before the kernels ahead of this one
//   end. Outputs leave through two boxes per warpgroup, one filled while the other is stored by TMA.
// Numerics: wgmma bf16 with f32 accumulators; z comes as bf16 hi + lo (lora_shrink.cu); silu by __expf.
// Chosen when: ops/linear_tiles.rs: `suits_operands` (1,536 rows and more, where it is about as fast as
//   cuBLASLt), `suits_gate` (or fewer rows without adapters, if tiles fill the waves), `suits` (512 rows
//   and more, at most 16 adapters per 256 rows on average, each about half a K step). `_begin` and
//   `_gate_added` serve what cuBLASLt multiplies: fewer rows, and FP8. GEMM and SwiGLU take 643 us where
//   cuBLASLt and silu_mul took 621 and 60 (bench/evidence, "Prefill").
#include "linear_tiles_loader.cuh"

// Copies tiles of weights and inputs. One thread.
struct Producer {
    const TilesArgs &a;
    const Memory &memory;

    __device__ void weights(int stage, const Tile &tile, int step) const {
        Mbarrier &full = memory.control->full[stage];
        static_assert(CLUSTER == 2, "a block copies a half");
        int half = cluster_rank();
        full.arrive_expect_tx(STAGE_BYTES);
        tma_load_multicast((1 << CLUSTER) - 1, memory.w(stage) + half * HALF * SWIZZLE, a.w, step * COLUMNS,
                     tile.output + half * a.second, full, CacheHint::EVICT_NORMAL);
    }
    __device__ void inputs(int stage, const Tile &tile, int step) const {
        tma_load(memory.x(stage), a.x, step * COLUMNS, tile.row, memory.control->full[stage], CacheHint::EVICT_LAST);
    }

    __device__ void base(int stage, const Tile &tile, int number) const {
        Mbarrier &full = memory.control->full[stage];
        int output = tile.output + number * COLUMNS;
        full.arrive_expect_tx(2 * X_BYTES);
        tma_load(memory.x(stage), a.x, output, tile.row, full, CacheHint::EVICT_FIRST);
        tma_load(memory.w(stage), a.x, output + a.second, tile.row, full, CacheHint::EVICT_FIRST);
    }

    __device__ void run() const {
        Schedule schedule(a);
        PipelineState ring;
        // Weights of the first steps come before the inputs are there.
        int ahead = schedule.begin() < schedule.end() ? min(STAGES, a.steps) : 0;
        for (int i = 0; i < ahead; i++) weights(i, schedule(schedule.begin()), i);
        pdl_wait();
        for (int i = schedule.begin(); i < schedule.end(); i += schedule.step()) {
            Tile tile = schedule(i);
            for (int step = 0; step < a.steps; step++) {
                if (ahead > 0) ahead--;
                else {
                    memory.control->empty[ring.stage].wait(ring.parity ^ 1);
                    weights(ring.stage, tile, step);
                }
                inputs(ring.stage, tile, step);
                ring.advance(STAGES);
            }
            for (int step = steps_of(units_of(a, memory, tile)); step > 0; step--) {
                memory.control->empty[ring.stage].wait(ring.parity ^ 1);
                memory.control->given[ring.stage].arrive();
                ring.advance(STAGES);
            }
            for (int i = 0; i < a.bases; i++) {
                memory.control->empty[ring.stage].wait(ring.parity ^ 1);
                base(ring.stage, tile, i);
                ring.advance(STAGES);
            }
        }
    }
};

// Waits for the threads of one group of consumers.
__device__ void group_sync(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(WARPGROUP) : "memory");
}

// Two neighbours as one register.
template <class T> __device__ uint32_t narrow_pair(float a, float b) {
    struct alignas(4) {
        T low, high;
    } v{from_float<T>(a), from_float<T>(b)};
    return *reinterpret_cast<uint32_t *>(&v);
}

// What a product does.
enum class Does {
    MULTIPLY,  // and adds what adapters add
    BEGIN,     // nothing but what adapters add
    GATE,      // multiplies, for outputs silu(sum of the first half) * sum of the second
    GATE_ADDED // the same of a product that is there
};

// A group of consumers: 64 rows of a tile.
template <class T, Does DOES> struct Consumer {
    const TilesArgs &a;
    const Memory &memory;
    static constexpr bool GATES = DOES == Does::GATE || DOES == Does::GATE_ADDED;
    int group, thread, warp, lane;
    PipelineState ring;
    Turns full, filled;

    __device__ Consumer(const TilesArgs &a, const Memory &memory) : a(a), memory(memory) {
        group = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
        warp = thread / WARP, lane = thread % WARP;
    }

    __device__ void run() {
        Schedule schedule(a);
        for (int i = schedule.begin(); i < schedule.end(); i += schedule.step()) {
            float sums[OUTPUTS / 2];
            Tile tile = schedule(i);
            if constexpr (DOES == Does::BEGIN || DOES == Does::GATE_ADDED) clear(sums);
            else multiply(sums);
            adapt(tile, sums);
            store(tile, sums);
        }
        if (thread == 0) tma_store_wait();
    }

    __device__ uint64_t inputs() const { return smem_descriptor(memory.x(ring.stage) + group * GROUP_ROWS * SWIZZLE); }
    __device__ uint64_t weights() const { return smem_descriptor(memory.w(ring.stage)); }

    // Tells both blocks that products have read a stage, which are over then. Nothing was written, so nothing is
    // published.
    __device__ void release(int stage) const {
        if (lane < CLUSTER) memory.control->empty[stage].arrive_cluster(lane);
    }

    __device__ static void clear(float (&sums)[OUTPUTS / 2]) {
#pragma unroll
        for (int i = 0; i < OUTPUTS / 2; i++) sums[i] = 0.0f;
    }

    // One step is multiplied while the next is begun.
    __device__ void multiply(float (&sums)[OUTPUTS / 2]) {
        int last = 0;
#pragma unroll 1
        for (int step = 0; step < a.steps; step++) {
            full.wait(memory.control->full, ring.stage);
            uint64_t x = inputs(), w = weights();
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) wgmma(T{}, sums, x + 2 * k, w + 2 * k, step + k > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0) release(last);
            last = ring.stage;
            ring.advance(STAGES);
        }
        wgmma_wait<0>();
        release(last);
    }

    // Adds B z: more steps of the same kind.
    __device__ void adapt(const Tile &tile, float (&sums)[OUTPUTS / 2]) {
        constexpr int BYTES = UNIT * sizeof(bf16) / 16; // of a unit's ranks, in sixteens
#pragma unroll 1
        for (int units = units_of(a, memory, tile); units > 0; units -= UNITS) {
            filled.wait(memory.control->filled, ring.stage);
            fence_proxy_async();
            uint64_t x = inputs(), w = weights();
            wgmma_fence();
            wgmma(bf16{}, sums, x, w, 1);
            wgmma(bf16{}, sums, x + BYTES, w, 1);
            if (units > 1) {
                wgmma(bf16{}, sums, x + 2 * BYTES, w + BYTES, 1);
                wgmma(bf16{}, sums, x + 3 * BYTES, w + BYTES, 1);
            }
            wgmma_commit_and_wait();
            release(ring.stage);
            ring.advance(STAGES);
        }
    }

    // Two boxes take turns: one is filled while the other is stored.
    __device__ void store(const Tile &tile, const float (&sums)[OUTPUTS / 2]) {
        constexpr int WIDTH = GATES ? HALF : OUTPUTS;
#pragma unroll
        for (int number = 0; number < WIDTH / COLUMNS; number++) {
            uint8_t *box = memory.boxes + (group * 2 + number % 2) * BOX_BYTES;
            int output = tile.output + number * COLUMNS;
            if (thread == 0) tma_store_wait_read<1>();
            group_sync(group);
            if constexpr (DOES == Does::GATE_ADDED) full.wait(memory.control->full, ring.stage);
#pragma unroll
            for (int chunk = 0; chunk < COLUMNS / 8; chunk += 2) {
                float values[2][4];
                values_of(output, chunk, &sums[number * COLUMNS / 2], values);
                fill(box, chunk, values);
            }
            if constexpr (DOES == Does::GATE_ADDED) {
                __syncwarp();
                fence_release_cluster(); // What was read is not to be overwritten before.
                release(ring.stage);
                ring.advance(STAGES);
            }
            fence_proxy_async();
            group_sync(group);
            if (thread == 0) tma_store(a.out, output, tile.row + group * GROUP_ROWS, box);
        }
    }

    // Four of each of two chunks of eight outputs, of two rows.
    __device__ void values_of(int output, int chunk, const float *sums, float (&values)[2][4]) const {
        add_bias(output, chunk, 0, sums, values);
        if constexpr (GATES) {
            float ups[2][4];
            add_bias(output, chunk, a.second, sums + HALF / 2, ups);
            if constexpr (DOES == Does::GATE_ADDED) {
                add_base(memory.x(ring.stage), chunk, values);
                add_base(memory.w(ring.stage), chunk, ups);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) values[i / 4][i % 4] = swiglu_fast(values[i / 4][i % 4], ups[i / 4][i % 4]);
        }
    }
    __device__ void add_bias(int output, int chunk, int from, const float *sums, float (&values)[2][4]) const {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int n = output + (chunk + j) * 8 + lane % 4 * 2;
            float2 bias = make_float2(0, 0);
            if (a.bias && n < a.cols) bias = *reinterpret_cast<const float2 *>(a.bias + from + n);
#pragma unroll
            for (int i = 0; i < 4; i++) values[j][i] = sums[(chunk + j) * 4 + i] + (i % 2 ? bias.y : bias.x);
        }
    }
    __device__ void add_base(const uint8_t *tile, int chunk, float (&values)[2][4]) const {
        uint32_t pairs[4];
        int row = group * GROUP_ROWS + warp * 16 + lane % 16;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                     : "r"(smem_address(tile + swizzled_offset(row, chunk + lane / 16)))
                     : "memory");
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 two = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&pairs[i]));
            values[i / 2][i % 2 * 2] += two.x, values[i / 2][i % 2 * 2 + 1] += two.y;
        }
    }

    // Puts sixteen outputs of the warp's rows into the box, from chunk `chunk` on.
    __device__ void fill(uint8_t *box, int chunk, const float (&values)[2][4]) const {
        int row = warp * 16 + lane % 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         smem_address(box + swizzled_offset(row, chunk + lane / 16))),
                     "r"(narrow_pair<T>(values[0][0], values[0][1])),
                     "r"(narrow_pair<T>(values[0][2], values[0][3])),
                     "r"(narrow_pair<T>(values[1][0], values[1][1])),
                     "r"(narrow_pair<T>(values[1][2], values[1][3]))
                     : "memory");
    }
};

template <int REGISTERS> __device__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ void init(const Memory &memory, int thread) {
    if (thread < STAGES) {
        memory.control->full[thread].init(1);
        memory.control->filled[thread].init(LOADER_WARPS);
        memory.control->given[thread].init(1);
        memory.control->empty[thread].init(CLUSTER * CONSUMERS / WARP);
    }
    fence_mbarrier_init();
}

template <class F> __device__ __forceinline__ void multiply_tiles(const TilesArgs &a, F &&consume) {
    extern __shared__ uint8_t shared[];
    pdl_launch_dependents();
    Memory memory(shared);
    int thread = threadIdx.x - CONSUMERS;
    // Who uses which adapter was handed over before the first kernel of the step.
    if (thread >= WARP) count_units(a, memory, thread - WARP);
    else if (thread >= 0) init(memory, thread);
    __syncthreads();
    cluster_sync();
    if (thread >= 0) {
        give_registers<40>();
        if (thread == 0) Producer{a, memory}.run();
        if (thread < WARP) __syncwarp();
        pdl_wait();
        if (thread >= WARP) LoraLoader(a, memory, thread - WARP).run();
    } else {
        take_registers<232>();
        pdl_wait();
        consume(memory);
    }
    __syncthreads();
    // Nobody leaves while the other block may still tell it something.
    cluster_sync();
}

// Blocks (cluster, 1, block of the cluster).
extern "C" __global__ void __launch_bounds__(CONSUMERS + WARPGROUP, 1)
    linear_tiles(const __grid_constant__ TilesArgs a) {
    multiply_tiles(a, [&](const Memory &memory) { Consumer<bf16, Does::MULTIPLY>(a, memory).run(); });
}

// What adapters add alone, and zeros, for a product that is added later.
extern "C" __global__ void __launch_bounds__(CONSUMERS + WARPGROUP, 1)
    linear_tiles_begin(const __grid_constant__ TilesArgs a) {
    multiply_tiles(a, [&](const Memory &memory) { Consumer<bf16, Does::BEGIN>(a, memory).run(); });
}

// Gates alone: the first half of a tile's sums are those of gates, the second of what they are for.
extern "C" __global__ void __launch_bounds__(CONSUMERS + WARPGROUP, 1)
    linear_tiles_gate(const __grid_constant__ TilesArgs a) {
    multiply_tiles(a, [&](const Memory &memory) { Consumer<bf16, Does::GATE>(a, memory).run(); });
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + WARPGROUP, 1)
    linear_tiles_gate_added(const __grid_constant__ TilesArgs a) {
    multiply_tiles(a, [&](const Memory &memory) { Consumer<bf16, Does::GATE_ADDED>(a, memory).run(); });
}
