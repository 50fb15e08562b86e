//! Summary of how an adapter's files change the model's tokenizer, chat template and end tokens.

use std::fmt::Display;

use serde::Serialize;

use crate::text::NamedToken;

/// How the files of an adapter's folder change the model's tokenizer, chat template and end tokens. Empty if
/// they equal the model's.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize)]
pub struct TextChanges {
    /// The file of the adapter's chat template, if it differs from the model's.
    pub chat_template: Option<&'static str>,
    /// Special tokens of the chat template that differ from the model's: `bos_token`, `eos_token`.
    pub special_tokens: Vec<(&'static str, String)>,
    /// Ids of end tokens, if they differ from the model's.
    pub end_tokens: Option<Vec<u32>>,
    /// Whether the adapter's `tokenizer.json` is used.
    pub tokenizer: bool,
    /// Tokens that the model's tokenizer lacks or has at another id.
    pub added_tokens: Vec<NamedToken>,
    /// Vocabulary files of slow tokenizers, which are not read. The model's tokenizer is used instead.
    pub unread: Vec<&'static str>,
}

impl TextChanges {
    /// The changes as text, one line for each.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(file) = self.chat_template {
            lines.push(format!("chat template: the adapter's, of {file}"));
        }
        if !self.special_tokens.is_empty() {
            let tokens: Vec<_> =
                self.special_tokens.iter().map(|(name, token)| format!("{name} {token}")).collect();
            lines.push(format!("tokens of the chat template: {}", listed(&tokens)));
        }
        if let Some(ids) = &self.end_tokens {
            lines.push(format!("end tokens: {}", listed(ids)));
        }
        if self.tokenizer {
            lines.push("tokenizer: the adapter's, of tokenizer.json".to_owned());
        }
        if !self.added_tokens.is_empty() {
            lines.push(format!("added tokens: {}", named(&self.added_tokens)));
        }
        lines
    }

    /// Warnings for files that are not read, one line for each.
    pub fn warnings(&self) -> Vec<String> {
        let warning = |file: &&str| {
            format!(
                "{file} is not read, as there is no tokenizer.json beside it: the model's tokenizer \
                 is used"
            )
        };
        self.unread.iter().map(warning).collect()
    }
}

/// The first tokens of a list with their ids.
pub(in crate::llm) fn named(tokens: &[NamedToken]) -> String {
    let words: Vec<_> = tokens.iter().map(|t| format!("{} ({})", t.token, t.id)).collect();
    listed(&words)
}

/// The first entries of a list, and the number of further ones.
fn listed<T: Display>(all: &[T]) -> String {
    const SHOWN: usize = 8;
    let mut words: Vec<_> = all.iter().take(SHOWN).map(ToString::to_string).collect();
    if all.len() > SHOWN {
        words.push(format!("and {} more", all.len() - SHOWN));
    }
    words.join(", ")
}
