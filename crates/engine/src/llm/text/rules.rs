//! Rules for using an adapter's tokenizer and end tokens with the model.

use std::collections::BTreeMap;

use lora_core::{Code, Rejection};

use super::changes::named;
use crate::text::{Contradiction, NamedToken};

/// The remedy that always applies.
const USE_BASE: &str = "set adapter_tokenizer: base to use the model's";

/// The adapter's tokenizer contradicts the model's vocabulary.
pub(in crate::llm) fn other_vocabulary(contradicted: &[Contradiction]) -> Option<Rejection> {
    let Contradiction { model, adapter } = contradicted.first()?;
    let NamedToken { token, id } = model;
    let there = match adapter {
        Some(other) => format!("{token:?} at {other}, where the model has it at {id}"),
        None => format!("no token {token:?}, which the model has at {id}"),
    };
    let others = match contradicted.len() - 1 {
        0 => String::new(),
        more => format!(", and {more} more that differ"),
    };
    Some(Rejection::new(
        Code::OtherVocabulary,
        "tokenizer.json of the adapter",
        format!("{there}{others}"),
        "the model's vocabulary, with tokens added",
        format!(
            "serve the adapter on the model that it was trained for, or {USE_BASE}, or \
             adapter_tokenizer: adapter if the adapter's is right"
        ),
    ))
}

/// Added tokens have ids beyond the model's `vocab` tokens, so there are no embeddings for them. The padding
/// token is exempt, as it is never fed to the model.
pub(in crate::llm) fn tokens_without_rows(
    added: &[NamedToken],
    padding: Option<&str>,
    vocab: usize,
) -> Option<Rejection> {
    let behind = |t: &&NamedToken| t.id as usize >= vocab && Some(t.token.as_str()) != padding;
    let behind: Vec<NamedToken> = added.iter().filter(behind).cloned().collect();
    (!behind.is_empty()).then(|| {
        without_rows(
            "tokenizer.json of the adapter",
            format!("added tokens {}", named(&behind)),
            vocab,
        )
    })
}

/// `eos_token_id` is beyond the model's vocabulary.
pub(in crate::llm) fn end_ids(ids: &[u32], vocab: usize) -> Option<Rejection> {
    let id = ids.iter().find(|id| **id as usize >= vocab)?;
    let setting = "eos_token_id in generation_config.json of the adapter";
    Some(without_rows(setting, format!("end token {id}"), vocab))
}

/// `eos_token` is beyond the model's vocabulary.
pub(in crate::llm) fn end_token_without_row(token: &str, id: u32, vocab: usize) -> Rejection {
    let setting = "eos_token in tokenizer_config.json of the adapter";
    without_rows(setting, format!("end token {token:?} ({id})"), vocab)
}

fn without_rows(setting: &str, found: String, vocab: usize) -> Rejection {
    Rejection::new(
        Code::TokensWithoutRows,
        setting,
        found,
        format!("ids 0 to {}, which the model has rows for", vocab.saturating_sub(1)),
        format!(
            "serve the adapter on the model with the resized vocabulary that it was trained on, or \
             {USE_BASE}"
        ),
    )
}

/// `eos_token` is not in the tokenizer.
pub(in crate::llm) fn unknown_end_token(token: &str) -> Rejection {
    Rejection::new(
        Code::UnknownEndToken,
        "eos_token in tokenizer_config.json of the adapter",
        format!("end token {token:?}"),
        "a token of tokenizer.json beside it, or of the model's tokenizer if there is none",
        format!("save the adapter's tokenizer again, or {USE_BASE}"),
    )
}

/// `added_tokens.json` has tokens that the model's tokenizer lacks, without a `tokenizer.json` beside it.
/// `known` gives the model's id of a token.
pub(in crate::llm) fn added_tokens_alone(
    added: &BTreeMap<String, u32>,
    known: impl Fn(&str) -> Option<u32>,
) -> Option<Rejection> {
    let new = added.iter().filter(|(token, id)| known(token) != Some(**id));
    let new: Vec<NamedToken> =
        new.map(|(token, id)| NamedToken { token: token.clone(), id: *id }).collect();
    (!new.is_empty()).then(|| {
        Rejection::new(
            Code::AddedTokensAlone,
            "added_tokens.json of the adapter",
            format!("added tokens {}, and no tokenizer.json", named(&new)),
            "tokens that the model's tokenizer has",
            format!(
                "save the adapter's tokenizer again as a fast tokenizer, which writes \
                 tokenizer.json, or {USE_BASE}"
            ),
        )
    })
}
