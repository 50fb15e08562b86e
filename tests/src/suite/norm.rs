//! Root-mean-square norms.

use lora_core::{Backend, DType};
use proptest::prelude::*;

use super::compare::{Class, close, exact};
use super::draw::{Fill, cols, gaps, rows};
use super::misuse::refusals;
use super::num::Num;
use super::reference::rms_norm;
use super::rig::{Gaps, Matrix, Rig};
use super::{Types, for_all};

const EPS: f32 = 1e-5;

/// A batch to normalise.
struct Operands {
    x: Matrix,
    residual: Matrix,
    w: Matrix,
}

fn operands(rows: usize, cols: usize, seed: u64, types: Types) -> Operands {
    let mut fill = Fill::new(seed);
    Operands {
        x: fill.matrix(rows, cols, types.x),
        residual: fill.matrix(rows, cols, types.out),
        w: fill.matrix(1, cols, DType::F32),
    }
}

fn norms(x: &Matrix, w: &Matrix) -> Vec<Num> {
    (0..x.rows).flat_map(|r| rms_norm(&x.nums(r), &w.nums(0), EPS)).collect()
}

/// `rms_norm` of `x` into `dtype`.
fn normalised<B: Backend>(
    rig: &mut Rig<B>,
    x: &Matrix,
    w: &Matrix,
    dtype: DType,
    [x_gaps, out_gaps]: [Gaps; 2],
) -> Result<Matrix, TestCaseError> {
    let mut out = rig.place(&Fill::new(0).matrix(x.rows, x.cols, dtype), out_gaps)?;
    let (x, w) = (rig.place(x, x_gaps)?, rig.place(w, Gaps::default())?);
    rig.be.rms_norm(&mut rig.q, x.view(), w.view().into(), EPS, out.view_mut())?;
    out.read(rig)
}

/// Residual and output of `add_rms_norm`, the latter in the dtype of `x`.
fn added<B: Backend>(
    rig: &mut Rig<B>,
    operands: &Operands,
    [x_gaps, residual_gaps, out_gaps]: [Gaps; 3],
) -> Result<[Matrix; 2], TestCaseError> {
    let Operands { x, residual, w } = operands;
    let mut out = rig.place(&Fill::new(0).matrix(x.rows, x.cols, x.dtype()), out_gaps)?;
    let mut residual = rig.place(residual, residual_gaps)?;
    let (x, w) = (rig.place(x, x_gaps)?, rig.place(w, Gaps::default())?);
    let (q, sum) = (&mut rig.q, residual.view_mut());
    rig.be.add_rms_norm(q, x.view(), sum, w.view().into(), EPS, out.view_mut())?;
    Ok([residual.read(rig)?, out.read(rig)?])
}

/// `out = x / sqrt(mean(x^2) + eps) * w`.
pub fn the_norm_is_its_formula<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let case = (rows(), cols(), [gaps(), gaps()], any::<u64>());
    for_all(make, 128, case, |rig, &(rows, cols, gaps, seed)| {
        let Operands { x, w, .. } = operands(rows, cols, seed, types);
        let found = normalised(rig, &x, &w, types.out, gaps)?;
        close("rms_norm", &found, &norms(&x, &w), Class::Dot(cols))
    });
}

/// The residual becomes the rounded sum, bit for bit, and the output is the norm of exactly that.
pub fn the_norm_after_an_addition_reads_the_rounded_sum<B: Backend>(
    make: &dyn Fn() -> B,
    types: Types,
) {
    let case = (rows(), cols(), [gaps(), gaps(), gaps()], any::<u64>());
    for_all(make, 128, case, |rig, &(rows, cols, gaps, seed)| {
        let operands = operands(rows, cols, seed, types);
        let [residual, out] = added(rig, &operands, gaps)?;
        let terms = operands.residual.data.iter_f32().zip(operands.x.data.iter_f32());
        let sums: Vec<f32> = terms.map(|(a, b)| a + b).collect();
        let sums = Matrix::floats(rows, cols, types.out, &sums);
        exact("residual of add_rms_norm", &residual, &sums)?;
        close("add_rms_norm", &out, &norms(&sums, &operands.w), Class::Dot(cols))
    });
}

/// A row gets the same bits alone and in a batch, wherever it is.
pub fn a_row_is_normalised_as_if_it_were_alone<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let case = (2usize..40, cols(), [gaps(), gaps(), gaps()], any::<u64>());
    for_all(make, 64, case, |rig, &(rows, cols, gaps, seed)| {
        let batch = operands(rows, cols, seed, types);
        let together = normalised(rig, &batch.x, &batch.w, types.out, [gaps[0], gaps[1]])?;
        let sums = added(rig, &batch, gaps)?;
        for r in [0, rows / 2, rows - 1] {
            let [x, residual] = [&batch.x, &batch.residual].map(|m| m.pick(&[r]));
            let alone = Operands { x, residual, w: batch.w.clone() };
            let found = normalised(rig, &alone.x, &alone.w, types.out, Default::default())?;
            exact("rms_norm of one row", &found, &together.pick(&[r]))?;
            let found = added(rig, &alone, Default::default())?;
            exact("residual of one row", &found[0], &sums[0].pick(&[r]))?;
            exact("add_rms_norm of one row", &found[1], &sums[1].pick(&[r]))?;
        }
        Ok(())
    });
}

/// Wrong shapes and dtypes are errors, and nothing is written.
pub fn norms_refuse_misfits<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        let Operands { x, residual, w } = operands(4, 6, 3, types);
        let place = |m: &Matrix, rig: &mut Rig<B>| rig.place(m, Gaps::default());
        let (x, w) = (place(&x, &mut m.rig)?, place(&w, &mut m.rig)?);
        let mut outs = [place(&residual, &mut m.rig)?, place(&residual, &mut m.rig)?];
        for (what, x, w) in [
            ("columns of x", x.view().slice_cols(0..5), w.view()),
            ("rows of x", x.view().slice_rows(0..3), w.view()),
            ("integers for x", x.mistyped(DType::I32), w.view()),
            ("columns of w", x.view(), w.view().slice_cols(0..5)),
            ("dtype of w", x.view(), w.mistyped(DType::Bf16)),
        ] {
            m.refused(&format!("rms_norm: {what}"), &mut outs, |rig, [out, _]| {
                rig.be.rms_norm(&mut rig.q, x, w.into(), EPS, out.view_mut())
            });
            m.refused(&format!("add_rms_norm: {what}"), &mut outs, |rig, [sum, out]| {
                let (q, sum, out) = (&mut rig.q, sum.view_mut(), out.view_mut());
                rig.be.add_rms_norm(q, x, sum, w.into(), EPS, out)
            });
        }
        m.refused("add_rms_norm: rows of out", &mut outs, |rig, [sum, out]| {
            let (q, mut out) = (&mut rig.q, out.view_mut());
            out.layout = out.layout.slice_rows(0..3);
            rig.be.add_rms_norm(q, x.view(), sum.view_mut(), w.view().into(), EPS, out)
        });
        m.refused("add_rms_norm: integers for the residual", &mut outs, |rig, [sum, out]| {
            let (q, sum) = (&mut rig.q, sum.mistyped_mut(DType::I32));
            rig.be.add_rms_norm(q, x.view(), sum, w.view().into(), EPS, out.view_mut())
        });
        Ok(())
    });
}
