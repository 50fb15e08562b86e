//! Building a tokenizer from the metadata of a GGUF file.

use std::collections::HashSet;

use serde_json::json;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper, SplitDelimiterBehavior,
    models::bpe::{BPE, Merges, Vocab},
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::{TextError, Tokenizer};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// `tokenizer.ggml.token_type` of control tokens such as BOS.
const CONTROL: i32 = 3;
/// `tokenizer.ggml.token_type` of tokens that are matched in the raw text before BPE.
const USER_DEFINED: i32 = 4;

/// The pre-tokenizer pattern of Llama 3.
const LLAMA3_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// The pre-tokenizer pattern of Qwen 2: as Llama 3's, but with single digits.
const QWEN2_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The `tokenizer.ggml.*` metadata of a GGUF file. `Tokenizer::try_from` builds a byte-level BPE tokenizer
/// from it.
///
/// The conversion fails with [`TextError::GgufUnsupported`] for an unsupported `model` or `pre`, and with
/// [`TextError::GgufInvalid`] for inconsistent metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: the algorithm. Only `gpt2`, byte-level BPE, is supported.
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is split before BPE. Supported are `smollm`, `llama-bpe`,
    /// `qwen2`, `gpt-2` and `default`, which means `gpt-2`.
    pub pre: String,
    /// `tokenizer.ggml.tokens`: spelling of each id, in the byte-level alphabet.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`: one per token, or empty if the file has none.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: pairs separated by one space, best first.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`. Not used for tokenizing.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`: replaces bytes that the vocabulary lacks.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`: whether [`super::SpecialTokens::Add`] puts `bos` first. A
    /// file without the key means true for `llama-bpe` and false for the others.
    pub add_bos: Option<bool>,
}

impl TryFrom<GgufVocab> for Tokenizer {
    type Error = TextError;

    fn try_from(vocab: GgufVocab) -> Result<Self, TextError> {
        let split = pre_tokenizer(&vocab)?;
        let mut inner = tokenizers::Tokenizer::new(bpe(&vocab)?);
        if vocab.pre == "qwen2" {
            inner
                .with_normalizer(Some(NormalizerWrapper::from(NFC)))
                .map_err(|error| library_error(&error))?;
        }
        inner.with_pre_tokenizer(Some(split));
        inner.with_decoder(Some(DecoderWrapper::from(ByteLevel::new(false, false, false))));
        inner
            .add_special_tokens(tokens_of_type(&vocab, CONTROL, true))
            .and_then(|_| inner.add_tokens(tokens_of_type(&vocab, USER_DEFINED, false)))
            .map_err(|error| library_error(&error))?;
        if vocab.add_bos.unwrap_or(vocab.pre == "llama-bpe") {
            inner.with_post_processor(Some(leading_bos(&vocab)?));
        }
        Ok(Self::from_inner(inner))
    }
}

fn library_error(error: &tokenizers::Error) -> TextError {
    TextError::GgufInvalid { key: TOKENS, problem: format!("cannot be used ({error})") }
}

fn pre_tokenizer(vocab: &GgufVocab) -> Result<PreTokenizerWrapper, TextError> {
    if vocab.model != "gpt2" {
        return Err(TextError::GgufUnsupported {
            key: "tokenizer.ggml.model",
            found: vocab.model.clone(),
            allowed: "`gpt2`",
        });
    }
    let (words, bytes) = match vocab.pre.as_str() {
        "gpt-2" | "default" => return Ok(ByteLevel::new(false, false, true).into()),
        "smollm" => (Digits::new(true).into(), ByteLevel::new(false, false, true)),
        "llama-bpe" => (split_at(LLAMA3_WORDS)?, ByteLevel::new(false, false, false)),
        "qwen2" => (split_at(QWEN2_WORDS)?, ByteLevel::new(false, false, false)),
        other => {
            return Err(TextError::GgufUnsupported {
                key: "tokenizer.ggml.pre",
                found: other.to_owned(),
                allowed: "`smollm`, `llama-bpe`, `qwen2`, `gpt-2` and `default`",
            });
        }
    };
    Ok(Sequence::new(vec![words, bytes.into()]).into())
}

fn split_at(words: &str) -> Result<PreTokenizerWrapper, TextError> {
    let pattern = SplitPattern::Regex(words.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
    split.map(Into::into).map_err(|error| library_error(&error))
}

fn bpe(vocab: &GgufVocab) -> Result<ModelWrapper, TextError> {
    let mut builder = BPE::builder()
        .vocab_and_merges(ids_by_token(vocab)?, merge_pairs(vocab)?)
        // Llama 3's vocabulary has words that no sequence of merges produces.
        .ignore_merges(vocab.pre == "llama-bpe")
        .fuse_unk(true);
    if let Some(unk) = vocab.unk {
        builder = builder.unk_token(token_at(vocab, "tokenizer.ggml.unknown_token_id", unk)?);
    }
    builder.build().map(Into::into).map_err(|error| TextError::GgufInvalid {
        key: MERGES,
        problem: format!("does not fit `{TOKENS}` ({error})"),
    })
}

fn ids_by_token(vocab: &GgufVocab) -> Result<Vocab, TextError> {
    if !vocab.token_types.is_empty() && vocab.token_types.len() != vocab.tokens.len() {
        let problem = format!(
            "has {} entries, but `{TOKENS}` has {}",
            vocab.token_types.len(),
            vocab.tokens.len()
        );
        return Err(TextError::GgufInvalid { key: TOKEN_TYPES, problem });
    }
    let mut seen = HashSet::with_capacity(vocab.tokens.len());
    if let Some(twice) = vocab.tokens.iter().find(|token| !seen.insert(token.as_str())) {
        let problem = format!("lists `{twice}` more than once");
        return Err(TextError::GgufInvalid { key: TOKENS, problem });
    }
    Ok(vocab.tokens.iter().cloned().zip(0u32..).collect())
}

fn merge_pairs(vocab: &GgufVocab) -> Result<Merges, TextError> {
    let pair = |(index, merge): (usize, &String)| match merge.split_once(' ') {
        Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
        None => Err(TextError::GgufInvalid {
            key: MERGES,
            problem: format!("has `{merge}` at index {index}, which is no pair"),
        }),
    };
    vocab.merges.iter().enumerate().map(pair).collect()
}

fn token_at(vocab: &GgufVocab, key: &'static str, id: u32) -> Result<String, TextError> {
    let index = usize::try_from(id).ok();
    index.and_then(|index| vocab.tokens.get(index)).cloned().ok_or_else(|| {
        let problem = format!("is {id}, but `{TOKENS}` has {} entries", vocab.tokens.len());
        TextError::GgufInvalid { key, problem }
    })
}

fn tokens_of_type(vocab: &GgufVocab, kind: i32, special: bool) -> Vec<AddedToken> {
    let of_kind = vocab.tokens.iter().zip(&vocab.token_types).filter(|(_, t)| **t == kind);
    of_kind.map(|(token, _)| AddedToken::from(token.clone(), special)).collect()
}

/// A post-processor that prepends BOS. It is built from JSON because the library's builder parses the spelling
/// of tokens, and fails for some.
fn leading_bos(vocab: &GgufVocab) -> Result<PostProcessorWrapper, TextError> {
    const KEY: &str = "tokenizer.ggml.bos_token_id";
    let problem = "is missing, but `tokenizer.ggml.add_bos_token` is true".to_owned();
    let id = vocab.bos.ok_or(TextError::GgufInvalid { key: KEY, problem })?;
    let bos = token_at(vocab, KEY, id)?;
    let first = json!({"SpecialToken": {"id": bos, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let second = json!({"Sequence": {"id": "B", "type_id": 1}});
    let template = json!({
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {bos.as_str(): {"id": bos, "ids": [id], "tokens": [bos]}},
    });
    serde_json::from_value(template).map_err(|error| library_error(&error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{SpecialTokens, testkit::byte_vocab};

    fn words(pre: &str, text: &str) -> Vec<String> {
        let vocab = GgufVocab { pre: pre.to_owned(), merges: Vec::new(), ..byte_vocab() };
        let tokenizer = Tokenizer::try_from(vocab).unwrap();
        let split = tokenizer.inner().get_pre_tokenizer().unwrap();
        let mut text = tokenizers::PreTokenizedString::from(text);
        tokenizers::PreTokenizer::pre_tokenize(split, &mut text).unwrap();
        let offsets = tokenizers::OffsetReferential::Original;
        let pieces = text.get_splits(offsets, tokenizers::OffsetType::Byte);
        pieces.into_iter().map(|(piece, _, _)| piece.replace('Ġ', " ")).collect()
    }

    #[test]
    fn each_pre_tokenizer_splits_numbers_and_spaces_its_own_way() {
        let text = "It'S  1234  x";
        assert_eq!(words("gpt-2", text), ["It", "'", "S", " ", " 1234", " ", " x"]);
        assert_eq!(
            words("smollm", text),
            ["It", "'", "S", "  ", "1", "2", "3", "4", " ", " x"],
            "digits are cut off first, so the spaces before them stay together"
        );
        assert_eq!(words("llama-bpe", text), ["It", "'S", " ", " ", "123", "4", " ", " x"]);
        assert_eq!(words("qwen2", text), ["It", "'S", " ", " ", "1", "2", "3", "4", " ", " x"]);
    }

    #[test]
    fn merges_and_control_tokens_are_applied() {
        let tokenizer = Tokenizer::try_from(byte_vocab()).unwrap();
        let ids = tokenizer.encode("hello</s><tool>", SpecialTokens::Skip).unwrap();
        let id = |token| tokenizer.token_id(token).unwrap();
        assert_eq!(ids, [id("hell"), id("o"), id("</s>"), id("<tool>")]);
        assert!(tokenizer.is_special(id("</s>")) && !tokenizer.is_special(id("<tool>")));
    }

    #[test]
    fn unsupported_kinds_name_the_value_and_the_remedy() {
        let spm = GgufVocab { model: "llama".to_owned(), ..byte_vocab() };
        let strange = GgufVocab { pre: "strange".to_owned(), ..byte_vocab() };
        for (vocab, key, value) in [(spm, "ggml.model", "`llama`"), (strange, "pre", "`strange`")] {
            let message = Tokenizer::try_from(vocab).unwrap_err().to_string();
            for part in [key, value, "tokenizer.json beside"] {
                assert!(message.contains(part), "{message}");
            }
        }
    }

    #[test]
    fn contradicting_metadata_is_refused() {
        let good = byte_vocab();
        let twice = vec!["a".to_owned(), "a".to_owned()];
        let cases = [
            (GgufVocab { token_types: vec![1], ..good.clone() }, "has 1 entries"),
            (GgufVocab { tokens: twice, token_types: vec![], ..good.clone() }, "more than once"),
            (GgufVocab { merges: vec!["ab".to_owned()], ..good.clone() }, "no pair"),
            (GgufVocab { merges: vec!["zz y".to_owned()], ..good.clone() }, "does not fit"),
            (GgufVocab { unk: Some(9999), ..good.clone() }, "unknown_token_id` is 9999"),
            (GgufVocab { bos: Some(9999), ..good.clone() }, "bos_token_id` is 9999"),
            (GgufVocab { bos: None, ..good }, "bos_token_id` is missing"),
        ];
        for (vocab, part) in cases {
            let message = Tokenizer::try_from(vocab).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
