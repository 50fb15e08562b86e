//! Sampling.

use lora_core::ops::{SampleArgs, SampleRow, mask_words};
use lora_core::{Backend, DType};
use proptest::prelude::*;

use super::draw::{Fill, gaps, rows};
use super::misuse::{Misuse, refusals};
use super::rig::{Gaps, Matrix, Placed, Rig};
use super::sample_reference::{Seen, allowed};
use super::{Types, for_all};

/// The logits and parameters of one row.
#[derive(Clone)]
struct Row {
    logits: Vec<f32>,
    params: SampleRow,
    seen: Seen,
}

/// Logits, in half of the cases with many ties and zeros of both signs, and random parameters. Every filter
/// is off in about half of the cases, and one row in eight is greedy.
fn row(fill: &mut Fill, vocab: usize) -> Row {
    let grid = fill.below(2) == 0;
    let value = |fill: &mut Fill| match (grid, fill.below(2)) {
        (true, 0) => fill.below(9) as f32 / -2.0,
        (true, _) => fill.below(9) as f32 / 2.0,
        (false, _) => 4.0 * fill.value(),
    };
    let logits = (0..vocab).map(|_| value(fill)).collect();
    let mut pick = |choices: &[f32]| choices[fill.below(choices.len())];
    let params = SampleRow {
        temperature: pick(&[1.0, 0.7, 0.05, 2.0, 1.0, 0.5, 1.5, 0.0]),
        top_p: pick(&[1.0, 1.0, 0.9, 0.5, 0.01]),
        min_p: pick(&[0.0, 0.0, 0.1, 0.6]),
        top_k: pick(&[0.0, 0.0, 1.0, 3.0, 50.0]) as u32,
        repetition_penalty: pick(&[1.0, 1.25, 2.0, 0.5]),
        presence_penalty: pick(&[0.0, 0.5, -1.0]),
        frequency_penalty: pick(&[0.0, 0.25, -0.5]),
        seed: [fill.bits() as u32, fill.bits() as u32],
        position: fill.below(4096) as u32,
        stream: fill.below(4) as u32,
        ..SampleRow::GREEDY
    };
    let order = fill.shuffled(vocab);
    let (seen, banned) = (fill.below(vocab.min(6) + 1), fill.below(vocab.min(6)));
    let history = order[..seen].iter().map(|t| [*t, fill.below(4) as i32]).collect();
    let banned = fill.shuffled(vocab)[..banned].to_vec();
    let biased = fill.below(vocab.min(5));
    let bias: Vec<(i32, f32)> =
        fill.shuffled(vocab)[..biased].iter().map(|t| (*t, 6.0 * fill.value())).collect();
    let mask = (fill.below(2) == 0).then(|| mask(fill, vocab, &banned));
    Row { logits, params, seen: Seen { history, bias, banned, mask } }
}

/// A mask that allows a single token, about half of them, or all but one; at least one allowed token is not
/// banned. (Not all tokens are banned.)
fn mask(fill: &mut Fill, vocab: usize, banned: &[i32]) -> Vec<bool> {
    let free: Vec<usize> = (0..vocab).filter(|t| !banned.contains(&(*t as i32))).collect();
    let kept = free[fill.below(free.len())];
    let kind = fill.below(3);
    let other = fill.below(vocab);
    let allows = |token: usize, fill: &mut Fill| match kind {
        0 => false,
        1 => fill.below(2) == 0,
        _ => token != other,
    };
    (0..vocab).map(|token| token == kept || allows(token, fill)).collect()
}

/// The words of a mask, with random bits beyond the vocabulary.
fn words(mask: &[bool], fill: &mut Fill) -> Vec<i32> {
    let word = |tokens: &[bool], fill: &mut Fill| {
        let behind = (fill.bits() as u32).checked_shl(tokens.len() as u32).unwrap_or(0);
        tokens.iter().enumerate().fold(behind, |word, (t, set)| word | u32::from(*set) << t) as i32
    };
    mask.chunks(32).map(|tokens| word(tokens, fill)).collect()
}

/// Samples tokens for the rows, in one call.
fn sampled<B: Backend>(
    rig: &mut Rig<B>,
    rows: &[Row],
    vocab: usize,
    [in_gaps, out_gaps]: [Gaps; 2],
) -> Result<Vec<i32>, TestCaseError> {
    let (mut params, mut history, mut banned) = (Vec::new(), Vec::new(), Vec::new());
    let mut bias: Vec<i32> = Vec::new();
    let (mut masks, mut fill) = (Vec::new(), Fill::new(rows.len() as u64));
    let width = mask_words(vocab);
    for row in rows {
        let row_params = SampleRow {
            history: [history.len() as u32 / 2, row.seen.history.len() as u32],
            banned: [banned.len() as u32, row.seen.banned.len() as u32],
            bias: [bias.len() as u32 / 2, row.seen.bias.len() as u32],
            mask: match row.seen.mask {
                Some(_) => (masks.len() / width) as i32,
                None => SampleRow::UNMASKED,
            },
            ..row.params
        };
        params.extend_from_slice(bytemuck::cast_slice(&[row_params]));
        history.extend(row.seen.history.iter().flatten());
        banned.extend_from_slice(&row.seen.banned);
        bias.extend(row.seen.bias.iter().flat_map(|(token, by)| [*token, by.to_bits() as i32]));
        masks.extend(row.seen.mask.iter().flat_map(|mask| words(mask, &mut fill)));
    }
    let logits: Vec<f32> = rows.iter().flat_map(|row| row.logits.clone()).collect();
    let logits = rig.place(&Matrix::floats(rows.len(), vocab, DType::F32, &logits), in_gaps)?;
    let params = Matrix::ints(rows.len(), SampleRow::WORDS, &params);
    let (params, banned) = (rig.place(&params, Gaps::default())?, rig.ids(&banned)?);
    let history = Matrix::ints(history.len() / 2, 2, &history);
    let history = rig.place(&history, Gaps::default())?;
    let bias = rig.place(&Matrix::ints(bias.len() / 2, 2, &bias), in_gaps)?;
    let masks = rig.place(&Matrix::ints(masks.len() / width, width, &masks), in_gaps)?;
    let mut out = rig.place(&Matrix::ints(1, rows.len(), &vec![-7; rows.len()]), out_gaps)?;
    let args = SampleArgs {
        logits: logits.view(),
        params: params.view(),
        history: history.view(),
        banned: banned.view(),
        bias: bias.view(),
        masks: masks.view(),
    };
    rig.be.sample(&mut rig.q, args, out.view_mut())?;
    prop_assert!(logits.is_untouched(rig)?, "sample: the logits were written");
    Ok(out.read(rig)?.to_ints())
}

/// Each row's token follows from its parameters, its history and Philox.
pub fn a_draw_follows_its_parameters<B: Backend>(make: &dyn Fn() -> B, _: Types) {
    let vocab = prop_oneof![1usize..40, prop::sample::select(vec![63usize, 64, 65, 257])];
    let case = (rows(), vocab, [gaps(), gaps()], any::<u64>());
    for_all(make, 256, case, |rig, &(count, vocab, gaps, seed)| {
        let mut fill = Fill::new(seed);
        let rows: Vec<Row> = (0..count).map(|_| row(&mut fill, vocab)).collect();
        let tokens = sampled(rig, &rows, vocab, gaps)?;
        for (r, (token, row)) in tokens.iter().zip(&rows).enumerate() {
            let allowed = allowed(&row.logits, &row.params, &row.seen);
            prop_assert!(
                allowed.contains(&(*token as usize)),
                "sample [{count}, {vocab}]: row {r} drew {token}, expected one of {allowed:?}; \
                 {:?} {:?}",
                row.params,
                row.seen
            );
        }
        Ok(())
    });
}

/// A row gets the same token alone, in any batch and at any place in it.
pub fn a_draw_does_not_depend_on_the_batch<B: Backend>(make: &dyn Fn() -> B, _: Types) {
    let case = (2usize..20, 1usize..60, [gaps(), gaps()], any::<u64>());
    for_all(make, 96, case, |rig, &(count, vocab, gaps, seed)| {
        let mut fill = Fill::new(seed);
        let rows: Vec<Row> = (0..count).map(|_| row(&mut fill, vocab)).collect();
        let tokens = sampled(rig, &rows, vocab, gaps)?;
        let order = fill.shuffled(count);
        let shuffled: Vec<Row> = order.iter().map(|r| rows[*r as usize].clone()).collect();
        let again = sampled(rig, &shuffled, vocab, Default::default())?;
        for (place, r) in order.iter().enumerate() {
            let (r, token) = (*r as usize, again[place]);
            prop_assert_eq!(token, tokens[r], "row {} of {}, moved to {}", r, count, place);
            let alone = sampled(rig, &rows[r..=r], vocab, Default::default())?;
            prop_assert_eq!(alone[0], tokens[r], "row {} of {} alone", r, count);
        }
        Ok(())
    });
}

/// Valid operands in the backend's memory: 2 rows of 8 tokens.
struct Right<B: Backend> {
    logits: Placed<B>,
    params: Placed<B>,
    history: Placed<B>,
    banned: Placed<B>,
    bias: Placed<B>,
    masks: Placed<B>,
    out: [Placed<B>; 1],
}

impl<B: Backend> Right<B> {
    fn new(rig: &mut Rig<B>) -> lora_core::Result<Self> {
        let none = Gaps::default();
        Ok(Self {
            logits: rig.place(&Fill::new(11).matrix(2, 8, DType::F32), none)?,
            params: rig.place(&params([0, 2], [0, 1], 0), none)?,
            history: rig.place(&Matrix::ints(2, 2, &[0, 1, 7, 2]), none)?,
            banned: rig.ids(&[3])?,
            bias: rig.place(&Matrix::ints(1, 2, &[6, 0]), none)?,
            masks: rig.place(&Matrix::ints(1, 1, &[0b1101_1110]), none)?,
            out: [rig.place(&Matrix::ints(1, 2, &[-7, -7]), none)?],
        })
    }
}

/// A greedy row without history, and one with the given entries and mask.
fn params(history: [u32; 2], banned: [u32; 2], mask: i32) -> Matrix {
    let bias = [0, 1];
    let rows = [SampleRow::GREEDY, SampleRow { history, banned, bias, mask, ..SampleRow::GREEDY }];
    Matrix::ints(2, SampleRow::WORDS, bytemuck::cast_slice(&rows))
}

/// Checks that the call is refused after the change `spoil`.
fn refused<B: Backend>(
    m: &mut Misuse<B>,
    right: &mut Right<B>,
    what: &str,
    spoil: fn(&mut SampleArgs<'_, B>),
) {
    let Right { logits, params, history, banned, bias, masks, out } = right;
    m.refused(&format!("sample: {what}"), out, |rig, [out]| {
        let mut args = SampleArgs {
            logits: logits.view(),
            params: params.view(),
            history: history.view(),
            banned: banned.view(),
            bias: bias.view(),
            masks: masks.view(),
        };
        spoil(&mut args);
        rig.be.sample(&mut rig.q, args, out.view_mut())
    });
}

/// A misuse of the op: a description, and the change that makes operands invalid.
type Spoil<B> = (&'static str, fn(&mut SampleArgs<'_, B>));

/// Wrong shapes and dtypes are errors, and nothing is written.
pub fn sampling_refuses_misfits<B: Backend>(make: &dyn Fn() -> B, _: Types) {
    let spoils: [Spoil<B>; 12] = [
        ("16-bit logits", |a| a.logits.layout.dtype = DType::Bf16),
        ("rows of logits", |a| a.logits.layout = a.logits.layout.slice_rows(0..1)),
        ("rows of params", |a| a.params.layout = a.params.layout.slice_rows(0..1)),
        ("columns of params", |a| a.params.layout = a.params.layout.slice_cols(0..4)),
        ("dtype of params", |a| a.params.layout.dtype = DType::Bf16),
        ("columns of history", |a| a.history.layout = a.history.layout.slice_cols(0..1)),
        ("dtype of history", |a| a.history.layout.dtype = DType::Bf16),
        ("columns of bias", |a| a.bias.layout = a.bias.layout.slice_cols(0..1)),
        ("dtype of bias", |a| a.bias.layout.dtype = DType::F32),
        ("dtype of banned", |a| a.banned.layout.dtype = DType::F32),
        ("columns of masks", |a| a.masks.layout = a.masks.layout.slice_cols(0..0)),
        ("dtype of masks", |a| a.masks.layout.dtype = DType::F32),
    ];
    refusals(make, |m| {
        let mut right = Right::new(&mut m.rig)?;
        for (what, spoil) in spoils {
            refused(m, &mut right, what, spoil);
        }
        let plain = m.rig.place(&params([0, 0], [0, 0], SampleRow::UNMASKED), Gaps::default())?;
        m.refused("sample: an empty vocabulary", &mut right.out, |rig, [out]| {
            let args = SampleArgs {
                logits: right.logits.view().slice_cols(0..0),
                params: plain.view(),
                history: right.history.view(),
                banned: right.banned.view().slice_cols(0..0),
                bias: right.bias.view().slice_rows(0..0),
                masks: right.masks.view().slice_cols(0..0),
            };
            rig.be.sample(&mut rig.q, args, out.view_mut())
        });
        m.refused("sample: dtype of out", &mut right.out, |rig, [out]| {
            let args = SampleArgs {
                logits: right.logits.view(),
                params: right.params.view(),
                history: right.history.view(),
                banned: right.banned.view(),
                bias: right.bias.view(),
                masks: right.masks.view(),
            };
            rig.be.sample(&mut rig.q, args, out.mistyped_mut(DType::F32))
        });
        Ok(())
    });
}

/// Tokens outside the vocabulary and entries outside their lists are errors, and nothing is
/// written.
pub fn sampling_refuses_ids_out_of_range<B: Backend>(make: &dyn Fn() -> B, _: Types) {
    refusals(make, |m| {
        for bad in [8, -1, i32::MAX] {
            let mut right = Right::new(&mut m.rig)?;
            right.banned = m.rig.ids(&[bad])?;
            refused(m, &mut right, &format!("banned token {bad} of 8"), |_| {});
            let mut right = Right::new(&mut m.rig)?;
            right.history = m.rig.place(&Matrix::ints(2, 2, &[0, 1, bad, 2]), Gaps::default())?;
            refused(m, &mut right, &format!("seen token {bad} of 8"), |_| {});
            let mut right = Right::new(&mut m.rig)?;
            right.bias = m.rig.place(&Matrix::ints(1, 2, &[bad, 0]), Gaps::default())?;
            refused(m, &mut right, &format!("biased token {bad} of 8"), |_| {});
        }
        for (history, banned, mask) in [
            ([1, 2], [0, 1], 0),
            ([u32::MAX, 2], [0, 1], 0),
            ([0, 2], [1, 1], 0),
            ([0, 2], [0, 1], 1),
            ([0, 2], [0, 1], -2),
        ] {
            let mut right = Right::new(&mut m.rig)?;
            right.params = m.rig.place(&params(history, banned, mask), Gaps::default())?;
            let what = format!("entries {history:?}, {banned:?}, mask {mask}");
            refused(m, &mut right, &what, |_| {});
        }
        Ok(())
    });
}
