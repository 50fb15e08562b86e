//! Layout with a pair of matrices for each expert.

use std::collections::BTreeMap;

use super::collect::{ExpertTensors, Halves};
use super::planner::{ExpertUpdate, Planner};
use crate::config::ExpertLayout;
use crate::formats::read::plan::TensorPlan;
use crate::formats::read::view::View;
use crate::rules::{Code, Rejection, listed};

impl Planner<'_> {
    pub(super) fn each(&mut self, tensors: &ExpertTensors) -> Option<ExpertLayout> {
        let layout = self.choose(&[ExpertLayout::PerExpert])?;
        for (layer, found) in &tensors.layers {
            for (name, experts) in &found.each {
                self.stack(*layer, &found.block, name, experts);
            }
        }
        Some(layout)
    }

    /// Stacks the experts of one module by expert number.
    fn stack(
        &mut self,
        layer: u32,
        block: &str,
        name: &str,
        experts: &BTreeMap<u32, Halves>,
    ) -> Option<()> {
        let module = self.module(block, name)?;
        // PEFT's selectors see one module for each expert; the first represents all of them.
        self.name(module, &format!("{block}.0.{name}"));
        let stack = format!("layer {layer} {block}.{name}");
        let count = self.count(experts);
        self.require_all(&stack, experts, count)?;
        let (mut a_parts, mut b_parts) = (vec![None; count], vec![None; count]);
        let mut ranks = Vec::with_capacity(experts.len());
        for (expert, halves) in experts {
            let (a, b) = halves.pair(self.problems)?;
            ranks.push((*expert, self.rank(a, b)?, a.name()));
            a_parts[*expert as usize] = Some(a.clone());
            b_parts[*expert as usize] = Some(b.clone());
        }
        let prefix = format!("{}layers.{layer}.{block}", self.root);
        let update =
            self.common_update(&stack, &ranks, |expert| format!("{prefix}.{expert}.{name}"))?;
        let mut joined = |parts: Vec<Option<View>>| {
            let plan = TensorPlan::stack(parts);
            if plan.is_none() {
                self.problems.push(differing(&stack));
            }
            plan
        };
        let pair = [joined(a_parts)?, joined(b_parts)?];
        self.insert(layer, module, update, pair);
        Some(())
    }

    /// The rank and scale that all experts of a stack must share; `path` gives PEFT's name of an expert.
    fn common_update(
        &mut self,
        stack: &str,
        ranks: &[(u32, usize, &str)],
        path: impl Fn(u32) -> String,
    ) -> Option<ExpertUpdate> {
        let first = ranks.first()?.1;
        if let Some((expert, rank, _)) = ranks.iter().find(|(_, rank, _)| *rank != first) {
            let found = format!("rank {rank} of expert {expert} beside rank {first} of others");
            self.problems.push(unequal(stack, found));
            return None;
        }
        let mut common = None;
        for (expert, rank, tensor) in ranks {
            let update = self.update(&path(*expert), tensor, *rank)?;
            if *common.get_or_insert(update) != update {
                let found = format!("scale {} of expert {expert} beside others", update.scale);
                self.problems.push(unequal(stack, found));
                return None;
            }
        }
        common
    }

    /// The required number of experts: that of the model, but no less than the file has.
    fn count(&self, experts: &BTreeMap<u32, Halves>) -> usize {
        let last = experts.keys().next_back().map_or(0, |last| *last as usize);
        // At least two, as a stack of one matrix is one that all experts share.
        let model = self.options.model.as_ref().map_or(2, |model| model.num_experts);
        model.max(last + 1)
    }

    fn require_all(
        &mut self,
        stack: &str,
        experts: &BTreeMap<u32, Halves>,
        count: usize,
    ) -> Option<()> {
        // No model has more experts, and a number in a tensor name must not determine how much is allocated.
        const MAX_EXPERTS: usize = 1 << 16;
        let missing = count.saturating_sub(experts.len());
        if missing == 0 || (self.options.allow_missing_experts && count <= MAX_EXPERTS) {
            return Some(());
        }
        let absent = (0..count as u32).filter(|expert| !experts.contains_key(expert)).take(9);
        let absent: Vec<String> = absent.map(|expert| expert.to_string()).collect();
        self.problems.push(Rejection::new(
            Code::MissingExperts,
            stack,
            format!("no weights for expert {} ({missing} in all)", listed(&absent)),
            format!("weights for every expert from 0 to {}", count - 1),
            "export the adapter again, or set allow_missing_experts: true to leave those experts \
             unchanged",
        ));
        None
    }

    /// The rank of a pair of matrices.
    fn rank(&mut self, a: &View, b: &View) -> Option<usize> {
        match (a.shape(), b.shape()) {
            (&[rank, input], &[output, columns])
                if rank == columns && rank * input * output > 0 =>
            {
                Some(rank)
            }
            (_, found) => {
                let allowed = format!("[out, rank] beside A [rank, in] of {:?}", a.shape());
                self.wrong_shape(b.name(), found, allowed);
                None
            }
        }
    }
}

fn unequal(stack: &str, found: String) -> Rejection {
    Rejection::new(
        Code::ExpertRankMismatch,
        stack,
        found,
        "one rank and one scale for all experts of a module",
        "train the experts of a module with one rank and alpha",
    )
}

fn differing(stack: &str) -> Rejection {
    Rejection::new(
        Code::TensorShape,
        stack,
        "experts whose lora_A or whose lora_B differ in shape or element type",
        "one shape and type for the lora_A of all experts of a module, and one for their lora_B",
        "export the adapter again",
    )
}
