//! Whose text an adapter's requests are made of.

use serde::{Deserialize, Serialize};

/// What is taken of a tokenizer, chat template and `generation_config.json` beside an adapter's weights.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterTokenizer {
    /// What differs from the model's. A tokenizer whose vocabulary contradicts the model's is refused.
    #[default]
    Auto,
    /// Nothing: the files are not read.
    Base,
    /// What differs from the model's, whatever the vocabulary.
    Adapter,
}
