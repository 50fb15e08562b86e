// Products of few rows, with what adapters add. The time goes into reading weights: a block's first warp
// after its consumers asks for them long before they are needed, and before the inputs are there, while
// the kernels before this one still run. Sums are staged through shared memory, where the blocks of a
// cluster, which share the terms of a sum, add each other's in their order.
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

constexpr int OUTPUTS = 64;  // of a group of consumers
constexpr int X_STAGES = 4;  // tiles of inputs that shared memory has room for
constexpr int MOST_STAGES = 24;
constexpr int STAGED = 64;   // rows that are staged together

// What an adapter does to a row's outputs in the present slice.
struct Part {
    const bf16 *b;
    const float *gain, *shift, *z;
    float scale;
    int32_t rank, active;
};

// N: the rows that there are, rounded up; GROUPS of consumers have 64 outputs each.
template <int N, int GROUPS> struct Sizes {
    static constexpr int WIDTH = OUTPUTS * GROUPS;
    static constexpr int W_BYTES = WIDTH * SWIZZLE, X_BYTES = N * SWIZZLE;
    static constexpr int ROWS = N < STAGED ? N : STAGED;
    static constexpr int STRIDE = WIDTH + 4; // Spreads what a warp stores over all banks.
    static constexpr int CONSUMERS = GROUPS * WARPGROUP;
};

// Barriers and tables of a block; tiles and staged sums come before them.
struct Control {
    Barrier w_full[MOST_STAGES], w_empty[MOST_STAGES], x_full[X_STAGES], x_empty[X_STAGES];
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
    float *sums;
    Part *parts; // [slices, rows]
    Control *control;

    __device__ Memory(uint8_t *memory, int stages) {
        // The swizzle goes by addresses.
        memory += -shared_address(memory) & (SWIZZLE_BLOCK - 1);
        w = memory;
        x = w + stages * S::W_BYTES;
        control = reinterpret_cast<Control *>(x + X_STAGES * S::X_BYTES);
        sums = reinterpret_cast<float *>(control + 1);
        parts = reinterpret_cast<Part *>(sums + S::ROWS * S::STRIDE);
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

// Asks for tiles of weights and inputs, in the order in which they are used.
template <class S> __device__ void produce(const StreamArgs &a, const Memory<S> &memory, Share share) {
    int columns = a.dtype == DTYPE_F8 ? SWIZZLE : SWIZZLE / 2; // of a step
    int of_tile = share.to - share.from, count = share.count();
    Ring w, x;
    auto ask_w = [&](int i) {
        int tile = share.tile + i / of_tile * share.clusters, step = share.from + i % of_tile;
        Barrier &full = memory.control->w_full[w.stage];
        memory.control->w_empty[w.stage].wait(w.parity ^ 1);
        full.expect(S::W_BYTES);
#pragma unroll
        for (int output = 0; output < S::WIDTH; output += OUTPUTS)
            copy_tile(memory.w + w.stage * S::W_BYTES + output * SWIZZLE, a.w, step * columns,
                      tile * S::WIDTH + output, full, Keep::FIRST_OUT);
        w.next(a.stages);
    };
    auto ask_x = [&](int i) {
        Barrier &full = memory.control->x_full[x.stage];
        memory.control->x_empty[x.stage].wait(x.parity ^ 1);
        full.expect(S::X_BYTES);
        copy_tile(memory.x + x.stage * S::X_BYTES, a.x, (share.from + i % of_tile) * columns, 0, full,
                  Keep::LAST_OUT);
        x.next(X_STAGES);
    };
    for (int i = 0; i < min(a.stages, count); i++) ask_w(i);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int i = 0; i < min(X_STAGES, count); i++) ask_x(i);
    // As soon as step `i` is done, its places are filled again.
    for (int i = 0; i < count; i++) {
        if (a.stages + i < count) ask_w(a.stages + i);
        if (X_STAGES + i < count) ask_x(X_STAGES + i);
    }
}

// Adds the products of this block's steps of a tile to `sums`.
template <class T, int N, class S>
__device__ void multiply(const StreamArgs &a, const Memory<S> &memory, int steps, Ring &w, Ring &x,
                         float (&sums)[N / 2]) {
    constexpr int PART = N < 64 ? N : 64;
    int group = threadIdx.x / WARPGROUP;
    bool leads = threadIdx.x % WARP == 0;
    // Unrolled, products of few rows would wait for each other's registers.
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        memory.control->w_full[w.stage].wait(w.parity);
        memory.control->x_full[x.stage].wait(x.parity);
        uint64_t of_w = operand(memory.w + w.stage * S::W_BYTES + group * OUTPUTS * SWIZZLE);
#pragma unroll
        for (int part = 0; part < N / PART; part++) {
            uint64_t of_x = operand(memory.x + x.stage * S::X_BYTES + part * PART * SWIZZLE);
            float fresh[PART / 2];
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) product(T{}, fresh, of_w + 2 * k, of_x + 2 * k, k > 0);
            products_end();
            // Sums of e4m3 keep few bits in the tensor cores: only 128 terms are added there.
#pragma unroll
            for (int i = 0; i < PART / 2; i++) sums[part * (PART / 2) + i] += fresh[i];
        }
        if (leads) {
            memory.control->w_empty[w.stage].arrive();
            memory.control->x_empty[x.stage].arrive();
        }
        w.next(a.stages), x.next(X_STAGES);
    }
}

// Waits for the consumers of this block.
template <class S> __device__ void consumers_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(S::CONSUMERS) : "memory");
}

// Puts a thread's sums of some rows where others find them.
template <int N, class S>
__device__ void stage(const Memory<S> &memory, const float (&sums)[N / 2], int part) {
    int lane = threadIdx.x % WARP, output = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < S::ROWS / 2; i++) {
        int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
        memory.sums[row * S::STRIDE + output + i % 4 / 2 * 8] = sums[part * (S::ROWS / 2) + i];
    }
}

// Neighbouring outputs of a lane.
template <int GROUPS> struct Outputs {
    static constexpr int COUNT = 2 * GROUPS;
    float v[COUNT];

    // Adds those of block `rank` of the cluster.
    __device__ void add(uint32_t address, uint32_t rank) {
        float more[COUNT];
        uint32_t there = address_at(address, rank);
#pragma unroll
        for (int i = 0; i < COUNT; i += 2)
            asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
                         : "=f"(more[i]), "=f"(more[i + 1])
                         : "r"(there + i * 4));
#pragma unroll
        for (int i = 0; i < COUNT; i++) v[i] += more[i];
    }
    template <class O> __device__ void store(O *to) const {
        struct alignas(COUNT * sizeof(O)) Together {
            O v[COUNT];
        } out;
#pragma unroll
        for (int i = 0; i < COUNT; i++) out.v[i] = from_float<O>(v[i]);
        *reinterpret_cast<Together *>(to) = out;
    }
};

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

// B z of a lane's outputs, which begin at `n` of the slice, for rows that are under way together.
template <int GROUPS, int TURN>
__device__ void expand(const Part *(&parts)[TURN], int n, float (&deltas)[TURN][2 * GROUPS]) {
    int most = 0;
#pragma unroll
    for (int u = 0; u < TURN; u++) most = max(most, parts[u] ? parts[u]->rank : 0);
    for (int j = 0; j < most; j += EIGHT) {
        uint4 b[TURN][2 * GROUPS];
        float z[TURN][EIGHT];
#pragma unroll
        for (int u = 0; u < TURN; u++) {
            int rank = parts[u] ? parts[u]->rank : 0;
#pragma unroll
            for (int i = 0; i < 2 * GROUPS; i++)
                b[u][i] = load_ranks(rank ? parts[u]->b + int64_t(n + i) * rank : nullptr, j, rank);
            load_z(rank ? parts[u]->z : nullptr, j, rank, z[u]);
        }
#pragma unroll
        for (int u = 0; u < TURN; u++)
#pragma unroll
            for (int i = 0; i < 2 * GROUPS; i++) deltas[u][i] += dot(b[u][i], z[u]);
    }
}

// The slice that holds output `n`; -1: there are no adapters.
__device__ int slice_of(const RowAdapters &lora, int n) {
    int slice = lora.slices - 1;
    while (slice > 0 && lora.columns[slice] > n) slice--;
    return slice;
}

// Adds up staged sums, applies scales, bias and adapters, and stores rows `first` to `first + S::ROWS`
// of a tile. The warps of all blocks of the cluster take rows in turn.
template <int GROUPS, class S>
__device__ void finish(const StreamArgs &a, const Memory<S> &memory, int tile, int first) {
    constexpr int TURN = 4 / GROUPS; // rows under way together
    int lane = threadIdx.x % WARP, size = cluster_size(), warps = size * S::CONSUMERS / WARP;
    int n = tile * S::WIDTH + lane * 2 * GROUPS, rows = min(S::ROWS, a.out.rows - first);
    if (n >= a.out.cols) return;
    int slice = slice_of(a.lora, n), in_slice = slice < 0 ? 0 : n - a.lora.columns[slice];
    const Part *of_slice = memory.parts + max(slice, 0) * a.out.rows + first;
    int from = cluster_rank() * (S::CONSUMERS / WARP) + threadIdx.x / WARP;
    for (; from < rows; from += warps * TURN) {
        const Part *parts[TURN];
        float deltas[TURN][2 * GROUPS] = {};
#pragma unroll
        for (int u = 0; u < TURN; u++) {
            int row = from + u * warps;
            bool adapted = slice >= 0 && row < rows && of_slice[row].active;
            parts[u] = adapted ? of_slice + row : nullptr;
        }
        expand<GROUPS, TURN>(parts, in_slice, deltas);
#pragma unroll
        for (int u = 0; u < TURN; u++) {
            int row = from + u * warps;
            if (row >= rows) continue;
            Outputs<GROUPS> out = {};
            uint32_t address = shared_address(memory.sums + row * S::STRIDE + lane * 2 * GROUPS);
            for (int block = 0; block < size; block++) out.add(address, block);
            float of_row = a.x_scales ? a.x_scales[first + row] : 1.0f;
            const Part *part = parts[u];
#pragma unroll
            for (int i = 0; i < 2 * GROUPS; i++) {
                float &v = out.v[i];
                if (a.w_scales) v *= of_row * a.w_scales[n + i];
                if (a.bias) v += a.bias[n + i];
                if (!part) continue;
                v += part->scale * deltas[u][i];
                if (part->gain) v *= part->gain[in_slice + i];
                if (part->shift) v += part->shift[in_slice + i];
            }
            with_float(a.out.dtype, [&](auto o) {
                out.store(a.out.row<decltype(o)>(first + row) + n);
            });
        }
    }
}

// What adapters do to each row, slice by slice.
template <class S> __device__ void read_parts(const StreamArgs &a, const Memory<S> &memory) {
    int rows = a.out.rows;
    for (int i = threadIdx.x; i < a.lora.slices * rows; i += S::CONSUMERS) {
        int slice = i / rows, row = i % rows, slot = a.lora.slots[row];
        Part part = {};
        if (slot >= 0) {
            const SlotRow &found = a.lora.table[slot * a.lora.slices + slice];
            part.b = static_cast<const bf16 *>(found.b);
            part.gain = found.gain, part.shift = found.shift;
            part.z = a.lora.z + (int64_t(row) * a.lora.slices + slice) * a.lora.max_rank;
            part.scale = found.scale, part.rank = found.rank, part.active = found.active;
        }
        memory.parts[i] = part;
    }
}

template <int N, int GROUPS, class S>
__device__ void consume(const StreamArgs &a, const Memory<S> &memory, const Share &share) {
    uint32_t size = cluster_size(), parity = 0;
    Control &control = *memory.control;
    Ring w, x;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    read_parts(a, memory);
    for (int tile = share.tile; tile < share.tiles; tile += share.clusters) {
        float sums[N / 2] = {};
        int steps = share.to - share.from;
        switch (a.dtype) {
        case DTYPE_BF16: multiply<bf16, N, S>(a, memory, steps, w, x, sums); break;
        case DTYPE_F16: multiply<f16, N, S>(a, memory, steps, w, x, sums); break;
        case DTYPE_F8: multiply<f8, N, S>(a, memory, steps, w, x, sums); break;
        }
#pragma unroll
        for (int part = 0; part < N / S::ROWS; part++) {
            // Until all blocks have taken what was staged before.
            control.taken.wait(parity ^ 1);
            stage<N, S>(memory, sums, part);
            consumers_sync<S>();
            if (threadIdx.x < size) control.staged.arrive_at(threadIdx.x);
            control.staged.wait(parity);
            finish<GROUPS, S>(a, memory, tile, part * S::ROWS);
            consumers_sync<S>();
            if (threadIdx.x < size) control.taken.arrive_at(threadIdx.x);
            parity ^= 1;
        }
    }
    // Nobody leaves while others read its sums.
    control.taken.wait(parity ^ 1);
}

template <int N, int GROUPS> __device__ __forceinline__ void stream(const StreamArgs &a, uint8_t *shared) {
    using S = Sizes<N, GROUPS>;
    Memory<S> memory(shared, a.stages);
    Share share(a, S::WIDTH);
    if (threadIdx.x == S::CONSUMERS) {
        Control &control = *memory.control;
        for (int i = 0; i < a.stages; i++) {
            control.w_full[i].init(1);
            control.w_empty[i].init(S::CONSUMERS / WARP);
        }
        for (int i = 0; i < X_STAGES; i++) {
            control.x_full[i].init(1);
            control.x_empty[i].init(S::CONSUMERS / WARP);
        }
        control.staged.init(cluster_size());
        control.taken.init(cluster_size());
        publish_barriers();
    }
    __syncthreads();
    cluster_sync();
    if (threadIdx.x >= S::CONSUMERS) {
        if (threadIdx.x == S::CONSUMERS) produce<S>(a, memory, share);
        return;
    }
    consume<N, GROUPS, S>(a, memory, share);
}

// Blocks (cluster, 1, block of the cluster), one for a multiprocessor; the warp behind the consumers is the producer.
extern "C" __global__ void __launch_bounds__(2 * WARPGROUP + WARP, 1)
    linear_stream(const __grid_constant__ StreamArgs a) {
    extern __shared__ uint8_t shared[];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    int rows = a.out.rows;
    if (rows <= 8) stream<8, 1>(a, shared);
    else if (rows <= 16) stream<16, 1>(a, shared);
    else if (rows <= 32) stream<32, 1>(a, shared);
    else if (rows <= 64) stream<64, 2>(a, shared);
    else stream<128, 2>(a, shared);
}
