// Linear layers of up to 64 rows with their LoRA: streams the weights at the pace of device memory.
//
// Problem: out[M, N] = x[M, K] w[N, K]^T * scales + bias + scale * B z, M <= 64, w and x both f16, bf16 or
//   e4m3.
// Grid: persistent clusters of one or two CTAs, which split K; a CTA computes tiles of 64 outputs (128
//   above 32 rows). Roles: one consumer warpgroup per 64 outputs, four epilogue warps, one warp that loads
//   weights, one that loads x.
// Pipeline: a ring of 128-byte K steps of weights, as deep as shared memory allows (TMA, w_full/w_empty),
//   and a shorter one of x (x_full/x_empty). Weights are requested before the kernels ahead of this one
//   end. While a tile is multiplied, the epilogue warps compute its LoRA expand; sums then go through
//   shared memory (sums_full/sums_empty, across the cluster), where the epilogue warps add the split-K
//   partials, scales, bias and LoRA.
// Numerics: wgmma with f32 accumulators; for e4m3, whose tensor-core sums keep about 14 bits, every 128
//   terms are added to f32 registers. z is split into bf16 hi + lo for the expand. How K is split depends
//   on the weights alone.
// Chosen when: M <= 64 and x and w are of one dtype and 16-byte aligned (`suits_stream`
//   in ops/linear/choice.rs); the LoRA is fused where few adapters are in the batch and the expand hides
//   behind the GEMM (`expand_is_hidden` in ops/lora/route.rs), so that few adapters cost about their bytes.
//   Elsewhere lora_mma.cu expands afterwards.
#include "linear_stream_epilogue.cuh"

// Loads weights. One thread.
template <class S> struct WeightProducer {
    StepIterator at;
    PipelineState ring, arrived;

    __device__ void load(const StreamArgs &a, const Smem<S> &smem, const Work &work, int columns) {
        Mbarrier &full = smem.barriers->w_full[ring.stage];
        full.arrive_expect_tx(S::W_BYTES);
#pragma unroll
        for (int output = 0; output < S::WIDTH; output += OUTPUTS)
            tma_load(smem.w + ring.stage * S::W_BYTES + output * SWIZZLE, a.w, at.step * columns,
                     at.tile * S::WIDTH + output, full, CacheHint::EVICT_FIRST);
        ring.advance(a.stages);
        at.next(work);
    }
    // Fills the pipeline as far as loads may be in flight.
    __device__ void begin(const StreamArgs &a, const Smem<S> &smem, const Work &work, int columns) {
        for (int i = 0; i < min(S::MAX_IN_FLIGHT, a.stages) && at.left > 0; i++) load(a, smem, work, columns);
    }
    // Loads the rest: a tile for each that arrives, as soon as its stage is empty. Does not wait for x, as no
    // kernel writes weights.
    __device__ void run(const StreamArgs &a, const Smem<S> &smem, const Work &work, int columns) {
        while (at.left > 0) {
            smem.barriers->w_full[arrived.stage].wait(arrived.parity);
            smem.barriers->w_empty[ring.stage].wait(ring.parity ^ 1);
            load(a, smem, work, columns);
            arrived.advance(a.stages);
        }
    }
};

// Loads x, once it is ready. One thread.
template <class S>
__device__ void produce_x(const StreamArgs &a, const Smem<S> &smem, const Work &work, int columns,
                          int32_t epoch) {
    PipelineState ring;
    if (a.lora.inputs) wait_ready(a.lora.inputs, epoch);
    else pdl_wait();
    for (StepIterator at(work); at.left > 0; at.next(work)) {
        Mbarrier &full = smem.barriers->x_full[ring.stage];
        smem.barriers->x_empty[ring.stage].wait(ring.parity ^ 1);
        full.arrive_expect_tx(S::X_BYTES);
        tma_load(smem.x + ring.stage * S::X_BYTES, a.x, at.step * columns, 0, full, CacheHint::EVICT_LAST);
        ring.advance(S::X_STAGES);
    }
}

// A consumer's side of both pipelines.
struct ConsumerState {
    PipelineState w, x;
};

// acc += w x^T over the next COUNT K steps.
template <int COUNT, class T, int N, class S>
__device__ void multiply(const StreamArgs &a, const Smem<S> &smem, ConsumerState &at, float (&acc)[N / 2]) {
    int group = threadIdx.x / WARPGROUP;
    ConsumerState done = at;
    float fresh[N / 2];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        smem.barriers->w_full[at.w.stage].wait(at.w.parity);
        smem.barriers->x_full[at.x.stage].wait(at.x.parity);
        uint64_t w = smem_descriptor(smem.w + at.w.stage * S::W_BYTES + group * OUTPUTS * SWIZZLE);
        uint64_t x = smem_descriptor(smem.x + at.x.stage * S::X_BYTES);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma(T{}, fresh, w + 2 * k, x + 2 * k, i + k > 0);
        at.w.advance(a.stages), at.x.advance(S::X_STAGES);
    }
    wgmma_commit_and_wait();
    // Tensor cores keep few bits of e4m3 sums, so these move to f32 registers every 128 terms (COUNT is 1).
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] += fresh[i];
    if (threadIdx.x % WARP != 0) return;
    for (int i = 0; i < COUNT; i++) {
        smem.barriers->w_empty[done.w.stage].arrive();
        smem.barriers->x_empty[done.x.stage].arrive();
        done.w.advance(a.stages), done.x.advance(S::X_STAGES);
    }
}

// acc += w x^T over all of this CTA's K steps of a tile.
template <class T, int N, class S>
__device__ void multiply_tile(const StreamArgs &a, const Smem<S> &smem, int steps, ConsumerState &at,
                              float (&acc)[N / 2]) {
    // Not unrolled: with few rows, one GEMM would wait for the registers of another.
    constexpr int BATCH = sizeof(T) == 1 ? 1 : S::BATCH;
#pragma unroll 1
    for (; steps >= BATCH; steps -= BATCH) multiply<BATCH, T, N, S>(a, smem, at, acc);
#pragma unroll 1
    for (; steps > 0; steps--) multiply<1, T, N, S>(a, smem, at, acc);
}

// Stores a thread's sums where the epilogue warps of the cluster read them.
template <int N, class S> __device__ void store_sums(const Smem<S> &smem, const float (&acc)[N / 2]) {
    int lane = threadIdx.x % WARP, output = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
        smem.sums[row * S::STRIDE + output + i % 4 / 2 * 8] = acc[i];
    }
}

// The consumer warpgroups.
template <int N, class S> __device__ void consume(const StreamArgs &a, const Smem<S> &smem,
                                                  const Work &work) {
    uint32_t parity = 0;
    Barriers &barriers = *smem.barriers;
    ConsumerState at;
    for (int tile = work.tile; tile < work.tiles; tile += work.clusters) {
        float acc[N / 2] = {};
        int steps = work.to - work.from;
        switch (a.dtype) {
        case DTYPE_BF16: multiply_tile<bf16, N, S>(a, smem, steps, at, acc); break;
        case DTYPE_F16: multiply_tile<f16, N, S>(a, smem, steps, at, acc); break;
        case DTYPE_F8: multiply_tile<f8, N, S>(a, smem, steps, at, acc); break;
        }
        barriers.sums_empty.wait(parity ^ 1);
        store_sums<N, S>(smem, acc);
        barriers.sums_full.arrive();
        parity ^= 1;
    }
}

template <int N, int GROUPS> __device__ __forceinline__ void stream(const StreamArgs &a, uint8_t *shared) {
    using S = TileShape<N, GROUPS>;
    // The first thread of two warps, with one producer each.
    constexpr int PRODUCERS = S::CONSUMERS + EPILOGUE_THREADS;
    Smem<S> smem(shared, a.stages);
    Work work(a, S::WIDTH);
    int columns = a.dtype == DTYPE_F8 ? SWIZZLE : SWIZZLE / 2, thread = threadIdx.x;
    WeightProducer<S> weights{StepIterator(work)};
    if (thread / WARP == PRODUCERS / WARP) {
        smem.init(a.stages, thread % WARP);
        if (thread == PRODUCERS) weights.begin(a, smem, work, columns);
        __syncwarp();
    }
    int32_t epoch = a.lora.inputs && thread == PRODUCERS + WARP ? current_epoch(a.lora.inputs) : 0;
    __syncthreads();
    pdl_launch_dependents();
    cluster_sync();
    if (thread == PRODUCERS) weights.run(a, smem, work, columns);
    else if (thread == PRODUCERS + WARP) produce_x(a, smem, work, columns, epoch);
    else if (thread < S::CONSUMERS) consume<N, S>(a, smem, work);
    else if (thread < PRODUCERS) run_epilogue<S>(a, smem, work);
    __syncwarp();
    cluster_sync(); // A CTA must not exit while its peer reads its sums.
}

// Grid (cluster, 1, CTA of the cluster); one CTA per SM.
extern "C" __global__ void __launch_bounds__(2 * WARPGROUP + EPILOGUE_THREADS + 2 * WARP, 1)
    linear_stream(const __grid_constant__ StreamArgs a) {
    extern __shared__ uint8_t shared[];
    int rows = a.out.rows;
    if (rows <= 8) stream<8, 1>(a, shared);
    else if (rows <= 16) stream<16, 1>(a, shared);
    else if (rows <= 32) stream<32, 1>(a, shared);
    else stream<64, 2>(a, shared);
}
