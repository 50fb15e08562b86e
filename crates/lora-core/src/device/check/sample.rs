//! Checks of sampling and log-probabilities.

use super::{dtype, id_row, index};
use crate::device::ops::{LogprobArgs, LogprobOut, SampleArgs, SampleRow, mask_words};
use crate::device::{Backend, DType, Error, MatLayout, Result, check_extent};

/// Checks [`crate::Backend::sample`].
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn sample<B: Backend>(args: &SampleArgs<'_, B>, out: MatLayout) -> Result<()> {
    const OP: &str = "sample";
    let (rows, vocab) = (args.logits.layout.rows, args.logits.layout.cols);
    dtype(OP, "logits", args.logits.layout.dtype, DType::F32)?;
    for (what, layout) in [
        ("params", args.params.layout),
        ("history", args.history.layout),
        ("bias", args.bias.layout),
        ("masks", args.masks.layout),
    ] {
        dtype(OP, what, layout.dtype, DType::I32)?;
    }
    if vocab == 0 && rows > 0 {
        return Err(Error::Shape { op: OP, what: "columns of logits", found: 0, expected: 1 });
    }
    check_extent(OP, "rows of params", args.params.layout.rows, rows)?;
    check_extent(OP, "columns of params", args.params.layout.cols, SampleRow::WORDS)?;
    check_extent(OP, "tokens of out", id_row(OP, "out", out)?, rows)?;
    check_extent(OP, "columns of history", args.history.layout.cols, 2)?;
    check_extent(OP, "columns of bias", args.bias.layout.cols, 2)?;
    check_extent(OP, "columns of masks", args.masks.layout.cols, mask_words(vocab))?;
    id_row(OP, "banned", args.banned.layout).map(drop)
}

/// Checks the ranges of a row of [`crate::Backend::sample`] in the other operands, and the tokens in its history and
/// bias; `seen` and `biased` give the token of an entry.
///
/// # Errors
/// [`crate::Error::OutOfRange`].
pub fn sample_ids<B: Backend>(
    args: &SampleArgs<'_, B>,
    row: &SampleRow,
    seen: impl Fn(usize) -> i32,
    biased: impl Fn(usize) -> i32,
) -> Result<()> {
    const OP: &str = "sample";
    let range = |what, [from, count]: [u32; 2], limit: usize| {
        let (from, count) = (from as usize, count as usize);
        match from.checked_add(count).filter(|end| *end <= limit) {
            Some(end) => Ok(from..end),
            None => Err(Error::OutOfRange { op: OP, what, found: (from + count) as i64, limit }),
        }
    };
    for entry in range("history entry", row.history, args.history.layout.rows)? {
        index(OP, "seen token", seen(entry), args.logits.layout.cols)?;
    }
    for entry in range("bias entry", row.bias, args.bias.layout.rows)? {
        index(OP, "biased token", biased(entry), args.logits.layout.cols)?;
    }
    range("banned entry", row.banned, args.banned.layout.cols)?;
    if row.mask != SampleRow::UNMASKED {
        index(OP, "mask", row.mask, args.masks.layout.rows)?;
    }
    Ok(())
}

/// Checks [`crate::Backend::logprobs`].
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`], [`crate::Error::OutOfRange`].
pub fn logprobs<B: Backend>(args: &LogprobArgs<'_, B>, out: &LogprobOut<'_, B>) -> Result<()> {
    const OP: &str = "logprobs";
    let (rows, vocab, k) =
        (args.logits.layout.rows, args.logits.layout.cols, out.top_ids.layout.cols);
    for (what, found, wanted) in [
        ("logits", args.logits.layout.dtype, DType::F32),
        ("target", out.target.layout.dtype, DType::F32),
        ("rank", out.rank.layout.dtype, DType::I32),
        ("top_ids", out.top_ids.layout.dtype, DType::I32),
        ("top", out.top.layout.dtype, DType::F32),
    ] {
        dtype(OP, what, found, wanted)?;
    }
    check_extent(OP, "targets", id_row(OP, "targets", args.targets.layout)?, rows)?;
    for (what, layout) in [("target", out.target.layout), ("rank", out.rank.layout)] {
        check_extent(OP, what, layout.rows, 1)?;
        check_extent(OP, what, layout.cols, rows)?;
    }
    check_extent(OP, "rows of top_ids", out.top_ids.layout.rows, rows)?;
    check_extent(OP, "rows of top", out.top.layout.rows, rows)?;
    check_extent(OP, "columns of top", out.top.layout.cols, k)?;
    if k > vocab {
        return Err(Error::OutOfRange { op: OP, what: "k", found: k as i64, limit: vocab + 1 });
    }
    Ok(())
}
