// Row gathers, and SwiGLU's activation.
//
// Problem: `gather_rows`: out[i] = table[ids[i]]. `silu_mul`: out = silu(gate) * up of the two halves of a
//   row.
// Grid: (row) or (row, part of its columns); `_vec8`: eight columns per thread.
// Pipeline: none.
// Numerics: f32 between load and store, silu by expf; `gather_rows_vec8` moves bits.
// Chosen when: ops/rows.rs: vec8 for one 16-bit dtype and 16-byte aligned rows of a multiple of eight
//   columns; the others for the rest. `silu_mul` where linear_tiles.cu does not fuse it.
#include "common.cuh"

// Laid out as `GatherArgs` of ops/rows.rs.
struct GatherArgs {
    Mat table, out;
    const int32_t *ids;
};
static_assert(sizeof(GatherArgs) == 72 && offsetof(GatherArgs, out) == 32 && offsetof(GatherArgs, ids) == 64);

// out[i] = table[ids[i]]. Grid (row).
extern "C" __global__ void gather_rows(GatherArgs a) {
    pdl_prologue();
    int64_t i = blockIdx.x;
    const Mat &table = a.table, &out = a.out;
    with_float(table.dtype, [&](auto t) {
        using T = decltype(t);
        const T *source = table.row<T>(a.ids[i]);
        with_float(out.dtype, [&](auto o) {
            using O = decltype(o);
            O *target = out.row<O>(i);
            for (int c = threadIdx.x; c < out.cols; c += blockDim.x)
                target[c] = from_float<O>(to_float(source[c]));
        });
    });
}

// As `gather_rows`, eight columns per thread, where table and output have one 16-bit dtype. Grid (row, part
// of its columns).
extern "C" __global__ void gather_rows_vec8(GatherArgs a) {
    pdl_prologue();
    int64_t i = blockIdx.x;
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * VEC8;
    if (c >= a.out.cols) return;
    Vec8<uint16_t>::load(a.table.row<uint16_t>(a.ids[i]) + c).store(a.out.row<uint16_t>(i) + c);
}

// Laid out as `GateArgs` of ops/rows.rs.
struct GateArgs {
    Mat gate_up, out;
};
static_assert(sizeof(GateArgs) == 64 && offsetof(GateArgs, out) == 32);

// out = silu(gate) * up, the gate in the left half of `gate_up`. Grid (row, part of its columns).
extern "C" __global__ void silu_mul(GateArgs a) {
    pdl_prologue();
    int64_t r = blockIdx.x;
    const Mat &gate_up = a.gate_up, &out = a.out;
    int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= out.cols) return;
    with_float(gate_up.dtype, [&](auto g) {
        using G = decltype(g);
        const G *row = gate_up.row<G>(r);
        float value = swiglu(to_float(row[c]), to_float(row[out.cols + c]));
        with_float(out.dtype, [&](auto o) {
            using O = decltype(o);
            out.row<O>(r)[c] = from_float<O>(value);
        });
    });
}

// As `silu_mul`, eight columns per thread, for 16-bit numbers.
extern "C" __global__ void silu_mul_vec8(GateArgs a) {
    pdl_prologue();
    int64_t r = blockIdx.x;
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * VEC8;
    if (c >= a.out.cols) return;
    with_16bit(a.out.dtype, [&](auto t) {
        using T = decltype(t);
        const T *row = a.gate_up.row<T>(r) + c;
        Vec8<T> gate = Vec8<T>::load(row), up = Vec8<T>::load(row + a.out.cols), out;
        for (int i = 0; i < VEC8; i++)
            out.v[i] = from_float<T>(swiglu(to_float(gate.v[i]), to_float(up.v[i])));
        out.store(a.out.row<T>(r) + c);
    });
}
