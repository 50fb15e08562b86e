//! Linear layers.

use lora_core::ops::HostUpdate;
use lora_core::{Backend, DType};
use proptest::prelude::*;

use super::compare::{Class, close, exact};
use super::draw::{Fill, cols, gaps, rows};
use super::misuse::refusals;
use super::num::Num;
use super::reference;
use super::rig::{Gaps, Matrix, Rig};
use super::{Types, for_all};

/// Shape of a product.
#[derive(Clone, Debug)]
struct Case {
    rows: usize,
    in_dim: usize,
    /// Output widths of the stacked matrices.
    parts: Vec<usize>,
    bias: bool,
    gaps: [Gaps; 2],
    seed: u64,
}

/// Operands of a product.
pub struct Operands {
    /// The input.
    pub x: Matrix,
    /// The stacked matrices.
    pub parts: Vec<Matrix>,
    /// Bias of all outputs.
    pub bias: Option<Vec<f32>>,
}

fn cases(rows: impl Strategy<Value = usize>) -> impl Strategy<Value = Case> {
    let parts = prop::collection::vec(cols(), 1..4);
    (rows, cols(), parts, any::<bool>(), [gaps(), gaps()], any::<u64>()).prop_map(
        |(rows, in_dim, parts, bias, gaps, seed)| Case { rows, in_dim, parts, bias, gaps, seed },
    )
}

impl Case {
    fn out_dim(&self) -> usize {
        self.parts.iter().sum()
    }

    fn operands(&self, types: Types) -> Operands {
        let mut fill = Fill::new(self.seed);
        let parts = self.parts.iter().map(|n| fill.matrix(*n, self.in_dim, types.w)).collect();
        Operands {
            parts,
            bias: self.bias.then(|| fill.values(self.out_dim())),
            x: fill.matrix(self.rows, self.in_dim, types.x),
        }
    }
}

impl Operands {
    /// The parts prepared as one matrix.
    fn weights<B: Backend>(&self, be: &B) -> lora_core::Result<B::Linear> {
        let parts: Vec<_> = self.parts.iter().map(|part| part.data.clone()).collect();
        be.prepare_linear(&parts, self.bias.as_deref())
    }
}

/// `x wᵀ`, as a matrix of `dtype`.
pub fn product<B: Backend>(
    rig: &mut Rig<B>,
    x: &Matrix,
    w: &B::Linear,
    cols: usize,
    dtype: DType,
    [x_gaps, out_gaps]: [Gaps; 2],
) -> Result<Matrix, TestCaseError> {
    let mut out = rig.place(&Fill::new(0).matrix(x.rows, cols, dtype), out_gaps)?;
    let x = rig.place(x, x_gaps)?;
    rig.be.linear(&mut rig.q, x.view(), w, out.view_mut())?;
    out.read(rig)
}

/// `out = x wᵀ + bias` for parts stacked by rows.
pub fn a_product_is_its_formula<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 192, cases(rows()), |rig, case| {
        let operands = case.operands(types);
        let w = operands.weights(&rig.be)?;
        let found = product(rig, &operands.x, &w, case.out_dim(), types.out, case.gaps)?;
        let rows: Vec<f32> = operands.parts.iter().flat_map(|part| part.data.to_f32()).collect();
        let stacked = Matrix::floats(case.out_dim(), case.in_dim, types.w, &rows);
        let expected = reference::linear(&operands.x, &stacked, operands.bias.as_deref());
        close("linear", &found, &expected, Class::Dot(case.in_dim))
    });
}

/// A row gets the same bits alone, in a small batch and in a large one.
pub fn a_row_is_multiplied_as_if_it_were_alone<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let rows = prop_oneof![4 => 2usize..40, 1 => 90usize..140];
    if !make().caps().batch_invariant {
        return;
    }
    for_all(make, 96, cases(rows), |rig, case| {
        let operands = case.operands(types);
        let w = operands.weights(&rig.be)?;
        let (cols, dtype) = (case.out_dim(), types.out);
        let together = product(rig, &operands.x, &w, cols, dtype, case.gaps)?;
        let last = case.rows - 1;
        for some in [vec![0], vec![case.rows / 2], vec![last], vec![last, 0]] {
            let found = product(rig, &operands.x.pick(&some), &w, cols, dtype, Default::default())?;
            exact(&format!("linear of rows {some:?} alone"), &found, &together.pick(&some))?;
        }
        Ok(())
    });
}

/// `row_norms` are the Euclidean norms of the rows of `w + scale * b a`, for any range of rows.
pub fn row_norms_are_those_of_the_sum<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let case = (cols(), cols(), 1usize..=40, (0usize..300, 0usize..300), -2f32..2.0, any::<u64>());
    for_all(make, 96, case, |rig, &(out, in_dim, rank, (a, b), scale, seed)| {
        let mut fill = Fill::new(seed);
        let w = fill.matrix(out, in_dim, types.w);
        let rows = a.min(b).min(out)..a.max(b).min(out);
        let low = [fill.matrix(rank, in_dim, types.w), fill.matrix(rows.len(), rank, types.w)];
        let prepared = rig.be.prepare_linear(std::slice::from_ref(&w.data), None)?;
        let update = HostUpdate { a: &low[0].data, b: &low[1].data, scale };
        let found = rig.be.row_norms(&prepared, rows.clone(), update)?;
        let [a, b] = low.map(|m| (0..m.rows).map(|r| m.nums(r)).collect::<Vec<_>>());
        let norm = |(i, n): (usize, usize)| {
            let element = |k: usize| {
                let delta: Num = (0..rank).map(|j| b[i][j] * a[j][k]).sum();
                Num::of(w.at(n, k).into()) + delta * f64::from(scale)
            };
            let elements: Vec<Num> = (0..in_dim).map(element).collect();
            let root = |f: fn(&Num) -> f64| elements.iter().map(|e| f(e).powi(2)).sum::<f64>();
            Num { value: root(|e| e.value).sqrt(), size: root(|e| e.size).sqrt() }
        };
        let expected: Vec<Num> = rows.enumerate().map(norm).collect();
        let found = Matrix::floats(1, found.len(), DType::F32, &found);
        close("row_norms", &found, &expected, Class::Dot(in_dim + rank))
    });
}

/// Wrong shapes and dtypes are errors, and nothing is written.
pub fn products_refuse_misfits<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        let mut fill = Fill::new(4);
        let matrix = fill.matrix(7, 6, types.w).data;
        let w = m.rig.be.prepare_linear(std::slice::from_ref(&matrix), None)?;
        let x = m.rig.place(&fill.matrix(4, 6, types.x), Gaps::default())?;
        let mut out = [m.rig.place(&fill.matrix(4, 7, types.out), Gaps::default())?];
        for (what, x) in [
            ("columns of x", x.view().slice_cols(0..5)),
            ("rows of x", x.view().slice_rows(0..3)),
            ("integers for x", x.mistyped(DType::I32)),
        ] {
            m.refused(&format!("linear: {what}"), &mut out, |rig, [out]| {
                rig.be.linear(&mut rig.q, x, &w, out.view_mut())
            });
        }
        m.refused("linear: columns of out", &mut out, |rig, [out]| {
            let mut out = out.view_mut();
            out.layout = out.layout.slice_cols(0..6);
            rig.be.linear(&mut rig.q, x.view(), &w, out)
        });
        m.refused("linear: integers for out", &mut out, |rig, [out]| {
            rig.be.linear(&mut rig.q, x.view(), &w, out.mistyped_mut(DType::I32))
        });
        let ints = Matrix::ints(7, 6, &fill.ids(42, 9)).data;
        let narrow = fill.matrix(7, 5, types.w).data;
        let vector = Matrix::floats(1, 6, types.w, &fill.values(6)).data;
        let vector = lora_core::HostTensor::new(types.w, vec![6], vector.bytes().clone());
        for (what, parts, bias) in [
            ("integers", vec![ints], None),
            ("columns of the second part", vec![matrix.clone(), narrow.clone()], None),
            ("a vector", vector.into_iter().collect(), None),
            ("bias", vec![matrix], Some(vec![0f32; 6])),
        ] {
            m.refused(&format!("prepare_linear: {what}"), &mut [], |rig, []| {
                rig.be.prepare_linear(&parts, bias.as_deref()).map(drop)
            });
        }
        let (a, b) = (fill.matrix(2, 6, types.w).data, fill.matrix(7, 2, types.w).data);
        for (what, rows, a, b) in [
            ("columns of a", 0..7, &narrow, &b),
            ("rows of b", 0..6, &a, &b),
            ("rows", 1..8, &a, &b),
        ] {
            m.refused(&format!("row_norms: {what}"), &mut [], |rig, []| {
                rig.be.row_norms(&w, rows, HostUpdate { a, b, scale: 1.0 }).map(drop)
            });
        }
        Ok(())
    });
}
