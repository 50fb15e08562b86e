//! The matrix product `y[m, n] = sum over k of x[m, k] * w[n, k]`, nearly all of a language model's
//! arithmetic, in two implementations that are tested against each other: a straightforward one
//! ([`matmul_obvious`]) and a fast one ([`matmul`]).
//!
//! Sums are accumulated in `f32`. The bits of a row's result do not depend on the other rows of the batch, on
//! the number of threads, or on strides and offsets.

mod dot;
mod dtype;
mod elementwise;
mod error;
mod fast;
mod float16;
mod isa;
mod lanes;
mod obvious;
mod operand;
mod packed;
mod shared;
#[cfg(test)]
mod tests;

pub use self::{
    dot::{Vector, axpy, axpy_rows, dot, dot_rows},
    dtype::Dtype,
    elementwise::{Float, exp, narrow, widen},
    error::InnerError,
    isa::{Isa, Level},
    operand::{Out, Rows},
    packed::{Packed, Part},
};

/// `out[m, n] = sum over k of x[m, k] * w[n, k]`, plus a bias if `out` has one, as fast as the CPU allows.
///
/// If both `x` and `w` are bfloat16 and `isa` has it, `vdpbf16ps` is used, which flushes subnormal inputs and
/// results to zero and rounds sums to nearest even; otherwise products and sums are `f32`. Each output is
/// summed over k in ascending order.
///
/// Weights are read once for every 96 to 512 rows (fewer for larger k). Large products are divided among the
/// current rayon pool (calls from inside of it, as by `ThreadPool::install`, avoid a hand-over); small ones
/// run on the calling thread.
///
/// # Errors
/// [`InnerError::Short`], [`InnerError::Overlap`] and [`InnerError::Count`] if an operand does not
/// fit `w`; nothing is written then.
pub fn matmul(isa: Isa, x: Rows<'_>, w: &Packed, out: Out<'_>) -> Result<(), InnerError> {
    check(&x, w, &out)?;
    fast::matmul(isa, x, w, out);
    Ok(())
}

/// The same as [`matmul`] in plain loops and `f32`: the reference for tests.
///
/// # Errors
/// As for [`matmul`].
pub fn matmul_obvious(x: Rows<'_>, w: &Packed, out: Out<'_>) -> Result<(), InnerError> {
    check(&x, w, &out)?;
    obvious::matmul(x, w, out);
    Ok(())
}

fn check(x: &Rows<'_>, w: &Packed, out: &Out<'_>) -> Result<(), InnerError> {
    x.check(w.k())?;
    out.check(x.count(), w)
}
