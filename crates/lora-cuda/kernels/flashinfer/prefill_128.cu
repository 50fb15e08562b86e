// Heads of 128.
#include "prefill.cuh"

cudaError_t prefill_128(const PrefillArgs &args, cudaStream_t stream) { return prefill<128>(args, stream); }
