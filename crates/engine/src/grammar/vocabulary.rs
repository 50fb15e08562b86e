//! The bytes of each token, as llguidance needs them.

use std::collections::HashMap;

use serde_json::Value;

use super::GuideError;
use crate::text::Tokenizer;

/// Prefix of the spelling of special tokens, which are no text. The byte does not occur in UTF-8.
const SPECIAL: u8 = llguidance::toktrie::TokTrie::SPECIAL_TOKEN_MARKER;

/// Longest token that llguidance's trie can hold. Longer tokens are never allowed by a guide.
const MAX_TOKEN_BYTES: usize = 1000;

/// The bytes of the ids `0..vocab`. Ids without text (beyond the tokenizer's vocabulary, or with the byte 0xFF)
/// have none. Special tokens have 0xFF and their spelling.
///
/// # Errors
/// [`GuideError::Decoder`].
pub fn token_bytes(tokenizer: &Tokenizer, vocab: usize) -> Result<Vec<Vec<u8>>, GuideError> {
    let inner = tokenizer.inner();
    let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or_default();
    let steps = steps(&decoder).ok_or_else(|| {
        let found = decoder["type"].as_str().map_or("none", |kind| kind);
        GuideError::Decoder { found: found.to_owned() }
    })?;
    let mut all = vec![Vec::new(); vocab];
    for (spelling, id) in inner.get_vocab(true) {
        let Some(bytes) = all.get_mut(id as usize) else { continue };
        if tokenizer.is_special(id) {
            bytes.push(SPECIAL);
            bytes.extend_from_slice(spelling.as_bytes());
        } else {
            let text = bytes_of(&steps, spelling);
            if text.len() <= MAX_TOKEN_BYTES && !text.contains(&SPECIAL) {
                *bytes = text;
            }
        }
    }
    Ok(all)
}

/// Whether a token with these bytes is special or has no text.
pub fn is_silent(bytes: &[u8]) -> bool {
    bytes.first().is_none_or(|first| *first == SPECIAL)
}

/// A step of a tokenizer's decoder, applied to a single token.
enum DecodeStep {
    /// Replaces a string by another one, such as SentencePiece's `▁` by a space.
    Replace(String, String),
    /// `<0x0A>` is the byte 10 (SentencePiece).
    ByteFallback,
    /// Each character stands for a byte, in the alphabet of GPT-2.
    ByteLevel(HashMap<char, u8>),
}

/// The steps of a decoder in the form of `tokenizer.json`; `None` if one of them is not supported.
///
/// `Strip` has no step: it removes spaces at the ends of a whole text, not of single tokens.
fn steps(decoder: &Value) -> Option<Vec<DecodeStep>> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Some(match decoder["type"].as_str()? {
        "Sequence" => {
            let parts = decoder["decoders"].as_array()?.iter().map(steps);
            parts.collect::<Option<Vec<_>>>()?.into_iter().flatten().collect()
        }
        "ByteLevel" => vec![DecodeStep::ByteLevel(byte_alphabet())],
        "ByteFallback" => vec![DecodeStep::ByteFallback],
        "Replace" => {
            vec![DecodeStep::Replace(
                text(&decoder["pattern"]["String"])?,
                text(&decoder["content"])?,
            )]
        }
        "Metaspace" => vec![DecodeStep::Replace(text(&decoder["replacement"])?, " ".to_owned())],
        "Fuse" | "Strip" => Vec::new(),
        _ => return None,
    })
}

/// The bytes of a token after all steps.
fn bytes_of(steps: &[DecodeStep], mut spelling: String) -> Vec<u8> {
    for step in steps {
        match step {
            DecodeStep::Replace(from, to) => spelling = spelling.replace(from, to),
            DecodeStep::ByteFallback => {
                if let Some(byte) = fallback_byte(&spelling) {
                    return vec![byte];
                }
            }
            DecodeStep::ByteLevel(alphabet) => {
                let bytes: Option<Vec<u8>> =
                    spelling.chars().map(|c| alphabet.get(&c).copied()).collect();
                // As in the decoder, a spelling with other characters is used unchanged.
                return bytes.unwrap_or(spelling.into_bytes());
            }
        }
    }
    spelling.into_bytes()
}

fn fallback_byte(spelling: &str) -> Option<u8> {
    let digits = spelling.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The byte-level alphabet of GPT-2 (Radford et al., 2019, `bytes_to_unicode`): printable Latin-1 characters
/// stand for themselves, characters from U+0100 on for the other bytes.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=255u8).filter(|byte| !printable(*byte));
    let stand_ins = ('\u{100}'..).zip(others);
    let themselves = (0..=255u8).filter(|byte| printable(*byte)).map(|byte| (byte.into(), byte));
    stand_ins.chain(themselves).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;
    use crate::text::SpecialTokens;
    use crate::text::testkit::byte_tokenizer;

    fn decoded(decoder: &Value, spelling: &str) -> Vec<u8> {
        bytes_of(&steps(decoder).unwrap(), spelling.to_owned())
    }

    #[test]
    fn the_alphabet_equals_that_of_the_tokenizers_crate() {
        let ours = byte_alphabet();
        assert_eq!(ours.len(), 256);
        assert!(ByteLevel::alphabet().iter().all(|c| ours.contains_key(c)));
        assert_eq!((ours[&'Ġ'], ours[&'Ċ'], ours[&'a']), (b' ', b'\n', b'a'));
    }

    #[test]
    fn the_bytes_of_tokens_concatenate_to_the_text() {
        let tokenizer = byte_tokenizer();
        let bytes = token_bytes(&tokenizer, 300).unwrap();
        for text in ["{\"a\": 1}\n", "naïve 東京 🦙", "hello"] {
            let ids = tokenizer.encode(text, SpecialTokens::Skip).unwrap();
            let joined: Vec<u8> = ids.iter().flat_map(|id| bytes[*id as usize].clone()).collect();
            assert_eq!(joined, text.as_bytes());
        }
    }

    #[test]
    fn special_tokens_and_ids_without_a_token_are_silent() {
        let tokenizer = byte_tokenizer();
        let bytes = token_bytes(&tokenizer, 300).unwrap();
        let id = |token| tokenizer.token_id(token).unwrap() as usize;
        assert_eq!(bytes[id("</s>")], b"\xFF</s>");
        assert!(is_silent(&bytes[id("</s>")]) && is_silent(&bytes[299]));
        assert_eq!(bytes[id("<tool>")], b"<tool>", "a user-defined token is text");
        assert_eq!(bytes[id("ÿ")], b"", "the byte does not occur in text");
    }

    #[test]
    fn sentencepiece_spaces_and_bytes_are_decoded() {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        assert_eq!(decoded(&decoder, "▁the▁"), b" the ");
        assert_eq!(decoded(&decoder, "<0xE6>"), [0xE6]);
        assert_eq!(decoded(&decoder, "<0xZZ>"), b"<0xZZ>");
        assert_eq!(decoded(&json!({"type": "Metaspace", "replacement": "_"}), "_a"), b" a");
    }

    #[test]
    fn an_unsupported_decoder_is_refused() {
        let mut inner = byte_tokenizer().inner().clone();
        inner.with_decoder(Some(tokenizers::decoders::wordpiece::WordPiece::default()));
        let json = inner.to_string(false).unwrap();
        let error = token_bytes(&Tokenizer::from_bytes(json.as_bytes()).unwrap(), 300).unwrap_err();
        assert_eq!(error, GuideError::Decoder { found: "WordPiece".to_owned() });
    }
}
