//! Use of a tokenizer beside an adapter.

use serde::{Deserialize, Serialize};

/// How a tokenizer, chat template and `generation_config.json` beside an adapter's weights are used.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterTokenizer {
    /// Use them where they differ from the model's. A tokenizer that contradicts the model's vocabulary is
    /// refused.
    #[default]
    Auto,
    /// Ignore them; they are not read.
    Base,
    /// Use them where they differ from the model's, whatever the vocabulary.
    Adapter,
}
