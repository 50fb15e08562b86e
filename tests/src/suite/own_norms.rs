//! Norms whose weight an adapter replaces.

use lora_core::lora::{LoraSite, SiteSpec, SlotSlice};
use lora_core::ops::NormWeight;
use lora_core::{Backend, DType};
use proptest::prelude::*;

use super::compare::{Class, close, exact};
use super::draw::{Fill, cols, rows};
use super::lora_case::plan;
use super::misuse::refusals;
use super::num::Num;
use super::reference::rms_norm;
use super::rig::{Gaps, Matrix, Placed, Rig};
use super::{Types, for_all};

const EPS: f32 = 1e-5;

/// A norm, the slots that have a weight for it, and the slots of a batch's rows.
#[derive(Clone, Debug)]
pub struct Case {
    cols: usize,
    /// Whether each slot has a weight of its own; the last slot is never written.
    owns: Vec<bool>,
    slot_of_row: Vec<i32>,
    seed: u64,
}

/// Norms of any width, and of multiples of eight, for vector loads.
fn cases() -> impl Strategy<Value = Case> {
    let width = prop_oneof![cols(), prop::sample::select(vec![64usize, 512, 2048])];
    let owns = prop::collection::vec(any::<bool>(), 1..5);
    (width, owns, rows(), any::<u64>()).prop_flat_map(|(cols, owns, rows, seed)| {
        let slots = owns.len() as i32;
        let any_slots = prop::collection::vec(-1..=slots, rows);
        let slots =
            prop_oneof![6 => any_slots, 1 => Just(vec![-1; rows]), 1 => Just(vec![0; rows])];
        slots.prop_map(move |slot_of_row| Case { cols, owns: owns.clone(), slot_of_row, seed })
    })
}

/// The norm in a backend's memory, and its weights on the host.
struct Norm<B: Backend> {
    base: Placed<B>,
    site: LoraSite<B>,
    weights: [Matrix; 2],
    plan: B::LoraPlan,
}

impl Case {
    fn norm<B: Backend>(&self, rig: &mut Rig<B>) -> Result<Norm<B>, TestCaseError> {
        let mut fill = Fill::new(self.seed ^ 1);
        let spec = SiteSpec::norm(self.cols);
        let mut site = LoraSite { table: rig.be.lora_table(&spec, self.owns.len() + 1)?, spec };
        let base = fill.matrix(1, self.cols, DType::F32);
        // All adapters have the same weight, as the lookup of slots with a weight is under test.
        let own = fill.matrix(1, self.cols, DType::F32);
        for (slot, owns) in self.owns.iter().enumerate() {
            let slice = owns.then(|| weight(&own));
            rig.be.write_slot(&mut rig.q, &mut site, slot, &[slice])?;
        }
        let placed = rig.place(&base, Gaps::default())?;
        let plan = plan(rig, &self.slot_of_row)?;
        Ok(Norm { base: placed, site, weights: [base, own], plan })
    }

    /// Whether a row is scaled by its adapter's weight.
    fn owns(&self, row: usize) -> bool {
        let slot = usize::try_from(self.slot_of_row[row]).ok();
        slot.and_then(|slot| self.owns.get(slot)).copied().unwrap_or(false)
    }

    fn expected(&self, x: &Matrix, weights: &[Matrix; 2]) -> Vec<Num> {
        let weight = |row: usize| weights[usize::from(self.owns(row))].nums(0);
        (0..x.rows).flat_map(|row| rms_norm(&x.nums(row), &weight(row), EPS)).collect()
    }
}

impl<B: Backend> Norm<B> {
    fn weight(&self) -> NormWeight<'_, B> {
        NormWeight { base: self.base.view(), lora: Some((&self.site, &self.plan)) }
    }
}

/// The site of a norm with two slots, of which the first has this weight.
///
/// # Errors
/// Those of the backend.
pub fn own_site<B: Backend>(rig: &mut Rig<B>, own: &Matrix) -> lora_core::Result<LoraSite<B>> {
    let spec = SiteSpec::norm(own.cols);
    let mut site = LoraSite { table: rig.be.lora_table(&spec, 2)?, spec };
    rig.be.write_slot(&mut rig.q, &mut site, 0, &[Some(weight(own))])?;
    Ok(site)
}

/// A slice that replaces a norm's weight.
fn weight(own: &Matrix) -> SlotSlice {
    let values: Vec<f32> = own.data.iter_f32().collect();
    let replacement = lora_core::HostTensor::from_f32(DType::F32, vec![values.len()], &values);
    SlotSlice { replacement, ..SlotSlice::default() }
}

/// Both norms use the weight of a row's adapter, or else the base model's. Rows whose adapter has no weight
/// get the same bits as without adapters.
pub fn a_row_is_scaled_by_its_own_weight<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 128, cases(), |rig, case| {
        let mut fill = Fill::new(case.seed);
        let rows = case.slot_of_row.len();
        let x = fill.matrix(rows, case.cols, types.out);
        let norm = case.norm(rig)?;
        let placed = rig.place(&x, Gaps::default())?;
        let zeros = Matrix::floats(rows, case.cols, types.out, &vec![0.0; rows * case.cols]);
        let mut residual = rig.place(&zeros, Gaps::default())?;
        let mut found = Vec::new();
        for w in [norm.weight(), norm.base.view().into()] {
            let mut out = rig.place(&zeros, Gaps::default())?;
            rig.be.rms_norm(&mut rig.q, placed.view(), w, EPS, out.view_mut())?;
            found.push(out.read(rig)?);
        }
        close("rms_norm", &found[0], &case.expected(&x, &norm.weights), Class::Dot(case.cols))?;
        let idle: Vec<usize> = (0..rows).filter(|row| !case.owns(*row)).collect();
        exact("rows of the base model", &found[0].pick(&idle), &found[1].pick(&idle))?;
        let mut out = rig.place(&zeros, Gaps::default())?;
        let (q, sum) = (&mut rig.q, residual.view_mut());
        rig.be.add_rms_norm(q, placed.view(), sum, norm.weight(), EPS, out.view_mut())?;
        exact("add_rms_norm to nothing", &out.read(rig)?, &found[0])
    });
}

/// Weights, sites and slots that do not fit are errors, and nothing is written.
pub fn own_norms_refuse_misfits<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        let case = Case { cols: 6, owns: vec![true, false], slot_of_row: vec![0, 1, -1], seed: 5 };
        let mut fill = Fill::new(6);
        let x = m.rig.place(&fill.matrix(3, 6, types.out), Gaps::default())?;
        let mut out = [m.rig.place(&fill.matrix(3, 6, types.out), Gaps::default())?];
        let mut norm =
            case.norm(&mut m.rig).map_err(|e| lora_core::Error::Device(e.to_string()))?;
        let linear = SiteSpec::linear(6, &[6]);
        let linear = LoraSite { table: m.rig.be.lora_table(&linear, 3)?, spec: linear };
        let wider = SiteSpec::norm(7);
        let wider = LoraSite { table: m.rig.be.lora_table(&wider, 3)?, spec: wider };
        let other_rows = plan(&mut m.rig, &[0, 1])?;
        let other_slot = plan(&mut m.rig, &[0, 1, 3])?;
        for (what, lora) in [
            ("a projection's site", (&linear, &norm.plan)),
            ("a site of other columns", (&wider, &norm.plan)),
            ("rows of the batch", (&norm.site, &other_rows)),
            ("slot 3 of 3", (&norm.site, &other_slot)),
        ] {
            let w = NormWeight { base: norm.base.view(), lora: Some(lora) };
            m.refused(&format!("rms_norm: {what}"), &mut out, |rig, [out]| {
                rig.be.rms_norm(&mut rig.q, x.view(), w, EPS, out.view_mut())
            });
        }
        let narrow = fill.matrix(1, 6, DType::Bf16).data;
        for (what, slice) in [
            ("elements of a norm's weight", weight(&fill.matrix(1, 5, DType::F32))),
            (
                "a norm's weight in bf16",
                SlotSlice { replacement: Some(narrow), ..SlotSlice::default() },
            ),
            ("a gain at a norm", SlotSlice { gain: Some(vec![1.0; 6]), ..SlotSlice::default() }),
        ] {
            m.refused(&format!("write_slot: {what}"), &mut [], |rig, []| {
                rig.be.write_slot(&mut rig.q, &mut norm.site, 0, &[Some(slice)])
            });
        }
        Ok(())
    });
}
