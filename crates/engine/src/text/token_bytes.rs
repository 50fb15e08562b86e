//! An upper bound of the bytes of text per token.
//!
//! With it, a text that is too long for `max_seq_len` is refused by its length, without spending minutes on
//! tokenizing it.

use tokenizers::{
    ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
};

/// The bound assumed for tokenizers that may drop text, or map a run of any length (of spaces, or of unknown
/// characters) to one token. Far above the average of real text.
const DEFAULT_BYTES_PER_TOKEN: usize = 1024;

/// Upper bound of the bytes that Unicode normalisation and lower-casing turn into one. The maximum is about 3,
/// for sequences of combining characters that have a composed form.
const MAX_NORMALIZER_SHRINK: usize = 4;

/// Upper bound of the bytes of text that one token represents.
pub(super) fn bytes_per_token(tokenizer: &Tokenizer) -> usize {
    proven_bound(tokenizer).unwrap_or(DEFAULT_BYTES_PER_TOKEN)
}

/// A proven bound, if every step of the tokenizer preserves the text; `None` if a step may drop or merge any
/// amount of it.
fn proven_bound(tokenizer: &Tokenizer) -> Option<usize> {
    let added = tokenizer.get_added_tokens_decoder();
    // Such a token absorbs all adjacent whitespace.
    if added.values().any(|token| token.lstrip || token.rstrip) {
        return None;
    }
    let shrink = tokenizer.get_normalizer().map_or(Some(1), shrink)?;
    let as_bytes = match tokenizer.get_pre_tokenizer() {
        Some(pre_tokenizer) => keeps_text(pre_tokenizer)?,
        None => false,
    };
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
    let vocab = model.get_vocab();
    // In a byte-level vocabulary, each character of a token is one byte of text.
    let length = |token: &String| if as_bytes { token.chars().count() } else { token.len() };
    let knows_every_byte = if as_bytes {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        alphabet.iter().all(|letter| vocab.contains_key(&letter.to_string()))
    } else {
        model.byte_fallback && (0..=255).all(|b| vocab.contains_key(&format!("<0x{b:02X}>")))
    };
    if !knows_every_byte {
        return None;
    }
    let of_model = vocab.keys().map(length).max()?;
    let of_added = added.values().map(|token| token.content.len()).max().unwrap_or(0);
    Some(of_model.max(of_added).saturating_mul(shrink))
}

/// Upper bound of the bytes of text that a normalizer turns into one; `None` if there is no bound.
fn shrink(normalizer: &NormalizerWrapper) -> Option<usize> {
    use NormalizerWrapper as N;
    match normalizer {
        N::NFC(_) | N::NFD(_) | N::NFKC(_) | N::NFKD(_) | N::Lowercase(_) => {
            Some(MAX_NORMALIZER_SHRINK)
        }
        N::Prepend(_) => Some(1),
        N::Replace(replace) => {
            let json = serde_json::to_value(replace).ok()?;
            let (from, to) = (json["pattern"]["String"].as_str()?, replace.content.len());
            from.len()
                .max(to)
                .checked_div(to)
                .map(|whole| whole + 1)
                .map(|bytes| if from.len() <= to { 1 } else { bytes })
        }
        N::Sequence(all) => {
            let mut steps = all.as_ref().iter().map(shrink);
            steps.try_fold(1_usize, |product, step| product.checked_mul(step?))
        }
        _ => None,
    }
}

/// Whether a pre-tokenizer maps text to the byte-level alphabet; `None` if it may drop text.
fn keeps_text(pre_tokenizer: &PreTokenizerWrapper) -> Option<bool> {
    use PreTokenizerWrapper as P;
    match pre_tokenizer {
        P::ByteLevel(_) => Some(true),
        P::Metaspace(_) | P::Digits(_) | P::UnicodeScripts(_) => Some(false),
        P::Split(split) if split.behavior != SplitDelimiterBehavior::Removed => Some(false),
        P::Sequence(all) => {
            let mut steps = all.as_ref().iter().map(keeps_text);
            steps.try_fold(false, |as_bytes, step| Some(as_bytes | step?))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::AddedToken;
    use tokenizers::normalizers::{Replace, Strip};

    use super::*;
    use crate::text::testkit::byte_tokenizer;
    use crate::text::{SpecialTokens, Tokenizer as TextTokenizer};

    fn changed(change: impl FnOnce(&mut Tokenizer)) -> usize {
        let mut inner = byte_tokenizer().inner().clone();
        change(&mut inner);
        bytes_per_token(&inner)
    }

    #[test]
    fn the_longest_token_is_the_bound() {
        // `<tool>`.
        assert_eq!(byte_tokenizer().bytes_per_token(), 6);
        let longer = AddedToken::from("a token of 23 bytes ...", false);
        assert_eq!(changed(|t| assert_eq!(t.add_tokens([longer]).unwrap(), 1)), 23);
    }

    #[test]
    fn tokenizers_that_may_drop_text_have_the_default_bound() {
        let strips = AddedToken::from("<x>", false).lstrip(true);
        assert_eq!(changed(|t| drop(t.add_tokens([strips]))), DEFAULT_BYTES_PER_TOKEN);
        assert_eq!(
            changed(|t| drop(t.with_normalizer(Some(Strip::new(true, true))))),
            DEFAULT_BYTES_PER_TOKEN
        );
        let shorter = || Replace::new("aaaa", "b").unwrap();
        assert_eq!(changed(|t| drop(t.with_normalizer(Some(shorter())))), 6 * 5);
        let dropped = || Replace::new("a", "").unwrap();
        assert_eq!(changed(|t| drop(t.with_normalizer(Some(dropped())))), DEFAULT_BYTES_PER_TOKEN);
    }

    proptest! {
        #[test]
        fn no_text_has_fewer_tokens(text in "(hell|<tool>|[a-zé ]|\\PC){0,40}", nfc in any::<bool>()) {
            let mut inner = byte_tokenizer().inner().clone();
            if nfc {
                inner.with_normalizer(Some(tokenizers::normalizers::NFC)).unwrap();
            }
            let tokenizer = TextTokenizer::from_inner(inner);
            let tokens = tokenizer.encode(&text, SpecialTokens::Skip).unwrap().len();
            prop_assert!(tokens * tokenizer.bytes_per_token() >= text.len());
        }
    }
}
