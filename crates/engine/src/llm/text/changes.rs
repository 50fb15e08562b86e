//! What an adapter's files change of the model's text, for people.

use std::fmt::Display;

use serde::Serialize;

use crate::text::NamedToken;

/// What the files beside an adapter's weights change of the model's tokenizer, chat template and end
/// tokens; nothing where they say what the model's say.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize)]
pub struct TextChanges {
    /// The file that another chat template was taken from.
    pub chat_template: Option<&'static str>,
    /// Tokens that the chat template writes, other than the model's: `bos_token`, `eos_token`.
    pub special_tokens: Vec<(&'static str, String)>,
    /// Ids of the tokens that end an answer, if others than the model's.
    pub end_tokens: Option<Vec<u32>>,
    /// Whether the adapter's `tokenizer.json` was taken.
    pub tokenizer: bool,
    /// Tokens that it has and the model's has not, or at another id.
    pub added_tokens: Vec<NamedToken>,
    /// Vocabularies of tokenizers that are not read; the model's tokenizer is used.
    pub unread: Vec<&'static str>,
}

impl TextChanges {
    /// What was taken, in a line for each part.
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

    /// What was not read, in a line for each file.
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

/// Tokens with their ids, the first few of them.
pub(in crate::llm) fn named(tokens: &[NamedToken]) -> String {
    let words: Vec<_> = tokens.iter().map(|t| format!("{} ({})", t.token, t.id)).collect();
    listed(&words)
}

/// The first few of a list, and how many more there are.
fn listed<T: Display>(all: &[T]) -> String {
    const SHOWN: usize = 8;
    let mut words: Vec<_> = all.iter().take(SHOWN).map(ToString::to_string).collect();
    if all.len() > SHOWN {
        words.push(format!("and {} more", all.len() - SHOWN));
    }
    words.join(", ")
}
