//! Token counts of a sequence, for the repetition, presence and frequency penalties.

use std::collections::BTreeMap;

use crate::sampling::SamplingPlan;

/// How often each token occurs in a sequence; not tracked where the plan has no penalties.
#[derive(Debug, Default)]
pub struct History {
    counts: Option<BTreeMap<u32, i32>>,
}

impl History {
    /// Counts the prompt's tokens from `prompt_ignore_length` on.
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

    /// Pairs of token and count, for [`lora_core::ops::SampleArgs::history`].
    pub fn entries(&self) -> impl Iterator<Item = [i32; 2]> + '_ {
        self.counts.iter().flatten().map(|(token, count)| [*token as i32, *count])
    }
}
