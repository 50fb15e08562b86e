// Prefill for head_dim 128; a file of its own, as it takes a minute to compile.
#include "prefill.cuh"

cudaError_t prefill_128(const PrefillArgs &args, cudaStream_t stream) { return prefill<128>(args, stream); }
