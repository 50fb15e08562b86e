// Heads of 64.
#include "prefill.cuh"

cudaError_t prefill_64(const PrefillArgs &args, cudaStream_t stream) { return prefill<64>(args, stream); }
