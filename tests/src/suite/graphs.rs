//! Recorded steps.

use lora_core::Backend;
use lora_core::lora::{RowPlan, SiteKind};
use proptest::prelude::*;

use super::draw::Fill;
use super::lora_case::{batch, linear_cases};
use super::rig::{Gaps, Matrix, Placed, Rig};
use super::{Types, for_all};

/// Times that a recording is tried.
const ATTEMPTS: usize = 10;

/// A product with its adapters, run eagerly, recorded, and replayed on another input with adapters on
/// other rows, gives the same bits as if it had been run. Adapters that came after the recording are
/// there, too, be they ones for which it is no longer good.
pub fn a_replay_is_what_would_have_been_run<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let cases = (linear_cases(), any::<prop::sample::Index>());
    for_all(make, 96, cases, |rig: &mut Rig<B>, (case, rotation)| {
        let mut fill = Fill::new(case.seed);
        let rows = case.slot_of_row.len();
        if !rig.be.caps().graphs || case.slot_of_row.iter().all(|slot| *slot < 0) {
            return Ok(());
        }
        let mut input = || fill.matrix(rows, case.in_dim, types.x);
        let (first, second) = (input(), input());
        let w = fill.matrix(case.out_dim(), case.in_dim, types.w);
        let w = rig.be.prepare_linear(&[w.data], None)?;
        let mut site = case.site(rig, SiteKind::Linear, types)?.site;
        let clear = vec![None; case.widths.len()];
        let written = case.site(rig, SiteKind::Linear, types)?.slots;
        // The first slot gets its adapter after the recording.
        rig.be.write_slot(&mut rig.q, &mut site, 0, &clear)?;
        let mut batch = batch(rig, &case.slot_of_row)?;
        let zeros =
            Matrix::floats(rows, case.out_dim(), types.out, &vec![0.0; rows * case.out_dim()]);
        let (x, mut out): (Placed<B>, Placed<B>) =
            (rig.place(&first, Gaps::default())?, rig.place(&zeros, Gaps::default())?);
        let Rig { be, q } = rig;
        be.linear_lora(q, x.view(), &w, Some((&site, &batch)), out.view_mut())?;
        let mut record = || {
            be.capture(q, |q| {
                be.linear_lora(q, x.view(), &w, Some((&site, &batch)), out.view_mut())
            })
        };
        // Other tests of the process may be in the way of a recording.
        let recorded = (0..ATTEMPTS).find_map(|_| record().transpose()).transpose()?;
        let Some(graph) = recorded else {
            return Err(TestCaseError::fail("what has run before was not recorded"));
        };
        be.write_slot(q, &mut site, 0, &written[0])?;
        let mut slots = case.slot_of_row.clone();
        slots.rotate_left(rotation.index(rows));
        batch.fill(be, q, &RowPlan::new(&slots))?;
        let mut x = x;
        be.upload(q, second.data.bytes(), x.view_mut())?;
        let replayed = be.replay(q, &graph)?;
        let found = out.read(rig)?;
        let Rig { be, q } = rig;
        be.linear_lora(q, x.view(), &w, Some((&site, &batch)), out.view_mut())?;
        let expected = out.read(rig)?;
        prop_assert!(!replayed || found == expected, "{found:?} instead of {expected:?}");
        Ok(())
    });
}
