// Log-probabilities of raw logits: of a given token, and of the top ones.
//
// Problem: per row, log_softmax(logits)[target], the target's rank, and the ids and log-probabilities of
//   the top n.
// Grid: one CTA of 1,024 threads per row.
// Pipeline: none; one pass over the row for the maximum and the rank, one for the sum, one per top token.
// Numerics: the sum of exponentials in f64; ties go to the lower id.
// Chosen when: always (ops/logprobs.rs), for requests that ask for log-probabilities.
#include "float_order.cuh"

// Laid out as `LogprobArgs` of ops/logprobs.rs.
struct LogprobArgs {
    Mat logits, top_ids, top; // top: log-probabilities of `top_ids`
    const int32_t *targets;   // By row.
    float *target;            // By row: log-probability of the target.
    int32_t *rank;            // By row: rank of the target, from 1.
};
static_assert(sizeof(LogprobArgs) == 120 && offsetof(LogprobArgs, top) == 64 &&
              offsetof(LogprobArgs, targets) == 96 && offsetof(LogprobArgs, rank) == 112);

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
    for (int t = threadIdx.x; t < vocab; t += blockDim.x) total += exp(static_cast<double>(logits[t] - best));
    total = block_reduce(total, 0.0, Sum());
    float normaliser = best + static_cast<float>(log(total));
    if (threadIdx.x == 0) {
        a.target[r] = target - normaliser;
        a.rank[r] = likelier + 1;
    }
    // The top tokens one by one: each is the largest pair below the one before.
    u64 previous = ~0ull;
    for (int i = 0; i < a.top_ids.cols; i++) {
        u64 next = 0;
        for (int t = threadIdx.x; t < vocab; t += blockDim.x) {
            u64 pair = ordered_pair(logits[t], t);
            if (pair < previous) next = max(next, pair);
        }
        previous = block_reduce(next, u64{0}, Max());
        if (threadIdx.x == 0) {
            int token = index_of_pair(previous);
            a.top_ids.row<int32_t>(r)[i] = token;
            a.top.row<float>(r)[i] = logits[token] - normaliser;
        }
    }
}
