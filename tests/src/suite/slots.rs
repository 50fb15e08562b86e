//! Writing adapters to slots.

use lora_core::lora::{LoraSite, SiteKind, SiteSpec, SlotLowRank, SlotRows, SlotSlice};
use lora_core::{Backend, DType};

use super::compare::exact;
use super::draw::Fill;
use super::lora_case::{added, linear_cases};
use super::misuse::refusals;
use super::reference::Input;
use super::rig::{Gaps, Matrix};
use super::{Types, for_all};

const NONE: [Gaps; 2] = [Gaps { outer_rows: 0, left: 0, right: 0 }; 2];

/// A slice with every part, for `[in, out]`, of rank 2.
pub fn slice(fill: &mut Fill, [in_dim, out]: [usize; 2], dtype: DType) -> SlotSlice {
    SlotSlice {
        low_rank: Some(SlotLowRank {
            a: fill.matrix(2, in_dim, dtype).data,
            b: fill.matrix(out, 2, dtype).data,
            scale: 0.5,
        }),
        gain: Some(fill.values(out)),
        shift: Some(fill.values(out)),
        replacement: Some(fill.matrix(out, in_dim, dtype).data),
        rows: None,
    }
}

/// After slots are overwritten with each other's adapters in reverse order, each applies the adapter that
/// was written last, and a slot that was not overwritten is unchanged.
pub fn a_slot_holds_what_was_written_last<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 96, linear_cases(), |rig, case| {
        let mut fill = Fill::new(case.seed);
        let rows = case.slot_of_row.len();
        let x = fill.matrix(rows, case.in_dim, types.x);
        let y = fill.matrix(rows, case.out_dim(), types.out);
        let mut site = case.site(rig, SiteKind::Linear, types)?;
        let written = site.slots.clone();
        let kept = case.adapters.len() / 2;
        for (slot, slices) in written.iter().rev().enumerate().skip(kept) {
            rig.be.write_slot(&mut rig.q, &mut site.site, slot, slices)?;
            site.slots[slot].clone_from(slices);
        }
        let found = added(rig, &site.site, &case.slot_of_row, [&x, &y], NONE)?;
        let input = |r: usize| Input::Row(x.nums(r));
        case.check("lora_add", &site.slots, SiteKind::Linear, input, [&y, &found])
    });
}

/// Slices that do not fit a site of `[in, out]`.
fn misfits([in_dim, out]: [usize; 2], dtype: DType) -> Vec<(&'static str, SlotSlice)> {
    let fill = &mut Fill::new(16);
    let right = slice(fill, [in_dim, out], dtype);
    let matrix = |fill: &mut Fill, rows, cols| fill.matrix(rows, cols, dtype).data;
    let ints = |rows, cols| Matrix::ints(rows, cols, &vec![1; rows * cols]).data;
    let factors =
        |a, b| SlotSlice { low_rank: Some(SlotLowRank { a, b, scale: 1.0 }), ..right.clone() };
    let replaced = |w| SlotSlice { replacement: Some(w), ..right.clone() };
    vec![
        ("columns of a", factors(matrix(fill, 2, in_dim + 1), matrix(fill, out, 2))),
        ("rows of b", factors(matrix(fill, 2, in_dim), matrix(fill, out + 1, 2))),
        ("ranks", factors(matrix(fill, 2, in_dim), matrix(fill, out, 3))),
        ("integers for a", factors(ints(2, in_dim), matrix(fill, out, 2))),
        ("integers for b", factors(matrix(fill, 2, in_dim), ints(out, 2))),
        ("gain", SlotSlice { gain: Some(vec![1.0; out + 1]), ..right.clone() }),
        ("shift", SlotSlice { shift: Some(vec![1.0; out - 1]), ..right.clone() }),
        ("rows of the replacement", replaced(matrix(fill, out + 1, in_dim))),
        ("columns of the replacement", replaced(matrix(fill, out, in_dim + 1))),
        ("integers for the replacement", replaced(ints(out, in_dim))),
    ]
}

/// A write that does not fit is an error and does not change the slot, even if its first slice fits and
/// only the second does not.
pub fn a_refused_write_leaves_the_slot<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        let (mut fill, widths) = (Fill::new(17), [4, 3]);
        let spec = lora_core::lora::SiteSpec::linear(6, &widths);
        let table = m.rig.be.lora_table(&spec, 2)?;
        let mut site = lora_core::lora::LoraSite { spec, table };
        let full = widths.map(|out| Some(slice(&mut fill, [6, out], types.w)));
        m.rig.be.write_slot(&mut m.rig.q, &mut site, 0, &full)?;
        let (x, y) = (fill.matrix(2, 6, types.x), fill.matrix(2, 7, types.out));
        let before = added(&mut m.rig, &site, &[0, 1], [&x, &y], NONE);

        let first = || Some(slice(&mut Fill::new(18), [6, 4], types.w));
        for (what, wrong) in misfits([6, 3], types.w) {
            m.refused(&format!("write_slot: {what}"), &mut [], |rig, []| {
                rig.be.write_slot(&mut rig.q, &mut site, 0, &[first(), Some(wrong)])
            });
        }
        m.refused("write_slot: number of slices", &mut [], |rig, []| {
            rig.be.write_slot(&mut rig.q, &mut site, 0, &[first()])
        });
        for slot in [2, usize::MAX, 1 << 32] {
            m.refused(&format!("write_slot: slot {slot} of 2"), &mut [], |rig, []| {
                rig.be.write_slot(&mut rig.q, &mut site, slot, &full)
            });
        }
        m.refused("write_slot: the slot was touched", &mut [], |rig, []| {
            let after = added(rig, &site, &[0, 1], [&x, &y], NONE);
            match (&before, after) {
                (Ok(before), Ok(after))
                    if exact("a refused write_slot", &after, before).is_ok() =>
                {
                    Err(lora_core::Error::Device("as it was".into()))
                }
                _ => Ok(()),
            }
        });
        Ok(())
    });
}

/// Rows of tokens that do not fit a site of `[3, 4]`.
fn row_misfits(dtype: DType) -> Vec<(&'static str, SlotSlice)> {
    let fill = &mut Fill::new(19);
    let of = |ids: &[u32], values| SlotSlice {
        rows: Some(SlotRows { ids: ids.to_vec(), values }),
        ..SlotSlice::default()
    };
    let mut matrix = |rows, cols| fill.matrix(rows, cols, dtype).data;
    let both = SlotSlice { replacement: Some(matrix(4, 3)), ..of(&[1], matrix(1, 3)) };
    vec![
        ("fewer rows than tokens", of(&[1, 2], matrix(1, 3))),
        ("columns of rows", of(&[1], matrix(1, 4))),
        ("a token outside", of(&[4], matrix(1, 3))),
        ("a token twice", of(&[1, 1], matrix(2, 3))),
        ("tokens out of order", of(&[2, 1], matrix(2, 3))),
        ("integers for rows", of(&[1], Matrix::ints(1, 3, &[1; 3]).data)),
        ("rows beside a replacement", both),
    ]
}

/// Rows of tokens are errors if they do not fit a site, or if the site has several slices.
pub fn rows_of_tokens_refuse_misfits<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        let spec = SiteSpec::linear(3, &[4]);
        let mut site = LoraSite { table: m.rig.be.lora_table(&spec, 1)?, spec };
        for (what, wrong) in row_misfits(types.w) {
            m.refused(&format!("write_slot: {what}"), &mut [], |rig, []| {
                rig.be.write_slot(&mut rig.q, &mut site, 0, &[Some(wrong)])
            });
        }
        let spec = SiteSpec::linear(3, &[4, 4]);
        let mut site = LoraSite { table: m.rig.be.lora_table(&spec, 1)?, spec };
        let values = Fill::new(20).matrix(1, 3, types.w).data;
        let rows = Some(SlotRows { ids: vec![1], values });
        let slice = Some(SlotSlice { rows, ..SlotSlice::default() });
        m.refused("write_slot: rows of tokens at one of two slices", &mut [], |rig, []| {
            rig.be.write_slot(&mut rig.q, &mut site, 0, &[slice, None])
        });
        Ok(())
    });
}
