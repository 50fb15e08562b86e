//! Layouts of routed-expert weights in files.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A layout of routed-expert weights in a file. In memory, there is one pair of stacks for each module:
/// A `[experts, rank, in]` and B `[experts, out, rank]`.
///
/// E experts, rank r, hidden size H, inner size I of one expert.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExpertLayout {
    /// One pair for each expert, `experts.{e}.gate_proj.lora_A.weight`: A `[r, in]`, B `[out, r]`.
    PerExpert,
    /// One pair for each module, `experts.gate_proj.lora_A.weight`: A `[E, r, in]`, B `[E, out, r]`.
    Stacked,
    /// [`ExpertLayout::Stacked`] with one matrix shared by all experts and stored once: `[r, in]` or
    /// `[1, r, in]` for A, `[out, r]` or `[1, out, r]` for B.
    SharedOuter,
    /// [`ExpertLayout::Stacked`] with gate and up fused in `experts.gate_up_proj`: B `[E, 2I, r]`, the gate
    /// rows of an expert before its up rows.
    Fused,
    /// [`ExpertLayout::Fused`] with interleaved gate and up rows, as in gpt-oss.
    FusedInterleaved,
    /// PEFT's `target_parameters` since release 0.19.1. `experts.base_layer.lora_*` is the first parameter of
    /// the model's module (gate_up_proj), `experts.lora_*` the second (down_proj); a single target is always
    /// `experts.lora_*`. The rows of A `[E r, in]` are ordered by expert, then rank; the columns of
    /// B `[out, r E]` by rank, then expert.
    TargetParameters,
    /// The same up to PEFT 0.19.0, for models that store experts as `[E, out, in]`: `in` and `out` are
    /// swapped, A `[E r, out]` and B `[in, r E]`.
    TargetParametersSwapped,
    /// [`ExpertLayout::TargetParameters`] with interleaved gate and up rows, as in gpt-oss.
    TargetParametersInterleaved,
    /// [`ExpertLayout::TargetParameters`] with the columns of B (`[out, E r]`) ordered by expert, then
    /// rank, as Unsloth wrote it until September 2026.
    UnslothExpertSlowest,
}

impl ExpertLayout {
    /// Every layout.
    pub const ALL: [Self; 9] = [
        Self::PerExpert,
        Self::Stacked,
        Self::SharedOuter,
        Self::Fused,
        Self::FusedInterleaved,
        Self::TargetParameters,
        Self::TargetParametersSwapped,
        Self::TargetParametersInterleaved,
        Self::UnslothExpertSlowest,
    ];

    /// Its name in `moe_layout`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PerExpert => "per-expert",
            Self::Stacked => "stacked",
            Self::SharedOuter => "shared-outer",
            Self::Fused => "fused",
            Self::FusedInterleaved => "fused-interleaved",
            Self::TargetParameters => "target-parameters",
            Self::TargetParametersSwapped => "target-parameters-swapped",
            Self::TargetParametersInterleaved => "target-parameters-interleaved",
            Self::UnslothExpertSlowest => "unsloth-expert-slowest",
        }
    }
}

impl fmt::Display for ExpertLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_setting() {
        for layout in ExpertLayout::ALL {
            let json = serde_json::to_string(layout.name()).unwrap();
            assert_eq!(serde_json::from_str::<ExpertLayout>(&json).unwrap(), layout);
            assert_eq!(serde_json::to_string(&layout).unwrap(), json);
        }
        let unknown = serde_json::from_str::<ExpertLayout>("\"stack\"").unwrap_err().to_string();
        assert!(unknown.contains("unsloth-expert-slowest"), "{unknown}");
    }
}
