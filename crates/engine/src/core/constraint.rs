//! Guided decoding: which tokens a sequence may sample next, and when its guide ends it.

use rayon::prelude::*;

use super::Active;
use super::event::{EndReason, Event, SequenceError};
use crate::grammar::{Allowed, GuideError, GuideMatcher};
use crate::sampling::SamplingPlan;
use crate::scheduler::{Sequence, Work};

/// A row of [`lora_core::ops::SampleArgs::masks`].
pub type Mask = Vec<i32>;

/// What a guide allows next.
#[derive(PartialEq, Eq, Debug)]
enum Next {
    /// One of these tokens; banned ones are cleared already.
    Sample(Mask),
    /// The text is complete, but the request has no end token that could be sampled.
    End,
}

/// The allowed tokens of each running sequence that has a guide and samples in this step; `None` for
/// other sequences. A sequence that cannot continue is ended here, and its results of this step are
/// then ignored. Masks take up to milliseconds each, so they are computed in parallel.
pub fn masks(running: &mut [Sequence<Active>], works: &[Work]) -> Vec<Option<Mask>> {
    let mut samples = vec![false; running.len()];
    for work in works {
        samples[work.sequence] = work.samples;
    }
    let guided = |s: &Sequence<Active>| s.data.submission.guide.is_some() && !s.data.finished;
    if !running.iter().zip(&samples).any(|(sequence, samples)| *samples && guided(sequence)) {
        return vec![None; running.len()];
    }
    let mask = |(sequence, samples): (&mut Sequence<Active>, bool)| {
        if samples && guided(sequence) { next_mask(sequence) } else { None }
    };
    running.par_iter_mut().zip(samples).map(mask).collect()
}

fn next_mask(sequence: &mut Sequence<Active>) -> Option<Mask> {
    let generated = sequence.generated();
    let submission = &mut sequence.data.submission;
    let banned = submission.plan.banned_after(&sequence.tokens, generated);
    let next = next(submission.guide.as_mut()?, &submission.plan, &banned);
    let event = match next {
        Ok(Next::Sample(mask)) => return Some(mask),
        Ok(Next::End) => Event::Finished(EndReason::End),
        Err(error) => Event::Failed(SequenceError::Guide(error)),
    };
    sequence.data.finish(&event);
    None
}

/// The guide's allowed tokens, adjusted for the tokens that end a sequence:
///
/// - end tokens, and stop tokens without text, are allowed exactly where the text is complete;
/// - stop tokens with text are allowed where the guide allows their text;
/// - banned tokens are not, except that a complete text may end where bans leave no other token.
fn next(guide: &mut GuideMatcher, plan: &SamplingPlan, banned: &[i32]) -> Result<Next, GuideError> {
    let Allowed { mut words, complete } = guide.allowed()?;
    for id in &plan.end_ids {
        set(&mut words, *id, complete);
    }
    if complete {
        let silent = plan.stop_ids.iter().filter(|id| guide.is_silent(**id));
        silent.for_each(|id| set(&mut words, *id, true));
    }
    for id in banned {
        set(&mut words, *id as u32, false);
    }
    if words.iter().any(|word| *word != 0) {
        return Ok(Next::Sample(words));
    }
    if !complete {
        return Err(guide.no_token());
    }
    if plan.end_ids.is_empty() {
        return Ok(Next::End);
    }
    plan.end_ids.iter().for_each(|id| set(&mut words, *id, true));
    Ok(Next::Sample(words))
}

fn set(words: &mut [i32], token: u32, allowed: bool) {
    if let Some(word) = words.get_mut(token as usize / 32) {
        let bit = 1 << (token % 32);
        *word = if allowed { *word | bit } else { *word & !bit };
    }
}

/// Advances the guide by a sampled token that is no end or stop token. Returns the event that ends the
/// sequence, if the guide failed, or if the text is complete and the request has no end token.
pub fn advance(active: &mut Active, token: u32) -> Option<Event> {
    let guide = active.submission.guide.as_mut()?;
    match guide.push(token) {
        Err(error) => Some(Event::Failed(SequenceError::Guide(error))),
        Ok(()) if guide.is_finished() && active.submission.plan.end_ids.is_empty() => {
            Some(Event::Finished(EndReason::End))
        }
        Ok(()) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::GuideCompiler;
    use crate::sampling::{Guide, SamplingParams};
    use crate::text::testkit::byte_tokenizer;

    const END: u32 = 2;
    const VOCAB: usize = 263;

    fn matcher(pattern: &str) -> GuideMatcher {
        let compiler = GuideCompiler::new(&byte_tokenizer(), VOCAB).unwrap();
        compiler.compile(&Guide::Regex(pattern)).unwrap()
    }

    fn plan(end_ids: &[u32]) -> SamplingPlan {
        SamplingPlan::resolve(&SamplingParams::default(), end_ids, 0)
    }

    fn id(token: &str) -> u32 {
        byte_tokenizer().token_id(token).unwrap()
    }

    /// The tokens allowed after `text`, one token per letter.
    fn after(pattern: &str, text: &str, plan: &SamplingPlan, banned: &[u32]) -> Vec<u32> {
        let mut guide = matcher(pattern);
        for letter in text.chars() {
            guide.push(id(&letter.to_string())).unwrap();
        }
        let banned: Vec<i32> = banned.iter().map(|t| *t as i32).collect();
        match next(&mut guide, plan, &banned).unwrap() {
            Next::Sample(words) => {
                (0..VOCAB as u32).filter(|t| words[*t as usize / 32] >> (t % 32) & 1 == 1).collect()
            }
            Next::End => Vec::new(),
        }
    }

    #[test]
    fn end_tokens_are_allowed_exactly_where_the_text_is_complete() {
        let plan = plan(&[END]);
        assert_eq!(after("ab?", "", &plan, &[]), [id("a")]);
        assert_eq!(after("ab?", "a", &plan, &[]), [END, id("b")]);
        assert_eq!(after("ab?", "ab", &plan, &[]), [END]);
    }

    #[test]
    fn tokens_of_several_letters_are_allowed_beside_single_letters() {
        assert_eq!(after("hello", "", &plan(&[END]), &[]), [id("h"), id("he"), id("hell")]);
    }

    #[test]
    fn an_end_token_with_text_is_allowed_at_the_end_only() {
        let plan = plan(&[id("b")]);
        assert_eq!(after("a[bc]d", "a", &plan, &[]), [id("c")]);
        assert_eq!(after("a[bc]d", "acd", &plan, &[]), [id("b")]);
    }

    #[test]
    fn stop_tokens_without_text_may_end_a_complete_text() {
        let params = SamplingParams { stop_token_ids: vec![1, id("x")], ..Default::default() };
        let plan = SamplingPlan::resolve(&params, &[END], 0);
        assert_eq!(after("ab?", "a", &plan, &[]), [1, END, id("b")]);
        assert_eq!(after("ab?", "", &plan, &[]), [id("a")]);
    }

    #[test]
    fn bans_apply_unless_only_end_tokens_are_left() {
        let ends = plan(&[END]);
        assert_eq!(after("a[bc]*", "a", &ends, &[id("b"), END]), [id("c")]);
        assert_eq!(after("ab", "ab", &ends, &[END]), [END]);
        assert_eq!(after("ab?", "a", &ends, &[id("b"), END]), [END]);
    }

    #[test]
    fn a_complete_text_without_an_end_token_just_ends() {
        assert_eq!(next(&mut matcher(""), &plan(&[]), &[]), Ok(Next::End));
    }

    #[test]
    fn an_incomplete_text_whose_every_token_is_banned_is_an_error() {
        let banned = [id("a") as i32];
        let error = next(&mut matcher("a"), &plan(&[END]), &banned).unwrap_err();
        assert_eq!(error, GuideError::NoToken { generated: 0 });
    }
}
