//! Tokenizers, a wrapper of the `tokenizers` crate.

use std::{
    collections::HashSet,
    fmt,
    path::Path,
    sync::{Arc, OnceLock},
};

use lora_core::files;

use super::{Detokenizer, TextError, token_bytes};

/// Whether encoding adds the special tokens of the tokenizer's post-processor, such as a leading BOS.
///
/// Special tokens that are spelled out in the text are recognised in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Add them: for plain prompts.
    Add,
    /// Do not add them: for rendered chats, which contain them already, and for banned words.
    Skip,
}

/// A tokenizer. Cheap to clone and to share between threads.
///
/// Truncation and padding settings of a `tokenizer.json` are ignored: a prompt is only truncated on request.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    special: Arc<HashSet<u32>>,
    bytes_per_token: Arc<OnceLock<usize>>,
    /// Hash of the `tokenizer.json`; `None` if it was built from a GGUF file.
    digest: Option<blake3::Hash>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TextError::Read`] or [`TextError::Tokenizer`], both naming the file.
    pub fn from_file(path: &Path) -> Result<Self, TextError> {
        let bytes = files::read(path, files::MAX_TOKENIZER)
            .map_err(|reason| TextError::Read { path: path.to_path_buf(), reason })?;
        Self::parse(&bytes, || path.display().to_string())
    }

    /// Parses the content of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] if the library rejects it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TextError> {
        Self::parse(bytes, || "the given tokenizer.json".to_owned())
    }

    /// As [`Tokenizer::from_bytes`]; `origin` names the source in errors.
    pub(super) fn parse(bytes: &[u8], origin: impl Fn() -> String) -> Result<Self, TextError> {
        let refuse = |reason: tokenizers::Error| TextError::Tokenizer {
            origin: origin(),
            reason: reason.to_string(),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(refuse)?;
        inner.with_truncation(None).map_err(refuse)?;
        inner.with_padding(None);
        Ok(Self { digest: Some(blake3::hash(bytes)), ..Self::from_inner(inner) })
    }

    pub(super) fn from_inner(inner: tokenizers::Tokenizer) -> Self {
        let special = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();
        let bytes_per_token = Arc::default();
        Self { inner: Arc::new(inner), special: Arc::new(special), bytes_per_token, digest: None }
    }

    pub(crate) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// Hash of the `tokenizer.json`; `None` for one that was built from a GGUF file.
    pub(crate) fn digest(&self) -> Option<blake3::Hash> {
        self.digest
    }

    /// Encodes `text` to token ids.
    ///
    /// # Errors
    /// [`TextError::Encode`] if the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TextError> {
        self.inner
            .encode_fast(text, special == SpecialTokens::Add)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| TextError::Encode { bytes: text.len(), reason: e.to_string() })
    }

    /// Decodes `ids` to text. Invalid UTF-8 becomes U+FFFD. Ids without a token, such as those of a vocabulary
    /// padded for alignment, are skipped.
    ///
    /// # Errors
    /// [`TextError::Decode`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|e| TextError::Decode { tokens: ids.len(), reason: e.to_string() })
    }

    /// Upper bound of the bytes of text per token: every text has at least its bytes divided by this as tokens.
    /// 1024 if the tokenizer may drop or merge text without a bound.
    pub fn bytes_per_token(&self) -> usize {
        *self.bytes_per_token.get_or_init(|| token_bytes::bytes_per_token(&self.inner))
    }

    /// Number of tokens, including added ones. The model's vocabulary may be larger.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Id of the token with this spelling, if any.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `id` is a special token, which `decode` can skip.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// A detokenizer for one output sequence.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(self.clone(), skip_special)
    }
}

impl fmt::Debug for Tokenizer {
    /// Prints the size of the vocabulary, not its entries.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special", &self.special.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::testkit::byte_tokenizer;

    #[test]
    fn text_survives_encoding_and_decoding() {
        let tokenizer = byte_tokenizer();
        for text in ["", "hello  world\n", "naïve 東京 🦙", "\u{0}\u{7f}"] {
            let ids = tokenizer.encode(text, SpecialTokens::Skip).unwrap();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
    }

    #[test]
    fn special_tokens_are_added_and_skipped_on_request() {
        let tokenizer = byte_tokenizer();
        let bos = tokenizer.token_id("<s>").unwrap();
        let with = tokenizer.encode("a", SpecialTokens::Add).unwrap();
        let without = tokenizer.encode("a", SpecialTokens::Skip).unwrap();
        assert_eq!(with.split_first(), Some((&bos, without.as_slice())));
        assert!(tokenizer.is_special(bos) && !tokenizer.is_special(without[0]));
        assert_eq!(tokenizer.decode(&with, true).unwrap(), "a");
        assert_eq!(tokenizer.decode(&with, false).unwrap(), "<s>a");
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_ignored() {
        let mut inner = byte_tokenizer().inner().clone();
        let limit = tokenizers::TruncationParams { max_length: 2, ..Default::default() };
        inner.with_truncation(Some(limit)).unwrap();
        inner.with_padding(Some(tokenizers::PaddingParams::default()));
        let bytes = inner.to_string(false).unwrap();
        let tokenizer = Tokenizer::from_bytes(bytes.as_bytes()).unwrap();
        let ids = tokenizer.encode("zyxwv", SpecialTokens::Skip).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "zyxwv");
    }

    #[test]
    fn unusable_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let missing = Tokenizer::from_file(&path).unwrap_err();
        assert!(matches!(&missing, TextError::Read { path: p, .. } if *p == path));
        std::fs::write(&path, "{}").unwrap();
        let broken = Tokenizer::from_file(&path).unwrap_err().to_string();
        assert!(broken.contains("tokenizer.json is not a usable tokenizer"), "{broken}");
    }
}
