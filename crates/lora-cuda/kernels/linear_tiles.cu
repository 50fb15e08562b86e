// Products of many rows, with what adapters add. A block computes tiles of outputs one after another:
// a producer copies tiles of weights and inputs to a ring in shared memory, two groups of consumers
// multiply. An adapter is more terms of the same sums: z stands beside the input and B beside the weights,
// and fillers put both into the ring behind the last step of K. A tile has two halves of weights, neighbours
// or a gate and what it is for. The two blocks of a cluster compute the same outputs of different rows: each
// copies a half to both, as the second cache could not serve each of them at the pace of the tensor cores.
#include "hopper.cuh"
#include "lora.cuh"

// The adapters of a site for a batch of many rows, of which the shrink has left z. Laid out as `ManyRows` of
// `ops/linear_tiles.rs`.
struct ManyRows {
    const SlotRow *table;
    const int32_t *slot_of_row;  // -1: no adapter
    const int32_t *group_starts; // Of each 256 rows: where their slots begin in `group_slots`, and the end.
    const int32_t *group_slots;
    const bf16 *z;     // scale * A x as sums of two numbers: [rows, slices, 2, max_rank]
    int32_t starts[5]; // Where slices begin, and the end of the last.
    int32_t slices, max_rank;
};

// Laid out as `TilesArgs` of `ops/linear_tiles.rs`.
struct TilesArgs {
    TensorMap w, x; // Boxes of 128 rows of 128 bytes. Where the product is there, `x` is that.
    TensorMap out;  // Boxes of 64 rows of 128 bytes.
    const float *bias; // Of each output; null: 0.
    ManyRows lora;         // No slices: there are no adapters.
    int32_t rows, cols;
    int32_t width;  // Outputs of a tile: all that it has sums of, or a gate and what it is for.
    int32_t second; // Where weights of the second half of a tile begin, behind the first half's.
    int32_t steps;  // Of K, 128 bytes each.
    int32_t bases;  // Boxes of each half of a tile of the product, where that is there.
};

constexpr int ROWS = 128, OUTPUTS = 256; // of a tile
constexpr int HALF = OUTPUTS / 2;
constexpr int CLUSTER = 2;               // blocks
constexpr int CLUSTER_ROWS = CLUSTER * ROWS; // for which slots are listed
constexpr int MOST_CLUSTERS = 64;        // of so many rows
constexpr int MOST_SLICES = 4;
constexpr int STAGES = 4;                // of the ring
constexpr int COLUMNS = 64;              // of K in a step, and of a box of outputs
constexpr int GROUP_ROWS = 64;           // of a group of consumers
constexpr int CONSUMERS = 2 * WARPGROUP;
constexpr int FILLERS = 3 * WARP;
constexpr int TOGETHER = 8;              // tiles of rows that go through all weights together
constexpr int UNIT = 16;                 // ranks of one instruction, of one slot at one slice
constexpr int UNITS = 2;                 // of a step
constexpr int CHUNK = 8;                 // ranks of one copy
constexpr int NOBODY = -2;               // a slot that no row has
constexpr int ENTRIES = 32;              // factors that fillers know at a time
constexpr int X_BYTES = ROWS * SWIZZLE, W_BYTES = OUTPUTS * SWIZZLE, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int BOX_BYTES = GROUP_ROWS * SWIZZLE;

// A factor B that a tile needs.
struct Entry {
    const bf16 *b;
    int32_t slot, slice, rank;
};

// Barriers of each stage: it holds a step of K, or one of adapters; the producer has given it to the
// fillers; all who copy to it may do so again.
struct Control {
    Barrier full[STAGES], filled[STAGES], given[STAGES], empty[STAGES];
    Entry entries[ENTRIES];
    int32_t slots[ROWS]; // of the rows that fillers work on
    uint16_t units[MOST_CLUSTERS * MOST_SLICES]; // Of each 256 rows at each slice.
};

// The shared memory of a block.
struct Memory {
    uint8_t *stages, *boxes; // Boxes of outputs: two for each group.
    Control *control;

    __device__ explicit Memory(uint8_t *memory) {
        // The swizzle goes by addresses.
        stages = memory + (-shared_address(memory) & (SWIZZLE_BLOCK - 1));
        boxes = stages + STAGES * STAGE_BYTES;
        control = reinterpret_cast<Control *>(boxes + 4 * BOX_BYTES);
    }
    __device__ uint8_t *x(int stage) const { return stages + stage * STAGE_BYTES; }
    __device__ uint8_t *w(int stage) const { return x(stage) + X_BYTES; }
};

// Which turn the barriers of a kind are at, a bit for each stage, where they have fewer turns than the ring.
struct Turns {
    uint32_t parities = 0;

    __device__ void wait(Barrier (&barriers)[STAGES], int stage) {
        barriers[stage].wait(parities >> stage & 1);
        parities ^= 1u << stage;
    }
};

// A tile: its first row and output, and the first row of the cluster's tiles.
struct Tile {
    int row, output, cluster_row;
};

// The tiles of this block, in turn with other clusters. Those that run at the same time have few rows and few
// outputs among them, so that the second cache holds what they read.
struct Schedule {
    int row_tiles, output_tiles, width, rank;

    __device__ explicit Schedule(const TilesArgs &a) : width(a.width), rank(cluster_rank()) {
        row_tiles = (a.rows + CLUSTER_ROWS - 1) / CLUSTER_ROWS, output_tiles = (a.cols + a.width - 1) / a.width;
    }
    __device__ int begin() const { return blockIdx.x; }
    __device__ int step() const { return gridDim.x; }
    __device__ int end() const { return row_tiles * output_tiles; }

    __device__ Tile operator()(int i) const {
        int in_group = TOGETHER * output_tiles, group = i / in_group;
        int in_turn = min(TOGETHER, row_tiles - group * TOGETHER);
        int row = (group * TOGETHER + i % in_group % in_turn) * CLUSTER_ROWS;
        return {row + rank * ROWS, i % in_group / in_turn * width, row};
    }
};

__device__ int width_of(const ManyRows &lora, int slice) { return lora.starts[slice + 1] - lora.starts[slice]; }

// Where the first output of half a tile lies in a slice; it may lie before or behind it.
__device__ int in_slice(const TilesArgs &a, int output, int half, int slice) {
    return output + half * a.second - a.lora.starts[slice];
}

// The slices that a tile has outputs of: from `first` to before `end`.
struct Slices {
    int first, end;

    __device__ Slices(const TilesArgs &a, int output) : first(0), end(0) {
        for (int slice = a.lora.slices - 1; slice >= 0; slice--) {
            bool meets = false;
            for (int half = 0; half < 2; half++) {
                int from = in_slice(a, output, half, slice);
                meets |= from > -HALF && from < width_of(a.lora, slice);
            }
            if (meets) first = slice, end = max(end, slice + 1);
        }
    }
};

// Units of the adapters of a tile, the same for both blocks of a cluster.
__device__ int units_of(const TilesArgs &a, const Memory &memory, const Tile &tile) {
    int units = 0;
    Slices slices(a, tile.output);
    for (int slice = slices.first; slice < slices.end; slice++)
        units += memory.control->units[tile.cluster_row / CLUSTER_ROWS * a.lora.slices + slice];
    return units;
}
__device__ int steps_of(int units) { return (units + UNITS - 1) / UNITS; }

// Counts the units of adapters, by the fillers.
__device__ void count_units(const TilesArgs &a, const Memory &memory, int thread) {
    int clusters = (a.rows + CLUSTER_ROWS - 1) / CLUSTER_ROWS;
    for (int i = thread; i < clusters * a.lora.slices; i += FILLERS) {
        int units = 0, group = i / a.lora.slices, slice = i % a.lora.slices;
        for (int j = a.lora.group_starts[group]; j < a.lora.group_starts[group + 1]; j++)
            units += (a.lora.table[a.lora.group_slots[j] * a.lora.slices + slice].rank + UNIT - 1) / UNIT;
        memory.control->units[i] = units;
    }
}

// Copies tiles of weights and inputs. One thread.
struct Producer {
    const TilesArgs &a;
    const Memory &memory;

    __device__ void weights(int stage, const Tile &tile, int step) const {
        Barrier &full = memory.control->full[stage];
        static_assert(CLUSTER == 2, "a block copies a half");
        int half = cluster_rank();
        full.expect(STAGE_BYTES);
        copy_tile_to((1 << CLUSTER) - 1, memory.w(stage) + half * HALF * SWIZZLE, a.w, step * COLUMNS,
                     tile.output + half * a.second, full, Keep::AS_USUAL);
    }
    __device__ void inputs(int stage, const Tile &tile, int step) const {
        copy_tile(memory.x(stage), a.x, step * COLUMNS, tile.row, memory.control->full[stage], Keep::LAST_OUT);
    }

    __device__ void base(int stage, const Tile &tile, int number) const {
        Barrier &full = memory.control->full[stage];
        int output = tile.output + number * COLUMNS;
        full.expect(2 * X_BYTES);
        copy_tile(memory.x(stage), a.x, output, tile.row, full, Keep::FIRST_OUT);
        copy_tile(memory.w(stage), a.x, output + a.second, tile.row, full, Keep::FIRST_OUT);
    }

    __device__ void run() const {
        Schedule schedule(a);
        Ring ring;
        // Weights of the first steps come before the inputs are there.
        int ahead = schedule.begin() < schedule.end() ? min(STAGES, a.steps) : 0;
        for (int i = 0; i < ahead; i++) weights(i, schedule(schedule.begin()), i);
        wait_for_inputs();
        for (int i = schedule.begin(); i < schedule.end(); i += schedule.step()) {
            Tile tile = schedule(i);
            for (int step = 0; step < a.steps; step++) {
                if (ahead > 0) ahead--;
                else {
                    memory.control->empty[ring.stage].wait(ring.parity ^ 1);
                    weights(ring.stage, tile, step);
                }
                inputs(ring.stage, tile, step);
                ring.next(STAGES);
            }
            for (int step = steps_of(units_of(a, memory, tile)); step > 0; step--) {
                memory.control->empty[ring.stage].wait(ring.parity ^ 1);
                memory.control->given[ring.stage].arrive();
                ring.next(STAGES);
            }
            for (int i = 0; i < a.bases; i++) {
                memory.control->empty[ring.stage].wait(ring.parity ^ 1);
                base(ring.stage, tile, i);
                ring.next(STAGES);
            }
        }
    }
};

// Sixteen ranks of one slot at one slice.
struct Unit {
    const bf16 *b; // Null: there are no more.
    int slot, slice, rank, from;
};

// Puts z and B of adapters into the ring. Three warps.
struct Filler {
    const TilesArgs &a;
    const Memory &memory;
    int thread;
    Tile tile;
    Slices slices;
    int first, end;  // of the tile's slots
    int known, next; // Entries that were looked up, and the next.
    int from;        // of the ranks of the next

    __device__ Filler(const TilesArgs &a, const Memory &memory, int thread)
        : a(a), memory(memory), thread(thread), slices(a, 0) {}

    __device__ static void sync() { asm volatile("bar.sync 3, %0;" ::"n"(FILLERS) : "memory"); }

    __device__ void run() {
        if (a.lora.slices == 0) return;
        Schedule schedule(a);
        int stage = 0;
        Turns given;
        for (int i = schedule.begin(); i < schedule.end(); i += schedule.step()) {
            begin(schedule(i));
            stage = (stage + a.steps) % STAGES;
            for (int units = units_of(a, memory, tile); units > 0; units -= UNITS) {
                Unit unit = take();
                given.wait(memory.control->given, stage);
                fill(stage, 0, unit);
                if (units > 1) fill(stage, 1, take());
                arrive_after_copies(memory.control->filled[stage]);
                stage = (stage + 1) % STAGES;
            }
            stage = (stage + a.bases) % STAGES;
        }
    }

    // Learns what a tile needs, while the ring is full.
    __device__ void begin(const Tile &of) {
        tile = of, slices = Slices(a, tile.output);
        const int32_t *ends = a.lora.group_starts + tile.cluster_row / CLUSTER_ROWS;
        first = ends[0], end = ends[1], known = next = from = 0;
        sync();
        for (int i = thread; i < ROWS; i += FILLERS)
            memory.control->slots[i] = tile.row + i < a.rows ? a.lora.slot_of_row[tile.row + i] : -1;
        look_up();
    }

    // Looks up the next factors, and asks for them early.
    __device__ void look_up() {
        int in_turn = slices.end - slices.first, count = min((end - first) * in_turn - known, ENTRIES);
        for (int i = thread; i < count; i += FILLERS) {
            int slot = a.lora.group_slots[first + (known + i) / in_turn];
            int slice = slices.first + (known + i) % in_turn;
            const SlotRow &part = a.lora.table[slot * a.lora.slices + slice];
            memory.control->entries[i] = {static_cast<const bf16 *>(part.b), slot, slice, part.rank};
        }
        known += ENTRIES;
        sync();
        for (int i = 0; i < count; i++) prefetch(memory.control->entries[i]);
    }
    __device__ void prefetch(const Entry &entry) const {
        for (int half = 0; half < 2; half++) {
            int first = in_slice(a, tile.output, half, entry.slice), from = max(first, 0);
            int count = min(first + HALF, width_of(a.lora, entry.slice)) - from;
            const bf16 *b = entry.b + int64_t(from) * entry.rank;
            for (int i = thread * COLUMNS; i < count * entry.rank; i += FILLERS * COLUMNS)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(b + i));
        }
    }

    __device__ Unit take() {
        while (true) {
            if (next == known) {
                sync();
                look_up();
            }
            const Entry &entry = memory.control->entries[next % ENTRIES];
            Unit unit = {entry.b, entry.slot, entry.slice, entry.rank, from};
            from += UNIT;
            if (from >= unit.rank) next++, from = 0;
            if (unit.from < unit.rank) return unit;
        }
    }

    // Copies that a thread makes lie a fixed number of rows apart, so that few instructions are left for each.
    template <int CHUNKS> struct Part {
        static constexpr int ROW_STEP = FILLERS / CHUNKS;
        static_assert(ROW_STEP % 8 == 0, "all rows of a thread are swizzled alike");
        int row, chunk;

        __device__ explicit Part(int thread) : row(thread / CHUNKS), chunk(thread % CHUNKS) {}
    };

    __device__ void fill(int stage, int place, const Unit &unit) const {
        fill_weights(memory.w(stage), place * (UNIT / CHUNK), unit);
        fill_inputs(memory.x(stage), place * (2 * UNIT / CHUNK), unit);
    }

    // Ranks of B for the outputs of a tile that lie in the slice.
    __device__ void fill_weights(uint8_t *to, int chunk, const Unit &unit) const {
        using P = Part<UNIT / CHUNK>;
        P part(thread);
        int k = unit.from + part.chunk * CHUNK, width = k < unit.rank ? width_of(a.lora, unit.slice) : 0;
        int first = in_slice(a, tile.output, 0, unit.slice), second = in_slice(a, tile.output, 1, unit.slice);
        to += swizzled(part.row, chunk + part.chunk);
#pragma unroll
        for (int row = part.row; row < OUTPUTS; row += P::ROW_STEP) {
            int n = row < HALF ? first + row : second + row - HALF;
            bool there = n >= 0 && n < width;
            copy_chunk(to, there ? unit.b + int64_t(n) * unit.rank + k : unit.b, there);
            to += P::ROW_STEP * SWIZZLE;
        }
    }

    // Ranks of z for the rows of a tile that have the adapter: coarse, then fine.
    __device__ void fill_inputs(uint8_t *to, int chunk, const Unit &unit) const {
        using P = Part<2 * UNIT / CHUNK>;
        P part(thread);
        int max_rank = a.lora.max_rank, k = unit.from + part.chunk % (UNIT / CHUNK) * CHUNK;
        int slot = k < unit.rank ? unit.slot : NOBODY, stride = a.lora.slices * 2 * max_rank;
        const bf16 *z = a.lora.z + int64_t(tile.row + part.row) * stride +
                        (unit.slice * 2 + part.chunk / (UNIT / CHUNK)) * max_rank + k;
        to += swizzled(part.row, chunk + part.chunk);
#pragma unroll
        for (int row = part.row; row < ROWS; row += P::ROW_STEP) {
            bool there = memory.control->slots[row] == slot;
            copy_chunk(to, there ? z : a.lora.z, there);
            to += P::ROW_STEP * SWIZZLE, z += P::ROW_STEP * stride;
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
    Ring ring;
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
        if (thread == 0) stores_end();
    }

    __device__ uint64_t inputs() const { return operand(memory.x(ring.stage) + group * GROUP_ROWS * SWIZZLE); }
    __device__ uint64_t weights() const { return operand(memory.w(ring.stage)); }

    // Tells both blocks that this warp has read a stage. Nothing was written, so nothing is published.
    __device__ void release(int stage) const {
        if (lane < CLUSTER) memory.control->empty[stage].arrive_at(lane);
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
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) product(T{}, sums, x + 2 * k, w + 2 * k, step + k > 0);
            products_commit();
            products_wait<1>();
            if (step > 0) release(last);
            last = ring.stage;
            ring.next(STAGES);
        }
        products_wait<0>();
        release(last);
    }

    // Adds B z: more steps of the same kind.
    __device__ void adapt(const Tile &tile, float (&sums)[OUTPUTS / 2]) {
        constexpr int BYTES = UNIT * sizeof(bf16) / 16; // of a unit's ranks, in sixteens
#pragma unroll 1
        for (int units = units_of(a, memory, tile); units > 0; units -= UNITS) {
            filled.wait(memory.control->filled, ring.stage);
            publish();
            uint64_t x = inputs(), w = weights();
            products_begin();
            product(bf16{}, sums, x, w, 1);
            product(bf16{}, sums, x + BYTES, w, 1);
            if (units > 1) {
                product(bf16{}, sums, x + 2 * BYTES, w + BYTES, 1);
                product(bf16{}, sums, x + 3 * BYTES, w + BYTES, 1);
            }
            products_end();
            release(ring.stage);
            ring.next(STAGES);
        }
    }

    // Two boxes take turns: one is filled while the other is stored.
    __device__ void store(const Tile &tile, const float (&sums)[OUTPUTS / 2]) {
        constexpr int WIDTH = GATES ? HALF : OUTPUTS;
#pragma unroll
        for (int number = 0; number < WIDTH / COLUMNS; number++) {
            uint8_t *box = memory.boxes + (group * 2 + number % 2) * BOX_BYTES;
            int output = tile.output + number * COLUMNS;
            if (thread == 0) stores_read<1>();
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
                release(ring.stage);
                ring.next(STAGES);
            }
            publish();
            group_sync(group);
            if (thread == 0) store_tile(a.out, output, tile.row + group * GROUP_ROWS, box);
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
            for (int i = 0; i < 8; i++) values[i / 4][i % 4] = gated_nearly(values[i / 4][i % 4], ups[i / 4][i % 4]);
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
                     : "r"(shared_address(tile + swizzled(row, chunk + lane / 16)))
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
                         shared_address(box + swizzled(row, chunk + lane / 16))),
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
        memory.control->filled[thread].init(FILLERS);
        memory.control->given[thread].init(1);
        memory.control->empty[thread].init(CLUSTER * CONSUMERS / WARP);
    }
    publish_barriers();
}

template <class F> __device__ __forceinline__ void multiply_tiles(const TilesArgs &a, F &&consume) {
    extern __shared__ uint8_t shared[];
    let_next_start();
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
        wait_for_inputs();
        if (thread >= WARP) Filler(a, memory, thread - WARP).run();
    } else {
        take_registers<232>();
        wait_for_inputs();
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
