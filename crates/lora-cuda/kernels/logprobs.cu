// Log-probabilities of raw logits: of a given token, and of the top ones.
//
// Problem: per row, log_softmax(logits)[target], the target's rank, and the ids and log-probabilities of
//   the top n.
// Grid: one CTA of 1,024 threads per row.
// Pipeline: none; one pass over the row for the maximum and the rank, one for the sum, one per top token.
// Numerics: the sum of exponentials in f64; ties go to the lower id.
// Chosen when: always (ops/logprobs.rs), for requests that ask for log-probabilities.
#include "common.cuh"

// Laid out as `LogprobArgs` of ops/logprobs.rs.
struct LogprobArgs {
    Mat logits, top_ids, top; // top: log-probabilities of `top_ids`
    const int32_t *targets;   // By row.
    float *target;            // By row: log-probability of the target.
    int32_t *rank;            // By row: rank of the target, from 1.
};

// A key that orders tokens by logit, equal ones by descending id.
__device__ u64 token_key(float logit, int token) {
    uint32_t bits = __float_as_uint(logit + 0.0f);
    uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<u64>(key) << 32 | (0xffffffffu - token);
}

// Grid (row).
extern "C" __global__ void logprobs(LogprobArgs a) {
    pdl_prologue();
    int64_t r = blockIdx.x;
    int vocab = a.logits.cols;
    const float *logits = a.logits.row<float>(r);
    float best = -INFINITY, target = logits[a.targets[r]];
    int likelier = 0;
    for (int t = threadIdx.x; t < vocab; t += blockDim.x) {
        best = fmaxf(best, logits[t]);
        likelier += logits[t] > target;
    }
    best = block_reduce(best, -INFINITY, Max());
    likelier = block_reduce(likelier, 0, Sum());
    double total = 0.0;
    for (int t = threadIdx.x; t < vocab; t += blockDim.x)
        total += exp(static_cast<double>(logits[t] - best));
    total = block_reduce(total, 0.0, Sum());
    float normaliser = best + static_cast<float>(log(total));
    if (threadIdx.x == 0) {
        a.target[r] = target - normaliser;
        a.rank[r] = likelier + 1;
    }
    // The top tokens one by one: each is the largest key below the one before.
    u64 previous = ~0ull;
    for (int i = 0; i < a.top_ids.cols; i++) {
        u64 next = 0;
        for (int t = threadIdx.x; t < vocab; t += blockDim.x) {
            u64 key = token_key(logits[t], t);
            if (key < previous) next = max(next, key);
        }
        previous = block_reduce(next, u64{0}, Max());
        if (threadIdx.x == 0) {
            int token = static_cast<int>(0xffffffffu - static_cast<uint32_t>(previous));
            a.top_ids.row<int32_t>(r)[i] = token;
            a.top.row<float>(r)[i] = logits[token] - normaliser;
        }
    }
}
