//! Recorded steps, and the order of ops.

use lora_core::lora::{LoraSite, SiteKind};
use lora_core::{Backend, DType, Result};
use proptest::prelude::*;

use super::draw::Fill;
use super::lora_case::{chained_cases, linear_cases, plan};
use super::rig::{Gaps, Matrix, Placed, Rig};
use super::{Types, for_all};

/// Attempts at recording.
const ATTEMPTS: usize = 10;

/// A recorded linear layer with adapters, replayed with another input and other adapters on the rows, gives
/// the same bits as running it. This includes adapters that were loaded after recording, for which the
/// recording may have become invalid.
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
        let mut plan = plan(rig, &case.slot_of_row)?;
        let zeros =
            Matrix::floats(rows, case.out_dim(), types.out, &vec![0.0; rows * case.out_dim()]);
        let (x, mut out): (Placed<B>, Placed<B>) =
            (rig.place(&first, Gaps::default())?, rig.place(&zeros, Gaps::default())?);
        let Rig { be, q } = rig;
        be.linear_lora(q, x.view(), &w, Some((&site, &plan)), out.view_mut())?;
        let mut record = || {
            be.capture(q, |q| be.linear_lora(q, x.view(), &w, Some((&site, &plan)), out.view_mut()))
        };
        // Other tests of the process may interfere with recording.
        let recorded = (0..ATTEMPTS).find_map(|_| record().transpose()).transpose()?;
        let Some(graph) = recorded else {
            return Err(TestCaseError::fail("what has run before was not recorded"));
        };
        be.write_slot(q, &mut site, 0, &written[0])?;
        let mut slots = case.slot_of_row.clone();
        slots.rotate_left(rotation.index(rows));
        be.plan_lora(q, &slots, &mut plan)?;
        let mut x = x;
        be.upload(q, second.data.bytes(), x.view_mut())?;
        let replayed = be.replay(q, &graph)?;
        let found = out.read(rig)?;
        let Rig { be, q } = rig;
        be.linear_lora(q, x.view(), &w, Some((&site, &plan)), out.view_mut())?;
        let expected = out.read(rig)?;
        prop_assert!(!replayed || found == expected, "{found:?} instead of {expected:?}");
        Ok(())
    });
}

/// A chain of norms and linear layers with adapters, each of which reads the output of the one before.
struct Chain<'a, B: Backend> {
    norm: &'a Placed<B>,
    w: &'a B::Linear,
    lora: (&'a LoraSite<B>, &'a B::LoraPlan),
    /// Outputs of linear layers and of norms.
    outputs: Placed<B>,
    inputs: Placed<B>,
}

impl<B: Backend> Chain<'_, B> {
    /// Linear layers of a chain.
    const LENGTH: usize = 12;

    fn run(&mut self, be: &B, q: &mut B::Queue, waits: bool) -> Result<()> {
        for _ in 0..Self::LENGTH {
            let (norm, inputs) = (self.norm.view(), self.inputs.view_mut());
            be.rms_norm(q, self.outputs.view(), norm.into(), 1e-6, inputs)?;
            let lora = Some(self.lora);
            be.linear_lora(q, self.inputs.view(), self.w, lora, self.outputs.view_mut())?;
            if waits {
                let written = be.download(q, self.outputs.view())?;
                be.wait(written)?;
            }
        }
        Ok(())
    }
}

/// A chain of linear layers with adapters, issued or replayed without waiting, gives the same bits as with
/// a wait after each op: no op reads its input before it is complete.
pub fn products_one_after_another_read_what_came_before<B: Backend>(
    make: &dyn Fn() -> B,
    types: Types,
) {
    for_all(make, 24, chained_cases(), |rig, case| {
        let mut fill = Fill::new(case.seed);
        let (rows, width) = (case.slot_of_row.len(), case.in_dim);
        let first = fill.matrix(rows, width, types.out);
        let w = fill.matrix(width, width, types.w);
        let w = rig.be.prepare_linear(&[w.data], None)?;
        let site = case.site(rig, SiteKind::Linear, types)?.site;
        let plan = plan(rig, &case.slot_of_row)?;
        let norm = rig.place(&fill.matrix(1, width, DType::F32), Gaps::default())?;
        let outputs = rig.place(&first, Gaps::default())?;
        let inputs = rig.place(&fill.matrix(rows, width, types.x), Gaps::default())?;
        let mut chain = Chain { norm: &norm, w: &w, lora: (&site, &plan), outputs, inputs };
        let mut found = Vec::new();
        for waits in [true, false] {
            let Rig { be, q } = rig;
            be.upload(q, first.data.bytes(), chain.outputs.view_mut())?;
            chain.run(be, q, waits)?;
            found.push(chain.outputs.read(rig)?);
        }
        let Rig { be, q } = rig;
        let recorded =
            (0..ATTEMPTS).find_map(|_| be.capture(q, |q| chain.run(be, q, false)).transpose());
        if let Some(graph) = recorded.transpose()? {
            be.upload(q, first.data.bytes(), chain.outputs.view_mut())?;
            prop_assert!(be.replay(q, &graph)?, "nothing has changed since it was recorded");
            found.push(chain.outputs.read(rig)?);
        }
        for other in &found[1..] {
            prop_assert!(*other == found[0], "{other:?} instead of {:?}", found[0]);
        }
        Ok(())
    });
}
