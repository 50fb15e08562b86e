//! Errors of guided decoding.

use std::fmt::Display;

use thiserror::Error;

/// An error of compiling or following a guide.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[non_exhaustive]
pub enum GuideError {
    /// The bytes of tokens cannot be derived from their spelling.
    #[error(
        "`guided_decoding` has to know the bytes of each token, but the tokenizer's decoder is \
         {found}; allowed: ByteLevel, ByteFallback, Replace of a string, Metaspace, Fuse, Strip; \
         leave `guided_decoding` out with this model"
    )]
    Decoder {
        /// The decoder as JSON.
        found: String,
    },
    /// llguidance rejects the vocabulary.
    #[error("`guided_decoding` cannot be used with this tokenizer: {reason}; leave it out")]
    Vocabulary {
        /// llguidance's message.
        reason: String,
    },
    /// The guide is invalid, too large, or uses unsupported features.
    #[error("sampling parameter `{field}` cannot be followed: {reason}; correct or simplify it")]
    Refused {
        /// The field of the request.
        field: &'static str,
        /// llguidance's message.
        reason: String,
    },
    /// No token is allowed next, though the text is not complete.
    #[error(
        "`guided_decoding` leaves no token after {generated} tokens: the text is not complete, and \
         every token that could follow is banned or does not exist; change the guide, or `bad` \
         and `bad_token_ids`"
    )]
    NoToken {
        /// Tokens generated so far.
        generated: usize,
    },
    /// llguidance failed to compute a step, for example at one of its limits.
    #[error(
        "`guided_decoding` failed after {generated} tokens: {reason}; simplify the guide, above \
         all parts that can match the same text in many ways"
    )]
    Step {
        /// Tokens generated so far.
        generated: usize,
        /// llguidance's message.
        reason: String,
    },
}

/// Most characters of llguidance's message that are kept, as it may quote the whole guide.
const MAX_REASON_CHARS: usize = 1000;

/// llguidance's message without the state dump that may follow it.
pub(super) fn reason(error: &impl Display) -> String {
    let message = format!("{error:#}");
    let dumps = ["\n<backtrace>", "\n<non-verbose/>", "\n<state>"];
    let end = dumps.iter().filter_map(|mark| message.find(mark)).min();
    let message = message[..end.unwrap_or(message.len())].trim();
    match message.char_indices().nth(MAX_REASON_CHARS) {
        Some((cut, _)) => format!("{} ...", &message[..cut]),
        None => message.to_owned(),
    }
}
