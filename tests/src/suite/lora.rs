//! LoRA on base layers.

use lora_core::fp8::{Fp8Scales, InputScale};
use lora_core::lora::{LoraSite, SiteKind, SiteSpec, SlotSlice};
use lora_core::{Backend, DType};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::compare::{Class, close, exact};
use super::draw::Fill;
use super::lora_case::{
    Case, added, embedding_cases, gated_cases, linear_cases, long_input_cases, many_gated_cases,
    many_gated_fp8_cases, many_row_cases, plan, prompt_cases, tiled_cases, wide_gated_cases,
};
use super::misuse::{Misuse, refusals};
use super::num::Num;
use super::reference::{Input, adapted, gated, linear};
use super::rig::{Gaps, Matrix, Rig};
use super::{Types, for_all};

const NONE: [Gaps; 2] = [Gaps { outer_rows: 0, left: 0, right: 0 }; 2];

/// The input and base output of a case.
fn operands(case: &Case, types: Types) -> [Matrix; 2] {
    let mut fill = Fill::new(case.seed);
    let rows = case.slot_of_row.len();
    [fill.matrix(rows, case.in_dim, types.x), fill.matrix(rows, case.out_dim(), types.out)]
}

/// Each slice of each row becomes `gain * (y + scale * B (A x)) + shift`, with `W x` instead of `y` if the
/// adapter replaces the matrix. Slices that the adapter does not change keep their bits.
pub fn an_adapter_does_what_its_formula_says<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 192, linear_cases(), |rig, case| meets_the_formula(rig, case, types));
}

/// The same for long prompts, for which a device may use other kernels.
pub fn long_prompts_get_their_adapters<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 6, prompt_cases(), |rig, case| meets_the_formula(rig, case, types));
}

fn meets_the_formula<B: Backend>(rig: &mut Rig<B>, case: &Case, types: Types) -> TestCaseResult {
    let [x, y] = operands(case, types);
    let site = case.site(rig, SiteKind::Linear, types)?;
    let found = added(rig, &site.site, &case.slot_of_row, [&x, &y], case.gaps)?;
    let input = |r: usize| Input::Row(x.nums(r));
    case.check("lora_add", &site.slots, SiteKind::Linear, input, [&y, &found])
}

/// LoRA on an embedding is that of a projection where `x` is the one-hot row of the token id.
pub fn an_embedding_adapter_does_what_its_formula_says<B: Backend>(
    make: &dyn Fn() -> B,
    types: Types,
) {
    for_all(make, 128, embedding_cases(), |rig, case| {
        let (rows, mut fill) = (case.slot_of_row.len(), Fill::new(case.seed));
        let (ids, y) = (fill.ids(rows, case.in_dim), fill.matrix(rows, case.out_dim(), types.out));
        let site = case.site(rig, SiteKind::Embedding, types)?;
        let (plan, placed) = (plan(rig, &case.slot_of_row)?, rig.ids(&ids)?);
        let mut out = rig.place(&y, case.gaps[1])?;
        rig.be.lora_embed(&mut rig.q, placed.view(), &site.site, &plan, out.view_mut())?;
        let found = out.read(rig)?;
        let input = |r: usize| Input::OneHot(ids[r] as usize);
        case.check("lora_embed", &site.slots, SiteKind::Embedding, input, [&y, &found])
    });
}

/// `linear_lora` is `linear`, then `lora_add`; without adapters it is bitwise equal to `linear`.
pub fn a_product_then_its_adapter<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 96, linear_cases(), |rig, case| product_then_adapter(rig, case, types));
}

/// The same for dimensions that suit tensor cores, ranks up to 256, and many adapters.
pub fn products_in_tiles_get_their_adapters<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 16, tiled_cases(), |rig, case| product_then_adapter(rig, case, types));
}

/// The same for so many rows that a device may use kernels that fuse the adapter into the GEMM.
pub fn products_of_many_rows_get_their_adapters<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 4, many_row_cases(), |rig, case| product_then_adapter(rig, case, types));
}

/// The same for many rows of long inputs.
pub fn long_inputs_get_their_adapters<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 4, long_input_cases(), |rig, case| product_then_adapter(rig, case, types));
}

fn product_then_adapter<B: Backend>(rig: &mut Rig<B>, case: &Case, types: Types) -> TestCaseResult {
    let [x, y] = operands(case, types);
    let mut fill = Fill::new(case.seed ^ 2);
    let w = fill.matrix(case.out_dim(), case.in_dim, types.w);
    let bias = fill.values(case.out_dim());
    let prepared = rig.be.prepare_linear(std::slice::from_ref(&w.data), Some(&bias))?;
    let site = case.site(rig, SiteKind::Linear, types)?;
    let plan = plan(rig, &case.slot_of_row)?;
    let placed = rig.place(&x, case.gaps[0])?;
    let mut outs = [None, Some(&plan)].map(|plan| (plan, rig.place(&y, case.gaps[1])));
    let mut found = Vec::new();
    for (plan, out) in &mut outs {
        let out = out.as_mut().map_err(|e| TestCaseError::fail(e.to_string()))?;
        let lora = plan.map(|plan| (&site.site, plan));
        rig.be.linear_lora(&mut rig.q, placed.view(), &prepared, lora, out.view_mut())?;
        found.push(out.read(rig)?);
    }
    let mut plain = rig.place(&y, NONE[1])?;
    rig.be.linear(&mut rig.q, placed.view(), &prepared, plain.view_mut())?;
    exact("linear_lora without adapters", &found[0], &plain.read(rig)?)?;

    let expected = with_adapters(case, &site.slots, &x, linear(&x, &w, Some(&bias)));
    let class = Class::Through(case.in_dim + case.max_rank(), types.out);
    close("linear_lora", &found[1], &expected, class)
}

/// The expected output after applying adapters to all rows: `[rows, out_dim]`.
fn with_adapters(
    case: &Case,
    slots: &[Vec<Option<SlotSlice>>],
    x: &Matrix,
    mut outputs: Vec<Num>,
) -> Vec<Num> {
    for (r, slot) in case.slot_of_row.iter().enumerate() {
        let Ok(slot) = usize::try_from(*slot) else { continue };
        let mut left = &mut outputs[r * case.out_dim()..];
        for (slice, width) in slots[slot].iter().zip(&case.widths) {
            let (of_slice, rest) = left.split_at_mut(*width);
            if let Some(slice) = slice {
                let input = Input::Row(x.nums(r));
                of_slice.copy_from_slice(&adapted(SiteKind::Linear, slice, &input, of_slice));
            }
            left = rest;
        }
    }
    outputs
}

/// `gated_linear_lora` is `linear_lora`, then `silu_mul`.
pub fn a_gated_product_is_its_parts<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 48, gated_cases(), |rig, case| gated_product(rig, case, types, types.w));
}

/// The same for so many rows that a device may fuse all of it.
pub fn gated_products_of_many_rows_are_their_parts<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 4, many_gated_cases(), |rig, case| gated_product(rig, case, types, types.w));
}

/// The same for fewer rows without adapters, but with many outputs.
pub fn wide_gated_products_are_their_parts<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 1, wide_gated_cases(), |rig, case| gated_product(rig, case, types, types.w));
}

/// The same for e4m3 weights, with inputs that are exact in e4m3.
pub fn gated_fp8_products_of_many_rows_are_their_parts<B: Backend>(
    make: &dyn Fn() -> B,
    types: Types,
) {
    let cases = many_gated_fp8_cases();
    for_all(make, 4, cases, |rig, case| gated_product(rig, case, types, DType::F8E4m3));
}

fn gated_product<B: Backend>(
    rig: &mut Rig<B>,
    case: &Case,
    types: Types,
    weights: DType,
) -> TestCaseResult {
    let mut fill = Fill::new(case.seed);
    let (rows, width) = (case.slot_of_row.len(), case.widths[0]);
    let y = fill.matrix(rows, 2 * width, types.out);
    let fp8 = weights == DType::F8E4m3;
    let values = fill.matrix(rows, case.in_dim, if fp8 { weights } else { DType::F32 });
    // Small, so that products of two sums are in the range of 16-bit floats.
    let of_row = |r| (0..case.in_dim).map(move |c| (r, c));
    let values: Vec<f32> =
        (0..rows).flat_map(of_row).map(|(r, c)| values.at(r, c) / 16.0).collect();
    let x = Matrix::floats(rows, case.in_dim, types.x, &values);
    let w = fill.matrix(case.out_dim(), case.in_dim, weights);
    let bias = fill.values(case.out_dim());
    let parts = std::slice::from_ref(&w.data);
    let prepared = if fp8 {
        let scales = Fp8Scales { parts: vec![1.0], input: InputScale::Static(1.0 / 16.0) };
        rig.be.prepare_fp8_linear(parts, &scales, Some(&bias))?
    } else {
        rig.be.prepare_linear(parts, Some(&bias))?
    };
    let site = case.site(rig, SiteKind::Linear, types)?;
    let (plan, placed) = (plan(rig, &case.slot_of_row)?, rig.place(&x, case.gaps[0])?);
    let base = linear(&x, &w, Some(&bias));
    let adapted = with_adapters(case, &site.slots, &x, base.clone());
    for (lora, outputs) in [(None, base), (Some((&site.site, &plan)), adapted)] {
        let mut gate_up = rig.place(&y, case.gaps[1])?;
        let mut out = rig.place(&fill.matrix(rows, width, types.x), case.gaps[0])?;
        let (gate_up, target) = (gate_up.view_mut(), out.view_mut());
        rig.be.gated_linear_lora(&mut rig.q, placed.view(), &prepared, lora, gate_up, target)?;
        let halves = outputs.chunks(2 * width).map(|row| row.split_at(width));
        let gates = halves.flat_map(|(gate, up)| gate.iter().zip(up).map(|(g, u)| gated(*g, *u)));
        let (op, rounded) = match (fp8, types.out) {
            // Sums of e4m3 have fewer bits than f32 on some devices.
            (true, DType::F32) => ("gated fp8 linear_lora", DType::F16),
            (true, dtype) => ("gated fp8 linear_lora", dtype),
            (false, dtype) => ("gated_linear_lora", dtype),
        };
        let class = Class::Through(case.in_dim + case.max_rank(), rounded);
        close(op, &out.read(rig)?, &gates.collect::<Vec<_>>(), class)?;
    }
    Ok(())
}

/// A row gets the same bits alone and in a plan of several adapters.
pub fn a_row_gets_its_adapter_as_if_it_were_alone<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 96, linear_cases(), |rig, case| {
        let [x, y] = operands(case, types);
        let site = case.site(rig, SiteKind::Linear, types)?.site;
        let together = added(rig, &site, &case.slot_of_row, [&x, &y], case.gaps)?;
        for (r, slot) in case.slot_of_row.iter().enumerate().take(9) {
            let [x, y] = [&x, &y].map(|m| m.pick(&[r]));
            // With another alignment, a device may sum in another order.
            let placements = if rig.be.caps().batch_invariant { vec![NONE] } else { vec![] };
            for gaps in placements.into_iter().chain([case.gaps]) {
                let alone = added(rig, &site, &[*slot], [&x, &y], gaps)?;
                exact("lora_add of one row", &alone, &together.pick(&[r]))?;
            }
        }
        Ok(())
    });
}

/// Rows with slot -1 keep their bits even if they are NaN, and so do rows with a slot that was cleared.
pub fn rows_without_an_adapter_keep_bits<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 64, linear_cases(), |rig, case| {
        let [x, _] = operands(case, types);
        let strange = [f32::NAN, -0.0, f32::INFINITY, f32::NEG_INFINITY, 1e-40, 1.0];
        let (rows, cols) = (case.slot_of_row.len(), case.out_dim());
        let values: Vec<f32> = strange.into_iter().cycle().take(rows * cols).collect();
        let y = Matrix::floats(rows, cols, types.out, &values);
        let mut site = case.site(rig, SiteKind::Linear, types)?.site;
        let found = added(rig, &site, &case.slot_of_row, [&x, &y], case.gaps)?;
        for (r, _) in case.slot_of_row.iter().enumerate().filter(|(_, slot)| **slot == -1) {
            exact("lora_add of a row without adapter", &found.pick(&[r]), &y.pick(&[r]))?;
        }
        for slot in 0..case.adapters.len() {
            let cleared = vec![None; case.widths.len()];
            rig.be.write_slot(&mut rig.q, &mut site, slot, &cleared)?;
        }
        let found = added(rig, &site, &case.slot_of_row, [&x, &y], case.gaps)?;
        exact("lora_add of cleared slots", &found, &y)
    });
}

/// A projection of 6 columns to slices of 4 and 3 with 2 slots, the first of them full.
fn small_site<B: Backend>(m: &mut Misuse<B>, types: Types) -> lora_core::Result<LoraSite<B>> {
    let spec = SiteSpec::linear(6, &[4, 3]);
    let table = m.rig.be.lora_table(&spec, 2)?;
    let mut site = LoraSite { spec, table };
    let slices = [4, 3].map(|out| Some(super::slots::slice(&mut Fill::new(13), [6, out], types.w)));
    m.rig.be.write_slot(&mut m.rig.q, &mut site, 0, &slices)?;
    Ok(site)
}

/// Wrong shapes and dtypes are errors, and nothing is written.
pub fn adapters_refuse_misfits<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        let (mut fill, none) = (Fill::new(14), NONE[0]);
        let site = small_site(m, types)?;
        let plan = plan(&mut m.rig, &[0, -1, 0])?;
        let x = m.rig.place(&fill.matrix(3, 6, types.x), none)?;
        let mut out = [m.rig.place(&fill.matrix(3, 7, types.out), none)?];
        for (what, x) in [
            ("columns of x", x.view().slice_cols(0..5)),
            ("rows of x", x.view().slice_rows(0..2)),
            ("integers for x", x.mistyped(DType::I32)),
        ] {
            m.refused(&format!("lora_add: {what}"), &mut out, |rig, [out]| {
                rig.be.lora_add(&mut rig.q, x, &site, &plan, out.view_mut())
            });
        }
        m.refused("lora_add: columns of out", &mut out, |rig, [out]| {
            let mut out = out.view_mut();
            out.layout = out.layout.slice_cols(0..6);
            rig.be.lora_add(&mut rig.q, x.view(), &site, &plan, out)
        });
        m.refused("lora_add: integers for out", &mut out, |rig, [out]| {
            let out = out.mistyped_mut(DType::I32);
            rig.be.lora_add(&mut rig.q, x.view(), &site, &plan, out)
        });
        let ids = m.rig.ids(&[0, 5, 2])?;
        m.refused("lora_embed: a site of a projection", &mut out, |rig, [out]| {
            rig.be.lora_embed(&mut rig.q, ids.view(), &site, &plan, out.view_mut())
        });
        let spec = SiteSpec::embedding(6, 7);
        let table = m.rig.be.lora_table(&spec, 2)?;
        let embedding = LoraSite { spec, table };
        m.refused("lora_add: a site of an embedding", &mut out, |rig, [out]| {
            rig.be.lora_add(&mut rig.q, x.view(), &embedding, &plan, out.view_mut())
        });
        for (what, ids) in [
            ("rows of ids", ids.view().slice_cols(0..2)),
            ("dtype of ids", ids.mistyped(DType::F32)),
        ] {
            m.refused(&format!("lora_embed: {what}"), &mut out, |rig, [out]| {
                rig.be.lora_embed(&mut rig.q, ids, &embedding, &plan, out.view_mut())
            });
        }
        Ok(())
    });
}

/// Slots, rows and token ids out of range are errors, and nothing is written.
pub fn adapters_refuse_ids_out_of_range<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        let (mut fill, none) = (Fill::new(15), NONE[0]);
        let site = small_site(m, types)?;
        let x = m.rig.place(&fill.matrix(3, 6, types.x), none)?;
        let mut out = [m.rig.place(&fill.matrix(3, 7, types.out), none)?];
        for (what, slots) in [("slot 2 of 2", vec![0, -1, 2]), ("row 3 of 3", vec![0, 0, 0, 0])] {
            let plan = plan(&mut m.rig, &slots)?;
            m.refused(&format!("lora_add: {what}"), &mut out, |rig, [out]| {
                rig.be.lora_add(&mut rig.q, x.view(), &site, &plan, out.view_mut())
            });
        }
        let spec = SiteSpec::embedding(6, 7);
        let table = m.rig.be.lora_table(&spec, 2)?;
        let embedding = LoraSite { spec, table };
        let plan = plan(&mut m.rig, &[0, 0, 0])?;
        for bad in [6, -1, i32::MAX] {
            let ids = m.rig.ids(&[0, 5, bad])?;
            m.refused(&format!("lora_embed: id {bad} of 6"), &mut out, |rig, [out]| {
                rig.be.lora_embed(&mut rig.q, ids.view(), &embedding, &plan, out.view_mut())
            });
        }
        Ok(())
    });
}
