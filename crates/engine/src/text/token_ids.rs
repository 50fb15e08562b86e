//! Token ids in `config.json` and `generation_config.json`.

use serde::Deserialize;

/// The value of `eos_token_id`: one id or a list of ids.
#[derive(Deserialize, Clone)]
#[serde(untagged, expecting = "expected a token id or a list of them")]
pub(crate) enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    pub(crate) fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}
