//! Linear layers with e4m3 weights.

use lora_core::fp8::{self, Fp8Scales, InputScale};
use lora_core::ops::HostUpdate;
use lora_core::{Backend, DType};
use proptest::prelude::*;

use super::compare::{Class, close, exact};
use super::draw::{Fill, cols, gaps, rows};
use super::linear::{Operands, product};
use super::misuse::refusals;
use super::num::Num;
use super::reference;
use super::rig::{Gaps, Matrix};
use super::{Types, for_all};

/// Shape of a product.
#[derive(Clone, Debug)]
struct Case {
    rows: usize,
    in_dim: usize,
    /// Output width and scale of each stacked matrix.
    parts: Vec<(usize, f32)>,
    input: InputScale,
    bias: bool,
    gaps: [Gaps; 2],
    seed: u64,
}

fn cases(rows: impl Strategy<Value = usize>) -> impl Strategy<Value = Case> {
    let scale = || prop::sample::select(vec![1.0f32, 0.5, 0.01, 0.037, 2.3]);
    // Kernels with loads of 16 bytes need multiples of 16.
    let outputs = prop_oneof![cols(), prop::sample::select(vec![16usize, 48, 128])];
    let parts = prop::collection::vec((outputs, scale()), 1..4);
    let input = prop_oneof![Just(InputScale::Dynamic), scale().prop_map(InputScale::Static)];
    let inputs = prop_oneof![cols(), prop::sample::select(vec![16usize, 64, 512])];
    (rows, inputs, parts, input, any::<bool>(), [gaps(), gaps()], any::<u64>()).prop_map(
        |(rows, in_dim, parts, input, bias, gaps, seed)| Case {
            rows,
            in_dim,
            parts,
            input,
            bias,
            gaps,
            seed,
        },
    )
}

impl Case {
    fn out_dim(&self) -> usize {
        self.parts.iter().map(|(n, _)| n).sum()
    }

    fn operands(&self, types: Types) -> Operands {
        let mut fill = Fill::new(self.seed);
        let part = |(n, _): &(usize, f32)| fill.matrix(*n, self.in_dim, DType::F8E4m3);
        Operands {
            parts: self.parts.iter().map(part).collect(),
            bias: self.bias.then(|| fill.values(self.out_dim())),
            x: fill.matrix(self.rows, self.in_dim, types.x),
        }
    }

    fn prepare<B: Backend>(&self, be: &B, operands: &Operands) -> lora_core::Result<B::Linear> {
        let parts: Vec<_> = operands.parts.iter().map(|part| part.data.clone()).collect();
        let scales = self.parts.iter().map(|(_, scale)| *scale).collect();
        let scales = Fp8Scales { parts: scales, input: self.input };
        be.prepare_fp8_linear(&parts, &scales, operands.bias.as_deref())
    }

    /// The expected result of every row.
    fn expected(&self, operands: &Operands) -> Vec<Num> {
        let row = |r: usize| {
            let x: Vec<f32> = (0..self.in_dim).map(|c| operands.x.at(r, c)).collect();
            let input = match self.input {
                InputScale::Static(scale) => scale,
                InputScale::Dynamic => fp8::scale_of(x.iter().copied()),
            };
            let rounded = x.iter().map(|v| Num::of(fp8::decode(fp8::encode(v / input)).into()));
            let rounded: Vec<Num> = rounded.collect();
            let mut out = Vec::with_capacity(self.out_dim());
            for (part, (_, scale)) in operands.parts.iter().zip(&self.parts) {
                let factor = f64::from(*scale) * f64::from(input);
                let dot = |n| reference::dot(&rounded, &part.nums(n)) * factor;
                out.extend((0..part.rows).map(dot));
            }
            if let Some(bias) = &operands.bias {
                out.iter_mut().zip(bias).for_each(|(y, b)| *y = *y + Num::of((*b).into()));
            }
            out
        };
        (0..self.rows).flat_map(row).collect()
    }
}

/// `out = e4m3(x / s) wᵀ * s * scale of the part + bias`, with a static scale s and with that of the row.
pub fn an_fp8_product_is_its_formula<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 192, cases(rows()), |rig, case| {
        let operands = case.operands(types);
        let w = case.prepare(&rig.be, &operands)?;
        let found = product(rig, &operands.x, &w, case.out_dim(), types.out, case.gaps)?;
        // Tensor cores of Hopper keep fewer bits of a sum of e4m3 products than f32 has.
        let class = if rig.be.caps().batch_invariant {
            Class::Dot(case.in_dim)
        } else {
            Class::Through(case.in_dim, DType::F16)
        };
        close("fp8 linear", &found, &case.expected(&operands), class)
    });
}

/// A row gets the same bits alone and in a batch.
pub fn an_fp8_row_is_multiplied_as_if_it_were_alone<B: Backend>(
    make: &dyn Fn() -> B,
    types: Types,
) {
    if !make().caps().batch_invariant {
        return;
    }
    for_all(make, 64, cases(2usize..40), |rig, case| {
        let operands = case.operands(types);
        let w = case.prepare(&rig.be, &operands)?;
        let (cols, dtype) = (case.out_dim(), types.out);
        let together = product(rig, &operands.x, &w, cols, dtype, case.gaps)?;
        for some in [vec![0], vec![case.rows / 2], vec![case.rows - 1, 0]] {
            let found = product(rig, &operands.x.pick(&some), &w, cols, dtype, Default::default())?;
            exact(&format!("fp8 linear of rows {some:?} alone"), &found, &together.pick(&some))?;
        }
        Ok(())
    });
}

/// `row_norms` are those of the scaled weights.
pub fn row_norms_count_the_scales<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 48, cases(Just(0)), |rig, case| {
        let operands = case.operands(types);
        let w = case.prepare(&rig.be, &operands)?;
        let (mut fill, out) = (Fill::new(case.seed), case.out_dim());
        let (a, b) = (
            fill.matrix(1, case.in_dim, types.w),
            Matrix::floats(out, 1, types.w, &vec![0.0; out]),
        );
        let found =
            rig.be.row_norms(&w, 0..out, HostUpdate { a: &a.data, b: &b.data, scale: 1.0 })?;
        let norm = |part: &Matrix, n: usize, scale: f32| {
            let squares = part.nums(n).iter().map(|e| e.value * e.value).sum::<f64>();
            Num::of(squares.sqrt() * f64::from(scale))
        };
        let parts = operands.parts.iter().zip(&case.parts);
        let expected: Vec<Num> = parts
            .flat_map(|(part, (_, scale))| (0..part.rows).map(|n| norm(part, n, *scale)))
            .collect();
        let found = Matrix::floats(1, found.len(), DType::F32, &found);
        close("row_norms", &found, &expected, Class::Dot(case.in_dim))
    });
}

/// Parts that are not e4m3, too few scales, and use as an embedding are errors.
pub fn fp8_products_refuse_misfits<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        let mut fill = Fill::new(4);
        let codes = fill.matrix(7, 6, DType::F8E4m3).data;
        let narrow = fill.matrix(7, 5, DType::F8E4m3).data;
        let floats = fill.matrix(7, 6, types.w).data;
        for (what, parts, scales, bias) in [
            ("floats", vec![floats], 1, None),
            ("too few scales", vec![codes.clone(), codes.clone()], 1, None),
            ("too many scales", vec![codes.clone()], 2, None),
            ("columns of the second part", vec![codes.clone(), narrow], 2, None),
            ("bias", vec![codes.clone()], 1, Some(vec![0f32; 6])),
        ] {
            m.refused(&format!("prepare_fp8_linear: {what}"), &mut [], |rig, []| {
                let scales = Fp8Scales { parts: vec![1.0; scales], input: InputScale::Dynamic };
                rig.be.prepare_fp8_linear(&parts, &scales, bias.as_deref()).map(drop)
            });
        }
        m.refused("prepare_linear: codes without a scale", &mut [], |rig, []| {
            rig.be.prepare_linear(std::slice::from_ref(&codes), None).map(drop)
        });
        let scales = Fp8Scales { parts: vec![1.0], input: InputScale::Dynamic };
        let table = m.rig.be.prepare_fp8_linear(std::slice::from_ref(&codes), &scales, None)?;
        let ids = m.rig.ids(&[0, 1])?;
        let mut out = [m.rig.place(&fill.matrix(2, 6, types.out), Gaps::default())?];
        m.refused("embed: a table in e4m3", &mut out, |rig, [out]| {
            rig.be.embed(&mut rig.q, &table, ids.view(), out.view_mut())
        });
        Ok(())
    });
}
