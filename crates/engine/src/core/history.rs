//! Which tokens a sequence has seen, for the penalties.

use std::collections::BTreeMap;

use crate::sampling::SamplingPlan;

/// Counts of seen tokens; empty where the plan has no penalties.
#[derive(Debug, Default)]
pub struct History {
    counts: Option<BTreeMap<u32, i32>>,
}

impl History {
    /// The history of a prompt without its first `prompt_ignore_length` tokens.
    pub fn new(prompt: &[u32], plan: &SamplingPlan) -> Self {
        if !plan.penalises {
            return Self::default();
        }
        let mut counts = BTreeMap::new();
        for token in prompt.iter().skip(plan.prompt_ignore_length) {
            *counts.entry(*token).or_default() += 1;
        }
        Self { counts: Some(counts) }
    }

    /// Adds a generated token.
    pub fn push(&mut self, token: u32) {
        if let Some(counts) = &mut self.counts {
            *counts.entry(token).or_default() += 1;
        }
    }

    /// Pairs of token and count, as [`lora_core::ops::SampleArgs::history`] wants them.
    pub fn entries(&self) -> impl Iterator<Item = [i32; 2]> + '_ {
        self.counts.iter().flatten().map(|(token, count)| [*token as i32, *count])
    }
}
