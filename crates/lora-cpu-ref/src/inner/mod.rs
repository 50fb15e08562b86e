//! The inner product `y[m, n] = sum over k of x[m, k] * w[n, k]`, which is nearly all the
//! arithmetic of a language model, in two implementations that are tested against each other: the
//! obvious one ([`matmul_obvious`]) and the fast one ([`matmul`]).
//!
//! Sums are kept in `f32`. A row's result has the same bits whatever other rows are in the batch,
//! however many threads there are and whichever rows of larger buffers are read and written.

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
/// If both `x` and `w` are bfloat16 and `isa` has it, products are made by `vdpbf16ps`, which takes
/// subnormal inputs and results as zero and rounds sums to nearest even; otherwise products and
/// sums are `f32`. Each output is summed over k in ascending order.
///
/// Weights are read once for every 96 to 512 rows (fewer the larger k is). Large products share
/// their work out over the current rayon pool (call from inside it, as `ThreadPool::install` does,
/// to save the hand-over); small ones stay on the calling thread.
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
