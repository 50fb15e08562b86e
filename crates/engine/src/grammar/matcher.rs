//! Matching a generated text against its guide.

use llguidance::toktrie::SimpleVob;
use llguidance::{Matcher, TokenParser};

use super::GuideError;
use super::error::reason;
use super::vocabulary::is_silent;

/// llguidance's message if no token may follow an incomplete text.
const NOTHING_FOLLOWS: &str = "NoExtensionBias";

/// A compiled guide, and its state after the text generated so far.
pub struct GuideMatcher {
    inner: Matcher,
    vocab: usize,
    generated: usize,
}

/// The tokens that may come next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Allowed {
    /// A row of [`lora_core::ops::SampleArgs::masks`], without end tokens. Bits beyond the vocabulary are 0.
    pub words: Vec<i32>,
    /// Whether the text is complete and may end.
    pub complete: bool,
}

impl GuideMatcher {
    pub(super) fn new(parser: TokenParser, vocab: usize) -> Self {
        Self { inner: Matcher::new(Ok(parser)), vocab, generated: 0 }
    }

    /// A copy of the state for another sequence. It shares nothing with this one, so both can be used in
    /// parallel.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self { inner: self.inner.deep_clone(), ..*self }
    }

    /// Computes the allowed tokens. Usually takes microseconds, at worst milliseconds.
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

    /// Advances by a token, which must be an allowed one.
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

    /// Whether the text is complete and cannot be extended.
    pub fn is_finished(&self) -> bool {
        self.inner.is_stopped() && !self.inner.is_error()
    }

    /// The error for an incomplete text after which no token is allowed.
    pub fn no_token(&self) -> GuideError {
        GuideError::NoToken { generated: self.generated }
    }

    /// Whether a token has no text: it is special, or has no bytes.
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
