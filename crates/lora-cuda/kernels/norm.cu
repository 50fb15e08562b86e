// RMS norms (Zhang & Sennrich, 2019), with weights that an adapter may bring along.
//
// Problem: out = x / sqrt(mean(x^2) + eps) * w per row; `add_rms_norm`: residual += x first, and the norm
//   of that.
// Grid: one CTA per row.
// Pipeline: none; `rms_norm_vec8` reads its weights, which no kernel writes, before it waits for its
//   inputs, and keeps the row in registers between sum and output.
// Numerics: f32 sums in a fixed order; the residual is rounded to its dtype before its norm is taken.
// Chosen when: `choose` in ops/norm.rs: vec8 for 16-bit rows of one dtype, 16-byte aligned, of up to 8,192
//   elements; the other two for the rest.
#include "common.cuh"
#include "lora.cuh"

// out = x / rms(x) * w for one row, by all threads of the CTA.
template <class X, class O>
__device__ void normalise(const X *x, const float *w, float eps, O *out, int cols) {
    float square = 0.0f;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        float v = to_float(x[c]);
        square += v * v;
    }
    square = block_reduce(square, 0.0f, Sum());
    float root = sqrtf(square / cols + eps);
    for (int c = threadIdx.x; c < cols; c += blockDim.x) out[c] = from_float<O>(to_float(x[c]) / root * w[c]);
}

// Laid out as `NormArgs` of ops/norm.rs.
struct NormArgs {
    Mat x, residual, out; // No residual: its data is null.
    NormWeight w;
    float eps;
};
static_assert(sizeof(NormArgs) == 128 && offsetof(NormArgs, out) == 64 && offsetof(NormArgs, w) == 96 &&
              offsetof(NormArgs, eps) == 120);

extern "C" __global__ void rms_norm(NormArgs a) {
    pdl_prologue();
    int64_t r = blockIdx.x;
    const Mat &x = a.x, &out = a.out;
    with_float(x.dtype, [&](auto t) {
        using X = decltype(t);
        with_float(out.dtype, [&](auto o) {
            using O = decltype(o);
            normalise(x.row<X>(r), a.w.of(r), a.eps, out.row<O>(r), x.cols);
        });
    });
}

// residual += x; out = norm(residual), of the rounded residual.
extern "C" __global__ void add_rms_norm(NormArgs a) {
    pdl_prologue();
    int64_t r = blockIdx.x;
    const Mat &x = a.x, &residual = a.residual, &out = a.out;
    with_float(residual.dtype, [&](auto t) {
        using R = decltype(t);
        R *sum = residual.row<R>(r);
        with_float(x.dtype, [&](auto u) {
            using X = decltype(u);
            const X *summand = x.row<X>(r);
            for (int c = threadIdx.x; c < x.cols; c += blockDim.x)
                sum[c] = from_float<R>(to_float(sum[c]) + to_float(summand[c]));
        });
        // No barrier: each thread reads back only what it wrote itself.
        with_float(out.dtype, [&](auto o) {
            using O = decltype(o);
            normalise(sum, a.w.of(r), a.eps, out.row<O>(r), x.cols);
        });
    });
}

// As the other two, for 16-bit rows of up to eight elements per thread, which are read once.
extern "C" __global__ void rms_norm_vec8(NormArgs a) {
    pdl_launch_dependents();
    with_16bit(a.out.dtype, [&](auto t) {
        using T = decltype(t);
        int64_t r = blockIdx.x;
        int c = threadIdx.x * VEC8;
        bool inside = c < a.x.cols;
        Vec8<T> row;
        Vec8<float> w; // No kernel writes the weights, so they are read before `pdl_wait`.
        if (inside) w = Vec8<float>::load(a.w.of(r) + c);
        pdl_wait();
        float square = 0.0f;
        if (inside) {
            row = Vec8<T>::load(a.x.row<T>(r) + c);
            if (a.residual.data) {
                Vec8<T> sum = Vec8<T>::load(a.residual.row<T>(r) + c);
                for (int i = 0; i < VEC8; i++)
                    row.v[i] = from_float<T>(to_float(sum.v[i]) + to_float(row.v[i]));
                row.store(a.residual.row<T>(r) + c);
            }
            for (int i = 0; i < VEC8; i++) square += to_float(row.v[i]) * to_float(row.v[i]);
        }
        square = block_reduce(square, 0.0f, Sum());
        float root = sqrtf(square / a.x.cols + a.eps);
        if (!inside) return;
        for (int i = 0; i < VEC8; i++) row.v[i] = from_float<T>(to_float(row.v[i]) / root * w.v[i]);
        row.store(a.out.row<T>(r) + c);
    });
}
