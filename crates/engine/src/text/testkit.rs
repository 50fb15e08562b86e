//! A small tokenizer for unit tests.

use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::{GgufVocab, Tokenizer};

/// A byte-level vocabulary: `<unk>`, `<s>` and `</s>` (control), `<tool>` (user-defined), the 256
/// bytes in the order of their characters in the byte-level alphabet, and `he`, `ll`, `hell`.
pub(super) fn byte_vocab() -> GgufVocab {
    let mut letters: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    letters.sort_unstable();
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "<tool>"].map(str::to_owned).to_vec();
    tokens.extend(letters.into_iter().map(String::from));
    tokens.extend(["he", "ll", "hell"].map(str::to_owned));
    let mut token_types = vec![1; tokens.len()];
    token_types[..4].copy_from_slice(&[3, 3, 3, 4]);
    GgufVocab {
        model: "gpt2".to_owned(),
        pre: "gpt-2".to_owned(),
        tokens,
        token_types,
        merges: ["h e", "l l", "he ll"].map(str::to_owned).to_vec(),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        add_bos: Some(true),
    }
}

/// The tokenizer of [`byte_vocab`].
pub(crate) fn byte_tokenizer() -> Tokenizer {
    Tokenizer::try_from(byte_vocab()).unwrap()
}
