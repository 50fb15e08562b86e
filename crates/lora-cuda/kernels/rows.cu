// Looking rows up, and the gate of an MLP.
#include "common.cuh"

// out[i] = table[ids[i]]. One block a row.
extern "C" __global__ void gather_rows(Mat table, const int32_t *ids, Mat out) {
    int64_t i = blockIdx.x;
    with_float(table.dtype, [&](auto t) {
        using T = decltype(t);
        const T *source = table.row<T>(ids[i]);
        with_float(out.dtype, [&](auto o) {
            using O = decltype(o);
            O *target = out.row<O>(i);
            for (int c = threadIdx.x; c < out.cols; c += blockDim.x)
                target[c] = from_float<O>(to_float(source[c]));
        });
    });
}

// out = silu(gate) * up, gate in the left half of `gate_up`. Blocks of a row, in x.
extern "C" __global__ void silu_mul(Mat gate_up, Mat out) {
    int64_t r = blockIdx.y;
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= out.cols) return;
    with_float(gate_up.dtype, [&](auto g) {
        using G = decltype(g);
        const G *row = gate_up.row<G>(r);
        float gate = to_float(row[c]), up = to_float(row[out.cols + c]);
        float value = gate / (1.0f + expf(-gate)) * up;
        with_float(out.dtype, [&](auto o) {
            using O = decltype(o);
            out.row<O>(r)[c] = from_float<O>(value);
        });
    });
}
