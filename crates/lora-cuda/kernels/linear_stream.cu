// Products of few rows, with what adapters add. The time goes into reading weights, so that nothing else
// may hold it up. The warps of a block have three roles: producers ask for weights long before they are
// needed, and before the inputs are there, while the kernels before this one still run; consumers
// multiply; finishers prepare what adapters add to a tile while it is multiplied. Sums are staged through
// shared memory, where the blocks of a cluster, which share the terms of a sum, find each other's.
#include "hopper.cuh"
#include "lora.cuh"

// Laid out as `StreamArgs` of `ops/linear_stream.rs`.
struct StreamArgs {
    TensorMap w, x;
    Mat out;
    const float *x_scales; // Of each row; null: 1.
    const float *w_scales; // Of each output; null: 1.
    const float *bias;     // Of each output; null: 0.
    RowAdapters lora;      // No slices: there are no adapters.
    int32_t dtype;         // Of weights and input.
    int32_t steps;         // Of K, 128 bytes each.
    int32_t stages;        // Tiles of weights that shared memory has room for.
};

constexpr int OUTPUTS = 64;     // of a group of consumers
constexpr int FINISHERS = WARPGROUP;
constexpr int MOST_STAGES = 24; // of weights
constexpr int MAX_BLOCKS = 2;   // of a cluster

// What an adapter does to a row's outputs in the present slice.
struct Part {
    const bf16 *b;
    const float *gain, *shift, *z;
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
    static constexpr int LANE = WIDTH / WARP;   // outputs of a lane of a finisher
    // Rows that a finisher has under way: of products, and of sums.
    static constexpr int TURN = 4 / GROUPS, SUMS_TURN = 4;
};

// Barriers of a block.
struct Control {
    Barrier w_full[MOST_STAGES], w_empty[MOST_STAGES], x_full[8], x_empty[8];
    Barrier staged, taken; // of the cluster's sums
};

// A place in a ring of stages, and the parity of its turn.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void next(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// The shared memory of a block.
template <class S> struct Memory {
    uint8_t *w, *x;
    Control *control;
    float *sums;   // [rows, STRIDE]
    float *deltas; // What adapters add: [rows of this block, WIDTH]
    Part *parts;   // [slices, rows]

    __device__ Memory(uint8_t *memory, int stages) {
        // The swizzle goes by addresses.
        memory += -shared_address(memory) & (SWIZZLE_BLOCK - 1);
        w = memory;
        x = w + stages * S::W_BYTES;
        control = reinterpret_cast<Control *>(x + S::X_STAGES * S::X_BYTES);
        sums = reinterpret_cast<float *>(control + 1);
        deltas = sums + S::ROWS * S::STRIDE;
        int blocks = cluster_size(), of_block = (S::ROWS + blocks - 1) / blocks;
        parts = reinterpret_cast<Part *>(deltas + of_block * S::WIDTH);
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
            control->staged.init(cluster_size());
            control->taken.init(cluster_size());
        }
        publish_barriers();
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
    Ring ring, arrived;

    __device__ void ask(const StreamArgs &a, const Memory<S> &memory, const Share &share, int columns) {
        Barrier &full = memory.control->w_full[ring.stage];
        full.expect(S::W_BYTES);
#pragma unroll
        for (int output = 0; output < S::WIDTH; output += OUTPUTS)
            copy_tile(memory.w + ring.stage * S::W_BYTES + output * SWIZZLE, a.w, at.step * columns,
                      at.tile * S::WIDTH + output, full, Keep::FIRST_OUT);
        ring.next(a.stages);
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
            arrived.next(a.stages);
        }
    }
};

// Asks for tiles of the input.
template <class S>
__device__ void produce_inputs(const StreamArgs &a, const Memory<S> &memory, const Share &share,
                               int columns) {
    Ring ring;
    wait_for_inputs();
    for (Cursor at(share); at.left > 0; at.next(share)) {
        Barrier &full = memory.control->x_full[ring.stage];
        memory.control->x_empty[ring.stage].wait(ring.parity ^ 1);
        full.expect(S::X_BYTES);
        copy_tile(memory.x + ring.stage * S::X_BYTES, a.x, at.step * columns, 0, full, Keep::LAST_OUT);
        ring.next(S::X_STAGES);
    }
}

// Waits for the threads of one role.
template <int BARRIER, int THREADS> __device__ void role_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
}

// A consumer's places in the rings.
struct Places {
    Ring w, x;
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
        uint64_t w = operand(memory.w + at.w.stage * S::W_BYTES + group * OUTPUTS * SWIZZLE);
        uint64_t x = operand(memory.x + at.x.stage * S::X_BYTES);
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) product(T{}, fresh, w + 2 * k, x + 2 * k, i + k > 0);
        at.w.next(a.stages), at.x.next(S::X_STAGES);
    }
    products_end();
    // Sums of e4m3 keep few bits in the tensor cores: 128 terms are added there.
#pragma unroll
    for (int i = 0; i < N / 2; i++) sums[i] += fresh[i];
    if (threadIdx.x % WARP != 0) return;
    for (int i = 0; i < COUNT; i++) {
        memory.control->w_empty[done.w.stage].arrive();
        memory.control->x_empty[done.x.stage].arrive();
        done.w.next(a.stages), done.x.next(S::X_STAGES);
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

// Puts a thread's sums where finishers find them.
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
        role_sync<1, S::CONSUMERS>();
        if (threadIdx.x < cluster_size()) control.staged.arrive_at(threadIdx.x);
        parity ^= 1;
    }
}

// Eight neighbours from `from` of a row of B with its rank; zeros behind its end.
__device__ uint4 load_ranks(const bf16 *row, int from, int rank) {
    if (from >= rank) return make_uint4(0, 0, 0, 0);
    if (rank % EIGHT == 0) return __ldg(reinterpret_cast<const uint4 *>(row + from));
    uint32_t v[4] = {};
    for (int i = 0; i < EIGHT && from + i < rank; i++)
        v[i / 2] |= uint32_t(__bfloat16_as_ushort(row[from + i])) << (i % 2 * 16);
    return make_uint4(v[0], v[1], v[2], v[3]);
}

// As `load_ranks`, of A x.
__device__ void load_z(const float *z, int from, int rank, float (&to)[EIGHT]) {
    if (from < rank && rank % EIGHT == 0) {
        reinterpret_cast<float4 *>(to)[0] = *reinterpret_cast<const float4 *>(z + from);
        reinterpret_cast<float4 *>(to)[1] = *reinterpret_cast<const float4 *>(z + from + 4);
        return;
    }
#pragma unroll
    for (int i = 0; i < EIGHT; i++) to[i] = from + i < rank ? z[from + i] : 0.0f;
}

__device__ float dot(uint4 b, const float (&z)[EIGHT]) {
    uint32_t pairs[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum += __uint_as_float(pairs[i] << 16) * z[2 * i];
        sum += __uint_as_float(pairs[i] & 0xffff0000u) * z[2 * i + 1];
    }
    return sum;
}

// The slice that holds output `n`; -1: there are no adapters.
__device__ int slice_of(const RowAdapters &lora, int n) {
    int slice = lora.slices - 1;
    while (slice > 0 && lora.columns[slice] > n) slice--;
    return slice;
}

// A warp of finishers and its rows, which all of them and the blocks of the cluster take in turn.
template <class S> struct Finisher {
    const StreamArgs &a;
    const Memory<S> &memory;
    int lane, warp, blocks, first, step;
    // Of a tile: the lane's first output, its slice, and where it is in that.
    int n = 0, slice = 0, in_slice = 0;

    __device__ Finisher(const StreamArgs &a, const Memory<S> &memory) : a(a), memory(memory) {
        constexpr int WARPS = FINISHERS / WARP;
        lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS, blocks = cluster_size();
        first = warp * blocks + cluster_rank(), step = WARPS * blocks;
    }

    // What adapters do to each row, slice by slice.
    __device__ void read_parts() {
        int rows = a.out.rows;
        for (int i = threadIdx.x % FINISHERS; i < a.lora.slices * rows; i += FINISHERS) {
            int of_slice = i / rows, row = i % rows, slot = a.lora.slots[row];
            Part part = {};
            if (slot >= 0) {
                const SlotRow &found = a.lora.table[slot * a.lora.slices + of_slice];
                part.b = static_cast<const bf16 *>(found.b);
                part.gain = found.gain, part.shift = found.shift;
                part.z = a.lora.z + (int64_t(row) * a.lora.slices + of_slice) * a.lora.max_rank;
                part.scale = found.scale, part.rank = found.rank, part.active = found.active;
            }
            memory.parts[i] = part;
        }
    }

    __device__ void turn_to(int tile) {
        n = tile * S::WIDTH + lane * S::LANE;
        slice = slice_of(a.lora, n), in_slice = slice < 0 ? 0 : n - a.lora.columns[slice];
    }

    // Asks for the factors of a tile, which come while something else is done.
    __device__ void prefetch(int tile) {
        turn_to(tile);
        for (int row = first; row < a.out.rows; row += step) {
            const Part *part = part_of(row);
            if (!part) continue;
            const bf16 *b = part->b + int64_t(in_slice) * part->rank;
            for (int i = 0; i < S::LANE * part->rank; i += 64)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(b + i));
        }
    }

    // Null: no adapter changes these outputs of the row.
    __device__ const Part *part_of(int row) const {
        if (slice < 0 || row >= a.out.rows || n >= a.out.cols) return nullptr;
        const Part *part = memory.parts + slice * a.out.rows + row;
        return part->active ? part : nullptr;
    }

    // Where the lane keeps what adapters add to a row.
    __device__ float *delta_of(int row) const {
        return memory.deltas + row / blocks * S::WIDTH + lane * S::LANE;
    }

    // scale * B z of all rows.
    __device__ void expand() const {
        for (int row = first; row < a.out.rows; row += step * S::TURN) {
            const Part *parts[S::TURN];
            float deltas[S::TURN][S::LANE] = {};
            int most = 0;
#pragma unroll
            for (int u = 0; u < S::TURN; u++) {
                parts[u] = part_of(row + u * step);
                most = max(most, parts[u] ? parts[u]->rank : 0);
            }
            for (int j = 0; j < most; j += EIGHT) add_ranks(parts, j, deltas);
#pragma unroll
            for (int u = 0; u < S::TURN; u++) {
                if (!parts[u]) continue;
                float *to = delta_of(row + u * step);
#pragma unroll
                for (int i = 0; i < S::LANE; i++) to[i] = parts[u]->scale * deltas[u][i];
            }
        }
    }

    // The products of eight ranks, all of whose loads are under way together.
    __device__ void add_ranks(const Part *(&parts)[S::TURN], int j,
                              float (&deltas)[S::TURN][S::LANE]) const {
        uint4 b[S::TURN][S::LANE];
        float z[S::TURN][EIGHT];
#pragma unroll
        for (int u = 0; u < S::TURN; u++) {
            int rank = parts[u] ? parts[u]->rank : 0;
#pragma unroll
            for (int i = 0; i < S::LANE; i++)
                b[u][i] = load_ranks(rank ? parts[u]->b + int64_t(in_slice + i) * rank : nullptr, j, rank);
            load_z(rank ? parts[u]->z : nullptr, j, rank, z[u]);
        }
#pragma unroll
        for (int u = 0; u < S::TURN; u++)
#pragma unroll
            for (int i = 0; i < S::LANE; i++) deltas[u][i] += dot(b[u][i], z[u]);
    }

    // Adds up staged sums, applies scales, bias and adapters, and stores.
    __device__ void finish() const {
        if (n >= a.out.cols) return;
        for (int row = first; row < a.out.rows; row += step * S::SUMS_TURN) {
            float sums[S::SUMS_TURN][MAX_BLOCKS][S::LANE];
#pragma unroll
            for (int u = 0; u < S::SUMS_TURN; u++)
                if (row + u * step < a.out.rows) load_blocks(row + u * step, sums[u]);
#pragma unroll
            for (int u = 0; u < S::SUMS_TURN; u++)
                if (row + u * step < a.out.rows) finish(row + u * step, sums[u]);
        }
    }

    __device__ void finish(int row, const float (&sums)[MAX_BLOCKS][S::LANE]) const {
        const Part *part = part_of(row);
        float v[S::LANE], of_row = a.x_scales ? a.x_scales[row] : 1.0f;
#pragma unroll
        for (int i = 0; i < S::LANE; i++) {
            v[i] = blocks > 1 ? sums[0][i] + sums[1][i] : sums[0][i];
            if (a.w_scales) v[i] *= of_row * a.w_scales[n + i];
            if (a.bias) v[i] += a.bias[n + i];
            if (!part) continue;
            v[i] += delta_of(row)[i];
            if (part->gain) v[i] *= part->gain[in_slice + i];
            if (part->shift) v[i] += part->shift[in_slice + i];
        }
        with_float(a.out.dtype, [&](auto o) { store(a.out.row<decltype(o)>(row) + n, v); });
    }

    // The sums of all blocks of the cluster.
    __device__ void load_blocks(int row, float (&sums)[MAX_BLOCKS][S::LANE]) const {
        uint32_t address = shared_address(memory.sums + row * S::STRIDE + lane * S::LANE);
#pragma unroll
        for (int block = 0; block < MAX_BLOCKS; block++)
#pragma unroll
            for (int i = 0; i < S::LANE; i += 2)
                if (block < blocks) load_at(address + i * 4, block, sums[block][i], sums[block][i + 1]);
    }

    template <class O> __device__ static void store(O *to, const float (&v)[S::LANE]) {
        struct alignas(S::LANE * sizeof(O)) Together {
            O v[S::LANE];
        } out;
#pragma unroll
        for (int i = 0; i < S::LANE; i++) out.v[i] = from_float<O>(v[i]);
        *reinterpret_cast<Together *>(to) = out;
    }
};

template <class S>
__device__ void finish(const StreamArgs &a, const Memory<S> &memory, const Share &share) {
    uint32_t parity = 0;
    Control &control = *memory.control;
    Finisher<S> finisher(a, memory);
    // What is known of adapters is handed over before the first kernel of a step.
    finisher.read_parts();
    role_sync<2, FINISHERS>();
    finisher.prefetch(share.tile);
    wait_for_inputs();
    for (int tile = share.tile; tile < share.tiles; tile += share.clusters) {
        if (tile + share.clusters < share.tiles) finisher.prefetch(tile + share.clusters);
        finisher.turn_to(tile);
        finisher.expand();
        control.staged.wait(parity);
        finisher.finish();
        role_sync<2, FINISHERS>();
        if (threadIdx.x % FINISHERS < cluster_size())
            control.taken.arrive_at(threadIdx.x % FINISHERS);
        parity ^= 1;
    }
    // Nobody leaves while others read its sums.
    control.taken.wait(parity ^ 1);
}

template <int N, int GROUPS> __device__ __forceinline__ void stream(const StreamArgs &a, uint8_t *shared) {
    using S = Sizes<N, GROUPS>;
    constexpr int PRODUCERS = S::CONSUMERS + FINISHERS; // One thread each of two warps.
    Memory<S> memory(shared, a.stages);
    Share share(a, S::WIDTH);
    int columns = a.dtype == DTYPE_F8 ? SWIZZLE : SWIZZLE / 2, thread = threadIdx.x;
    WeightProducer<S> weights{Cursor(share)};
    if (thread / WARP == PRODUCERS / WARP) {
        memory.init(a.stages, thread % WARP);
        if (thread == PRODUCERS) weights.begin(a, memory, share, columns);
        __syncwarp();
    }
    __syncthreads();
    cluster_sync();
    if (thread == PRODUCERS) weights.go_on(a, memory, share, columns);
    else if (thread == PRODUCERS + WARP) produce_inputs(a, memory, share, columns);
    else if (thread < S::CONSUMERS) consume<N, S>(a, memory, share);
    else if (thread < PRODUCERS) finish<S>(a, memory, share);
}

// Blocks (cluster, 1, block of the cluster), one for a multiprocessor.
extern "C" __global__ void __launch_bounds__(2 * WARPGROUP + FINISHERS + 2 * WARP, 1)
    linear_stream(const __grid_constant__ StreamArgs a) {
    extern __shared__ uint8_t shared[];
    let_next_start();
    int rows = a.out.rows;
    if (rows <= 8) stream<8, 1>(a, shared);
    else if (rows <= 16) stream<16, 1>(a, shared);
    else if (rows <= 32) stream<32, 1>(a, shared);
    else stream<64, 2>(a, shared);
}
