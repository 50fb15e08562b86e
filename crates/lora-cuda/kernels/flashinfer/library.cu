// The exported functions of the library.
#include "library.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Launches the prefill kernel; returns a `cudaError_t`.
EXPORTED int32_t loramux_prefill(const PrefillArgs *args, void *stream) {
    auto on = static_cast<cudaStream_t>(stream);
    switch (args->head_dim) {
    case 64: return prefill_64(*args, on);
    case 128: return prefill_128(*args, on);
    default: return cudaErrorInvalidValue;
    }
}

// The text of a `cudaError_t`.
EXPORTED const char *loramux_error(int32_t error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
