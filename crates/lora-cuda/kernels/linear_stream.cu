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
// Chosen when: M <= 64 and x and w are of one dtype and 16-byte aligned (`multiply_stream` in
//   ops/linear_stream.rs); the LoRA is fused where few adapters are in the batch and the expand hides
//   behind the GEMM (`expand_is_hidden` in ops/lora.rs), so that few adapters cost about their bytes.
//   Elsewhere lora_mma.cu expands afterwards.
#include "tma.cuh"
#include "wgmma.cuh"
#include "lora_factors.cuh"

// Laid out as `StreamArgs` of `ops/linear_stream.rs`.
struct StreamArgs {
    TensorMap w, x;
    Mat out;
    const float *x_scales; // Of each row; null: 1.
    const float *w_scales; // Of each output; null: 1.
    const float *bias;     // Of each output; null: 0.
    FewRows lora;          // No slices: there are no adapters.
    int32_t dtype;         // Of weights and input.
    int32_t steps;         // Of K, 128 bytes each.
    int32_t stages;        // Tiles of weights that shared memory has room for.
};

constexpr int OUTPUTS = 64;     // of a group of consumers
constexpr int EPILOGUE_WARPS = WARPGROUP;
constexpr int MAX_STAGES = 24; // of weights
constexpr int MAX_BLOCKS = 2;   // of a cluster

// What an adapter does to the outputs of a slice.
struct Part {
    const bf16 *b;
    const float *gain, *shift;
    float scale;
    int32_t rank, active;
};

// N: the rows that there are, rounded up; GROUPS of consumers have 64 outputs each.
template <int N, int GROUPS> struct Sizes {
    static constexpr int ROWS = N, WIDTH = OUTPUTS * GROUPS;
    static constexpr int W_BYTES = WIDTH * SWIZZLE, X_BYTES = N * SWIZZLE;
    static constexpr int X_STAGES = 8 / GROUPS; // tiles of inputs that shared memory has room for
    static constexpr int BATCH = 4 / GROUPS;    // steps that are multiplied without a wait
    // Tiles of weights under way: more would not come sooner, and all that others read would wait.
    static constexpr int UNDER_WAY = 8 / GROUPS;
    static constexpr int STRIDE = WIDTH + 4;    // Spreads what a warp stores over all banks.
    static constexpr int CONSUMERS = GROUPS * WARPGROUP;
};

// A barrier of one role in the blocks of a cluster. Every thread arrives for itself, in its own block by the usual
// instructions: checkers of races follow that.
struct ClusterBarrier {
    Mbarrier here, there;

    __device__ void init(int threads) {
        here.init(threads);
        there.init(threads);
    }
    __device__ void arrive() {
        static_assert(MAX_BLOCKS == 2, "there is one other");
        here.arrive();
        if (cluster_size() == 1) return;
        fence_release_cluster();
        there.arrive_cluster(cluster_rank() ^ 1);
    }
    __device__ void wait(uint32_t parity) {
        here.wait(parity);
        if (cluster_size() > 1) there.wait_cluster(parity);
    }
};

// Barriers of a block.
struct Control {
    Mbarrier w_full[MAX_STAGES], w_empty[MAX_STAGES], x_full[8], x_empty[8];
    ClusterBarrier staged, taken; // of the cluster's sums
};

// The shared memory of a block.
template <class S> struct Memory {
    uint8_t *w, *x;
    Control *control;
    float *sums;   // [rows, STRIDE]
    float *deltas; // What adapters add to the outputs that this block finishes: [rows, their number + 4]
    Part *parts;   // [tiles of rows, slices]
    int4 *tiles;
    int32_t *order, *tile_of_row; // -1: no adapter
    float *row_scales;

    __device__ Memory(uint8_t *memory, int stages) {
        memory += padding_to_atom(memory);
        w = memory;
        x = w + stages * S::W_BYTES;
        control = reinterpret_cast<Control *>(x + S::X_STAGES * S::X_BYTES);
        sums = reinterpret_cast<float *>(control + 1);
        deltas = sums + S::ROWS * S::STRIDE;
        tiles = reinterpret_cast<int4 *>(deltas + S::ROWS * (S::WIDTH / cluster_size() + 4));
        order = reinterpret_cast<int32_t *>(tiles + S::ROWS), tile_of_row = order + S::ROWS;
        row_scales = reinterpret_cast<float *>(tile_of_row + S::ROWS);
        parts = reinterpret_cast<Part *>(row_scales + S::ROWS);
    }
    // By the lanes of a warp.
    __device__ void init(int stages, int lane) const {
        if (lane < stages) {
            control->w_full[lane].init(1);
            control->w_empty[lane].init(S::CONSUMERS / WARP);
        }
        if (lane < S::X_STAGES) {
            control->x_full[lane].init(1);
            control->x_empty[lane].init(S::CONSUMERS / WARP);
        }
        if (lane == 0) {
            control->staged.init(S::CONSUMERS);
            control->taken.init(EPILOGUE_WARPS);
        }
        fence_mbarrier_init();
        __syncwarp();
    }
};

// The tiles and steps of this block: tiles in turn with other clusters, steps shared with its own.
struct Share {
    int tile, tiles, clusters, from, to;

    __device__ Share(const StreamArgs &a, int width) {
        int size = cluster_size(), rank = cluster_rank();
        clusters = gridDim.x, tile = blockIdx.x;
        tiles = (a.out.cols + width - 1) / width;
        from = a.steps * rank / size, to = a.steps * (rank + 1) / size;
    }
    __device__ int count() const {
        int of_tiles = tile < tiles ? (tiles - tile + clusters - 1) / clusters : 0;
        return of_tiles * (to - from);
    }
};

// The tiles of a block in the order in which they are used: all of its steps of one, then of the next.
// Counted up rather than computed, as a producer has little time for each.
struct Cursor {
    int tile, step, left;

    __device__ Cursor(const Share &share) : tile(share.tile), step(share.from), left(share.count()) {}

    __device__ void next(const Share &share) {
        left--;
        if (++step == share.to) step = share.from, tile += share.clusters;
    }
};

// Asks for tiles of weights.
template <class S> struct WeightProducer {
    Cursor at;
    PipelineState ring, arrived;

    __device__ void ask(const StreamArgs &a, const Memory<S> &memory, const Share &share, int columns) {
        Mbarrier &full = memory.control->w_full[ring.stage];
        full.arrive_expect_tx(S::W_BYTES);
#pragma unroll
        for (int output = 0; output < S::WIDTH; output += OUTPUTS)
            tma_load(memory.w + ring.stage * S::W_BYTES + output * SWIZZLE, a.w, at.step * columns,
                      at.tile * S::WIDTH + output, full, CacheHint::EVICT_FIRST);
        ring.advance(a.stages);
        at.next(share);
    }
    __device__ void begin(const StreamArgs &a, const Memory<S> &memory, const Share &share, int columns) {
        for (int i = 0; i < min(S::UNDER_WAY, a.stages) && at.left > 0; i++)
            ask(a, memory, share, columns);
    }
    // Goes on before the inputs are there, as far as there is room.
    __device__ void go_on(const StreamArgs &a, const Memory<S> &memory, const Share &share, int columns) {
        while (at.left > 0) {
            memory.control->w_full[arrived.stage].wait(arrived.parity);
            memory.control->w_empty[ring.stage].wait(ring.parity ^ 1);
            ask(a, memory, share, columns);
            arrived.advance(a.stages);
        }
    }
};

// Asks for tiles of the input.
template <class S>
__device__ void produce_inputs(const StreamArgs &a, const Memory<S> &memory, const Share &share,
                               int columns, int32_t epoch) {
    PipelineState ring;
    if (a.lora.inputs) wait_ready(a.lora.inputs, epoch);
    else pdl_wait();
    for (Cursor at(share); at.left > 0; at.next(share)) {
        Mbarrier &full = memory.control->x_full[ring.stage];
        memory.control->x_empty[ring.stage].wait(ring.parity ^ 1);
        full.arrive_expect_tx(S::X_BYTES);
        tma_load(memory.x + ring.stage * S::X_BYTES, a.x, at.step * columns, 0, full, CacheHint::EVICT_LAST);
        ring.advance(S::X_STAGES);
    }
}

// Waits for all epilogue warps.
__device__ void epilogue_sync() { asm volatile("bar.sync 2, %0;" ::"n"(EPILOGUE_WARPS) : "memory"); }

// A consumer's places in the rings.
struct Places {
    PipelineState w, x;
};

// Adds the products of the next COUNT steps to `sums`.
template <int COUNT, class T, int N, class S>
__device__ void multiply(const StreamArgs &a, const Memory<S> &memory, Places &at, float (&sums)[N / 2]) {
    int group = threadIdx.x / WARPGROUP;
    Places done = at;
    float fresh[N / 2];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        memory.control->w_full[at.w.stage].wait(at.w.parity);
        memory.control->x_full[at.x.stage].wait(at.x.parity);
        uint64_t w = smem_descriptor(memory.w + at.w.stage * S::W_BYTES + group * OUTPUTS * SWIZZLE);
        uint64_t x = smem_descriptor(memory.x + at.x.stage * S::X_BYTES);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma(T{}, fresh, w + 2 * k, x + 2 * k, i + k > 0);
        at.w.advance(a.stages), at.x.advance(S::X_STAGES);
    }
    wgmma_commit_and_wait();
    // Sums of e4m3 keep few bits in the tensor cores: 128 terms are added there.
#pragma unroll
    for (int i = 0; i < N / 2; i++) sums[i] += fresh[i];
    if (threadIdx.x % WARP != 0) return;
    for (int i = 0; i < COUNT; i++) {
        memory.control->w_empty[done.w.stage].arrive();
        memory.control->x_empty[done.x.stage].arrive();
        done.w.advance(a.stages), done.x.advance(S::X_STAGES);
    }
}

// Adds the products of this block's steps of a tile to `sums`.
template <class T, int N, class S>
__device__ void multiply_all(const StreamArgs &a, const Memory<S> &memory, int steps, Places &at,
                             float (&sums)[N / 2]) {
    // Unrolled, products of few rows would wait for each other's registers.
    constexpr int BATCH = sizeof(T) == 1 ? 1 : S::BATCH;
#pragma unroll 1
    for (; steps >= BATCH; steps -= BATCH) multiply<BATCH, T, N, S>(a, memory, at, sums);
#pragma unroll 1
    for (; steps > 0; steps--) multiply<1, T, N, S>(a, memory, at, sums);
}

// Puts a thread's sums where epilogue warps find them.
template <int N, class S>
__device__ void stage(const Memory<S> &memory, const float (&sums)[N / 2]) {
    int lane = threadIdx.x % WARP, output = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
        memory.sums[row * S::STRIDE + output + i % 4 / 2 * 8] = sums[i];
    }
}

template <int N, class S>
__device__ void consume(const StreamArgs &a, const Memory<S> &memory, const Share &share) {
    uint32_t parity = 0;
    Control &control = *memory.control;
    Places at;
    for (int tile = share.tile; tile < share.tiles; tile += share.clusters) {
        float sums[N / 2] = {};
        int steps = share.to - share.from;
        switch (a.dtype) {
        case DTYPE_BF16: multiply_all<bf16, N, S>(a, memory, steps, at, sums); break;
        case DTYPE_F16: multiply_all<f16, N, S>(a, memory, steps, at, sums); break;
        case DTYPE_F8: multiply_all<f8, N, S>(a, memory, steps, at, sums); break;
        }
        // Until all blocks have taken what was staged before.
        control.taken.wait(parity ^ 1);
        stage<N, S>(memory, sums);
        control.staged.arrive();
        parity ^= 1;
    }
}

// Four ranks of z of a row, the sum of all partials; zeros behind the end, or where there is no row.
__device__ float4 load_z(const FewRows &lora, int rows, int row, int slice, int from, int rank) {
    if (row < 0 || from >= rank) return make_float4(0, 0, 0, 0);
    const float *z = lora.z + (int64_t(row) * lora.slices + slice) * lora.max_rank + from;
    int64_t plane = int64_t(rows) * lora.slices * lora.max_rank;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int p = 0; p < lora.partials; p++) {
        float4 v = *reinterpret_cast<const float4 *>(z + p * plane);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    // Whatever lies behind the end must not meet the zeros of B.
    if (from + 1 >= rank) sum.y = 0;
    if (from + 2 >= rank) sum.z = 0;
    if (from + 3 >= rank) sum.w = 0;
    return sum;
}

// The slice that holds output `n`.
__device__ int slice_of(const FewRows &lora, int n) {
    int slice = 0;
#pragma unroll
    for (int i = 1; i < 4; i++)
        if (i < lora.slices && lora.starts[i] <= n) slice = i;
    return slice;
}

// The warps that prepare what adapters add and write the outputs. The blocks of a cluster share the
// outputs of a tile.
template <class S> struct Epilogue {
    const StreamArgs &a;
    const Memory<S> &memory;
    int thread, warp, group, quad, blocks, width, tiles;

    __device__ Epilogue(const StreamArgs &a, const Memory<S> &memory) : a(a), memory(memory) {
        thread = threadIdx.x % EPILOGUE_WARPS, warp = thread / WARP;
        group = thread % WARP / 4, quad = thread % 4;
        blocks = cluster_size(), width = S::WIDTH / blocks, tiles = 0;
    }

    // Reads who uses which adapter.
    __device__ void read_batch() {
        if (a.lora.slices == 0) return;
        tiles = a.lora.sizes[2];
        if (thread < a.out.rows) memory.order[thread] = a.lora.order[thread], memory.tile_of_row[thread] = -1;
        if (thread < tiles) memory.tiles[thread] = a.lora.tiles[thread];
        epilogue_sync();
        if (thread < tiles) {
            int4 tile = memory.tiles[thread];
            for (int i = 0; i < tile.y; i++) memory.tile_of_row[memory.order[tile.x + i]] = thread;
        }
        for (int i = thread; i < tiles * a.lora.slices; i += EPILOGUE_WARPS) {
            int slot = memory.tiles[i / a.lora.slices].z;
            const SlotRow &found = a.lora.table[slot * a.lora.slices + i % a.lora.slices];
            memory.parts[i] = {static_cast<const bf16 *>(found.b), found.gain, found.shift,
                               found.scale, found.rank, found.active};
        }
        epilogue_sync();
    }

    // The first output of a tile that this block finishes.
    __device__ int first_of(int tile) const { return tile * S::WIDTH + cluster_rank() * width; }

    // Asks for the factors of a tile, which come while something else is done.
    __device__ void prefetch(int tile) const {
        int n = first_of(tile), slice = slice_of(a.lora, n), in_slice = n - a.lora.starts[slice];
        // Not beyond the slice, in whose B alone they lie.
        int end = slice + 1 < a.lora.slices ? a.lora.starts[slice + 1] : a.out.cols;
        int count = min(width, end - n);
        for (int t = thread; t < tiles; t += EPILOGUE_WARPS) {
            const Part &part = memory.parts[t * a.lora.slices + slice];
            if (count > 0 && part.rank > 0)
                prefetch_l2(part.b + int64_t(in_slice) * part.rank, count * part.rank * sizeof(bf16));
        }
    }

    // scale * B z of a tile's rows. Each warp takes some tiles of rows, T instructions of outputs a time.
    template <int T> __device__ void expand(int tile) const {
        constexpr int TOGETHER = 16 * T;
        // The last tile may reach behind the last output.
        int count = min(width, a.out.cols - first_of(tile));
        for (int t = warp; t < tiles; t += EPILOGUE_WARPS / WARP)
            for (int from = 0; from < count; from += TOGETHER) expand<T>(t, first_of(tile) + from, from);
    }
    template <int T> __device__ void expand(int t, int n, int from) const {
        int slice = slice_of(a.lora, n), rows = memory.tiles[t].y, place = memory.tiles[t].x;
        const Part &part = memory.parts[t * a.lora.slices + slice];
        if (!part.active) return;
        const bf16 *b = part.b + int64_t(n - a.lora.starts[slice] + group * 2 * T) * part.rank;
        int row = group < rows ? memory.order[place + group] : -1;
        float sums[T][4] = {};
#pragma unroll 2
        for (int k = quad * 4; k < (part.rank + 15) / 16 * 16; k += 16) {
            Factors<T> factors;
            factors.load(b, part.rank, 2 * T, k);
            float4 z = load_z(a.lora, a.out.rows, row, slice, k, part.rank);
            HiLo x(z.x), y(z.y), v(z.z), w(z.w);
            factors.multiply(make_uint2(pack2(x.hi, y.hi), pack2(v.hi, w.hi)),
                             make_uint2(pack2(x.lo, y.lo), pack2(v.lo, w.lo)), sums);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (2 * quad + i >= rows) continue;
            float *to = delta_of(memory.order[place + 2 * quad + i]) + from + group * 2 * T;
#pragma unroll
            for (int s = 0; s < T; s++) {
                to[2 * s] = part.scale * sums[s][i];
                to[2 * s + 1] = part.scale * sums[s][2 + i];
            }
        }
    }
    __device__ void expand_any(int tile) const {
        if (width == 32) expand<2>(tile);
        else expand<4>(tile);
    }

    __device__ float *delta_of(int row) const { return memory.deltas + row * (width + 4); }

    // Reads what rows are divided by.
    __device__ void read_scales() const {
        if (a.x_scales && thread < a.out.rows) memory.row_scales[thread] = a.x_scales[thread];
    }

    // What the base layer does to a thread's four outputs of a tile. To be read before their sums are there, as reading
    // takes long while weights stream in.
    struct Outputs {
        float scales[4], bias[4];
    };
    __device__ Outputs outputs_of(int tile) const {
        Outputs outputs = {{1, 1, 1, 1}, {}};
        int n = first_of(tile) + thread % (width / 4) * 4;
        if (n >= a.out.cols) return outputs;
        auto read = [&](const float *from, float (&to)[4]) {
            float4 v = *reinterpret_cast<const float4 *>(from + n);
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        };
        if (a.w_scales) read(a.w_scales, outputs.scales);
        if (a.bias) read(a.bias, outputs.bias);
        return outputs;
    }

    // Adds up staged sums, applies scales, bias and adapters, and stores, four neighbours at a time.
    __device__ void finish(int tile, const Outputs &outputs) const {
        constexpr int TURN = 4;
        int log = 31 - __clz(width / 4), count = a.out.rows << log, mask = (1 << log) - 1;
        for (int i = thread; i < count; i += EPILOGUE_WARPS * TURN) {
            float4 sums[TURN][MAX_BLOCKS];
#pragma unroll
            for (int u = 0; u < TURN; u++) {
                int at = i + u * EPILOGUE_WARPS;
                if (at < count) load_blocks(at >> log, (at & mask) * 4, sums[u]);
            }
#pragma unroll
            for (int u = 0; u < TURN; u++) {
                int at = i + u * EPILOGUE_WARPS;
                if (at < count) finish(tile, outputs, at >> log, (at & mask) * 4, sums[u]);
            }
        }
    }

    __device__ void finish(int tile, const Outputs &outputs, int row, int from,
                           const float4 (&sums)[MAX_BLOCKS]) const {
        int n = first_of(tile) + from;
        if (n >= a.out.cols) return;
        float v[4] = {sums[0].x, sums[0].y, sums[0].z, sums[0].w};
        if (blocks > 1) v[0] += sums[1].x, v[1] += sums[1].y, v[2] += sums[1].z, v[3] += sums[1].w;
        float of_row = a.x_scales ? memory.row_scales[row] : 1.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = v[i] * (of_row * outputs.scales[i]) + outputs.bias[i];
        adapt(row, n, from, v);
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

    // What the row's adapter does to outputs of the base layer.
    __device__ void adapt(int row, int n, int from, float (&v)[4]) const {
        int t = tiles > 0 ? memory.tile_of_row[row] : -1;
        if (t < 0) return;
        int slice = slice_of(a.lora, n), in_slice = n - a.lora.starts[slice];
        const Part &part = memory.parts[t * a.lora.slices + slice];
        if (!part.active) return;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (part.rank > 0) v[i] += delta_of(row)[from + i];
            if (part.gain) v[i] *= part.gain[in_slice + i];
            if (part.shift) v[i] += part.shift[in_slice + i];
        }
    }

    // The sums of all blocks of the cluster for four outputs.
    __device__ void load_blocks(int row, int from, float4 (&sums)[MAX_BLOCKS]) const {
        const float *here = memory.sums + row * S::STRIDE + cluster_rank() * width + from;
#pragma unroll
        for (int block = 0; block < MAX_BLOCKS; block++)
            if (block < blocks) sums[block] = ld_shared_cluster(smem_address(here), block);
    }
};

template <class S>
__device__ void finish(const StreamArgs &a, const Memory<S> &memory, const Share &share) {
    uint32_t parity = 0;
    Control &control = *memory.control;
    Epilogue<S> epilogue(a, memory);
    // What is known of adapters is handed over before the first kernel of a step.
    epilogue.read_batch();
    epilogue.prefetch(share.tile);
    pdl_wait();
    epilogue.read_scales();
    for (int tile = share.tile; tile < share.tiles; tile += share.clusters) {
        if (tile + share.clusters < share.tiles) epilogue.prefetch(tile + share.clusters);
        auto outputs = epilogue.outputs_of(tile);
        epilogue.expand_any(tile);
        epilogue_sync();
        control.staged.wait(parity);
        epilogue.finish(tile, outputs);
        control.taken.arrive();
        epilogue_sync(); // What adapters add is used.
        parity ^= 1;
    }
    // What the other block tells this one has arrived before this one leaves.
    control.taken.wait(parity ^ 1);
}

template <int N, int GROUPS> __device__ __forceinline__ void stream(const StreamArgs &a, uint8_t *shared) {
    using S = Sizes<N, GROUPS>;
    constexpr int PRODUCERS = S::CONSUMERS + EPILOGUE_WARPS; // One thread each of two warps.
    Memory<S> memory(shared, a.stages);
    Share share(a, S::WIDTH);
    int columns = a.dtype == DTYPE_F8 ? SWIZZLE : SWIZZLE / 2, thread = threadIdx.x;
    WeightProducer<S> weights{Cursor(share)};
    if (thread / WARP == PRODUCERS / WARP) {
        memory.init(a.stages, thread % WARP);
        if (thread == PRODUCERS) weights.begin(a, memory, share, columns);
        __syncwarp();
    }
    int32_t epoch = a.lora.inputs && thread == PRODUCERS + WARP ? current_epoch(a.lora.inputs) : 0;
    __syncthreads();
    pdl_launch_dependents();
    cluster_sync();
    if (thread == PRODUCERS) weights.go_on(a, memory, share, columns);
    else if (thread == PRODUCERS + WARP) produce_inputs(a, memory, share, columns, epoch);
    else if (thread < S::CONSUMERS) consume<N, S>(a, memory, share);
    else if (thread < PRODUCERS) finish<S>(a, memory, share);
    __syncwarp();
    cluster_sync(); // Nobody leaves while others read its sums.
}

// Blocks (cluster, 1, block of the cluster), one for a multiprocessor.
extern "C" __global__ void __launch_bounds__(2 * WARPGROUP + EPILOGUE_WARPS + 2 * WARP, 1)
    linear_stream(const __grid_constant__ StreamArgs a) {
    extern __shared__ uint8_t shared[];
    int rows = a.out.rows;
    if (rows <= 8) stream<8, 1>(a, shared);
    else if (rows <= 16) stream<16, 1>(a, shared);
    else if (rows <= 32) stream<32, 1>(a, shared);
    else stream<64, 2>(a, shared);
}
