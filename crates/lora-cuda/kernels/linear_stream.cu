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
#include "lora_factors.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// Laid out as `StreamArgs` of ops/linear/stream.rs.
struct StreamArgs {
    TensorMap w, x;
    Mat out;
    const float *x_scales; // By row; null: 1.
    const float *w_scales; // By output; null: 1.
    const float *bias;     // By output; null: 0.
    FewRows lora;          // No slices: no LoRA.
    int32_t dtype;         // Of w and x.
    int32_t steps;         // Of K, 128 bytes each.
    int32_t stages;        // Of the ring of weights: as many as shared memory has room for.
};
static_assert(sizeof(StreamArgs) == 448 && offsetof(StreamArgs, x) == 128 &&
              offsetof(StreamArgs, out) == 256 && offsetof(StreamArgs, x_scales) == 288 &&
              offsetof(StreamArgs, lora) == 312 && offsetof(StreamArgs, dtype) == 392 &&
              offsetof(StreamArgs, stages) == 400);

constexpr int OUTPUTS = 64;                 // of a consumer warpgroup: the M of wgmma, as weights are its `a`
constexpr int EPILOGUE_THREADS = WARPGROUP; // in four warps
constexpr int EPILOGUE_BARRIER = 2;         // named barrier of the epilogue warps
constexpr int MAX_STAGES = 24;  // of weights; their mbarriers are initialised by the lanes of one warp
constexpr int MAX_X_STAGES = 8; // of x
constexpr int MAX_CLUSTER = 2;  // Clusters of four leave SMs idle: not every GPC has a multiple of four.
static_assert(MAX_STAGES <= WARP && MAX_X_STAGES <= WARP);

// What the epilogue needs of an adapter's slice, in shared memory.
struct SliceFactors {
    const bf16 *b;
    const float *gain, *shift;
    float scale;
    int32_t rank, active;
};
static_assert(sizeof(SliceFactors) == 40, "`PART_BYTES` of ops/linear/stream_cut.rs");

// N: rows of x, rounded up to what wgmma takes. GROUPS: consumer warpgroups, of 64 outputs each.
template <int N, int GROUPS> struct TileShape {
    static constexpr int ROWS = N, WIDTH = OUTPUTS * GROUPS;
    static constexpr int W_BYTES = WIDTH * SWIZZLE, X_BYTES = N * SWIZZLE;
    static constexpr int X_STAGES = MAX_X_STAGES / GROUPS;
    static constexpr int BATCH = 4 / GROUPS; // K steps between two waits for wgmma
    // Weight tiles in flight. With more, weights would not arrive sooner, and other reads would queue behind.
    static constexpr int MAX_IN_FLIGHT = 8 / GROUPS;
    static constexpr int STRIDE = WIDTH + 4; // Padded, so that a warp's stores hit all banks.
    static constexpr int CONSUMERS = GROUPS * WARPGROUP;
};

// A barrier at which one role of every CTA of the cluster arrives. Every thread arrives for itself, in its
// own CTA by the instructions of CTA scope, which race checkers follow.
struct ClusterBarrier {
    Mbarrier own, peer;

    __device__ void init(int threads) {
        own.init(threads);
        peer.init(threads);
    }
    __device__ void arrive() {
        static_assert(MAX_CLUSTER == 2, "there is one peer");
        own.arrive();
        if (cluster_size() == 1) return;
        fence_release_cluster();
        peer.arrive_cluster(cluster_rank() ^ 1);
    }
    __device__ void wait(uint32_t parity) {
        own.wait(parity);
        if (cluster_size() > 1) peer.wait_cluster(parity);
    }
};

struct Barriers {
    Mbarrier w_full[MAX_STAGES], w_empty[MAX_STAGES], x_full[MAX_X_STAGES], x_empty[MAX_X_STAGES];
    ClusterBarrier sums_full, sums_empty;
};
static_assert(sizeof(Barriers) + SWIZZLE_ATOM <= 2048, "`CONTROL_BYTES` of ops/linear/stream_cut.rs");

// Shared memory of a CTA. S: the `TileShape`.
template <class S> struct Smem {
    uint8_t *w, *x;
    Barriers *barriers;
    float *sums;         // [rows, STRIDE]
    float *deltas;       // The LoRA term of the outputs that this CTA stores: [rows, their number + 4]
    SliceFactors *parts; // [tiles of rows, slices]
    int4 *tiles;
    int32_t *order, *tile_of_row; // -1: no adapter
    float *row_scales;

    __device__ Smem(uint8_t *memory, int stages) {
        memory += padding_to_atom(memory);
        w = memory;
        x = w + stages * S::W_BYTES;
        barriers = reinterpret_cast<Barriers *>(x + S::X_STAGES * S::X_BYTES);
        sums = reinterpret_cast<float *>(barriers + 1);
        deltas = sums + S::ROWS * S::STRIDE;
        tiles = reinterpret_cast<int4 *>(deltas + S::ROWS * (S::WIDTH / cluster_size() + 4));
        order = reinterpret_cast<int32_t *>(tiles + S::ROWS), tile_of_row = order + S::ROWS;
        row_scales = reinterpret_cast<float *>(tile_of_row + S::ROWS);
        parts = reinterpret_cast<SliceFactors *>(row_scales + S::ROWS);
    }
    // By one warp.
    __device__ void init(int stages, int lane) const {
        if (lane < stages) {
            barriers->w_full[lane].init(1);
            barriers->w_empty[lane].init(S::CONSUMERS / WARP);
        }
        if (lane < S::X_STAGES) {
            barriers->x_full[lane].init(1);
            barriers->x_empty[lane].init(S::CONSUMERS / WARP);
        }
        if (lane == 0) {
            barriers->sums_full.init(S::CONSUMERS);
            barriers->sums_empty.init(EPILOGUE_THREADS);
        }
        fence_mbarrier_init();
        __syncwarp();
    }
};

// The work of this CTA: every `clusters`th tile, and of each the K steps from `from` to before `to`.
struct Work {
    int tile, tiles, clusters, from, to;

    __device__ Work(const StreamArgs &a, int width) {
        int size = cluster_size(), rank = cluster_rank();
        clusters = gridDim.x, tile = blockIdx.x;
        tiles = (a.out.cols + width - 1) / width;
        from = a.steps * rank / size, to = a.steps * (rank + 1) / size;
    }
    __device__ int steps() const {
        int own_tiles = tile < tiles ? (tiles - tile + clusters - 1) / clusters : 0;
        return own_tiles * (to - from);
    }
};

// Iterates over the K steps of one tile, then of the next. Incremented rather than computed from a number, as
// a producer has few cycles for each step.
struct StepIterator {
    int tile, step, left;

    __device__ StepIterator(const Work &work) : tile(work.tile), step(work.from), left(work.steps()) {}

    __device__ void next(const Work &work) {
        left--;
        if (++step == work.to) step = work.from, tile += work.clusters;
    }
};

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

// A barrier of the epilogue warps.
__device__ void epilogue_sync() { named_barrier_sync<EPILOGUE_BARRIER, EPILOGUE_THREADS>(); }

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

// Four ranks of z of a row: the sum of the split-K partials. Zeros from `rank` on, or if `row` is negative.
__device__ float4 load_z(const FewRows &lora, int rows, int row, int slice, int from, int rank) {
    if (row < 0 || from >= rank) return make_float4(0, 0, 0, 0);
    const float *z = lora.z + (int64_t(row) * lora.slices + slice) * lora.max_rank + from;
    int64_t partial_stride = int64_t(rows) * lora.slices * lora.max_rank;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int p = 0; p < lora.partials; p++) {
        float4 v = *reinterpret_cast<const float4 *>(z + p * partial_stride);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    // Memory behind the rank is not initialised: a NaN there would survive the zeros of B.
    if (from + 1 >= rank) sum.y = 0;
    if (from + 2 >= rank) sum.z = 0;
    if (from + 3 >= rank) sum.w = 0;
    return sum;
}

// The slice that holds output `n`.
__device__ int slice_of(const FewRows &lora, int n) {
    int slice = 0;
#pragma unroll
    for (int i = 1; i < MAX_SLICES; i++)
        if (i < lora.slices && lora.starts[i] <= n) slice = i;
    return slice;
}

// The epilogue warps: compute the LoRA term of a tile, add it to the sums and store the outputs. The CTAs of
// a cluster share the outputs of a tile.
template <class S> struct Epilogue {
    const StreamArgs &a;
    const Smem<S> &smem;
    int thread, warp, group, quad, ctas, width, tiles;

    __device__ Epilogue(const StreamArgs &a, const Smem<S> &smem) : a(a), smem(smem) {
        thread = threadIdx.x % EPILOGUE_THREADS, warp = thread / WARP;
        group = thread % WARP / 4, quad = thread % 4;
        ctas = cluster_size(), width = S::WIDTH / ctas, tiles = 0;
    }

    // Copies the tables of adapters to shared memory.
    __device__ void load_batch() {
        if (a.lora.slices == 0) return;
        tiles = a.lora.sizes[2];
        if (thread < a.out.rows) smem.order[thread] = a.lora.order[thread], smem.tile_of_row[thread] = -1;
        if (thread < tiles) smem.tiles[thread] = a.lora.tiles[thread];
        epilogue_sync();
        if (thread < tiles) {
            int4 tile = smem.tiles[thread];
            for (int i = 0; i < tile.y; i++) smem.tile_of_row[smem.order[tile.x + i]] = thread;
        }
        for (int i = thread; i < tiles * a.lora.slices; i += EPILOGUE_THREADS) {
            int slot = smem.tiles[i / a.lora.slices].z;
            const SlotRow &part = a.lora.table[slot * a.lora.slices + i % a.lora.slices];
            smem.parts[i] = {
                static_cast<const bf16 *>(part.b), part.gain, part.shift, part.scale, part.rank, part.active};
        }
        epilogue_sync();
    }

    // The first output of a tile that this CTA stores.
    __device__ int first_of(int tile) const { return tile * S::WIDTH + cluster_rank() * width; }

    // Prefetches the rows of B that a tile needs.
    __device__ void prefetch(int tile) const {
        int n = first_of(tile), slice = slice_of(a.lora, n), in_slice = n - a.lora.starts[slice];
        // B ends with its slice.
        int end = slice + 1 < a.lora.slices ? a.lora.starts[slice + 1] : a.out.cols;
        int count = min(width, end - n);
        for (int t = thread; t < tiles; t += EPILOGUE_THREADS) {
            const SliceFactors &part = smem.parts[t * a.lora.slices + slice];
            if (count > 0 && part.rank > 0)
                prefetch_l2(part.b + int64_t(in_slice) * part.rank, count * part.rank * sizeof(bf16));
        }
    }

    // deltas = scale * B z of a tile's outputs. Warps take tiles of rows in turn, T mma's of outputs at once.
    template <int T> __device__ void expand(int tile) const {
        constexpr int OUTPUTS_AT_ONCE = 16 * T;
        // The last tile may reach beyond the last output.
        int count = min(width, a.out.cols - first_of(tile));
        for (int t = warp; t < tiles; t += EPILOGUE_THREADS / WARP)
            for (int from = 0; from < count; from += OUTPUTS_AT_ONCE)
                expand<T>(t, first_of(tile) + from, from);
    }
    template <int T> __device__ void expand(int t, int n, int from) const {
        int slice = slice_of(a.lora, n), rows = smem.tiles[t].y, start = smem.tiles[t].x;
        const SliceFactors &part = smem.parts[t * a.lora.slices + slice];
        if (!part.active) return;
        const bf16 *b = part.b + int64_t(n - a.lora.starts[slice] + group * 2 * T) * part.rank;
        int row = group < rows ? smem.order[start + group] : -1;
        float acc[T][4] = {};
#pragma unroll 2
        for (int k = quad * 4; k < (part.rank + 15) / 16 * 16; k += 16) {
            Factors<T> factors;
            factors.load(b, part.rank, 2 * T, k);
            float4 z = load_z(a.lora, a.out.rows, row, slice, k, part.rank);
            HiLo x(z.x), y(z.y), v(z.z), w(z.w);
            factors.multiply(make_uint2(pack2(x.hi, y.hi), pack2(v.hi, w.hi)),
                             make_uint2(pack2(x.lo, y.lo), pack2(v.lo, w.lo)), acc);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (2 * quad + i >= rows) continue;
            float *to = delta_of(smem.order[start + 2 * quad + i]) + from + group * 2 * T;
#pragma unroll
            for (int s = 0; s < T; s++) {
                to[2 * s] = part.scale * acc[s][i];
                to[2 * s + 1] = part.scale * acc[s][2 + i];
            }
        }
    }
    __device__ void expand_any(int tile) const {
        if (width == 32) expand<2>(tile);
        else expand<4>(tile);
    }

    __device__ float *delta_of(int row) const { return smem.deltas + row * (width + 4); }

    __device__ void load_row_scales() const {
        if (a.x_scales && thread < a.out.rows) smem.row_scales[thread] = a.x_scales[thread];
    }

    // Scales and bias of a thread's four outputs of a tile. Loaded before the sums are ready, as loads take
    // long while weights stream in.
    struct ScaleBias {
        float scales[4], bias[4];
    };
    __device__ ScaleBias load_scale_bias(int tile) const {
        ScaleBias loaded = {{1, 1, 1, 1}, {}};
        int n = first_of(tile) + thread % (width / 4) * 4;
        if (n >= a.out.cols) return loaded;
        auto load = [&](const float *from, float (&to)[4]) {
            float4 v = *reinterpret_cast<const float4 *>(from + n);
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        };
        if (a.w_scales) load(a.w_scales, loaded.scales);
        if (a.bias) load(a.bias, loaded.bias);
        return loaded;
    }

    // Adds the split-K partials, applies scales, bias and LoRA, and stores, four adjacent outputs at a time.
    // All loads of an iteration come first, so that their latencies overlap.
    __device__ void store(int tile, const ScaleBias &scale_bias) const {
        constexpr int UNROLL = 4;
        int log = 31 - __clz(width / 4), count = a.out.rows << log, mask = (1 << log) - 1;
        for (int i = thread; i < count; i += EPILOGUE_THREADS * UNROLL) {
            float4 sums[UNROLL][MAX_CLUSTER];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                int at = i + u * EPILOGUE_THREADS;
                if (at < count) load_partials(at >> log, (at & mask) * 4, sums[u]);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                int at = i + u * EPILOGUE_THREADS;
                if (at < count) store(tile, scale_bias, at >> log, (at & mask) * 4, sums[u]);
            }
        }
    }

    __device__ void store(int tile, const ScaleBias &scale_bias, int row, int from,
                          const float4 (&sums)[MAX_CLUSTER]) const {
        int n = first_of(tile) + from;
        if (n >= a.out.cols) return;
        float v[4] = {sums[0].x, sums[0].y, sums[0].z, sums[0].w};
        if (ctas > 1) v[0] += sums[1].x, v[1] += sums[1].y, v[2] += sums[1].z, v[3] += sums[1].w;
        float row_scale = a.x_scales ? smem.row_scales[row] : 1.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = v[i] * (row_scale * scale_bias.scales[i]) + scale_bias.bias[i];
        add_lora(row, n, from, v);
        with_float(a.out.dtype, [&](auto o) {
            using O = decltype(o);
            struct alignas(4 * sizeof(O)) Four {
                O v[4];
            } out;
#pragma unroll
            for (int i = 0; i < 4; i++) out.v[i] = from_float<O>(v[i]);
            *reinterpret_cast<Four *>(a.out.row<O>(row) + n) = out;
        });
    }

    // Adds the LoRA term, then applies the adapter's gain and shift.
    __device__ void add_lora(int row, int n, int from, float (&v)[4]) const {
        int t = tiles > 0 ? smem.tile_of_row[row] : -1;
        if (t < 0) return;
        int slice = slice_of(a.lora, n), in_slice = n - a.lora.starts[slice];
        const SliceFactors &part = smem.parts[t * a.lora.slices + slice];
        if (!part.active) return;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (part.rank > 0) v[i] += delta_of(row)[from + i];
            if (part.gain) v[i] *= part.gain[in_slice + i];
            if (part.shift) v[i] += part.shift[in_slice + i];
        }
    }

    // The sums of every CTA of the cluster for four outputs.
    __device__ void load_partials(int row, int from, float4 (&sums)[MAX_CLUSTER]) const {
        const float *own = smem.sums + row * S::STRIDE + cluster_rank() * width + from;
#pragma unroll
        for (int cta = 0; cta < MAX_CLUSTER; cta++)
            if (cta < ctas) sums[cta] = ld_shared_cluster(smem_address(own), cta);
    }
};

template <class S> __device__ void run_epilogue(const StreamArgs &a, const Smem<S> &smem, const Work &work) {
    uint32_t parity = 0;
    Barriers &barriers = *smem.barriers;
    Epilogue<S> epilogue(a, smem);
    // The tables of adapters were written before the first kernel of the step.
    epilogue.load_batch();
    epilogue.prefetch(work.tile);
    pdl_wait();
    epilogue.load_row_scales();
    for (int tile = work.tile; tile < work.tiles; tile += work.clusters) {
        if (tile + work.clusters < work.tiles) epilogue.prefetch(tile + work.clusters);
        auto scale_bias = epilogue.load_scale_bias(tile);
        epilogue.expand_any(tile);
        epilogue_sync();
        barriers.sums_full.wait(parity);
        epilogue.store(tile, scale_bias);
        barriers.sums_empty.arrive();
        epilogue_sync(); // All have read the deltas.
        parity ^= 1;
    }
    // The peer's last arrival must reach this CTA before it exits.
    barriers.sums_empty.wait(parity ^ 1);
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
