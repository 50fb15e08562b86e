//! How far a text has followed its guide.

use llguidance::toktrie::SimpleVob;
use llguidance::{Matcher, TokenParser};

use super::GuideError;
use super::error::reason;
use super::vocabulary::is_silent;

/// The words of llguidance's message where nothing may follow an incomplete text.
const NOTHING_FOLLOWS: &str = "NoExtensionBias";

/// A guide and the text that follows it so far.
pub struct GuideMatcher {
    inner: Matcher,
    vocab: usize,
    generated: usize,
}

/// Tokens that may come next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Allowed {
    /// A row of [`lora_core::ops::SampleArgs::masks`]; bits behind the vocabulary are 0. Tokens that
    /// end a text are not among them.
    pub words: Vec<i32>,
    /// Whether the text may end here.
    pub complete: bool,
}

impl GuideMatcher {
    pub(super) fn new(parser: TokenParser, vocab: usize) -> Self {
        Self { inner: Matcher::new(Ok(parser)), vocab, generated: 0 }
    }

    /// The same state for another text; the two share nothing, so they may run side by side.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self { inner: self.inner.deep_clone(), ..*self }
    }

    /// What may come next. Takes microseconds as a rule, and milliseconds at worst.
    ///
    /// # Errors
    /// [`GuideError::NoToken`] or [`GuideError::Step`].
    pub fn allowed(&mut self) -> Result<Allowed, GuideError> {
        let set = self.inner.compute_mask_or_eos();
        let set = set.map_err(|error| match reason(&error) {
            reason if reason == NOTHING_FOLLOWS => self.no_token(),
            reason => GuideError::Step { generated: self.generated, reason },
        })?;
        let complete = set.get(self.vocab);
        Ok(Allowed { words: words(&set, self.vocab), complete })
    }

    /// Takes the next token in, which must be one of those allowed.
    ///
    /// # Errors
    /// [`GuideError::Step`].
    pub fn push(&mut self, token: u32) -> Result<(), GuideError> {
        let generated = self.generated;
        self.inner
            .consume_token(token)
            .map_err(|error| GuideError::Step { generated, reason: reason(&error) })?;
        self.generated += 1;
        Ok(())
    }

    /// Whether the text is complete and nothing may follow.
    pub fn is_finished(&self) -> bool {
        self.inner.is_stopped() && !self.inner.is_error()
    }

    /// The error of a text that nothing may follow.
    pub fn no_token(&self) -> GuideError {
        GuideError::NoToken { generated: self.generated }
    }

    /// Whether a token is no text: special, or without any bytes.
    pub fn is_silent(&self, token: u32) -> bool {
        self.inner.tok_env().is_ok_and(|env| is_silent(env.tok_trie().token(token)))
    }
}

impl std::fmt::Debug for GuideMatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuideMatcher").field("generated", &self.generated).finish_non_exhaustive()
    }
}

/// The first `vocab` bits of a set.
fn words(set: &SimpleVob, vocab: usize) -> Vec<i32> {
    let mut words: Vec<i32> =
        set.as_slice().iter().take(vocab.div_ceil(32)).map(|word| *word as i32).collect();
    if let Some(last) = words.last_mut()
        && !vocab.is_multiple_of(32)
    {
        *last &= ((1u32 << (vocab % 32)) - 1) as i32;
    }
    words
}
