//! Streaming detokenisation: token ids to text, one token at a time.

use tokenizers::{DecodeStreamError, step_decode_stream};

use super::{TextError, Tokenizer};

/// Decodes the tokens of one sequence as they are generated.
///
/// Pieces consist of whole characters: the bytes of an incomplete character are held back. With a byte-level
/// tokenizer, the pieces and the final [`Detokenizer::finish`] together equal [`Tokenizer::decode`] of all
/// ids. With a tokenizer that falls back to byte tokens (`<0x0A>`) this holds for valid UTF-8. If a later
/// byte makes characters invalid that were released already, they stay, and only what follows becomes
/// U+FFFD.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Ids that decoding still depends on: those of the last piece, then those held back.
    ids: Vec<u32>,
    /// Text of the released `ids`.
    prefix: String,
    /// Number of `ids` whose text was released.
    released: usize,
}

impl Detokenizer {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), prefix: String::new(), released: 0 }
    }

    /// Adds a token and returns the text that it completes, possibly empty.
    ///
    /// # Errors
    /// [`TextError::Decode`] if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        if self.skip_special && self.tokenizer.is_special(id) {
            // Special tokens decode to nothing. If they were kept in `ids`, a long run of them would be
            // decoded again at every step.
            return Ok(String::new());
        }
        let step = step_decode_stream(
            self.tokenizer.inner(),
            vec![id],
            self.skip_special,
            &mut self.ids,
            &mut self.prefix,
            &mut self.released,
        );
        match step {
            Ok(piece) => Ok(piece.unwrap_or_default()),
            Err(error) if error.is::<DecodeStreamError>() => self.release_alone(),
            Err(error) => Err(TextError::Decode { tokens: 1, reason: error.to_string() }),
        }
    }

    /// Returns the text held back, with U+FFFD for incomplete characters, and resets the state.
    ///
    /// # Errors
    /// [`TextError::Decode`] if the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, TextError> {
        let whole = self.tokenizer.decode(&self.ids, self.skip_special)?;
        let rest = match whole.strip_prefix(&self.prefix) {
            Some(rest) => rest.to_owned(),
            None => self.tokenizer.decode(self.held(), self.skip_special)?,
        };
        self.ids.clear();
        self.prefix.clear();
        self.released = 0;
        Ok(rest)
    }

    /// Decodes the held ids alone, when together with the earlier ids they would change released text.
    fn release_alone(&mut self) -> Result<String, TextError> {
        let held = self.held().to_vec();
        let piece = self.tokenizer.decode(&held, self.skip_special)?;
        self.released = held.len();
        self.ids = held;
        self.prefix.clone_from(&piece);
        Ok(piece)
    }

    fn held(&self) -> &[u32] {
        self.ids.get(self.released..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::{SpecialTokens, testkit::byte_tokenizer};

    fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
        let mut detokenizer = tokenizer.detokenizer(skip_special);
        let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
        pieces.push(detokenizer.finish().unwrap());
        pieces
    }

    /// A tokenizer with byte fallback, as SentencePiece models have.
    fn fallback_tokenizer() -> Tokenizer {
        let mut vocab = serde_json::Map::new();
        for (id, byte) in (0u32..).zip(0..=255u8) {
            vocab.insert(format!("<0x{byte:02X}>"), id.into());
        }
        for (id, letter) in (256u32..).zip(["a", "b", "▁"]) {
            vocab.insert(letter.to_owned(), id.into());
        }
        let json = serde_json::json!({
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
        });
        Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_character_is_held_back_until_its_last_byte() {
        let tokenizer = byte_tokenizer();
        let ids = tokenizer.encode("é🦙!", SpecialTokens::Skip).unwrap();
        assert_eq!(stream(&tokenizer, &ids, true), ["", "é", "", "", "", "🦙", "!", ""]);
        assert_eq!(stream(&tokenizer, &ids[..4], true), ["", "é", "", "", "\u{fffd}"]);
    }

    #[test]
    fn a_byte_that_makes_released_text_invalid_is_no_error() {
        let tokenizer = fallback_tokenizer();
        let pieces = stream(&tokenizer, &[0x41, 0xff, 256, 257], true);
        assert_eq!(pieces.concat(), "A\u{fffd}ab");
    }

    proptest! {
        #[test]
        fn pieces_of_any_ids_are_the_decoded_whole(
            ids in prop::collection::vec(0u32..270, 0..40),
            skip_special: bool,
        ) {
            let tokenizer = byte_tokenizer();
            let whole = tokenizer.decode(&ids, skip_special).unwrap();
            prop_assert_eq!(stream(&tokenizer, &ids, skip_special).concat(), whole);
        }

        #[test]
        fn pieces_of_any_text_are_the_text(text in "\\PC{0,20}") {
            let tokenizer = byte_tokenizer();
            let ids = tokenizer.encode(&text, SpecialTokens::Skip).unwrap();
            let pieces = stream(&tokenizer, &ids, true);
            prop_assert_eq!(pieces.concat(), text);
        }

        #[test]
        fn byte_fallback_gives_valid_text_back(text in "[ab▁é東🦙]{0,20}") {
            let tokenizer = fallback_tokenizer();
            let ids = tokenizer.encode(&text, SpecialTokens::Skip).unwrap();
            let whole = tokenizer.decode(&ids, true).unwrap();
            prop_assert_eq!(stream(&tokenizer, &ids, true).concat(), whole);
        }

        #[test]
        fn byte_fallback_never_fails(ids in prop::collection::vec(0u32..260, 0..40)) {
            stream(&fallback_tokenizer(), &ids, true);
        }
    }
}
