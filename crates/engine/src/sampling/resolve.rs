//! Resolving a request's parameters to a plan.

use lora_core::ops::SampleRow;

use super::{SamplingParams, SamplingPlan};
use crate::text::{SpecialTokens, TextError, Tokenizer};

impl SamplingPlan {
    /// The plan of one output of a request. `model_end_ids` are the model's end tokens. `stream` is the index of
    /// the output, which selects its random numbers among outputs with the same seed; only output 0 reports
    /// on the prompt. The parameters must have passed [`SamplingParams::validate`].
    pub fn resolve(params: &SamplingParams, model_end_ids: &[u32], stream: u32) -> Self {
        let end_ids = match params.end_id {
            _ if params.ignore_eos => Vec::new(),
            None => model_end_ids.to_vec(),
            Some(id) => u32::try_from(id).into_iter().collect(),
        };
        let row = sample_row(params, stream);
        let penalises = row.repetition_penalty != 1.0
            || row.presence_penalty != 0.0
            || row.frequency_penalty != 0.0;
        // With `best_of`, outputs are ranked by cumulative log-probability, so log-probabilities are needed.
        let competes = params.sequences() > params.n;
        let first = stream == 0;
        let bias = |(id, bias): (&u32, &f32)| [*id as i32, bias.to_bits() as i32];
        Self {
            row,
            bias: params.logit_bias.iter().map(bias).collect(),
            penalises,
            prompt_ignore_length: params.prompt_ignore_length.unwrap_or(0),
            min_tokens: params.min_tokens.unwrap_or(1),
            end_ids,
            stop_ids: params.stop_token_ids.clone(),
            bad_sequences: params.bad_token_ids.iter().map(|id| vec![*id]).collect(),
            logprobs: params.logprobs.or(competes.then_some(0)),
            prompt_logprobs: params.prompt_logprobs.filter(|_| first),
            context_logits: params.return_context_logits && first,
            generation_logits: params.return_generation_logits,
        }
    }

    /// Bans words, both as spelled and with a leading space.
    ///
    /// # Errors
    /// [`TextError`] if a word cannot be tokenized.
    pub fn ban_words(&mut self, words: &[String], tokenizer: &Tokenizer) -> Result<(), TextError> {
        for word in words {
            for spelling in [word.clone(), format!(" {word}")] {
                let ids = tokenizer.encode(&spelling, SpecialTokens::Skip)?;
                if !ids.is_empty() {
                    self.bad_sequences.push(ids);
                }
            }
        }
        Ok(())
    }
}

fn sample_row(params: &SamplingParams, stream: u32) -> SampleRow {
    let seed = params.seed.unwrap_or(0);
    let greedy = SampleRow {
        seed: [seed as u32, (seed >> 32) as u32],
        stream,
        repetition_penalty: params.repetition_penalty.unwrap_or(1.0),
        presence_penalty: params.presence_penalty.unwrap_or(0.0),
        frequency_penalty: params.frequency_penalty.unwrap_or(0.0),
        ..SampleRow::GREEDY
    };
    if params.is_greedy() {
        return greedy;
    }
    SampleRow {
        temperature: params.temperature.unwrap_or(1.0),
        top_k: params.top_k.and_then(|k| u32::try_from(k).ok()).unwrap_or(0),
        top_p: params.top_p.unwrap_or(1.0),
        min_p: params.min_p.unwrap_or(0.0),
        ..greedy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_set_means_greedy_with_the_models_end() {
        let plan = SamplingPlan::resolve(&SamplingParams::default(), &[2, 5], 0);
        assert_eq!(plan.row, SampleRow::GREEDY);
        assert_eq!((plan.end_ids, plan.penalises, plan.min_tokens), (vec![2, 5], false, 1));
    }

    #[test]
    fn ignoring_the_end_leaves_no_end_token() {
        let params = SamplingParams { ignore_eos: true, ..SamplingParams::default() };
        assert!(SamplingPlan::resolve(&params, &[2], 0).end_ids.is_empty());
        let params = SamplingParams { end_id: Some(-1), ..SamplingParams::default() };
        assert!(SamplingPlan::resolve(&params, &[2], 0).end_ids.is_empty());
    }

    #[test]
    fn outputs_of_one_request_differ_in_their_stream() {
        let params = SamplingParams {
            temperature: Some(0.7),
            seed: Some(1 << 33),
            ..SamplingParams::default()
        };
        let row = SamplingPlan::resolve(&params, &[], 3).row;
        assert_eq!((row.seed, row.stream, row.temperature), ([0, 2], 3, 0.7));
    }
}
