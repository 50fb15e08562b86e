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

#include "common.cuh"

constexpr int THREADS = 512;
constexpr int TURN = 4; // loads that a thread has under way at a time

// The layout of `lora_core::ops::SampleRow`.
struct SampleRow {
    float temperature, top_p, min_p;
    uint32_t top_k, seed[2], position, stream;
    float repetition_penalty, presence_penalty, frequency_penalty;
    uint32_t history[2], banned[2], bias[2];
    int32_t mask;
};

// Laid out as `SampleArgs` of `ops/sample.rs`.
struct SampleArgs {
    Mat logits, params, history, bias, masks, scratch; // scratch: [rows, vocab] f32
    const int32_t *banned;
    int32_t *out;
};

// A number that is ordered as the float is; zeros of both signs are equal.
__device__ uint32_t key_of(float v) {
    uint32_t bits = __float_as_uint(v + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float of_key(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Philox4x32-10 (Salmon et al., 2011): the first word.
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

// The number of this thread among those of its row, and how many there are.
__device__ int thread_of_row() { return blockIdx.z * THREADS + threadIdx.x; }
__device__ int threads_of_row() { return gridDim.z * THREADS; }

// Calls `f` with the tokens and logits of this thread's share of a row, in no particular order. Unless
// `ONCE`, some may come again, which saves branches that the compiler would move the loads behind.
template <bool ONCE = true, class F> __device__ void each(const float *row, int vocab, F &&f) {
    int thread = thread_of_row(), threads = threads_of_row();
    // Logits before the first multiple of 16 bytes, and groups of four from there on.
    int before = static_cast<int>(-reinterpret_cast<uintptr_t>(row) % sizeof(float4) / sizeof(float));
    int head = min(vocab, before), fours = (vocab - head) / 4;
    const float4 *body = reinterpret_cast<const float4 *>(row + head);
    for (int first = thread; first < fours; first += TURN * threads) {
        float4 four[TURN];
#pragma unroll
        for (int u = 0; u < TURN; u++) four[u] = body[min(first + u * threads, fours - 1)];
        asm volatile("" ::: "memory"); // All loads come before what is done with them.
#pragma unroll
        for (int u = 0; u < TURN; u++) {
            if (ONCE && first + u * threads >= fours) break;
            int t = head + 4 * min(first + u * threads, fours - 1);
            f(t, four[u].x), f(t + 1, four[u].y), f(t + 2, four[u].z), f(t + 3, four[u].w);
        }
    }
    if (thread < vocab - 4 * fours) {
        int t = thread < head ? thread : thread + 4 * fours;
        f(t, row[t]);
    }
}

// The combination of the values of all threads of a row, in each of them.
template <class Op> __device__ u64 row_reduce(u64 v, Op op) {
    __shared__ u64 part;
    auto cluster = cooperative_groups::this_cluster();
    v = block_reduce(v, u64{0}, op);
    if (threadIdx.x == 0) part = v;
    cluster.sync();
    u64 all = 0;
    for (unsigned b = 0; b < cluster.num_blocks(); b++) all = op(all, *cluster.map_shared_rank(&part, b));
    cluster.sync(); // Nobody leaves, or writes another value, while others read this one.
    return all;
}

// The sum of the values of the block's threads before this one.
template <class T> __device__ T sum_before(T mine) {
    __shared__ T totals[THREADS / WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    T sum = mine;
    for (int step = 1; step < WARP; step *= 2) {
        T other = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads(); // Earlier totals may still be read.
    if (lane == WARP - 1) totals[warp] = sum;
    __syncthreads();
    sum -= mine;
    for (int w = 0; w < warp; w++) sum += totals[w];
    return sum;
}

// One row, seen by all threads of its blocks.
struct Row {
    const float *logits;
    int vocab;
    float best, temperature;

    __device__ u64 weight(float logit) const {
        return static_cast<u64>(expf((logit - best) / temperature) * 1099511627776.0f);
    }
    __device__ float plain_weight(float logit) const { return expf((logit - best) / temperature); }
};

// Where a threshold lies in descending order: above it `above` in sum, `count` tokens.
struct Place {
    uint32_t key;
    u64 above, weight; // of the tokens above; of one token with this key
    uint32_t count, ties;
};

constexpr int DIGIT = 11;
constexpr int BINS = 1 << DIGIT;

// Sums of tokens by a digit of their keys. The halves of a weight are added one by one, as there is no
// instruction that adds 64 bits in shared memory.
struct Bins {
    uint32_t low[BINS], high[BINS], count[BINS];

    __device__ void add(uint32_t bin, u64 weight) {
        uint32_t addend = static_cast<uint32_t>(weight), rest = static_cast<uint32_t>(weight >> 32);
        if (addend != 0) rest += atomicAdd(&low[bin], addend) > ~addend; // the carry
        if (rest != 0) atomicAdd(&high[bin], rest);
        atomicAdd(&count[bin], 1u);
    }
    __device__ u64 weight(int bin) const { return static_cast<u64>(high[bin]) << 32 | low[bin]; }
    __device__ void set(int bin, u64 weight, uint32_t tokens) {
        low[bin] = static_cast<uint32_t>(weight), high[bin] = static_cast<uint32_t>(weight >> 32);
        count[bin] = tokens;
    }
};

// Bins that a block sums up for all blocks of its row.
__device__ int bins_of_block() { return BINS / gridDim.z; }

__device__ void sum_up(Bins &bins) {
    auto cluster = cooperative_groups::this_cluster();
    int from = blockIdx.z * bins_of_block();
    for (int bin = from + threadIdx.x; bin < from + bins_of_block(); bin += THREADS) {
        u64 weight = 0;
        uint32_t count = 0;
        for (unsigned b = 0; b < cluster.num_blocks(); b++) {
            const Bins *others = cluster.map_shared_rank(&bins, b);
            weight += others->weight(bin), count += others->count[bin];
        }
        bins.set(bin, weight, count);
    }
}

// The first bin in descending order that reaches `target`, or else the last that is not empty, below
// `parent`, which is where the digits before this one led.
__device__ Place choose(Bins &bins, const Place &parent, int shift, u64 target, bool counting) {
    constexpr int MINE = BINS / THREADS;
    __shared__ Place chosen;
    auto cluster = cooperative_groups::this_cluster();
    int top = BINS - 1 - static_cast<int>(threadIdx.x) * MINE;
    u64 weights[MINE], weight = 0;
    uint32_t counts[MINE], count = 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const Bins *owner = cluster.map_shared_rank(&bins, (top - i) / bins_of_block());
        weights[i] = owner->weight(top - i), counts[i] = owner->count[top - i];
        weight += weights[i], count += counts[i];
    }
    weight = parent.above + sum_before(weight), count = parent.count + sum_before(count);
    Place place = {};
    int rank = -1; // The highest of the bins that reach the target wins, then the lowest of the others.
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        int bin = top - i;
        if (counts[i] != 0 && rank < BINS) {
            bool reached = (counting ? count + counts[i] : weight + weights[i]) >= target;
            rank = reached ? BINS + bin : BINS - 1 - bin;
            place = {parent.key | static_cast<uint32_t>(bin) << shift, weight, 0, count, counts[i]};
        }
        weight += weights[i], count += counts[i];
    }
    int winner = block_reduce(rank, -1, Max());
    if (rank == winner) chosen = place;
    __syncthreads();
    return chosen;
}

// The first place in descending order at which the running sum of weights (or, if `counting`, of
// tokens) reaches `target`, which must not be 0 nor more than the sum of all.
__device__ __noinline__ Place search(Row row, u64 target, bool counting) {
    __shared__ Bins bins;
    auto cluster = cooperative_groups::this_cluster();
    Place place = {};
    uint32_t decided = 0; // bits of the key
    // The last two digits have a bit in common, which the former of them decides.
    for (int shift = 32 - DIGIT, left = 32; left > 0; left = shift, shift = max(shift - DIGIT, 0)) {
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) bins.set(bin, 0, 0);
        __syncthreads();
        each(row.logits, row.vocab, [&](int, float logit) {
            uint32_t key = key_of(logit);
            if ((key & decided) == place.key) bins.add(key >> shift & (BINS - 1), row.weight(logit));
        });
        cluster.sync();
        sum_up(bins);
        cluster.sync();
        place = choose(bins, place, shift, target, counting);
        cluster.sync(); // Nobody clears bins that others still read.
        decided = ~0u << shift;
    }
    place.weight = row.weight(of_key(place.key));
    return place;
}

// Writes the id of tie number `index` (from 0) among the tokens of a key, in ascending order of ids.
// Every warp of the row has neighbouring tokens.
__device__ void write_tie(const Row &row, uint32_t key, int index, int32_t *out) {
    constexpr int WARPS = THREADS / WARP;
    __shared__ int counts[WARPS];
    auto cluster = cooperative_groups::this_cluster();
    int lane = threadIdx.x % WARP, warp = thread_of_row() / WARP, warps = threads_of_row() / WARP;
    int share = (row.vocab + warps - 1) / warps;
    int from = min(warp * share, row.vocab), to = min(from + share, row.vocab), mine = 0;
#pragma unroll TURN
    for (int t = from + lane; t < to; t += WARP) mine += key_of(row.logits[t]) == key;
    mine = warp_reduce(mine, Sum());
    if (lane == 0) counts[warp % WARPS] = mine;
    cluster.sync();
    int before = 0;
    for (int w = lane; w < warp; w += WARP) before += cluster.map_shared_rank(counts, w / WARPS)[w % WARPS];
    before = warp_reduce(before, Sum());
    cluster.sync(); // Nobody leaves while others read its counts.
    if (index < before || before + mine <= index) return;
    for (int t = from + lane; before <= index; t += WARP) {
        bool equal = t < to && key_of(row.logits[t]) == key;
        unsigned all = __ballot_sync(ALL_LANES, equal);
        if (equal && before + __popc(all & ((1u << lane) - 1)) == index) *out = t;
        before += __popc(all);
    }
}

// The row with bias, penalties, bans and mask, in a copy where there are any.
__device__ const float *prepare(const SampleArgs &a, const SampleRow &p, int64_t r) {
    const float *raw = a.logits.row<float>(r);
    if (p.history[1] == 0 && p.banned[1] == 0 && p.bias[1] == 0 && p.mask < 0) return raw;
    float *logits = a.scratch.row<float>(r);
    const int32_t *mask = p.mask >= 0 ? a.masks.row<int32_t>(p.mask) : nullptr;
    auto allowed = [&](int t) { return !mask || (mask[t / 32] >> (t % 32) & 1); };
    auto cluster = cooperative_groups::this_cluster();
    uint32_t thread = thread_of_row(), threads = threads_of_row();
    each<false>(raw, a.logits.cols, [&](int t, float logit) { logits[t] = allowed(t) ? logit : -INFINITY; });
    cluster.sync();
    if (p.bias[1] != 0) { // The same in all threads of the cluster, as the barrier needs.
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
        // Two roundings, as everywhere: which of two tokens is likelier must not depend on the device.
        if (times > 0.0f)
            logit = __fsub_rn(logit, __fadd_rn(p.presence_penalty, __fmul_rn(times, p.frequency_penalty)));
        logits[entry[0]] = logit;
    }
    cluster.sync();
    for (uint32_t i = thread; i < p.banned[1]; i += threads) logits[a.banned[p.banned[0] + i]] = -INFINITY;
    cluster.sync();
    return logits;
}

// The sum of the weights that survive top-k, top-p and min-p.
__device__ u64 kept_weight(const Row &row, const SampleRow &p) {
    u64 total = 0;
    if (p.top_k > 0 && p.top_k < static_cast<uint32_t>(row.vocab)) {
        Place k = search(row, p.top_k, true);
        total = k.above + (p.top_k - k.count) * k.weight;
    } else {
        each(row.logits, row.vocab, [&](int, float logit) { total += row.weight(logit); });
        total = row_reduce(total, Sum());
    }
    if (p.top_p < 1.0f) {
        u64 target = max(u64{1}, static_cast<u64>(static_cast<double>(p.top_p) * total));
        Place place = search(row, target, false);
        u64 needed = place.weight == 0 ? 0 : (target - place.above + place.weight - 1) / place.weight;
        total = min(total, place.above + needed * place.weight);
    }
    if (p.min_p > 0.0f) {
        u64 likely = 0;
        each(row.logits, row.vocab, [&](int, float logit) {
            if (row.plain_weight(logit) >= p.min_p) likely += row.weight(logit);
        });
        total = min(total, max(u64{1}, row_reduce(likely, Sum())));
    }
    return total;
}

// Blocks (row, part of its vocabulary), those of a row in a cluster; their number is a power of two.
extern "C" __global__ void __launch_bounds__(THREADS, 2) sample(SampleArgs a) {
    pdl_prologue();
    int64_t r = blockIdx.x;
    const SampleRow p = *reinterpret_cast<const SampleRow *>(a.params.row<int32_t>(r));
    Row row = {prepare(a, p, r), a.logits.cols, 0.0f, p.temperature};
    // The likeliest token, the lowest id among equals: the key above, the id inverted below.
    u64 first = 0;
    each<false>(row.logits, row.vocab, [&](int t, float logit) {
        first = max(first, static_cast<u64>(key_of(logit)) << 32 | (0xffffffffu - t));
    });
    first = row_reduce(first, Max());
    row.best = of_key(static_cast<uint32_t>(first >> 32));
    // Where everything is banned or masked out, there is no distribution.
    if (p.temperature == 0.0f || p.top_k == 1 || row.best == -INFINITY) {
        if (thread_of_row() == 0) a.out[r] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(first));
        return;
    }
    u64 total = kept_weight(row, p), word = philox(p.seed, p.position, p.stream) >> 8;
    u64 left = (total >> 24) * word + (((total & 0xffffffull) * word) >> 24);
    Place place = search(row, left + 1, false);
    u64 needed = place.weight == 0 ? 1 : (left + 1 - place.above + place.weight - 1) / place.weight;
    int index = min(static_cast<int>(min(needed, u64{0x7fffffff})), static_cast<int>(place.ties)) - 1;
    write_tie(row, place.key, max(index, 0), &a.out[r]);
}
