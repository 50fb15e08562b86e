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
struct RankBlock {
    const bf16 *b;
    int slot, slice, rank, from;
};

// Puts z and B of adapters into the ring.
struct LoraLoader {
    const TilesArgs &a;
    const Smem &smem;
    int thread;
    Tile tile;
    Slices slices;
    int first, end;  // of the tile's slots in `group_slots`
    int known, next; // Entries that were looked up, and the next to use.
    int from;        // The next rank of that entry.

    __device__ LoraLoader(const TilesArgs &a, const Smem &smem, int thread)
        : a(a), smem(smem), thread(thread), slices(a, 0) {}

    __device__ static void sync() { named_barrier_sync<LOADER_BARRIER, LOADERS>(); }

    __device__ void run() {
        if (a.lora.slices == 0) return;
        TileScheduler scheduler(a);
        int stage = 0;
        PhaseBits lora_free;
        for (int i = scheduler.begin(); i < scheduler.end(); i += scheduler.step()) {
            begin(scheduler(i));
            stage = (stage + a.steps) % STAGES;
            for (int blocks = rank_blocks_of(a, smem, tile); blocks > 0; blocks -= BLOCKS_PER_STEP) {
                RankBlock block = take();
                lora_free.wait(smem.control->lora_free, stage);
                fill(stage, 0, block);
                if (blocks > 1) fill(stage, 1, take());
                cp_async_arrive(smem.control->lora_full[stage]);
                stage = (stage + 1) % STAGES;
            }
            stage = (stage + a.bases) % STAGES;
        }
    }

    // Looks up what a tile needs, while the consumers work on steps of K.
    __device__ void begin(const Tile &of) {
        tile = of, slices = Slices(a, tile.output);
        const int32_t *ends = a.lora.group_starts + tile.cluster_row / CLUSTER_ROWS;
        first = ends[0], end = ends[1], known = next = from = 0;
        sync();
        for (int i = thread; i < ROWS; i += LOADERS)
            smem.control->slots[i] = tile.row + i < a.rows ? a.lora.slot_of_row[tile.row + i] : -1;
        look_up();
    }

    // Looks up the next entries, slot by slot, and prefetches their B.
    __device__ void look_up() {
        int per_slot = slices.end - slices.first, count = min((end - first) * per_slot - known, MAX_ENTRIES);
        for (int i = thread; i < count; i += LOADERS) {
            int slot = a.lora.group_slots[first + (known + i) / per_slot];
            int slice = slices.first + (known + i) % per_slot;
            const SlotRow &part = a.lora.table[slot * a.lora.slices + slice];
            smem.control->entries[i] = {static_cast<const bf16 *>(part.b), slot, slice, part.rank};
        }
        known += MAX_ENTRIES;
        sync();
        for (int i = 0; i < count; i++) prefetch(smem.control->entries[i]);
    }
    __device__ void prefetch(const Entry &entry) const {
        for (int half = 0; half < 2; half++) {
            int first = in_slice(a, tile.output, half, entry.slice), from = max(first, 0);
            int count = min(first + HALF, width_of(a.lora, entry.slice)) - from;
            const bf16 *b = entry.b + int64_t(from) * entry.rank;
            for (int i = thread * COLUMNS; i < count * entry.rank; i += LOADERS * COLUMNS)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(b + i));
        }
    }

    // The next rank block. There must be one.
    __device__ RankBlock take() {
        while (true) {
            if (next == known) {
                sync();
                look_up();
            }
            const Entry &entry = smem.control->entries[next % MAX_ENTRIES];
            RankBlock block = {entry.b, entry.slot, entry.slice, entry.rank, from};
            from += RANKS;
            if (from >= block.rank) next++, from = 0;
            if (block.from < block.rank) return block;
        }
    }

    // Assigns the chunks of a tile to threads: a thread has one chunk of rows that are a fixed number apart,
    // so that few instructions are left for each copy.
    template <int CHUNKS> struct CopyLane {
        static constexpr int ROW_STEP = LOADERS / CHUNKS;
        static_assert(ROW_STEP % 8 == 0, "all rows of a thread are swizzled alike");
        int row, chunk;

        __device__ explicit CopyLane(int thread) : row(thread / CHUNKS), chunk(thread % CHUNKS) {}
    };

    // Copies rank block number `number` of a stage.
    __device__ void fill(int stage, int number, const RankBlock &block) const {
        fill_weights(smem.w(stage), number * (RANKS / CHUNK), block);
        fill_inputs(smem.x(stage), number * (2 * RANKS / CHUNK), block);
    }

    // B for the outputs of the tile that lie in the slice.
    __device__ void fill_weights(uint8_t *to, int chunk, const RankBlock &block) const {
        using L = CopyLane<RANKS / CHUNK>;
        L lane(thread);
        int k = block.from + lane.chunk * CHUNK, width = k < block.rank ? width_of(a.lora, block.slice) : 0;
        int first = in_slice(a, tile.output, 0, block.slice);
        int second = in_slice(a, tile.output, 1, block.slice);
        to += swizzled_offset(lane.row, chunk + lane.chunk);
#pragma unroll
        for (int row = lane.row; row < OUTPUTS; row += L::ROW_STEP) {
            int n = row < HALF ? first + row : second + row - HALF;
            bool valid = n >= 0 && n < width;
            cp_async_16(to, valid ? block.b + int64_t(n) * block.rank + k : block.b, valid);
            to += L::ROW_STEP * SWIZZLE;
        }
    }

    // z of the rows of the tile that have the adapter: chunks of hi, then of lo.
    __device__ void fill_inputs(uint8_t *to, int chunk, const RankBlock &block) const {
        using L = CopyLane<2 * RANKS / CHUNK>;
        L lane(thread);
        int max_rank = a.lora.max_rank, k = block.from + lane.chunk % (RANKS / CHUNK) * CHUNK;
        int slot = k < block.rank ? block.slot : NO_SLOT, stride = a.lora.slices * 2 * max_rank;
        const bf16 *z = a.lora.z + int64_t(tile.row + lane.row) * stride +
                        (block.slice * 2 + lane.chunk / (RANKS / CHUNK)) * max_rank + k;
        to += swizzled_offset(lane.row, chunk + lane.chunk);
#pragma unroll
        for (int row = lane.row; row < ROWS; row += L::ROW_STEP) {
            bool valid = smem.control->slots[row] == slot;
            cp_async_16(to, valid ? z : a.lora.z, valid);
            to += L::ROW_STEP * SWIZZLE, z += L::ROW_STEP * stride;
        }
    }
};
