// The adapters of a site, and which rows use them.
#pragma once

#include "common.cuh"

// What one adapter does to one slice. Laid out as `SlotRow` of `ops/lora_table.rs`.
struct SlotRow {
    const void *a, *b, *replacement;
    const float *gain, *shift;
    float scale;
    int32_t rank, a_dtype, b_dtype, replacement_dtype, active;
};

// The weight of an RMS norm for each row: its adapter's, or the base model's. Laid out as
// `NormWeightArg` of `ops/norm.rs`. No kernel writes any of it.
struct NormWeight {
    const float *base;       // Null where the model has no such norm.
    const SlotRow *adapters; // By slot; null as long as no adapter has a weight of its own.
    const int32_t *slots;    // Of each row, negative without an adapter.

    __device__ const float *of(int64_t row) const {
        if (!adapters) return base;
        int32_t slot = slots[row];
        const void *own = slot < 0 ? nullptr : adapters[slot].replacement;
        return own ? static_cast<const float *>(own) : base;
    }
};

// Rows of the vocabulary that an adapter has of its own. Laid out as `TokenRows` of
// `ops/lora_rows.rs`.
struct TokenRows {
    const void *values; // [count, columns]
    const int32_t *ids; // Ascending.
    int32_t count, dtype;
};

// Laid out as `LoraArgs` of `ops/lora.rs`.
struct LoraArgs {
    Mat x;              // Input of the base layer; of an embedding, `ids` stands for it.
    Mat out;
    const int32_t *ids; // Null unless the site is an embedding.
    const SlotRow *table;
    const int32_t *order, *starts, *slots;
    const int32_t *idle;    // Rows without an adapter.
    const int4 *tiles;      // Rows of one adapter: start in `order`, number, slot.
    const int32_t *sizes;   // Number of segments, of rows in `order`, and of tiles.
    const int32_t *columns; // Where slices begin, and the end.
    float *z; // Parts of A x: [partials, rows, slices, max_rank]; without partials what `lora_shrink.cu` leaves.
    int32_t *inputs;        // Two words, see `announce_inputs`.
    int32_t slices, max_rank, in_dim;
    int32_t chunk, partials;  // Columns of K that a partial sums, and their number.
    int32_t tile_rows;      // Rows of a full tile.
};

__device__ inline float *z_of(const LoraArgs &a, int64_t row, int slice, int rank) {
    return a.z + (row * a.slices + slice) * a.max_rank + rank;
}

// The adapters of a site for a batch of few rows, which the shrink has seen before. Laid out as
// `FewRows` of `ops/lora.rs`.
struct FewRows {
    const SlotRow *table;
    const int32_t *order;
    const int4 *tiles;
    const int32_t *sizes;
    const float *z;
    int32_t starts[4]; // Where slices begin.
    int32_t slices, max_rank, partials;
    int32_t *inputs; // Where the shrink, the kernel before, tells that the inputs are there.
};

// A product needs the inputs at once, but z late. So it does not wait for the shrink's end before it reads
// inputs, but for word: the shrink announces a number before it lets the product start, and repeats it in the
// second of two words once it has waited for the inputs itself. Numbers only grow. Kernels that announce one
// start one after another, the next perhaps before this one has its inputs. Done by the first block, with all
// of its threads.
__device__ inline bool is_first_block() { return blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0; }

// Returns the number, for the thread that tells.
__device__ inline int32_t announce_inputs(int32_t *words) {
    if (!is_first_block()) return 0;
    int32_t number = 0;
    if (threadIdx.x == 0) {
        auto announced = static_cast<volatile int32_t *>(words);
        number = *announced + 1;
        *announced = number;
        __threadfence();
    }
    __syncthreads(); // before any of them lets the product start
    return number;
}

__device__ inline void signal_ready(int32_t *words, int32_t announced) {
    if (!is_first_block() || threadIdx.x != 0) return;
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(words + 1), "r"(announced) : "memory");
}

// The number that is announced. To be read before the kernel after this one may start.
__device__ inline int32_t announced_inputs(const int32_t *words) {
    return *static_cast<const volatile int32_t *>(words);
}

// Waits for the inputs, which the TMA may read then.
__device__ inline void wait_ready(const int32_t *words, int32_t announced) {
    int32_t told;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(told) : "l"(words + 1) : "memory");
    while (told - announced < 0);
    asm volatile("fence.proxy.async;" ::: "memory");
}
