//! Sampling parameters with every default filled in: what the batch loop works with.

use lora_core::ops::SampleRow;

/// How to continue one sequence.
#[derive(Clone, PartialEq, Debug)]
pub struct SamplingPlan {
    /// Parameters of the draw, without what changes from step to step.
    pub row: SampleRow,
    /// Tokens with what is added to their logits, as the bits of an f32.
    pub bias: Vec<[i32; 2]>,
    /// Whether penalties change any logit, so that a history has to be kept.
    pub penalises: bool,
    /// Tokens at the start of the prompt that penalties leave out.
    pub prompt_ignore_length: usize,
    /// Tokens to generate before any of `end_ids` and `stop_ids` may be drawn.
    pub min_tokens: usize,
    /// Tokens that end the text and are its end marker.
    pub end_ids: Vec<u32>,
    /// Tokens that end the text by request.
    pub stop_ids: Vec<u32>,
    /// Sequences of tokens whose last token must not follow the others; one-token sequences are
    /// plain bans.
    pub bad_sequences: Vec<Vec<u32>>,
    /// Likeliest tokens to report with each token; 0 reports the token alone.
    pub logprobs: Option<usize>,
    /// The same for prompt tokens.
    pub prompt_logprobs: Option<usize>,
    /// Whether logits of the prompt are returned.
    pub context_logits: bool,
    /// Whether logits of generated tokens are returned.
    pub generation_logits: bool,
}

impl SamplingPlan {
    /// Whether every prompt position needs logits.
    pub fn wants_prompt_logits(&self) -> bool {
        self.prompt_logprobs.is_some() || self.context_logits
    }

    /// Whether a token can be drawn before the host knows the one before it, and nothing but the
    /// tokens drawn is reported.
    pub fn can_overlap(&self) -> bool {
        let reads_tokens = self.penalises || self.bad_sequences.iter().any(|bad| bad.len() > 1);
        let reports_more =
            self.wants_prompt_logits() || self.logprobs.is_some() || self.generation_logits;
        !reads_tokens && !reports_more
    }

    /// Tokens that must not come next after `tokens`, of which `generated` were generated.
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
    fn what_depends_on_tokens_or_logits_is_not_drawn_unseen() {
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
