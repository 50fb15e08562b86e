// Prefill for head_dim 64; a file of its own, as it takes a minute to compile.
#include "prefill.cuh"

cudaError_t prefill_64(const PrefillArgs &args, cudaStream_t stream) { return prefill<64>(args, stream); }
