// Sampling without a sort: thresholds of top-k and top-p are found digit by digit in histograms.
//
// Problem: per row, logit bias, penalties, bans and mask, then argmax or a sample of softmax(logits /
//   temperature) restricted by top-k, top-p and min-p.
// Grid: (row, 1, part of the vocabulary); 512 threads; the CTAs of a row form a cluster of up to eight.
// Pipeline: none; four loads of four logits are in flight per thread. Histograms and reductions go through
//   the shared memory of the cluster.
// Numerics: probabilities are integers, of which the most likely token has 2^40, so that sums depend
//   neither on their order nor on the number of CTAs. Philox4x32-10 random numbers. Ties go to the lower
//   id.
// Chosen when: always (ops/sample.rs); rows are split until about 256 CTAs are busy.
#include <cooperative_groups.h>

#include "float_order.cuh"

constexpr int THREADS = 512;
constexpr int CTAS_PER_SM = 2;
constexpr int UNROLL = 4;                      // loads of four logits that a thread has in flight
constexpr float WEIGHT_ONE = 1099511627776.0f; // 2^40: the integer weight of the most likely token

// Sampling parameters of a row. Laid out as `lora_core::ops::SampleRow`.
struct SampleRow {
    float temperature, top_p, min_p;
    uint32_t top_k, seed[2], position, stream;
    float repetition_penalty, presence_penalty, frequency_penalty;
    uint32_t history[2], banned[2], bias[2]; // First entry and count.
    int32_t mask;                            // Row of `masks`; negative: none.
};
static_assert(sizeof(SampleRow) == 72 && offsetof(SampleRow, seed) == 16 &&
              offsetof(SampleRow, position) == 24 && offsetof(SampleRow, repetition_penalty) == 32 &&
              offsetof(SampleRow, history) == 44 && offsetof(SampleRow, mask) == 68);

// Laid out as `SampleArgs` of ops/sample.rs.
struct SampleArgs {
    Mat logits, params, history, bias, masks, scratch; // scratch: [rows, vocab] f32
    const int32_t *banned;
    int32_t *out;
};
static_assert(sizeof(SampleArgs) == 208 && offsetof(SampleArgs, scratch) == 160 &&
              offsetof(SampleArgs, banned) == 192 && offsetof(SampleArgs, out) == 200);

// Philox4x32-10 (Salmon et al., 2011): the first word of a block.
__device__ uint32_t philox(const uint32_t seed[2], uint32_t c0, uint32_t c1) {
    uint32_t k0 = seed[0], k1 = seed[1], c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        u64 a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(a);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c0;
}

// The index of this thread among those of its row, and their number.
__device__ int thread_of_row() { return blockIdx.z * THREADS + threadIdx.x; }
__device__ int threads_of_row() { return gridDim.z * THREADS; }

// Calls `f` with tokens and logits: this thread's share of a row, in no particular order. Unless `ONCE`, some
// tokens come several times, which saves branches that the compiler would move the loads behind.
template <bool ONCE = true, class F> __device__ void for_each_logit(const float *row, int vocab, F &&f) {
    int thread = thread_of_row(), threads = threads_of_row();
    // Single logits up to a 16-byte boundary, float4 from there on, single ones at the end.
    int before = static_cast<int>(-reinterpret_cast<uintptr_t>(row) % sizeof(float4) / sizeof(float));
    int prefix = min(vocab, before), float4s = (vocab - prefix) / 4;
    const float4 *body = reinterpret_cast<const float4 *>(row + prefix);
    for (int first = thread; first < float4s; first += UNROLL * threads) {
        float4 loaded[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) loaded[u] = body[min(first + u * threads, float4s - 1)];
        asm volatile("" ::: "memory"); // All loads are issued before the first is used.
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (ONCE && first + u * threads >= float4s) break;
            int t = prefix + 4 * min(first + u * threads, float4s - 1);
            f(t, loaded[u].x), f(t + 1, loaded[u].y), f(t + 2, loaded[u].z), f(t + 3, loaded[u].w);
        }
    }
    if (thread < vocab - 4 * float4s) {
        int t = thread < prefix ? thread : thread + 4 * float4s;
        f(t, row[t]);
    }
}

// Reduces the values of all threads of a row; each thread gets the result.
template <class Op> __device__ u64 row_reduce(u64 v, Op op) {
    __shared__ u64 part;
    auto cluster = cooperative_groups::this_cluster();
    v = block_reduce(v, u64{0}, op);
    if (threadIdx.x == 0) part = v;
    cluster.sync();
    u64 all = 0;
    for (unsigned b = 0; b < cluster.num_blocks(); b++) all = op(all, *cluster.map_shared_rank(&part, b));
    cluster.sync(); // No CTA may exit, or write its next value, while others read this one.
    return all;
}

// The exclusive prefix sum of the values of the CTA's threads.
template <class T> __device__ T exclusive_sum(T own) {
    __shared__ T totals[THREADS / WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    T sum = own;
    for (int step = 1; step < WARP; step *= 2) {
        T other = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads(); // Another thread may still read the totals of an earlier sum.
    if (lane == WARP - 1) totals[warp] = sum;
    __syncthreads();
    sum -= own;
    for (int w = 0; w < warp; w++) sum += totals[w];
    return sum;
}

// A row of logits.
struct Row {
    const float *logits;
    int vocab;
    float max_logit, temperature;

    // The probability of a token relative to the most likely one, as an integer and as a float.
    __device__ u64 weight(float logit) const {
        return static_cast<u64>(expf((logit - max_logit) / temperature) * WEIGHT_ONE);
    }
    __device__ float relative_probability(float logit) const {
        return expf((logit - max_logit) / temperature);
    }
};

// A threshold in the descending order of tokens.
struct Threshold {
    uint32_t key;         // of its logit
    u64 above, weight;    // Sum of the weights above it; weight of one token with this key.
    uint32_t count, ties; // Tokens above it; tokens with this key.
};

constexpr int DIGIT = 11; // bits of a digit: three digits make a key
constexpr int BINS = 1 << DIGIT;

// A histogram of tokens and their weights by a digit of their keys. Weights are added in two halves, as
// shared memory has no 64-bit atomic add.
struct Histogram {
    uint32_t low[BINS], high[BINS], count[BINS];

    __device__ void add(uint32_t bin, u64 weight) {
        uint32_t addend = static_cast<uint32_t>(weight), rest = static_cast<uint32_t>(weight >> 32);
        if (addend != 0) rest += atomicAdd(&low[bin], addend) > ~addend; // carry
        if (rest != 0) atomicAdd(&high[bin], rest);
        atomicAdd(&count[bin], 1u);
    }
    __device__ u64 weight(int bin) const { return static_cast<u64>(high[bin]) << 32 | low[bin]; }
    __device__ void set(int bin, u64 weight, uint32_t tokens) {
        low[bin] = static_cast<uint32_t>(weight), high[bin] = static_cast<uint32_t>(weight >> 32);
        count[bin] = tokens;
    }
};

// Bins whose sums over the cluster each CTA computes.
__device__ int bins_per_cta() { return BINS / gridDim.z; }

// Replaces this CTA's share of its bins by the sums over the cluster.
__device__ void sum_over_cluster(Histogram &bins) {
    auto cluster = cooperative_groups::this_cluster();
    int from = blockIdx.z * bins_per_cta();
    for (int bin = from + threadIdx.x; bin < from + bins_per_cta(); bin += THREADS) {
        u64 weight = 0;
        uint32_t count = 0;
        for (unsigned b = 0; b < cluster.num_blocks(); b++) {
            const Histogram *others = cluster.map_shared_rank(&bins, b);
            weight += others->weight(bin), count += others->count[bin];
        }
        bins.set(bin, weight, count);
    }
}

// The first bin in descending order at which the running sum reaches `target`, or else the last one that is
// not empty. `parent` is the threshold by the digits before this one.
__device__ Threshold select_bin(Histogram &bins, const Threshold &parent, int shift, u64 target,
                                bool counting) {
    constexpr int PER_THREAD = BINS / THREADS;
    __shared__ Threshold selected;
    auto cluster = cooperative_groups::this_cluster();
    int top = BINS - 1 - static_cast<int>(threadIdx.x) * PER_THREAD;
    u64 weights[PER_THREAD], weight = 0;
    uint32_t counts[PER_THREAD], count = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const Histogram *owner = cluster.map_shared_rank(&bins, (top - i) / bins_per_cta());
        weights[i] = owner->weight(top - i), counts[i] = owner->count[top - i];
        weight += weights[i], count += counts[i];
    }
    weight = parent.above + exclusive_sum(weight), count = parent.count + exclusive_sum(count);
    Threshold found = {};
    // The thread with the largest rank wins: the highest bin to reach the target, or else the lowest.
    int rank = -1;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        int bin = top - i;
        if (counts[i] != 0 && rank < BINS) {
            bool reached = (counting ? count + counts[i] : weight + weights[i]) >= target;
            rank = reached ? BINS + bin : BINS - 1 - bin;
            found = {parent.key | static_cast<uint32_t>(bin) << shift, weight, 0, count, counts[i]};
        }
        weight += weights[i], count += counts[i];
    }
    int winner = block_reduce(rank, -1, Max());
    if (rank == winner) selected = found;
    __syncthreads();
    return selected;
}

// The first threshold in descending order at which the running sum of weights (or, if `counting`, the number
// of tokens) reaches `target`, which must not be 0 nor more than the sum of all.
__device__ __noinline__ Threshold find_threshold(Row row, u64 target, bool counting) {
    __shared__ Histogram bins;
    auto cluster = cooperative_groups::this_cluster();
    Threshold threshold = {};
    uint32_t decided = 0; // mask of the key bits that are known
    // Three digits of 11 bits overlap by one bit in a key of 32; the second digit decides it.
    for (int shift = 32 - DIGIT, left = 32; left > 0; left = shift, shift = max(shift - DIGIT, 0)) {
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) bins.set(bin, 0, 0);
        __syncthreads();
        for_each_logit(row.logits, row.vocab, [&](int, float logit) {
            uint32_t key = ordered_key(logit);
            if ((key & decided) == threshold.key) bins.add(key >> shift & (BINS - 1), row.weight(logit));
        });
        cluster.sync();
        sum_over_cluster(bins);
        cluster.sync();
        threshold = select_bin(bins, threshold, shift, target, counting);
        cluster.sync(); // No CTA may clear bins that others still read.
        decided = ~0u << shift;
    }
    threshold.weight = row.weight(float_of_key(threshold.key));
    return threshold;
}

// Writes the id of tie number `index`, from 0, among the tokens with a key, in ascending order of ids. Every
// warp of the row has a contiguous part of the vocabulary.
__device__ void write_tie(const Row &row, uint32_t key, int index, int32_t *out) {
    constexpr int WARPS = THREADS / WARP;
    __shared__ int counts[WARPS];
    auto cluster = cooperative_groups::this_cluster();
    int lane = threadIdx.x % WARP, warp = thread_of_row() / WARP, warps = threads_of_row() / WARP;
    int share = (row.vocab + warps - 1) / warps;
    int from = min(warp * share, row.vocab), to = min(from + share, row.vocab), own = 0;
#pragma unroll UNROLL
    for (int t = from + lane; t < to; t += WARP) own += ordered_key(row.logits[t]) == key;
    own = warp_reduce(own, Sum());
    if (lane == 0) counts[warp % WARPS] = own;
    cluster.sync();
    int before = 0;
    for (int w = lane; w < warp; w += WARP) before += cluster.map_shared_rank(counts, w / WARPS)[w % WARPS];
    before = warp_reduce(before, Sum());
    cluster.sync(); // A CTA must not exit while others read its counts.
    if (index < before || before + own <= index) return;
    for (int t = from + lane; before <= index; t += WARP) {
        bool equal = t < to && ordered_key(row.logits[t]) == key;
        unsigned all = __ballot_sync(ALL_LANES, equal);
        if (equal && before + __popc(all & ((1u << lane) - 1)) == index) *out = t;
        before += __popc(all);
    }
}

// Applies mask, logit bias, penalties and bans, in a copy; returns the row itself where there are none.
__device__ const float *process_logits(const SampleArgs &a, const SampleRow &p, int64_t r) {
    const float *raw = a.logits.row<float>(r);
    if (p.history[1] == 0 && p.banned[1] == 0 && p.bias[1] == 0 && p.mask < 0) return raw;
    float *logits = a.scratch.row<float>(r);
    const int32_t *mask = p.mask >= 0 ? a.masks.row<int32_t>(p.mask) : nullptr;
    auto allowed = [&](int t) { return !mask || (mask[t / 32] >> (t % 32) & 1); };
    auto cluster = cooperative_groups::this_cluster();
    uint32_t thread = thread_of_row(), threads = threads_of_row();
    for_each_logit<false>(raw, a.logits.cols,
                          [&](int t, float logit) { logits[t] = allowed(t) ? logit : -INFINITY; });
    cluster.sync();
    if (p.bias[1] != 0) { // Uniform across the cluster, as the barrier needs.
        for (uint32_t i = thread; i < p.bias[1]; i += threads) {
            const int32_t *entry = a.bias.row<int32_t>(p.bias[0] + i);
            logits[entry[0]] = __fadd_rn(logits[entry[0]], __int_as_float(entry[1]));
        }
        cluster.sync();
    }
    for (uint32_t i = thread; i < p.history[1]; i += threads) {
        const int32_t *entry = a.history.row<int32_t>(p.history[0] + i);
        if (!allowed(entry[0])) continue;
        float times = entry[1], logit = logits[entry[0]];
        logit = logit > 0.0f ? logit / p.repetition_penalty : logit * p.repetition_penalty;
        // No fused multiply-add: which of two tokens is likelier must not depend on the backend.
        if (times > 0.0f)
            logit = __fsub_rn(logit, __fadd_rn(p.presence_penalty, __fmul_rn(times, p.frequency_penalty)));
        logits[entry[0]] = logit;
    }
    cluster.sync();
    for (uint32_t i = thread; i < p.banned[1]; i += threads) logits[a.banned[p.banned[0] + i]] = -INFINITY;
    cluster.sync();
    return logits;
}

// The sum of the weights that top-k, top-p and min-p keep.
__device__ u64 kept_weight(const Row &row, const SampleRow &p) {
    u64 total = 0;
    if (p.top_k > 0 && p.top_k < static_cast<uint32_t>(row.vocab)) {
        Threshold k = find_threshold(row, p.top_k, true);
        total = k.above + (p.top_k - k.count) * k.weight;
    } else {
        for_each_logit(row.logits, row.vocab, [&](int, float logit) { total += row.weight(logit); });
        total = row_reduce(total, Sum());
    }
    if (p.top_p < 1.0f) {
        u64 target = max(u64{1}, static_cast<u64>(static_cast<double>(p.top_p) * total));
        Threshold p_end = find_threshold(row, target, false);
        u64 needed = p_end.weight == 0 ? 0 : (target - p_end.above + p_end.weight - 1) / p_end.weight;
        total = min(total, p_end.above + needed * p_end.weight);
    }
    if (p.min_p > 0.0f) {
        u64 likely = 0;
        for_each_logit(row.logits, row.vocab, [&](int, float logit) {
            if (row.relative_probability(logit) >= p.min_p) likely += row.weight(logit);
        });
        total = min(total, max(u64{1}, row_reduce(likely, Sum())));
    }
    return total;
}

// Grid (row, 1, part of the vocabulary); the CTAs of a row are a cluster, whose size is a power of two.
extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) sample(SampleArgs a) {
    pdl_prologue();
    int64_t r = blockIdx.x;
    const SampleRow p = *reinterpret_cast<const SampleRow *>(a.params.row<int32_t>(r));
    Row row = {process_logits(a, p, r), a.logits.cols, 0.0f, p.temperature};
    // The most likely token, the lowest id among equals: see `ordered_pair`.
    u64 first = 0;
    for_each_logit<false>(row.logits, row.vocab,
                          [&](int t, float logit) { first = max(first, ordered_pair(logit, t)); });
    first = row_reduce(first, Max());
    row.max_logit = float_of_pair(first);
    // If every token is banned or masked, there is no distribution.
    if (p.temperature == 0.0f || p.top_k == 1 || row.max_logit == -INFINITY) {
        if (thread_of_row() == 0) a.out[r] = index_of_pair(first);
        return;
    }
    u64 total = kept_weight(row, p), word = philox(p.seed, p.position, p.stream) >> 8;
    u64 left = (total >> 24) * word + (((total & 0xffffffull) * word) >> 24);
    Threshold sampled = find_threshold(row, left + 1, false);
    u64 needed = sampled.weight == 0 ? 1 : (left + 1 - sampled.above + sampled.weight - 1) / sampled.weight;
    int index = min(static_cast<int>(min(needed, u64{0x7fffffff})), static_cast<int>(sampled.ties)) - 1;
    write_tie(row, sampled.key, max(index, 0), &a.out[r]);
}
