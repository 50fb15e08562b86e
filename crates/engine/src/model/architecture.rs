//! The supported model families and their differences, one row of a table each.

use super::ModelError;

/// A family of dense decoders.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Architecture {
    /// Llama 1-3 and models of its shape.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Llama with biases on q, k and v.
    Qwen2,
    /// Llama with RMS norms on the heads of q and k.
    Qwen3,
}

/// How the layers of a family differ from those of the others. Loading and the forward pass look at these
/// traits, never at the family's name, so that a new family is a new row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// `model_type` in `config.json`, and GGUF's `general.architecture`.
    pub name: &'static str,
    /// Which projections of attention have biases.
    pub attention_bias: AttentionBias,
    /// Whether the heads of q and k have RMS norms.
    pub qk_norm: bool,
    /// Which layers have a sliding window.
    pub window: WindowRule,
    /// Row order of q and k in GGUF files, as llama.cpp's converter writes them.
    pub gguf_rotary: GgufRotary,
}

/// Which projections of attention have biases.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttentionBias {
    /// On all four projections if `attention_bias` says so.
    AsConfigured,
    /// On q, k and v whatever the configuration says, and not on o.
    QueryKeyValue,
}

/// Which layers have a sliding window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WindowRule {
    /// No layer, whatever `sliding_window` says.
    Never,
    /// All layers, if `sliding_window` is set.
    EveryLayer,
    /// With `use_sliding_window`: the layers that `layer_types` names, or those from `max_window_layers` on.
    SomeLayers,
}

/// Order of the rows of each head of q and k in a GGUF file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GgufRotary {
    /// The two rows of a rotary pair are adjacent, as llama.cpp's kernels for this family expect.
    Interleaved,
    /// The two rows of a rotary pair are half a head apart, as in Hugging Face checkpoints.
    HalfSplit,
}

impl Architecture {
    const TABLE: [(Self, Traits); 4] = [
        (
            Self::Llama,
            Traits {
                name: "llama",
                attention_bias: AttentionBias::AsConfigured,
                qk_norm: false,
                window: WindowRule::Never,
                gguf_rotary: GgufRotary::Interleaved,
            },
        ),
        (
            Self::Mistral,
            Traits {
                name: "mistral",
                attention_bias: AttentionBias::AsConfigured,
                qk_norm: false,
                window: WindowRule::EveryLayer,
                gguf_rotary: GgufRotary::Interleaved,
            },
        ),
        (
            Self::Qwen2,
            Traits {
                name: "qwen2",
                attention_bias: AttentionBias::QueryKeyValue,
                qk_norm: false,
                window: WindowRule::SomeLayers,
                gguf_rotary: GgufRotary::HalfSplit,
            },
        ),
        (
            Self::Qwen3,
            Traits {
                name: "qwen3",
                attention_bias: AttentionBias::AsConfigured,
                qk_norm: true,
                window: WindowRule::SomeLayers,
                gguf_rotary: GgufRotary::HalfSplit,
            },
        ),
    ];

    /// The family that `model_type` (or GGUF's `general.architecture`) names.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for any other name.
    pub fn from_name(name: &str) -> Result<Self, ModelError> {
        let row = Self::TABLE.iter().find(|(_, traits)| traits.name == name);
        row.map(|(architecture, _)| *architecture).ok_or_else(|| {
            let names = Self::TABLE.map(|(_, traits)| traits.name);
            let (last, others) = names.split_last().unwrap_or((&"", &[]));
            ModelError::unsupported("model_type", name, format!("{} or {last}", others.join(", ")))
        })
    }

    /// How its layers differ from those of other families.
    pub fn traits(self) -> &'static Traits {
        // The table has one row for each variant, in order: see the test below.
        &Self::TABLE[self as usize].1
    }

    /// Its `model_type`.
    pub fn name(self) -> &'static str {
        self.traits().name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_row_for_each_family_in_order() {
        for (i, (architecture, traits)) in Architecture::TABLE.iter().enumerate() {
            assert_eq!(*architecture as usize, i);
            assert_eq!(Architecture::from_name(traits.name).unwrap(), *architecture);
        }
        let error = Architecture::from_name("gpt2").unwrap_err().to_string();
        assert!(error.contains("llama, mistral, qwen2 or qwen3"), "{error}");
    }
}
