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
// Chosen when: `suits` in ops/linear/tiles.rs (1,536 rows and more, where it is about as fast as
//   cuBLASLt), `suits_gate` (or fewer rows without adapters, if tiles fill the waves), `suits_tiles` in
//   ops/lora/route.rs (512 rows and more, at most 16 adapters per 256 rows on average, each about half a K
//   step). `_begin` and `_gate_added` serve what cuBLASLt multiplies: fewer rows, and FP8. GEMM and SwiGLU
//   take 643 us where cuBLASLt and silu_mul took 621 and 60 (bench/evidence, "Prefill").
#include "linear_tiles_loader.cuh"
#include "mma.cuh"

// Registers per thread once the warpgroups have traded them: consumers hold 128 accumulators each, and
// copying needs few.
constexpr int CONSUMER_REGISTERS = 232, PRODUCER_REGISTERS = 40;
static_assert((2 * CONSUMER_REGISTERS + PRODUCER_REGISTERS) * WARPGROUP <= 65536,
              "an SM has 64 Ki registers");

// Loads x and weights. One thread.
struct Producer {
    const TilesArgs &a;
    const Smem &smem;

    // Half of the weights, for both CTAs.
    __device__ void load_weights(int stage, const Tile &tile, int step) const {
        Mbarrier &full = smem.control->full[stage];
        static_assert(CLUSTER == 2, "each CTA loads one half");
        int half = cluster_rank();
        full.arrive_expect_tx(STAGE_BYTES);
        tma_load_multicast((1 << CLUSTER) - 1, smem.w(stage) + half * HALF * SWIZZLE, a.w, step * COLUMNS,
                           tile.output + half * a.second, full, CacheHint::EVICT_NORMAL);
    }
    __device__ void load_inputs(int stage, const Tile &tile, int step) const {
        tma_load(smem.x(stage), a.x, step * COLUMNS, tile.row, smem.control->full[stage],
                 CacheHint::EVICT_LAST);
    }

    // A box of each half of the GEMM's output, in mode GATE_ADDED.
    __device__ void load_base(int stage, const Tile &tile, int number) const {
        Mbarrier &full = smem.control->full[stage];
        int output = tile.output + number * COLUMNS;
        full.arrive_expect_tx(2 * X_BYTES);
        tma_load(smem.x(stage), a.x, output, tile.row, full, CacheHint::EVICT_FIRST);
        tma_load(smem.w(stage), a.x, output + a.second, tile.row, full, CacheHint::EVICT_FIRST);
    }

    __device__ void run() const {
        TileScheduler scheduler(a);
        PipelineState ring;
        // No kernel writes weights, so those of the first steps are loaded before x is ready.
        int ahead = scheduler.begin() < scheduler.end() ? min(STAGES, a.steps) : 0;
        for (int i = 0; i < ahead; i++) load_weights(i, scheduler(scheduler.begin()), i);
        pdl_wait();
        for (int i = scheduler.begin(); i < scheduler.end(); i += scheduler.step()) {
            Tile tile = scheduler(i);
            for (int step = 0; step < a.steps; step++) {
                if (ahead > 0) ahead--;
                else {
                    smem.control->empty[ring.stage].wait(ring.parity ^ 1);
                    load_weights(ring.stage, tile, step);
                }
                load_inputs(ring.stage, tile, step);
                ring.advance(STAGES);
            }
            for (int step = steps_of(rank_blocks_of(a, smem, tile)); step > 0; step--) {
                smem.control->empty[ring.stage].wait(ring.parity ^ 1);
                smem.control->lora_free[ring.stage].arrive();
                ring.advance(STAGES);
            }
            for (int i = 0; i < a.bases; i++) {
                smem.control->empty[ring.stage].wait(ring.parity ^ 1);
                load_base(ring.stage, tile, i);
                ring.advance(STAGES);
            }
        }
    }
};

// A barrier of one consumer warpgroup; named barrier 0 is that of `__syncthreads`.
__device__ void warpgroup_sync(int group) { named_barrier_sync<WARPGROUP>(group + 1); }

// What the kernels of this file compute.
enum class Mode {
    LINEAR,    // GEMM and LoRA
    BEGIN,     // LoRA alone
    GATE,      // SwiGLU of GEMM and LoRA: the first half of a tile's sums are gates, the second ups
    GATE_ADDED // SwiGLU of an existing GEMM output and LoRA
};

// A consumer warpgroup: 64 rows of a tile.
template <class T, Mode MODE> struct Consumer {
    const TilesArgs &a;
    const Smem &smem;
    static constexpr bool GATES = MODE == Mode::GATE || MODE == Mode::GATE_ADDED;
    int group, thread, warp, lane;
    PipelineState ring;
    PhaseBits full, lora_full;

    __device__ Consumer(const TilesArgs &a, const Smem &smem) : a(a), smem(smem) {
        group = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
        warp = thread / WARP, lane = thread % WARP;
    }

    __device__ void run() {
        TileScheduler scheduler(a);
        for (int i = scheduler.begin(); i < scheduler.end(); i += scheduler.step()) {
            float acc[OUTPUTS / 2];
            Tile tile = scheduler(i);
            if constexpr (MODE == Mode::BEGIN || MODE == Mode::GATE_ADDED) clear(acc);
            else multiply(acc);
            add_lora(tile, acc);
            store(tile, acc);
        }
        if (thread == 0) tma_store_wait();
    }

    __device__ uint64_t x_descriptor() const {
        return smem_descriptor(smem.x(ring.stage) + group * WARPGROUP_ROWS * SWIZZLE);
    }
    __device__ uint64_t w_descriptor() const { return smem_descriptor(smem.w(ring.stage)); }

    // Releases a stage to the producers of both CTAs, after the wgmma's that read it have completed. Nothing
    // was written, so no fence is needed.
    __device__ void release(int stage) const {
        if (lane < CLUSTER) smem.control->empty[stage].arrive_cluster(lane);
    }

    __device__ static void clear(float (&acc)[OUTPUTS / 2]) {
#pragma unroll
        for (int i = 0; i < OUTPUTS / 2; i++) acc[i] = 0.0f;
    }

    // acc = x w^T. The wgmma's of a step are issued while those of the step before run.
    __device__ void multiply(float (&acc)[OUTPUTS / 2]) {
        int last = 0;
#pragma unroll 1
        for (int step = 0; step < a.steps; step++) {
            full.wait(smem.control->full, ring.stage);
            uint64_t x = x_descriptor(), w = w_descriptor();
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) wgmma(T{}, acc, x + 2 * k, w + 2 * k, step + k > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0) release(last);
            last = ring.stage;
            ring.advance(STAGES);
        }
        wgmma_wait<0>();
        release(last);
    }

    // acc += z B^T, as further steps of the same sum.
    __device__ void add_lora(const Tile &tile, float (&acc)[OUTPUTS / 2]) {
        constexpr int BLOCK = RANKS * sizeof(bf16) / 16; // bytes of a rank block's row, in descriptor units
#pragma unroll 1
        for (int blocks = rank_blocks_of(a, smem, tile); blocks > 0; blocks -= BLOCKS_PER_STEP) {
            lora_full.wait(smem.control->lora_full, ring.stage);
            fence_proxy_async(); // cp.async writes by the generic proxy.
            uint64_t x = x_descriptor(), w = w_descriptor();
            wgmma_fence();
            wgmma(bf16{}, acc, x, w, 1);
            wgmma(bf16{}, acc, x + BLOCK, w, 1);
            if (blocks > 1) {
                wgmma(bf16{}, acc, x + 2 * BLOCK, w + BLOCK, 1);
                wgmma(bf16{}, acc, x + 3 * BLOCK, w + BLOCK, 1);
            }
            wgmma_commit_and_wait();
            release(ring.stage);
            ring.advance(STAGES);
        }
    }

    // Stores the outputs by TMA, through two boxes: one is filled while the other is stored.
    __device__ void store(const Tile &tile, const float (&acc)[OUTPUTS / 2]) {
        constexpr int WIDTH = GATES ? HALF : OUTPUTS;
#pragma unroll
        for (int number = 0; number < WIDTH / COLUMNS; number++) {
            uint8_t *box = smem.boxes + (group * 2 + number % 2) * BOX_BYTES;
            int output = tile.output + number * COLUMNS;
            if (thread == 0) tma_store_wait_read<1>();
            warpgroup_sync(group);
            if constexpr (MODE == Mode::GATE_ADDED) full.wait(smem.control->full, ring.stage);
#pragma unroll
            for (int chunk = 0; chunk < COLUMNS / 8; chunk += 2) {
                float values[2][4];
                outputs_of(output, chunk, &acc[number * COLUMNS / 2], values);
                fill(box, chunk, values);
            }
            if constexpr (MODE == Mode::GATE_ADDED) {
                __syncwarp();
                fence_release_cluster(); // The stage must not be overwritten before it was read.
                release(ring.stage);
                ring.advance(STAGES);
            }
            fence_proxy_async();
            warpgroup_sync(group);
            if (thread == 0) tma_store(a.out, output, tile.row + group * WARPGROUP_ROWS, box);
        }
    }

    // Outputs of two chunks of eight: a thread has two adjacent ones of each, for two rows.
    __device__ void outputs_of(int output, int chunk, const float *acc, float (&values)[2][4]) const {
        add_bias(output, chunk, 0, acc, values);
        if constexpr (GATES) {
            float ups[2][4];
            add_bias(output, chunk, a.second, acc + HALF / 2, ups);
            if constexpr (MODE == Mode::GATE_ADDED) {
                add_base(smem.x(ring.stage), chunk, values);
                add_base(smem.w(ring.stage), chunk, ups);
            }
#pragma unroll
            for (int i = 0; i < 8; i++)
                values[i / 4][i % 4] = swiglu_fast(values[i / 4][i % 4], ups[i / 4][i % 4]);
        }
    }
    __device__ void add_bias(int output, int chunk, int from, const float *acc, float (&values)[2][4]) const {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int n = output + (chunk + j) * 8 + lane % 4 * 2;
            float2 bias = make_float2(0, 0);
            if (a.bias && n < a.cols) bias = *reinterpret_cast<const float2 *>(a.bias + from + n);
#pragma unroll
            for (int i = 0; i < 4; i++) values[j][i] = acc[(chunk + j) * 4 + i] + (i % 2 ? bias.y : bias.x);
        }
    }
    // Adds the GEMM's output, of which `tile` is a box.
    __device__ void add_base(const uint8_t *tile, int chunk, float (&values)[2][4]) const {
        uint32_t pairs[4];
        int row = group * WARPGROUP_ROWS + warp * 16 + lane % 16;
        ldmatrix_x4(pairs, tile + swizzled_offset(row, chunk + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 two = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&pairs[i]));
            values[i / 2][i % 2 * 2] += two.x, values[i / 2][i % 2 * 2 + 1] += two.y;
        }
    }

    // Puts sixteen outputs of the warp's rows into a box, from chunk `chunk` on.
    __device__ void fill(uint8_t *box, int chunk, const float (&values)[2][4]) const {
        int row = warp * 16 + lane % 16;
        auto pack = [](float low, float high) { return pack2(from_float<T>(low), from_float<T>(high)); };
        stmatrix_x4(box + swizzled_offset(row, chunk + lane / 16),
                    {pack(values[0][0], values[0][1]), pack(values[0][2], values[0][3]),
                     pack(values[1][0], values[1][1]), pack(values[1][2], values[1][3])});
    }
};

__device__ void init(const Smem &smem, int thread) {
    if (thread < STAGES) {
        smem.control->full[thread].init(1);
        smem.control->lora_full[thread].init(LOADERS);
        smem.control->lora_free[thread].init(1);
        smem.control->empty[thread].init(CLUSTER * CONSUMERS / WARP);
    }
    fence_mbarrier_init();
}

// Splits the CTA into its roles; `consume` is run by the consumer warpgroups.
template <class F> __device__ __forceinline__ void multiply_tiles(const TilesArgs &a, F &&consume) {
    extern __shared__ uint8_t shared[];
    pdl_launch_dependents();
    Smem smem(shared);
    int thread = threadIdx.x - CONSUMERS;
    // The tables of adapters were written before the first kernel of the step.
    if (thread >= WARP) count_rank_blocks(a, smem, thread - WARP);
    else if (thread >= 0) init(smem, thread);
    __syncthreads();
    cluster_sync();
    if (thread >= 0) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (thread == 0) Producer{a, smem}.run();
        if (thread < WARP) __syncwarp();
        pdl_wait();
        if (thread >= WARP) LoraLoader(a, smem, thread - WARP).run();
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS>();
        pdl_wait();
        consume(smem);
    }
    __syncthreads();
    cluster_sync(); // A CTA must not exit while its peer may arrive at its mbarriers.
}

// Grid (cluster, 1, CTA of the cluster).
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_tiles(const __grid_constant__ TilesArgs a) {
    multiply_tiles(a, [&](const Smem &smem) { Consumer<bf16, Mode::LINEAR>(a, smem).run(); });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_tiles_begin(const __grid_constant__ TilesArgs a) {
    multiply_tiles(a, [&](const Smem &smem) { Consumer<bf16, Mode::BEGIN>(a, smem).run(); });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_tiles_gate(const __grid_constant__ TilesArgs a) {
    multiply_tiles(a, [&](const Smem &smem) { Consumer<bf16, Mode::GATE>(a, smem).run(); });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_tiles_gate_added(const __grid_constant__ TilesArgs a) {
    multiply_tiles(a, [&](const Smem &smem) { Consumer<bf16, Mode::GATE_ADDED>(a, smem).run(); });
}
