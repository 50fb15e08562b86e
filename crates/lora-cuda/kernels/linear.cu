// Linear layers of any dtype and alignment, rounding of activations to e4m3, and norms of DoRA rows.
//
// Problem: `linear`: out[M, N] = x[M, K] w[N, K]^T * scales + bias. `quantise_rows`: codes = e4m3(x /
//   scale), a static scale or one per row. `row_norms`: |w[n] + scale * (B A)[n]| per output.
// Grid: `linear`: a warp per output and eight rows. `quantise_rows`: a CTA per row. `row_norms`: a warp per
//   output.
// Pipeline: none; `quantise_rows_vec8` keeps a row in registers between its maximum and its rounding.
// Numerics: f32 sums in an order that does not depend on the batch; quotients are rounded as IEEE 754
//   divides.
// Chosen when: `linear` where neither linear_stream.cu nor cuBLASLt takes the operands (`choose` in
//   ops/linear/choice.rs); `quantise_rows*` before FP8 GEMMs (`choose` in ops/linear/quantise.rs: vec8 where
//   a row fits the registers of a CTA); `row_norms` when a DoRA adapter is loaded.
#include "common.cuh"

// Laid out as `LinearArgs` of ops/linear/any.rs.
struct LinearArgs {
    Mat x, w, out;
    const float *x_scales; // By row; null: 1.
    const float *w_scales; // By output; null: 1.
    const float *bias;     // By output; null: 0.
};
static_assert(sizeof(LinearArgs) == 120 && offsetof(LinearArgs, out) == 64 &&
              offsetof(LinearArgs, x_scales) == 96 && offsetof(LinearArgs, bias) == 112);

constexpr int ROWS = 8;            // of x that a warp takes together
constexpr int VECS_PER_THREAD = 4; // of a row in the registers of `quantise_rows_vec8`
constexpr float MAX_E4M3 = 448.0f;
constexpr float MIN_NORMAL = 1.17549435e-38f; // of f32

// Grid (outputs, eight rows); a warp per output. A row is summed in the same order in any batch.
extern "C" __global__ void linear(LinearArgs a) {
    pdl_prologue();
    int lane = threadIdx.x % WARP;
    int64_t n = static_cast<int64_t>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    int from = blockIdx.y * ROWS, rows = min(ROWS, a.x.rows - from);
    if (n >= a.w.rows) return;
    float sums[ROWS] = {};
    with_float_or_fp8(a.w.dtype, [&](auto t) {
        using W = decltype(t);
        const W *w = a.w.row<W>(n);
        with_float_or_fp8(a.x.dtype, [&](auto u) {
            using X = decltype(u);
            for (int k = lane; k < a.x.cols; k += WARP) {
                float weight = to_float(w[k]);
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    if (r < rows) sums[r] += weight * to_float(a.x.row<X>(from + r)[k]);
            }
        });
    });
    with_float(a.out.dtype, [&](auto o) {
        using O = decltype(o);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float value = warp_reduce(sums[r], Sum());
            if (r >= rows || lane != 0) continue;
            float scale = (a.x_scales ? a.x_scales[from + r] : 1.0f) * (a.w_scales ? a.w_scales[n] : 1.0f);
            value = value * scale + (a.bias ? a.bias[n] : 0.0f);
            a.out.row<O>(from + r)[n] = from_float<O>(value);
        }
    });
}

// Laid out as `QuantiseArgs` of ops/linear/quantise.rs.
struct QuantiseArgs {
    Mat x, codes;
    float *scales;
    float scale;
};
static_assert(sizeof(QuantiseArgs) == 80 && offsetof(QuantiseArgs, codes) == 32 &&
              offsetof(QuantiseArgs, scales) == 64 && offsetof(QuantiseArgs, scale) == 72);

// The scale of a row with this largest magnitude. A row whose scale would be subnormal is as good as zero.
__device__ float row_scale(float largest) {
    float scale = largest / MAX_E4M3;
    return scale >= MIN_NORMAL && scale < INFINITY ? scale : 1.0f;
}

// codes = e4m3(x / scale), where `scale` 0 means that of the row's largest magnitude; `scales` gets the scale
// of each row. Grid (row).
extern "C" __global__ void quantise_rows(QuantiseArgs a) {
    pdl_prologue();
    int64_t r = blockIdx.x;
    const Mat &x = a.x;
    with_float(x.dtype, [&](auto t) {
        using X = decltype(t);
        const X *row = x.row<X>(r);
        float divisor = a.scale;
        if (divisor == 0.0f) {
            float largest = 0.0f;
            for (int c = threadIdx.x; c < x.cols; c += blockDim.x)
                largest = fmaxf(largest, fabsf(to_float(row[c])));
            divisor = row_scale(block_reduce(largest, 0.0f, Max()));
        }
        for (int c = threadIdx.x; c < x.cols; c += blockDim.x)
            a.codes.row<f8>(r)[c] = from_float<f8>(to_float(row[c]) / divisor);
        if (threadIdx.x == 0) a.scales[r] = divisor;
    });
}

template <class X> struct PairOf;
template <> struct PairOf<bf16> {
    using Type = __nv_bfloat162;
};
template <> struct PairOf<f16> {
    using Type = __half2;
};

// The maximum of `largest` and the magnitudes of eight numbers.
template <class X> __device__ float max_magnitude(float largest, const Vec8<X> &x) {
    using Pair = typename PairOf<X>::Type;
    const Pair *pairs = reinterpret_cast<const Pair *>(x.v);
    Pair most =
        __hmax2(__hmax2(__habs2(pairs[0]), __habs2(pairs[1])), __hmax2(__habs2(pairs[2]), __habs2(pairs[3])));
    return fmaxf(largest, fmaxf(to_float(most.x), to_float(most.y)));
}

// Divides many numbers by one, rounded as IEEE 754 rounds.
struct Divisor {
    float value, inverse;
    bool in_range;

    // `largest`: the largest magnitude to be divided.
    __device__ Divisor(float value, float largest) : value(value), inverse(1.0f / value) {
        in_range = value > 0x1p-60f && value < 0x1p60f && largest * inverse < 1024.0f;
    }

    // Away from overflow and underflow, one correction by the remainder rounds exactly (Markstein, 1990).
    __device__ float quotient(float x) const {
        float first = x * inverse;
        return in_range ? fmaf(fmaf(-first, value, x), inverse, first) : x / value;
    }
};

// The e4m3 codes of eight numbers.
struct alignas(VEC8) Codes {
    uint16_t pairs[VEC8 / 2];

    template <class X> __device__ Codes(const Vec8<X> &x, const Divisor &divisor) {
        for (int i = 0; i < VEC8 / 2; i++) {
            float low = divisor.quotient(to_float(x.v[2 * i]));
            float high = divisor.quotient(to_float(x.v[2 * i + 1]));
            pairs[i] = __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
        }
    }
};

// As `quantise_rows`, for rows of 16-bit numbers that fit the registers of a CTA, so that they are read once.
extern "C" __global__ void quantise_rows_vec8(QuantiseArgs a) {
    pdl_prologue();
    int64_t r = blockIdx.x;
    with_16bit(a.x.dtype, [&](auto t) {
        using X = decltype(t);
        Vec8<X> row[VECS_PER_THREAD];
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < VECS_PER_THREAD; i++) {
            int c = (i * blockDim.x + threadIdx.x) * VEC8;
            if (c < a.x.cols) row[i] = Vec8<X>::load(a.x.row<X>(r) + c);
            else row[i] = {};
        }
#pragma unroll
        for (int i = 0; i < VECS_PER_THREAD; i++) largest = max_magnitude(largest, row[i]);
        float scale = a.scale;
        if (scale == 0.0f) scale = row_scale(block_reduce(largest, 0.0f, Max()));
        Divisor divisor(scale, largest);
#pragma unroll
        for (int i = 0; i < VECS_PER_THREAD; i++) {
            int c = (i * blockDim.x + threadIdx.x) * VEC8;
            if (c < a.x.cols) *reinterpret_cast<Codes *>(a.codes.row<f8>(r) + c) = Codes(row[i], divisor);
        }
        if (threadIdx.x == 0) a.scales[r] = scale;
    });
}

// Laid out as `RowNormArgs` of ops/linear/row_norms.rs.
struct RowNormArgs {
    Mat w, a, b;
    const float *w_scales;
    float *norms;
    int64_t from;
    float scale;
};
static_assert(sizeof(RowNormArgs) == 128 && offsetof(RowNormArgs, w_scales) == 96 &&
              offsetof(RowNormArgs, from) == 112 && offsetof(RowNormArgs, scale) == 120);

// norms[i] = |w[from + i] * w_scale + scale * b[i] a|, a and b in f32. A warp per row.
extern "C" __global__ void row_norms(RowNormArgs args) {
    pdl_prologue();
    const Mat &w = args.w, &a = args.a, &b = args.b;
    int64_t from = args.from;
    int lane = threadIdx.x % WARP;
    int64_t i = static_cast<int64_t>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (i >= b.rows) return;
    with_float_or_fp8(w.dtype, [&](auto t) {
        using W = decltype(t);
        const W *row = w.row<W>(from + i);
        const float *factors = b.row<float>(i);
        float w_scale = args.w_scales ? args.w_scales[from + i] : 1.0f, square = 0.0f;
        for (int k = lane; k < w.cols; k += WARP) {
            float value = to_float(row[k]) * w_scale;
            for (int j = 0; j < a.rows; j++) value += args.scale * factors[j] * a.row<float>(j)[k];
            square += value * value;
        }
        square = warp_reduce(square, Sum());
        if (lane == 0) args.norms[i] = sqrtf(square);
    });
}
