//! What ops check about their operands before any work, the same on every backend.
//!
//! Functions named as an op check shapes and dtypes; those that end in `_ids` check numbers that
//! point into tables, wherever a backend has them at hand.

use std::ops::Range;

use super::fp8::Fp8Scales;
use super::lora::{LoraPlan, SiteKind, SiteSpec, SlotRows, SlotSlice};
use super::ops::{
    AttentionArgs, LogprobArgs, LogprobOut, NormWeight, QkvArgs, SampleArgs, SampleRow, mask_words,
};
use super::{Backend, DType, Error, HostTensor, MatLayout, Result, check_extent};

/// Checks that an operand holds floats.
///
/// # Errors
/// [`Error::DType`].
pub fn float(op: &'static str, what: &'static str, found: DType) -> Result<()> {
    if found.is_float() {
        return Ok(());
    }
    Err(Error::DType { op, what, found, allowed: "float32, float16, bfloat16" })
}

/// Checks that an operand can be a KV cache.
///
/// # Errors
/// [`Error::DType`].
fn cache(op: &'static str, what: &'static str, found: DType) -> Result<()> {
    if found == DType::F8E4m3 {
        return Ok(());
    }
    float(op, what, found)
}

fn dtype(op: &'static str, what: &'static str, found: DType, wanted: DType) -> Result<()> {
    let allowed = match wanted {
        _ if found == wanted => return Ok(()),
        DType::I32 => "int32",
        _ => "float32",
    };
    Err(Error::DType { op, what, found, allowed })
}

/// Checks that `index` is one of `limit` entries.
///
/// # Errors
/// [`Error::OutOfRange`].
pub fn index(op: &'static str, what: &'static str, index: i32, limit: usize) -> Result<usize> {
    let found = i64::from(index);
    let inside = usize::try_from(index).ok().filter(|i| *i < limit);
    inside.ok_or(Error::OutOfRange { op, what, found, limit })
}

/// Checks that every number is one of `limit` entries.
///
/// # Errors
/// [`Error::OutOfRange`] naming the first that is not.
pub fn ids(op: &'static str, what: &'static str, ids: &[i32], limit: usize) -> Result<()> {
    ids.iter().try_for_each(|id| index(op, what, *id, limit).map(drop))
}

/// Checks that an operand is `[1, n]` i32, and returns `n`.
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`].
pub fn id_row(op: &'static str, what: &'static str, layout: MatLayout) -> Result<usize> {
    dtype(op, what, layout.dtype, DType::I32)?;
    check_extent(op, what, layout.rows, 1)?;
    Ok(layout.cols)
}

/// Checks that a matrix has so many bytes and no gaps between its rows.
///
/// # Errors
/// [`Error::Shape`].
pub fn dense_bytes(op: &'static str, layout: MatLayout, host: usize) -> Result<()> {
    if layout.rows > 1 {
        check_extent(op, "row stride", layout.row_stride, layout.cols)?;
    }
    check_extent(op, "bytes on the host", host, layout.rows * layout.cols * layout.dtype.size())
}

/// Checks [`Backend::copy_rows`].
///
/// # Errors
/// [`Error::Shape`] if rows lie outside of the matrix, or overlap.
pub fn copy_rows(layout: MatLayout, from: &Range<usize>, to: usize) -> Result<()> {
    const OP: &str = "copy_rows";
    let count = from.len();
    let target = to..to.saturating_add(count);
    for rows in [from, &target] {
        if rows.start > rows.end || rows.end > layout.rows {
            let (what, found) = ("end of rows", rows.end);
            return Err(Error::Shape { op: OP, what, expected: layout.rows, found });
        }
    }
    let apart = from.start.abs_diff(to);
    if apart < count {
        let what = "rows between source and target";
        return Err(Error::Shape { op: OP, what, expected: count, found: apart });
    }
    Ok(())
}

/// Checks [`Backend::embed`] from a table `[rows, cols]`.
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`].
pub fn embed(cols: usize, ids: MatLayout, out: MatLayout) -> Result<()> {
    float("embed", "out", out.dtype)?;
    looked_up("embed", cols, ids, out)
}

/// Checks [`Backend::gather_rows`]. Integers are moved as they are.
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`].
pub fn gather_rows(x: MatLayout, rows: MatLayout, out: MatLayout) -> Result<()> {
    const OP: &str = "gather_rows";
    match x.dtype {
        DType::I32 => dtype(OP, "out", out.dtype, DType::I32)?,
        _ => {
            float(OP, "x", x.dtype)?;
            float(OP, "out", out.dtype)?;
        }
    }
    looked_up(OP, x.cols, rows, out)
}

fn looked_up(op: &'static str, cols: usize, ids: MatLayout, out: MatLayout) -> Result<()> {
    check_extent(op, "rows of out", out.rows, id_row(op, "ids", ids)?)?;
    check_extent(op, "columns of out", out.cols, cols)
}

/// Checks the weights of a norm of `rows` rows and `cols` columns.
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`]; [`Error::Unsupported`] for a site of another kind.
fn norm_weights<B: Backend>(
    op: &'static str,
    w: &NormWeight<'_, B>,
    [rows, cols]: [usize; 2],
) -> Result<()> {
    let base = w.base.layout;
    dtype(op, "w", base.dtype, DType::F32)?;
    check_extent(op, "rows of w", base.rows, 1)?;
    check_extent(op, "columns of w", base.cols, cols)?;
    let Some((site, plan)) = w.lora else { return Ok(()) };
    site_kind::<B>(op, &site.spec, SiteKind::Norm)?;
    check_extent(op, "columns of adapters' w", site.spec.in_dim, cols)?;
    check_extent(op, "rows of the batch", plan.rows(), rows)
}

/// Checks [`Backend::rms_norm`] and, with the residual among `outs`, [`Backend::add_rms_norm`].
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`].
pub fn norm<B: Backend>(
    op: &'static str,
    x: MatLayout,
    w: &NormWeight<'_, B>,
    outs: &[(&'static str, MatLayout)],
) -> Result<()> {
    float(op, "x", x.dtype)?;
    for (what, out) in outs {
        float(op, what, out.dtype)?;
        check_extent(op, what, out.rows, x.rows)?;
        check_extent(op, what, out.cols, x.cols)?;
    }
    norm_weights(op, w, [x.rows, x.cols])
}

/// Checks [`Backend::silu_mul`].
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`].
pub fn silu_mul(gate_up: MatLayout, out: MatLayout) -> Result<()> {
    const OP: &str = "silu_mul";
    float(OP, "gate_up", gate_up.dtype)?;
    float(OP, "out", out.dtype)?;
    check_extent(OP, "rows of out", out.rows, gate_up.rows)?;
    check_extent(OP, "columns of gate_up", gate_up.cols, 2 * out.cols)
}

/// Checks [`Backend::linear`] by a matrix `[n, k]`.
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`].
pub fn linear(x: MatLayout, [n, k]: [usize; 2], out: MatLayout) -> Result<()> {
    const OP: &str = "linear";
    float(OP, "x", x.dtype)?;
    float(OP, "out", out.dtype)?;
    check_extent(OP, "columns of x", x.cols, k)?;
    check_extent(OP, "columns of out", out.cols, n)?;
    check_extent(OP, "rows of out", out.rows, x.rows)
}

/// Checks the parts of a weight matrix, stacked by rows, and returns its `[n, k]`.
///
/// # Errors
/// [`Error::Shape`], or [`Error::DType`] where parts differ in dtype or `allow` refuses it.
pub fn weight_parts(
    op: &'static str,
    parts: &[HostTensor],
    bias: Option<&[f32]>,
    allow: impl Fn(DType) -> Result<()>,
) -> Result<[usize; 2]> {
    let (mut n, mut k) = (0, None);
    for part in parts {
        let [rows, cols] = part.shape()[..] else {
            let (what, found) = ("number of dimensions", part.shape().len());
            return Err(Error::Shape { op, what, found, expected: 2 });
        };
        allow(part.dtype())?;
        check_extent(op, "columns of a part", cols, *k.get_or_insert(cols))?;
        n += rows;
    }
    let first = parts.first().map(HostTensor::dtype);
    if let Some(other) = parts.iter().map(HostTensor::dtype).find(|d| Some(*d) != first) {
        let allowed = "the dtype of the first part";
        return Err(Error::DType { op, what: "weight", found: other, allowed });
    }
    if let Some(bias) = bias {
        check_extent(op, "bias", bias.len(), n)?;
    }
    Ok([n, k.unwrap_or(0)])
}

/// Checks [`Backend::prepare_fp8_linear`], and returns the `[n, k]` of the matrix.
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`].
pub fn fp8_parts(
    parts: &[HostTensor],
    scales: &Fp8Scales,
    bias: Option<&[f32]>,
) -> Result<[usize; 2]> {
    const OP: &str = "prepare_fp8_linear";
    check_extent(OP, "scales", scales.parts.len(), parts.len())?;
    weight_parts(OP, parts, bias, |found| match found {
        DType::F8E4m3 => Ok(()),
        _ => Err(Error::DType { op: OP, what: "weight", found, allowed: "float8_e4m3fn" }),
    })
}

/// Checks [`Backend::row_norms`] of `rows` of a matrix `[n, k]`, and returns the rank.
///
/// # Errors
/// [`Error::Shape`], [`Error::OutOfRange`].
pub fn row_norms(
    [n, k]: [usize; 2],
    rows: &Range<usize>,
    a: &HostTensor,
    b: &HostTensor,
) -> Result<usize> {
    const OP: &str = "row_norms";
    let [rank, cols] = a.shape()[..] else {
        let found = a.shape().len();
        return Err(Error::Shape { op: OP, what: "dimensions of a", found, expected: 2 });
    };
    check_extent(OP, "columns of a", cols, k)?;
    check_extent(OP, "elements of b", b.len(), rows.len() * rank)?;
    if rows.end > n {
        let (found, limit) = (rows.end as i64, n + 1);
        return Err(Error::OutOfRange { op: OP, what: "row", found, limit });
    }
    Ok(rank)
}

/// Checks [`Backend::qk_norm_rope_append`].
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`].
pub fn qkv<B: Backend>(args: &QkvArgs<'_, B>) -> Result<()> {
    const OP: &str = "qk_norm_rope_append";
    let (dims, rows) = (args.dims, args.qkv.layout.rows);
    float(OP, "qkv", args.qkv.layout.dtype)?;
    check_extent(OP, "columns of qkv", args.qkv.layout.cols, dims.q_cols() + 2 * dims.kv_cols())?;
    for held in [&args.k_cache, &args.v_cache] {
        cache(OP, "cache", held.layout.dtype)?;
        check_extent(OP, "columns of a cache", held.layout.cols, dims.kv_cols())?;
    }
    check_extent(OP, "rows of v_cache", args.v_cache.layout.rows, args.k_cache.layout.rows)?;
    check_extent(OP, "positions", id_row(OP, "positions", args.positions.layout)?, rows)?;
    check_extent(OP, "kv_slots", id_row(OP, "kv_slots", args.kv_slots.layout)?, rows)?;
    check_extent(OP, "head_dim modulo 2", dims.head_dim % 2, 0)?;
    dtype(OP, "cos_sin_table", args.cos_sin_table.layout.dtype, DType::F32)?;
    check_extent(OP, "columns of cos_sin_table", args.cos_sin_table.layout.cols, dims.head_dim)?;
    match &args.norms {
        Some((q, k, _)) => {
            norm_weights(OP, q, [rows, dims.head_dim])?;
            norm_weights(OP, k, [rows, dims.head_dim])
        }
        None => Ok(()),
    }
}

/// Checks positions and slots of [`Backend::qk_norm_rope_append`].
///
/// # Errors
/// [`Error::OutOfRange`].
pub fn qkv_ids<B: Backend>(args: &QkvArgs<'_, B>, positions: &[i32], slots: &[i32]) -> Result<()> {
    const OP: &str = "qk_norm_rope_append";
    ids(OP, "position", positions, args.cos_sin_table.layout.rows)?;
    let mut stored = slots.iter().filter(|slot| **slot != -1);
    stored.try_for_each(|s| index(OP, "KV slot", *s, args.k_cache.layout.rows).map(drop))
}

/// Checks [`Backend::attention`].
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`].
pub fn attention<B: Backend>(args: &AttentionArgs<'_, B>, out: MatLayout) -> Result<()> {
    const OP: &str = "attention";
    let (dims, rows) = (args.dims, args.queries.layout.rows);
    float(OP, "queries", args.queries.layout.dtype)?;
    cache(OP, "k_cache", args.k_cache.layout.dtype)?;
    float(OP, "out", out.dtype)?;
    let left_over = dims.heads.checked_rem(dims.kv_heads).unwrap_or(dims.heads.max(1));
    check_extent(OP, "heads that kv_heads do not divide", left_over, 0)?;
    for (what, given) in [("window", args.window), ("block", Some(args.tokens_per_block))] {
        if given == Some(0) {
            return Err(Error::Shape { op: OP, what, found: 0, expected: 1 });
        }
    }
    check_extent(OP, "columns of queries", args.queries.layout.cols, dims.q_cols())?;
    check_extent(OP, "rows of out", out.rows, rows)?;
    check_extent(OP, "columns of out", out.cols, dims.q_cols())?;
    check_extent(OP, "row stride of out", out.row_stride, dims.q_cols())?;
    check_extent(OP, "columns of k_cache", args.k_cache.layout.cols, dims.kv_cols())?;
    check_extent(OP, "columns of v_cache", args.v_cache.layout.cols, dims.kv_cols())?;
    check_extent(OP, "rows of v_cache", args.v_cache.layout.rows, args.k_cache.layout.rows)?;
    if args.v_cache.layout.dtype != args.k_cache.layout.dtype {
        let (found, allowed) = (args.v_cache.layout.dtype, "the dtype of k_cache");
        return Err(Error::DType { op: OP, what: "v_cache", found, allowed });
    }
    dtype(OP, "block_tables", args.block_tables.layout.dtype, DType::I32)?;
    check_extent(OP, "positions", id_row(OP, "positions", args.positions.layout)?, rows)?;
    let sequences = id_row(OP, "sequence_of_row", args.sequence_of_row.layout)?;
    check_extent(OP, "sequence_of_row", sequences, rows)
}

/// Checks positions, sequences and the KV blocks that are read in [`Backend::attention`]; `table`
/// gives the blocks of a sequence.
///
/// # Errors
/// [`Error::OutOfRange`].
pub fn attention_ids<'t, B: Backend>(
    args: &AttentionArgs<'_, B>,
    positions: &[i32],
    sequences: &[i32],
    table: impl Fn(usize) -> &'t [i32],
) -> Result<()> {
    const OP: &str = "attention";
    let tables = args.block_tables.layout;
    let blocks = args.k_cache.layout.rows / args.tokens_per_block;
    for (position, sequence) in positions.iter().zip(sequences) {
        let covered = tables.cols * args.tokens_per_block;
        let position = index(OP, "position", *position, covered)?;
        let sequence = index(OP, "sequence", *sequence, tables.rows)?;
        ids(OP, "KV block", &table(sequence)[..=position / args.tokens_per_block], blocks)?;
    }
    Ok(())
}

/// Checks [`Backend::sample`].
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`].
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

/// Checks where a row of [`Backend::sample`] points, and its seen and biased tokens; `seen` and
/// `biased` give the token of an entry.
///
/// # Errors
/// [`Error::OutOfRange`].
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

/// Checks [`Backend::logprobs`].
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`], [`Error::OutOfRange`].
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

/// Checks that a plan made for up to `capacity` rows has room for `rows`.
///
/// # Errors
/// [`Error::Shape`].
pub fn plan_room(op: &'static str, rows: usize, capacity: usize) -> Result<()> {
    if rows <= capacity {
        return Ok(());
    }
    let what = "rows, above what there is room for";
    Err(Error::Shape { op, what, found: rows, expected: capacity })
}

/// Checks what is written to a slot of a site, slice by slice.
///
/// # Errors
/// [`Error::DType`], [`Error::Shape`], and [`Error::OutOfRange`] for the slot.
pub fn write_slot(
    spec: &SiteSpec,
    slots: usize,
    slot: usize,
    slices: &[Option<SlotSlice>],
) -> Result<()> {
    const OP: &str = "write_slot";
    index(OP, "slot", i32::try_from(slot).unwrap_or(i32::MAX), slots)?;
    check_extent(OP, "slices", slices.len(), spec.slices.len())?;
    for (slice, columns) in slices.iter().zip(&spec.slices) {
        if let Some(slice) = slice {
            slot_slice(OP, spec, slice, columns.len())?;
        }
    }
    Ok(())
}

fn slot_slice(op: &'static str, spec: &SiteSpec, slice: &SlotSlice, out: usize) -> Result<()> {
    if spec.kind == SiteKind::Norm {
        return norm_slice(op, slice, out);
    }
    for (what, vector) in [("gain", &slice.gain), ("shift", &slice.shift)] {
        if let Some(vector) = vector {
            check_extent(op, what, vector.len(), out)?;
        }
    }
    let matrix = |what, tensor: &HostTensor| {
        float(op, what, tensor.dtype())?;
        let found = tensor.shape().len();
        let dims = tensor.matrix_dims().filter(|_| found == 2);
        dims.ok_or(Error::Shape { op, what, found, expected: 2 })
    };
    if let Some(w) = &slice.replacement {
        let (rows, cols) = matrix("replacement", w)?;
        let expected = match spec.kind {
            SiteKind::Embedding => (spec.in_dim, out),
            _ => (out, spec.in_dim),
        };
        check_extent(op, "rows of replacement", rows, expected.0)?;
        check_extent(op, "columns of replacement", cols, expected.1)?;
    }
    if let Some(SlotRows { ids, values }) = &slice.rows {
        let (vocab, width) = match spec.kind {
            SiteKind::Embedding => (spec.in_dim, out),
            _ => (out, spec.in_dim),
        };
        let beside = usize::from(slice.replacement.is_some()) + spec.slices.len() - 1;
        check_extent(op, "slices or replacements beside rows of tokens", beside, 0)?;
        let (rows, cols) = matrix("rows", values)?;
        check_extent(op, "rows of tokens", rows, ids.len())?;
        check_extent(op, "columns of rows of tokens", cols, width)?;
        token_ids(op, ids, vocab)?;
    }
    if let Some(low) = &slice.low_rank {
        let (rank, columns) = matrix("a", &low.a)?;
        check_extent(op, "columns of a", columns, spec.in_dim)?;
        let (rows, ranks) = matrix("b", &low.b)?;
        check_extent(op, "rows of b", rows, out)?;
        check_extent(op, "columns of b", ranks, rank)?;
    }
    Ok(())
}

/// Checks that tokens are ascending and of a vocabulary.
fn token_ids(op: &'static str, ids: &[u32], vocab: usize) -> Result<()> {
    let what = "token";
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
        return Err(Error::OutOfRange { op, what, found: i64::from(*id), limit: vocab });
    }
    match ids.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(pair) => {
            let (what, found) = ("token after a larger one", pair[1] as usize);
            Err(Error::Shape { op, what, expected: pair[0] as usize + 1, found })
        }
        None => Ok(()),
    }
}

/// Checks what an adapter does to a norm: it has a weight of its own, and nothing else.
fn norm_slice(op: &'static str, slice: &SlotSlice, cols: usize) -> Result<()> {
    let SlotSlice { low_rank, gain, shift, replacement, rows } = slice;
    let others = usize::from(low_rank.is_some())
        + usize::from(rows.is_some())
        + usize::from(gain.is_some())
        + usize::from(shift.is_some());
    check_extent(op, "parts of a norm besides its weight", others, 0)?;
    let Some(weight) = replacement else { return Ok(()) };
    dtype(op, "weight of a norm", weight.dtype(), DType::F32)?;
    check_extent(op, "dimensions of a norm's weight", weight.shape().len(), 1)?;
    check_extent(op, "elements of a norm's weight", weight.len(), cols)
}

fn site_kind<B: Backend>(op: &'static str, spec: &SiteSpec, kind: SiteKind) -> Result<()> {
    if spec.kind == kind {
        return Ok(());
    }
    let what = format!("a site of kind {:?}", spec.kind);
    Err(Error::Unsupported { op, backend: B::NAME, what })
}

/// Checks that a site is of `kind`, and an output of it.
///
/// # Errors
/// [`Error::Unsupported`] for a site of another kind; [`Error::DType`], [`Error::Shape`].
pub fn site_output<B: Backend>(
    op: &'static str,
    spec: &SiteSpec,
    kind: SiteKind,
    out: MatLayout,
) -> Result<()> {
    site_kind::<B>(op, spec, kind)?;
    float(op, "out", out.dtype)?;
    check_extent(op, "columns of out", out.cols, spec.out_dim())
}
