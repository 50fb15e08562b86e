// LoRA for operands that the tensor-core kernels do not take, and rows of tokens that adapters bring along.
//
// Problem: `lora_shrink`: z = A x. `lora_expand`: y = gain * (y + scale * B z) + shift, or with a matrix
//   that replaces the base layer's. `lora_rows`: rows of the vocabulary that an adapter has of its own, in
//   embeddings and logits.
// Grid: shrink: (row in adapter order, slice), a warp per rank. Expand: (row, slice, part of its outputs),
//   a warp per output. Rows: (row, part of its tokens), a warp per token.
// Pipeline: none.
// Numerics: f32 sums; one partial of z, over all of K.
// Chosen when (ops/lora/route.rs): an adapter whose factors are not bf16 or that replaces the base matrix, an
//   embedding, inputs or outputs that are not bf16, inputs that are not 16-byte aligned, ranks above 256.
//   `lora_rows` (ops/lora/token_rows.rs) whenever a resident adapter has rows of tokens.
#include "common.cuh"
#include "lora.cuh"

// Finds row `i` in adapter order and its adapter's part of the slice; false if there is none to compute.
__device__ bool find_row(const LoraArgs &a, int i, int slice, int &row, SlotRow &part) {
    if (i >= a.sizes[1]) return false;
    int low = 0, high = a.sizes[0] - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (a.starts[middle] <= i) low = middle;
        else high = middle - 1;
    }
    row = a.order[i];
    part = a.table[a.slots[low] * a.slices + slice];
    return part.active != 0;
}

// A dot product by one warp; every lane gets the result.
template <class X, class W> __device__ float dot(const X *x, const W *w, int count) {
    float sum = 0.0f;
    for (int k = threadIdx.x % WARP; k < count; k += WARP) sum += to_float(x[k]) * to_float(w[k]);
    return warp_reduce(sum, Sum());
}

// Grid (row in adapter order, slice); a warp per rank.
extern "C" __global__ void lora_shrink(LoraArgs a) {
    pdl_prologue();
    int row;
    SlotRow part;
    if (!find_row(a, blockIdx.x, blockIdx.y, row, part)) return;
    float *z = z_of(a, row, blockIdx.y, 0);
    with_float(part.a_dtype, [&](auto t) {
        using A = decltype(t);
        const A *factor = static_cast<const A *>(part.a);
        if (a.ids) {
            for (int j = threadIdx.x; j < part.rank; j += blockDim.x)
                z[j] = to_float(factor[static_cast<int64_t>(j) * a.in_dim + a.ids[row]]);
            return;
        }
        with_float(a.x.dtype, [&](auto u) {
            using X = decltype(u);
            const X *x = a.x.row<X>(row);
            for (int j = threadIdx.x / WARP; j < part.rank; j += blockDim.x / WARP) {
                float sum = dot(x, factor + static_cast<int64_t>(j) * a.in_dim, a.in_dim);
                if (threadIdx.x % WARP == 0) z[j] = sum;
            }
        });
    });
}

// Laid out as `LoraRowsArgs` of ops/lora/token_rows.rs.
struct LoraRowsArgs {
    Mat x; // Input of a linear site; of an embedding, `ids` stands for it.
    Mat out;
    const int32_t *ids; // Null unless the site is an embedding.
    const TokenRows *table;
    const int32_t *slots; // By row; negative without an adapter.
    int32_t in_dim;
};
static_assert(sizeof(LoraRowsArgs) == 96 && offsetof(LoraRowsArgs, ids) == 64 &&
              offsetof(LoraRowsArgs, slots) == 80 && offsetof(LoraRowsArgs, in_dim) == 88);

// The index of a token among those that the adapter brings along, or -1.
__device__ int find_token(const TokenRows &rows, int id) {
    int low = 0, high = rows.count - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if (rows.ids[middle] < id) low = middle + 1;
        else high = middle;
    }
    return low == high && rows.ids[low] == id ? low : -1;
}

// Replaces the base layer's output by the adapter's rows of tokens: of an embedding the row of the input
// token, of lm_head the logits of those tokens. Grid (row, part of its tokens); of an embedding (row).
extern "C" __global__ void lora_rows(LoraRowsArgs a) {
    pdl_prologue();
    int64_t r = blockIdx.x;
    int32_t slot = a.slots[r];
    if (slot < 0) return;
    TokenRows rows = a.table[slot];
    if (rows.count == 0) return;
    with_float(a.out.dtype, [&](auto o) {
        using O = decltype(o);
        O *out = a.out.row<O>(r);
        with_float(rows.dtype, [&](auto t) {
            using W = decltype(t);
            const W *values = static_cast<const W *>(rows.values);
            if (a.ids) {
                int place = find_token(rows, a.ids[r]);
                if (place < 0) return;
                const W *row = values + static_cast<int64_t>(place) * a.out.cols;
                for (int c = threadIdx.x; c < a.out.cols; c += blockDim.x)
                    out[c] = from_float<O>(to_float(row[c]));
                return;
            }
            with_float(a.x.dtype, [&](auto u) {
                using X = decltype(u);
                const X *x = a.x.row<X>(r);
                int warps = blockDim.x / WARP;
                int first = blockIdx.y * warps + threadIdx.x / WARP;
                for (int j = first; j < rows.count; j += gridDim.y * warps) {
                    float logit = dot(x, values + static_cast<int64_t>(j) * a.in_dim, a.in_dim);
                    if (threadIdx.x % WARP == 0) out[rows.ids[j]] = from_float<O>(logit);
                }
            });
        });
    });
}

// One output of the matrix that replaces the base layer's; every lane gets it.
__device__ float replaced(const LoraArgs &a, const SlotRow &part, int row, int n, int width) {
    float base = 0.0f;
    with_float(part.replacement_dtype, [&](auto t) {
        using W = decltype(t);
        const W *w = static_cast<const W *>(part.replacement);
        if (a.ids) {
            base = to_float(w[static_cast<int64_t>(a.ids[row]) * width + n]);
            return;
        }
        with_float(a.x.dtype, [&](auto u) {
            using X = decltype(u);
            base = dot(a.x.row<X>(row), w + static_cast<int64_t>(n) * a.in_dim, a.in_dim);
        });
    });
    return base;
}

// Grid (row in adapter order, slice, part of its outputs); a warp per output.
extern "C" __global__ void lora_expand(LoraArgs a) {
    pdl_prologue();
    int row;
    SlotRow part;
    if (!find_row(a, blockIdx.x, blockIdx.y, row, part)) return;
    int from = a.columns[blockIdx.y], width = a.columns[blockIdx.y + 1] - from;
    const float *z = z_of(a, row, blockIdx.y, 0);
    int warps = blockDim.x / WARP;
    for (int n = blockIdx.z * warps + threadIdx.x / WARP; n < width; n += gridDim.z * warps) {
        float delta = 0.0f;
        if (part.rank > 0)
            with_float(part.b_dtype, [&](auto t) {
                using B = decltype(t);
                delta =
                    dot(z, static_cast<const B *>(part.b) + static_cast<int64_t>(n) * part.rank, part.rank);
            });
        float base = part.replacement ? replaced(a, part, row, n, width) : 0.0f;
        if (threadIdx.x % WARP != 0) continue;
        with_float(a.out.dtype, [&](auto o) {
            using O = decltype(o);
            O *place = a.out.row<O>(row) + from + n;
            float value = part.replacement ? base : to_float(*place);
            value += part.scale * delta;
            if (part.gain) value *= part.gain[n];
            if (part.shift) value += part.shift[n];
            *place = from_float<O>(value);
        });
    }
}
