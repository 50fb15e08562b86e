// The LoRA loader warps of linear_tiles.cu.
//
// Problem: for every adapter of a tile's 256 rows and every slice of its outputs, bring z of the rows that
//   use it [128, 16 ranks, hi and lo] and B [256 outputs, 16 ranks] into a stage of the ring.
// Grid: three of the twelve warps of a CTA; 96 threads copy 16 bytes at a time.
// Pipeline: a stage is theirs once the producer hands it over (lora_free) and is full when their cp.async
//   arrive (lora_full). Two rank blocks share a stage. While the ring is full they look up the next tile's
//   factors and prefetch them into L2.
// Numerics: none; ranks behind the end, outputs outside of the slice and rows of other adapters are zeros.
// Chosen when: always, as part of linear_tiles.cu; idle without adapters.
#pragma once

#include "linear_tiles.cuh"

// Sixteen ranks of one slot at one slice.
struct Unit {
    const bf16 *b; // Null: there are no more.
    int slot, slice, rank, from;
};

// Puts z and B of adapters into the ring. Three warps.
struct LoraLoader {
    const TilesArgs &a;
    const Memory &memory;
    int thread;
    Tile tile;
    Slices slices;
    int first, end;  // of the tile's slots
    int known, next; // Entries that were looked up, and the next.
    int from;        // of the ranks of the next

    __device__ LoraLoader(const TilesArgs &a, const Memory &memory, int thread)
        : a(a), memory(memory), thread(thread), slices(a, 0) {}

    __device__ static void sync() { asm volatile("bar.sync 3, %0;" ::"n"(LOADER_WARPS) : "memory"); }

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
                cp_async_arrive(memory.control->filled[stage]);
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
        for (int i = thread; i < ROWS; i += LOADER_WARPS)
            memory.control->slots[i] = tile.row + i < a.rows ? a.lora.slot_of_row[tile.row + i] : -1;
        look_up();
    }

    // Looks up the next factors, and asks for them early.
    __device__ void look_up() {
        int in_turn = slices.end - slices.first, count = min((end - first) * in_turn - known, ENTRIES);
        for (int i = thread; i < count; i += LOADER_WARPS) {
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
            for (int i = thread * COLUMNS; i < count * entry.rank; i += LOADER_WARPS * COLUMNS)
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
        static constexpr int ROW_STEP = LOADER_WARPS / CHUNKS;
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
        to += swizzled_offset(part.row, chunk + part.chunk);
#pragma unroll
        for (int row = part.row; row < OUTPUTS; row += P::ROW_STEP) {
            int n = row < HALF ? first + row : second + row - HALF;
            bool there = n >= 0 && n < width;
            cp_async_16(to, there ? unit.b + int64_t(n) * unit.rank + k : unit.b, there);
            to += P::ROW_STEP * SWIZZLE;
        }
    }

    // Ranks of z for the rows of a tile that have the adapter: hi, then lo.
    __device__ void fill_inputs(uint8_t *to, int chunk, const Unit &unit) const {
        using P = Part<2 * UNIT / CHUNK>;
        P part(thread);
        int max_rank = a.lora.max_rank, k = unit.from + part.chunk % (UNIT / CHUNK) * CHUNK;
        int slot = k < unit.rank ? unit.slot : NOBODY, stride = a.lora.slices * 2 * max_rank;
        const bf16 *z = a.lora.z + int64_t(tile.row + part.row) * stride +
                        (unit.slice * 2 + part.chunk / (UNIT / CHUNK)) * max_rank + k;
        to += swizzled_offset(part.row, chunk + part.chunk);
#pragma unroll
        for (int row = part.row; row < ROWS; row += P::ROW_STEP) {
            bool there = memory.control->slots[row] == slot;
            cp_async_16(to, there ? z : a.lora.z, there);
            to += P::ROW_STEP * SWIZZLE, z += P::ROW_STEP * stride;
        }
    }
};
