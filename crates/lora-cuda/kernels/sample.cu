// Drawing tokens without a sort: thresholds are found digit by digit in histograms. Weights are
// integers (2^40 is the likeliest token's), so that sums do not depend on their order.
#include "common.cuh"

using u64 = unsigned long long;

// The layout of `lora_core::ops::SampleRow`.
struct SampleRow {
    float temperature, top_p, min_p;
    uint32_t top_k, seed[2], position, stream;
    float repetition_penalty, presence_penalty, frequency_penalty;
    uint32_t history[2], banned[2];
    int32_t mask;
};

// Laid out as `SampleArgs` of `ops/sample.rs`.
struct SampleArgs {
    Mat logits, params, history, masks, scratch; // scratch: [rows, vocab] f32
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

// Where a threshold lies in descending order: above it `above` in sum, `count` tokens.
struct Place {
    uint32_t key;
    u64 above, weight; // of the tokens above; of one token with this key
    int32_t count, ties;
};

// One row, seen by all threads of its block.
struct Row {
    const float *logits;
    int vocab;
    float best, temperature;

    __device__ u64 weight(float logit) const {
        return static_cast<u64>(expf((logit - best) / temperature) * 1099511627776.0f);
    }
    __device__ float plain_weight(float logit) const { return expf((logit - best) / temperature); }
};

// The first place in descending order at which the running sum of weights (or, if `counting`, of
// tokens) reaches `target`, which must not be 0 nor more than the sum of all.
__device__ Place search(const Row &row, u64 target, bool counting) {
    __shared__ u64 weights[256];
    __shared__ uint32_t counts[256], chosen;
    __shared__ u64 above_weight;
    __shared__ uint32_t above_count;
    uint32_t prefix = 0;
    u64 weight_above = 0;
    uint32_t count_above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int i = threadIdx.x; i < 256; i += blockDim.x) weights[i] = 0, counts[i] = 0;
        __syncthreads();
        for (int t = threadIdx.x; t < row.vocab; t += blockDim.x) {
            uint32_t key = key_of(row.logits[t]);
            if (shift < 24 && (key >> (shift + 8)) != prefix) continue;
            atomicAdd(&weights[(key >> shift) & 255], row.weight(row.logits[t]));
            atomicAdd(&counts[(key >> shift) & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u64 weight = weight_above;
            uint32_t count = count_above;
            int digit = 255, last = 0;
            for (; digit >= 0; digit--) {
                if (counts[digit] == 0) continue;
                last = digit;
                u64 reached = counting ? count + counts[digit] : weight + weights[digit];
                if (reached >= target) break;
                weight += weights[digit], count += counts[digit];
            }
            if (digit < 0) { // Not reached: the last one there is.
                weight -= weights[last], count -= counts[last];
            }
            chosen = last, above_weight = weight, above_count = count;
        }
        __syncthreads();
        prefix = prefix << 8 | chosen, weight_above = above_weight, count_above = above_count;
    }
    int ties = static_cast<int>(counts[prefix & 255]);
    return {prefix, weight_above, row.weight(of_key(prefix)), static_cast<int32_t>(count_above), ties};
}

// The id of tie number `index` (from 0) among the tokens of a key, in ascending order of ids.
__device__ int tie(const Row &row, uint32_t key, int index) {
    __shared__ int found, totals[WARP];
    int per_thread = (row.vocab + blockDim.x - 1) / blockDim.x;
    int from = min(threadIdx.x * per_thread, static_cast<unsigned>(row.vocab));
    int to = min(from + per_thread, row.vocab), mine = 0;
    for (int t = from; t < to; t++) mine += key_of(row.logits[t]) == key;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, before = mine;
    for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_up_sync(ALL_LANES, before, step);
        if (lane >= step) before += other;
    }
    __syncthreads();
    if (lane == WARP - 1) totals[warp] = before;
    __syncthreads();
    before -= mine;
    for (int w = 0; w < warp; w++) before += totals[w];
    if (before <= index && index < before + mine) {
        int left = index - before;
        for (int t = from; t < to; t++)
            if (key_of(row.logits[t]) == key && left-- == 0) found = t;
    }
    __syncthreads();
    return found;
}

// Copies the row and applies penalties, bans and mask to the copy.
__device__ void prepare(const SampleArgs &a, const SampleRow &p, int64_t r, float *logits) {
    int vocab = a.logits.cols;
    const float *raw = a.logits.row<float>(r);
    const int32_t *mask = p.mask >= 0 ? a.masks.row<int32_t>(p.mask) : nullptr;
    for (int t = threadIdx.x; t < vocab; t += blockDim.x) logits[t] = raw[t];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p.history[1]; i += blockDim.x) {
        const int32_t *entry = a.history.row<int32_t>(p.history[0] + i);
        float times = entry[1], logit = logits[entry[0]];
        logit = logit > 0.0f ? logit / p.repetition_penalty : logit * p.repetition_penalty;
        // Two roundings, as everywhere: which of two tokens is likelier must not depend on the device.
        if (times > 0.0f)
            logit = __fsub_rn(logit, __fadd_rn(p.presence_penalty, __fmul_rn(times, p.frequency_penalty)));
        logits[entry[0]] = logit;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p.banned[1]; i += blockDim.x)
        logits[a.banned[p.banned[0] + i]] = -INFINITY;
    if (mask)
        for (int t = threadIdx.x; t < vocab; t += blockDim.x)
            if (!(mask[t / 32] >> (t % 32) & 1)) logits[t] = -INFINITY;
    __syncthreads();
}

// The sum of the weights that survive top-k, top-p and min-p.
__device__ u64 kept_weight(const Row &row, const SampleRow &p) {
    u64 total = 0;
    if (p.top_k > 0 && p.top_k < static_cast<uint32_t>(row.vocab)) {
        Place k = search(row, p.top_k, true);
        total = k.above + (p.top_k - k.count) * k.weight;
    } else {
        for (int t = threadIdx.x; t < row.vocab; t += blockDim.x) total += row.weight(row.logits[t]);
        total = block_reduce(total, u64{0}, Sum());
    }
    if (p.top_p < 1.0f) {
        u64 target = max(u64{1}, static_cast<u64>(static_cast<double>(p.top_p) * total));
        Place place = search(row, target, false);
        u64 needed = place.weight == 0 ? 0 : (target - place.above + place.weight - 1) / place.weight;
        total = min(total, place.above + needed * place.weight);
    }
    if (p.min_p > 0.0f) {
        u64 likely = 0;
        for (int t = threadIdx.x; t < row.vocab; t += blockDim.x)
            if (row.plain_weight(row.logits[t]) >= p.min_p) likely += row.weight(row.logits[t]);
        total = min(total, max(u64{1}, block_reduce(likely, u64{0}, Sum())));
    }
    return total;
}

// One block a row.
extern "C" __global__ void sample(SampleArgs a) {
    enter();
    int64_t r = blockIdx.x;
    const SampleRow p = *reinterpret_cast<const SampleRow *>(a.params.row<int32_t>(r));
    float *logits = a.scratch.row<float>(r);
    prepare(a, p, r, logits);
    // The likeliest token, the lowest id among equals: the key above, the id inverted below.
    u64 first = 0;
    for (int t = threadIdx.x; t < a.logits.cols; t += blockDim.x)
        first = max(first, static_cast<u64>(key_of(logits[t])) << 32 | (0xffffffffu - t));
    first = block_reduce(first, u64{0}, Max());
    int likeliest = static_cast<int>(0xffffffffu - static_cast<uint32_t>(first));
    float best = logits[likeliest];
    // Where everything is banned or masked out, there is no distribution.
    if (p.temperature == 0.0f || p.top_k == 1 || best == -INFINITY) {
        if (threadIdx.x == 0) a.out[r] = likeliest;
        return;
    }
    Row row = {logits, a.logits.cols, best, p.temperature};
    u64 total = kept_weight(row, p), word = philox(p.seed, p.position, p.stream) >> 8;
    u64 left = (total >> 24) * word + (((total & 0xffffffull) * word) >> 24);
    Place place = search(row, left + 1, false);
    u64 needed = place.weight == 0 ? 1 : (left + 1 - place.above + place.weight - 1) / place.weight;
    int index = min(static_cast<int>(min(needed, u64{0x7fffffff})), place.ties) - 1;
    int token = tie(row, place.key, max(index, 0));
    if (threadIdx.x == 0) a.out[r] = token;
}
