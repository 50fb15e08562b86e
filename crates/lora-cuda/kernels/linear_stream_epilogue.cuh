// The epilogue warps of linear_stream.cu: LoRA expand, split-K partials, scales and bias.
#pragma once

#include "linear_stream.cuh"

// A barrier of the epilogue warps.
__device__ void epilogue_sync() { named_barrier_sync<EPILOGUE_BARRIER, EPILOGUE_THREADS>(); }

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
