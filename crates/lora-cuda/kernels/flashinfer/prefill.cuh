// Attention of prompts by FlashInfer's prefill kernel for Hopper (Ye et al., FlashInfer, 2025):
// FlashAttention-3 on CUTLASS, over paged keys and values.
//
// Problem: softmax(scale * q K^T) V in bf16, head_dim 64 or 128, for the rows and keys that the host has
//   planned.
// Grid: persistent, one CTA per SM; which CTA computes which tiles (192 or 128 rows of one head) is in the
//   plan's lists, the longest tiles first. Producer and consumer warpgroups are FlashInfer's.
// Pipeline: FlashInfer's, two stages of 96 keys by cp.async, as pages are no TMA boxes, with a proxy fence
//   that it lacks; the epilogue is this crate's.
// Numerics: wgmma with f32 accumulators; probabilities in bf16.
// Chosen when: planned prompts in bf16, aligned, with equal strides of K and V and no V scale
//   (`suits_flashinfer` in ops/attention/mod.rs), and the step is not recorded. It takes 0.5 to 0.8 of the
//   time of attention_prefill.cu (bench/evidence, "attention of prompts").
#pragma once

// Replaces a header of FlashInfer that includes parts of CUTLASS's tests, which need cuRAND. The attention
// kernels use none of them.
#define FLASHINFER_CUTLASS_UTILS_CUH_
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>
#include <sstream>

#include <flashinfer/attention/hopper/default_params.cuh>
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variants.cuh>

#include "library.h"

namespace {

using T = cutlass::bfloat16_t;
using Params = flashinfer::BatchPrefillPagedParams<T, T, T, int32_t>;

Params params_of(const PrefillArgs &a) {
    auto list = [](const int32_t *entries) { return const_cast<int32_t *>(entries); };
    auto matrix = [](const void *data) { return static_cast<T *>(const_cast<void *>(data)); };
    Params p{};
    p.q_ptr = matrix(a.queries), p.k_ptr = matrix(a.keys), p.v_ptr = matrix(a.values);
    p.o_ptr = static_cast<T *>(a.out);
    p.work_indptr = list(a.block_ends);
    p.head_indices = list(a.heads_of), p.qo_tile_indices = list(a.tiles);
    p.qo_indptr = list(a.first_rows), p.qo_lens = list(a.rows_of);
    p.kv_indptr = list(a.first_blocks), p.kv_lens = list(a.keys_of);
    // Must be readable, but this variant does not use it.
    p.batch_indices = list(a.heads_of);
    p.kv_indices = list(a.tables);
    p.additional_params.sm_scale = a.scale;
    p.q_stride_n = a.query_stride, p.o_stride_n = a.out_stride;
    p.k_stride_n = p.v_stride_n = a.cache_stride;
    p.q_stride_h = p.k_stride_h = p.v_stride_h = p.o_stride_h = a.head_dim;
    p.k_page_stride = p.v_page_stride = a.tokens_per_block * a.cache_stride;
    p.page_size = a.tokens_per_block;
    p.nnz_qo = a.rows;
    p.num_qo_heads = a.heads, p.num_kv_heads = a.kv_heads, p.group_size = a.heads / a.kv_heads;
    p.window_left = a.before;
    p.causal = true;
    return p;
}

// Adds a proxy fence to the consumer side of a pipeline. Paged keys and values are copied by cp.async, which
// writes by the generic proxy, and multiplied by wgmma, which reads by the async proxy: the PTX ISA ("Async
// proxy") asks for a fence in between, which FlashInfer lacks.
template <class Pipeline> struct Fenced : Pipeline {
    using Pipeline::Pipeline;

    template <class State, class Token> __device__ void consumer_wait(State state, Token token) {
        Pipeline::consumer_wait(state, token);
        cutlass::arch::fence_view_async_shared();
    }
};

// The tile sizes are those that FlashInfer chooses for these head_dims.
template <int DIM>
using Base = flashinfer::AttentionKernelTraits</*USE_TMA_LOAD_KV=*/false, DIM, DIM, DIM == 64 ? 192 : 128,
                                               /*CTA_KV=*/96, /*NUM_STAGES=*/2, T, T, T, int32_t,
                                               flashinfer::StandardAttention>;
template <int DIM> struct Traits : Base<DIM> {
    using MainloopPipeline = Fenced<typename Base<DIM>::MainloopPipeline>;
};

} // namespace

// Stores the outputs of a tile through shared memory. FlashInfer 0.7.2's own epilogue has a race: every warp
// arrives twice at a barrier that counts each once, so that the faster half completes it and reads what the
// others have not written.
template <int DIM> struct flashinfer::CollectiveEpilogue<Traits<DIM>>
    : flashinfer::CollectiveEpilogue<Base<DIM>> {
    using Own = flashinfer::CollectiveEpilogue<Base<DIM>>;

    template <class Sums, class Lse, class Shared, class Mma, class Place>
    __device__ void store(const typename Own::Params &params, const Sums &sums, const Lse &, Shared &shared,
                          Mma mma, int thread, const Place &place) {
        using namespace cute;
        auto [tile, head, kv_head, first_row, first_block, rows, keys, sequence] = place;
        auto outputs = make_tensor(make_smem_ptr(shared.smem_o.data()), typename Own::SmemLayoutO{});
        auto copy_sums = make_tiled_copy_C(typename Own::SmemCopyAtomO{}, mma);
        auto mine = copy_sums.get_thread_slice(thread);
        auto narrow = flashinfer::convert_type<T>(sums);
        mma_threads_sync(); // All have read the values whose place the outputs take.
        cute::copy(copy_sums, mine.retile_S(narrow), mine.partition_D(outputs));
        mma_threads_sync(); // All have written their outputs.
        flashinfer::write_O<Own::NUM_COPY_THREADS>(params.O_ptr, typename Own::TiledCopyO{}, params.layout_O,
                                                   select<0, 1>(typename Own::TileShape_PDV{}), outputs,
                                                   thread, tile, head, first_row, rows, /*write_warp_idx=*/0);
        mma_threads_sync(); // All have read them: the next values may overwrite them.
    }

    // A barrier of the consumer warpgroups.
    __device__ static void mma_threads_sync() {
        cutlass::arch::NamedBarrier::sync(Own::NUM_MMA_THREADS, int(flashinfer::NamedBarriers::kValueEmpty));
    }
};

namespace {

template <int DIM, bool WINDOW> cudaError_t launch(const PrefillArgs &args, cudaStream_t stream) {
    Params params = params_of(args);
    return flashinfer::BatchPrefillWithPagedKVCacheKernelTraitsDispatched<
        Traits<DIM>, WINDOW, /*CAUSAL=*/true, /*SAME_SCHEDULE_FOR_ALL_HEADS=*/false>(params, stream);
}

template <int DIM> cudaError_t prefill(const PrefillArgs &args, cudaStream_t stream) {
    return args.before < 0 ? launch<DIM, false>(args, stream) : launch<DIM, true>(args, stream);
}

} // namespace
