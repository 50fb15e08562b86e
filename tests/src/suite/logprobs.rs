//! Log-probabilities.

use lora_core::ops::{LogprobArgs, LogprobOut};
use lora_core::{Backend, DType};
use proptest::prelude::*;

use super::compare::{Class, close, exact};
use super::draw::{Fill, gaps, rows};
use super::misuse::{Misuse, refusals};
use super::num::Num;
use super::rig::{Gaps, Matrix, Placed, Rig};
use super::{Types, for_all};

/// Logits with many ties and zeros of both signs. Some are minus infinity, but no complete row.
fn logits(fill: &mut Fill, rows: usize, vocab: usize) -> Matrix {
    let value = |fill: &mut Fill| match fill.below(16) {
        0 => f32::NEG_INFINITY,
        1 => -0.0,
        2..=6 => (fill.below(9) as f32 - 4.0) / 2.0,
        _ => 6.0 * fill.value(),
    };
    let row = |_| {
        let mut values: Vec<f32> = (0..vocab).map(|_| value(fill)).collect();
        values[fill.below(vocab)] = 1.5;
        values
    };
    let values: Vec<f32> = (0..rows).flat_map(row).collect();
    Matrix::floats(rows, vocab, DType::F32, &values)
}

/// Ids of a row, most likely first, lower ids first among equals.
fn ranked(logits: &[Num]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // The sort is stable, so equals stay in ascending order.
    order.sort_by(|a, b| {
        let order = logits[*b].value.partial_cmp(&logits[*a].value);
        order.unwrap_or(std::cmp::Ordering::Equal)
    });
    order
}

/// The log-softmax of a row.
fn log_softmax(logits: &[Num]) -> Vec<Num> {
    let best = logits.iter().map(|l| l.value).fold(f64::NEG_INFINITY, f64::max);
    let normalizer = best + logits.iter().map(|l| (l.value - best).exp()).sum::<f64>().ln();
    let value =
        |l: &Num| Num { value: l.value - normalizer, size: l.size + normalizer.abs() + 1.0 };
    logits.iter().map(value).collect()
}

/// Log-probability and rank of the target, and the most likely tokens, agree with the log-softmax, ids and
/// ranks exactly. A row does not depend on others.
pub fn logprobs_are_the_log_softmax<B: Backend>(make: &dyn Fn() -> B, _: Types) {
    let vocab = prop_oneof![1usize..40, Just(257usize)];
    let case = (rows(), vocab, 0usize..22, [gaps(), gaps()], any::<u64>());
    for_all(make, 160, case, |rig, &(rows, vocab, k, gaps, seed)| {
        let (mut fill, k) = (Fill::new(seed), k.min(vocab));
        let logits = logits(&mut fill, rows, vocab);
        let targets = fill.ids(rows, vocab);
        let found = reported(rig, &logits, &targets, k, gaps)?;

        let (mut target, mut top) = (Vec::new(), Vec::new());
        let (mut ranks, mut ids) = (Vec::new(), Vec::new());
        for (r, id) in targets.iter().enumerate() {
            let row = logits.nums(r);
            let (values, order) = (log_softmax(&row), ranked(&row));
            target.push(values[*id as usize]);
            let likelier = row.iter().filter(|l| l.value > row[*id as usize].value);
            ranks.push(1 + likelier.count() as i32);
            top.extend(order[..k].iter().map(|i| values[*i]));
            ids.extend(order[..k].iter().map(|i| *i as i32));
        }
        close("logprobs of targets", &found[0], &target, Class::Rounded)?;
        exact("ranks of targets", &found[1], &Matrix::ints(1, rows, &ranks))?;
        exact("ids of the likeliest", &found[2], &Matrix::ints(rows, k, &ids))?;
        close("logprobs of the likeliest", &found[3], &top, Class::Rounded)?;

        for r in (0..rows).step_by(5) {
            let (logits, none) = (logits.pick(&[r]), [Gaps::default(); 2]);
            let alone = reported(rig, &logits, &targets[r..=r], k, none)?;
            exact("likeliest of one row", &alone[3], &found[3].pick(&[r]))?;
        }
        Ok(())
    });
}

/// Output matrices: target, rank, top ids, top values.
fn outs<B: Backend>(
    rig: &mut Rig<B>,
    rows: usize,
    k: usize,
    gaps: Gaps,
) -> lora_core::Result<[Placed<B>; 4]> {
    let mut fill = Fill::new(9);
    let mut ints = |rows, cols| Matrix::ints(rows, cols, &fill.ids(rows * cols, 99));
    let (rank, ids) = (ints(1, rows), ints(rows, k));
    Ok([
        rig.place(&fill.matrix(1, rows, DType::F32), gaps)?,
        rig.place(&rank, gaps)?,
        rig.place(&ids, gaps)?,
        rig.place(&fill.matrix(rows, k, DType::F32), gaps)?,
    ])
}

/// Runs the op: target, rank, top ids, top values.
fn reported<B: Backend>(
    rig: &mut Rig<B>,
    logits: &Matrix,
    targets: &[i32],
    k: usize,
    [in_gaps, out_gaps]: [Gaps; 2],
) -> Result<[Matrix; 4], TestCaseError> {
    let [mut target, mut rank, mut ids, mut top] = outs(rig, logits.rows, k, out_gaps)?;
    let (logits, targets) = (rig.place(logits, in_gaps)?, rig.ids(targets)?);
    let args = LogprobArgs { logits: logits.view(), targets: targets.view() };
    let out = LogprobOut {
        target: target.view_mut(),
        rank: rank.view_mut(),
        top_ids: ids.view_mut(),
        top: top.view_mut(),
    };
    rig.be.logprobs(&mut rig.q, args, out)?;
    Ok([target.read(rig)?, rank.read(rig)?, ids.read(rig)?, top.read(rig)?])
}

/// A misuse of the op: a description, and the change that makes operands invalid.
type Spoil<B> = (&'static str, fn(&mut LogprobArgs<'_, B>, &mut LogprobOut<'_, B>));

/// Checks that the call is refused after the change `spoil`.
fn refused<B: Backend>(
    m: &mut Misuse<B>,
    targets: &[i32],
    what: &str,
    spoil: fn(&mut LogprobArgs<'_, B>, &mut LogprobOut<'_, B>),
) -> lora_core::Result<()> {
    let logits = m.rig.place(&logits(&mut Fill::new(10), 3, 8), Gaps::default())?;
    let targets = m.rig.ids(targets)?;
    let mut outs = outs(&mut m.rig, 3, 2, Gaps::default())?;
    m.refused(&format!("logprobs: {what}"), &mut outs, |rig, [target, rank, ids, top]| {
        let mut args = LogprobArgs { logits: logits.view(), targets: targets.view() };
        let mut out = LogprobOut {
            target: target.view_mut(),
            rank: rank.view_mut(),
            top_ids: ids.view_mut(),
            top: top.view_mut(),
        };
        spoil(&mut args, &mut out);
        rig.be.logprobs(&mut rig.q, args, out)
    });
    Ok(())
}

/// Wrong shapes and dtypes are errors, and nothing is written.
pub fn logprobs_refuse_misfits<B: Backend>(make: &dyn Fn() -> B, _: Types) {
    let spoils: [Spoil<B>; 10] = [
        ("16-bit logits", |a, _| a.logits.layout.dtype = DType::Bf16),
        ("rows of logits", |a, _| a.logits.layout = a.logits.layout.slice_rows(0..2)),
        ("fewer tokens than are asked for", |a, _| {
            a.logits.layout = a.logits.layout.slice_cols(0..1)
        }),
        ("dtype of targets", |a, _| a.targets.layout.dtype = DType::F32),
        ("rows of targets", |a, _| a.targets.layout = a.targets.layout.slice_cols(0..2)),
        ("columns of target", |_, o| o.target.layout = o.target.layout.slice_cols(0..2)),
        ("rows of rank", |_, o| o.rank.layout.rows = 2),
        ("dtype of rank", |_, o| o.rank.layout.dtype = DType::F32),
        ("rows of top_ids", |_, o| o.top_ids.layout = o.top_ids.layout.slice_rows(0..2)),
        ("columns of top", |_, o| o.top.layout = o.top.layout.slice_cols(0..1)),
    ];
    refusals(make, |m| {
        spoils.iter().try_for_each(|(what, spoil)| refused(m, &[0, 1, 2], what, *spoil))
    });
}

/// Targets outside the vocabulary are errors, and nothing is written.
pub fn logprobs_refuse_ids_out_of_range<B: Backend>(make: &dyn Fn() -> B, _: Types) {
    refusals(make, |m| {
        [8, -1, i32::MAX]
            .iter()
            .try_for_each(|bad| refused(m, &[0, 1, *bad], &format!("target {bad} of 8"), |_, _| {}))
    });
}
