//! [`SamplingPlan`]: sampling parameters with all defaults resolved, as the batch loop uses them.

use lora_core::ops::SampleRow;

/// How to sample one sequence.
#[derive(Clone, PartialEq, Debug)]
pub struct SamplingPlan {
    /// Parameters of the sampling op. Position and ranges, which change from step to step, are not set.
    pub row: SampleRow,
    /// Logit bias: pairs of token and bias, the latter as the bits of an f32.
    pub bias: Vec<[i32; 2]>,
    /// Whether any penalty is on, so that token counts have to be tracked.
    pub penalises: bool,
    /// Number of leading prompt tokens that penalties ignore.
    pub prompt_ignore_length: usize,
    /// Fewest tokens to generate before any of `end_ids` and `stop_ids` may be sampled.
    pub min_tokens: usize,
    /// The model's end tokens, or the request's `end_id`.
    pub end_ids: Vec<u32>,
    /// The request's stop tokens.
    pub stop_ids: Vec<u32>,
    /// Token sequences that must not be generated: the last token is banned after the others. Sequences of one
    /// token are always banned.
    pub bad_sequences: Vec<Vec<u32>>,
    /// Number of most probable tokens to report with each token; 0 reports only the sampled one.
    pub logprobs: Option<usize>,
    /// The same for prompt tokens.
    pub prompt_logprobs: Option<usize>,
    /// Whether logits of the prompt are returned.
    pub context_logits: bool,
    /// Whether logits of generated tokens are returned.
    pub generation_logits: bool,
}

impl SamplingPlan {
    /// Whether the logits of all prompt positions are needed.
    pub fn wants_prompt_logits(&self) -> bool {
        self.prompt_logprobs.is_some() || self.context_logits
    }

    /// Whether overlap scheduling is possible: the next token can be sampled before the host has read the
    /// previous one, and nothing but tokens is reported.
    pub fn can_overlap(&self) -> bool {
        let reads_tokens = self.penalises || self.bad_sequences.iter().any(|bad| bad.len() > 1);
        let reports_more =
            self.wants_prompt_logits() || self.logprobs.is_some() || self.generation_logits;
        !reads_tokens && !reports_more
    }

    /// Tokens banned after `tokens`, of which the last `generated` were generated.
    pub fn banned_after(&self, tokens: &[u32], generated: usize) -> Vec<i32> {
        let mut banned = Vec::new();
        if generated < self.min_tokens {
            banned.extend(self.end_ids.iter().chain(&self.stop_ids).map(|t| *t as i32));
        }
        for sequence in &self.bad_sequences {
            if let Some((last, before)) = sequence.split_last()
                && tokens.ends_with(before)
            {
                banned.push(*last as i32);
            }
        }
        banned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> SamplingPlan {
        SamplingPlan {
            row: SampleRow::GREEDY,
            bias: Vec::new(),
            penalises: false,
            prompt_ignore_length: 0,
            min_tokens: 1,
            end_ids: vec![2],
            stop_ids: vec![9],
            bad_sequences: vec![vec![7], vec![5, 6]],
            logprobs: None,
            prompt_logprobs: None,
            context_logits: false,
            generation_logits: false,
        }
    }

    #[test]
    fn end_tokens_are_banned_until_min_tokens() {
        assert_eq!(plan().banned_after(&[1], 0), [2, 9, 7]);
        assert_eq!(plan().banned_after(&[1], 1), [7]);
    }

    #[test]
    fn plans_that_need_tokens_or_logits_cannot_overlap() {
        let plain = SamplingPlan { bad_sequences: vec![vec![7]], ..plan() };
        assert!(plain.can_overlap());
        for other in [
            plan(),
            SamplingPlan { penalises: true, ..plain.clone() },
            SamplingPlan { logprobs: Some(0), ..plain.clone() },
            SamplingPlan { prompt_logprobs: Some(0), ..plain.clone() },
            SamplingPlan { context_logits: true, ..plain.clone() },
            SamplingPlan { generation_logits: true, ..plain.clone() },
        ] {
            assert!(!other.can_overlap(), "{other:?}");
        }
    }

    #[test]
    fn a_bad_word_is_only_banned_after_its_beginning() {
        assert_eq!(plan().banned_after(&[1, 5], 1), [7, 6]);
    }
}
