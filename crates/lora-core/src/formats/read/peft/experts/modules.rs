//! Layouts with a pair of stacks for each module, or with one for gate and up together.

use super::super::keys::GATE_UP;
use super::collect::{ExpertTensors, Halves};
use super::planner::Planner;
use crate::config::ExpertLayout;
use crate::formats::read::plan::TensorPlan;
use crate::formats::read::view::View;
use crate::modules::TargetModule;
use crate::rules::{Code, Rejection};

/// A pair of stacks and its rank.
struct Stacks {
    a: View,
    b: View,
    rank: usize,
}

impl Planner<'_> {
    pub(super) fn modules(&mut self, tensors: &ExpertTensors) -> Option<ExpertLayout> {
        let halves = || tensors.layers.values().flat_map(|layer| &layer.modules);
        let layout = if halves().any(|(name, _)| name == GATE_UP) {
            use ExpertLayout::{Fused, FusedInterleaved};
            self.refuse_unmarked_interleaving(FusedInterleaved, Fused);
            self.choose(&[Fused, FusedInterleaved])?
        } else if halves().any(|(_, halves)| is_shared(halves)) {
            self.choose(&[ExpertLayout::SharedOuter])?
        } else {
            self.choose(&[ExpertLayout::Stacked])?
        };
        for (layer, found) in &tensors.layers {
            for (name, halves) in &found.modules {
                self.module_stack(*layer, &found.block, name, halves, layout);
            }
        }
        Some(layout)
    }

    fn module_stack(
        &mut self,
        layer: u32,
        block: &str,
        name: &str,
        halves: &Halves,
        layout: ExpertLayout,
    ) -> Option<()> {
        let (a, b) = halves.pair(self.problems)?;
        let Stacks { a, b, rank } = self.stacks(a, b)?;
        let path = format!("{block}.{name}");
        let update = self.update(&format!("{}layers.{layer}.{path}", self.root), a.name(), rank)?;
        if name != GATE_UP {
            let module = self.module(block, name)?;
            self.name(module, &path);
            self.insert(layer, module, update, [a.into(), b.into()]);
            return Some(());
        }
        // Gate and up share A.
        let (a, [gate, up]) = (TensorPlan::from(a), self.gate_and_up(b, layout)?);
        for (module, b) in [(TargetModule::MoeHTo4h, gate), (TargetModule::MoeGate, up)] {
            self.name(module, &path);
            self.insert(layer, module, update, [a.clone(), b.into()]);
        }
        Some(())
    }

    /// Stacks `[experts, rank, in]` and `[experts, out, rank]`; a matrix without an axis of experts
    /// is shared by all of them.
    fn stacks(&mut self, a: &View, b: &View) -> Option<Stacks> {
        if a.shape().len() == 2 && b.shape().len() == 2 {
            self.problems.push(Rejection::new(
                Code::RoutedExpertLayout,
                a.name(),
                format!("two dimensions, {:?}, as has its lora_B, and no expert number", a.shape()),
                "a matrix for each expert, or stacks of three dimensions",
                "export the adapter again",
            ));
            return None;
        }
        let stacked = |view: &View| match view.shape().len() {
            2 => view.clone().unsqueeze(),
            _ => view.clone(),
        };
        let (a, b) = (stacked(a), stacked(b));
        let (&[a_experts, rank, input], &[b_experts, output, columns]) = (a.shape(), b.shape())
        else {
            let allowed = "A [experts, rank, in] and B [experts, out, rank]";
            for wrong in [&a, &b].into_iter().filter(|view| view.shape().len() != 3) {
                self.wrong_shape(wrong.name(), wrong.shape(), allowed);
            }
            return None;
        };
        let experts = a_experts == b_experts || a_experts == 1 || b_experts == 1;
        if !experts || rank != columns || a.len() == 0 || input * output * b_experts == 0 {
            let allowed = format!("[experts, out, rank] beside A of {:?}", a.shape());
            self.wrong_shape(b.name(), b.shape(), allowed);
            return None;
        }
        Some(Stacks { rank, a, b })
    }

    /// The gate rows and the up rows of B `[experts, 2I, rank]`.
    pub(super) fn gate_and_up(&mut self, b: View, layout: ExpertLayout) -> Option<[View; 2]> {
        use ExpertLayout::{FusedInterleaved, TargetParametersInterleaved};
        let rows = b.shape()[1];
        if !rows.is_multiple_of(2) {
            self.wrong_shape(b.name(), b.shape(), "an even number of rows, gate and up");
            return None;
        }
        Some(match layout {
            FusedInterleaved | TargetParametersInterleaved => {
                [b.clone().every(1, 0, 2), b.every(1, 1, 2)]
            }
            _ => [b.clone().narrow(1, 0..rows / 2), b.narrow(1, rows / 2..rows)],
        })
    }
}

/// Whether A or B is shared by all experts while the other is not.
fn is_shared(halves: &Halves) -> bool {
    let experts = |view: &Option<View>| match view.as_ref().map(View::shape) {
        Some(&[experts, _, _]) => Some(experts),
        Some(&[_, _]) => Some(1),
        _ => None,
    };
    let (a, b) = (experts(&halves.a), experts(&halves.b));
    a.zip(b).is_some_and(|(a, b)| a != b)
}
