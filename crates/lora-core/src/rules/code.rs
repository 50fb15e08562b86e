//! Codes of the rules.

use std::fmt;

use serde::{Serialize, Serializer};

use super::{Rule, Stage};

/// A rule. The strings of [`Code::as_str`] are stable across releases.
///
/// The tables in `rules/`, one for each [`Stage`], have the meaning and remedy of each code. `docs/errors.md`
/// is generated from them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(test, derive(strum::VariantArray))]
#[non_exhaustive]
pub enum Code {
    /// A setting names a target module that does not exist.
    UnknownTargetModule,
    /// The module map is ambiguous or has empty names.
    ModuleMapConflict,
    /// A number of a configuration is outside its range.
    SettingOutOfRange,
    /// A setting has a value that is known but not supported.
    UnsupportedSetting,
    /// `lora_dir` has more than one entry.
    SeveralLoraDirs,
    /// Routed experts are targeted on another MoE backend than CUTLASS.
    MoeBackend,
    /// Routed experts are targeted on quantised base weights.
    QuantizedExperts,
    /// The targeted modules of routed experts do not make up a path through an expert.
    IncompleteExpertModules,
    /// Routed experts are targeted in a model that is compiled.
    CompiledExperts,
    /// The model is of an architecture or a quantisation that is not run.
    UnsupportedModel,
    /// The adapter is of another PEFT kind than LoRA.
    UnsupportedPeftType,
    /// A field of the adapter's configuration asks for something that is not supported.
    UnsupportedConfigField,
    /// A field of the adapter's configuration is not known and not empty.
    UnknownConfigField,
    /// A field of the adapter's configuration is required and absent.
    MissingConfigField,
    /// A field of the adapter's configuration has a wrong type or value.
    InvalidConfigField,
    /// A pattern of the adapter's configuration is not a regular expression that can be read.
    InvalidPattern,
    /// A pattern of the adapter's configuration is too large, or takes too long to match.
    PatternTooComplex,
    /// The adapter was trained on changed base weights.
    MutatedBaseWeights,
    /// A tensor's name does not follow the grammar of adapter files.
    UnknownTensor,
    /// Tensors are named as inside a wrapper of the model.
    WrappedNames,
    /// Tensors are named as parts of a multimodal model.
    MultimodalNames,
    /// Tensors are named as another program than PEFT names them.
    ForeignNames,
    /// Tensors without elements, as a partitioned model has them.
    PartitionedTensors,
    /// A tensor belongs to a module that the module map does not know.
    UnknownModule,
    /// Two tensors of a file claim the same role.
    DuplicateTensor,
    /// The file holds more than one adapter.
    SeveralAdapters,
    /// Tensors of routed experts in no known layout, or in another than `moe_layout` says.
    RoutedExpertLayout,
    /// Tensors of routed experts that more than one layout would explain.
    AmbiguousExpertLayout,
    /// Experts of one module with unequal ranks or scales.
    ExpertRankMismatch,
    /// Experts without weights beside experts with weights.
    MissingExperts,
    /// `lora_A` without `lora_B`, or the other way round.
    IncompletePair,
    /// A tensor has a wrong number of dimensions, or dimensions that contradict each other.
    TensorShape,
    /// A tensor has an element type that is not supported here.
    TensorDtype,
    /// A tensor holds NaN or infinity.
    NonFinite,
    /// A tensor's rank is not the one that the configuration states.
    RankMismatch,
    /// A tensor is present that the configuration does not declare.
    UndeclaredTensor,
    /// A tensor is absent that the configuration declares.
    MissingTensor,
    /// `lora_bias` on `embed_tokens`.
    LoraBiasOnEmbedding,
    /// DoRA on routed experts.
    DoraOnExperts,
    /// A layer index is not below the model's number of layers.
    LayerOutOfRange,
    /// A rank is above `max_lora_rank`.
    RankOverLimit,
    /// A module is not among the effective `lora_target_modules`.
    ModuleNotServed,
    /// The model has no such module.
    ModuleNotInModel,
    /// The adapter has another vocabulary than the model.
    VocabularyMismatch,
    /// A tensor does not fit the model's dimensions.
    ShapeMismatch,
    /// The configuration of a NeMo archive names a module for which it has no weights.
    TargetWithoutWeights,
    /// The file has weights of a module that the configuration does not target.
    WeightsWithoutTarget,
    /// The adapter would change nothing.
    NoopAdapter,
    /// The adapter needs tied embedding and output weights to stay tied.
    TiedEmbeddings,
    /// The adapter replaces a bias that the model does not have.
    BiasNotInModel,
    /// A tokenizer beside the adapter contradicts the model's vocabulary.
    OtherVocabulary,
    /// Tokens beside the adapter have ids for which the model has no rows.
    TokensWithoutRows,
    /// The end token beside the adapter is no token of the tokenizer.
    UnknownEndToken,
    /// Added tokens beside the adapter without the tokenizer that they belong to.
    AddedTokensAlone,
    /// An adapter's name is empty or has characters that its users cannot carry.
    InvalidAdapterName,
    /// A request's adapter path is empty or does not exist.
    AdapterPath,
    /// Routed-expert LoRA in a step of min-latency mode.
    MoeMinLatency,
    /// Routed-expert LoRA in a step that exchanges tokens between ranks.
    MoeAlltoall,
    /// Routed-expert LoRA in a step that is captured into a CUDA graph.
    MoeGraphCapture,
}

impl Code {
    /// Every code, by stage and in the order of the tables.
    pub fn all() -> impl Iterator<Item = Self> {
        Stage::ALL.into_iter().flat_map(Stage::rules).map(|rule| rule.code)
    }

    /// The stable name, in kebab case.
    pub fn as_str(self) -> &'static str {
        self.row().1.name
    }

    /// The stage at which the rule is checked.
    pub fn stage(self) -> Stage {
        self.row().0
    }

    /// The meaning: what is refused and why, in one or two sentences.
    pub fn meaning(self) -> &'static str {
        self.row().1.meaning
    }

    /// The remedy in general, in one or two sentences; [`crate::Rejection::remedy`] is specific to a case.
    pub fn remedy(self) -> &'static str {
        self.row().1.remedy
    }

    fn row(self) -> (Stage, &'static Rule) {
        let of_stage = |stage: Stage| Some((stage, stage.rules().iter().find(|r| r.code == self)?));
        Stage::ALL
            .into_iter()
            .find_map(of_stage)
            .unwrap_or_else(|| unreachable!("{self:?} is in no table: see the test below"))
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use strum::VariantArray;

    use super::*;

    #[test]
    fn each_code_is_in_exactly_one_table() {
        for code in Code::VARIANTS {
            assert_eq!(Code::all().filter(|c| c == code).count(), 1, "{code:?}");
        }
        assert_eq!(Code::all().count(), Code::VARIANTS.len());
    }

    #[test]
    fn names_are_distinct_and_those_of_the_variants_in_kebab_case() {
        let names: BTreeSet<&str> = Code::all().map(Code::as_str).collect();
        assert_eq!(names.len(), Code::VARIANTS.len());
        for code in Code::all() {
            let mut kebab = String::new();
            for letter in format!("{code:?}").chars() {
                if letter.is_ascii_uppercase() && !kebab.is_empty() {
                    kebab.push('-');
                }
                kebab.push(letter.to_ascii_lowercase());
            }
            assert_eq!(code.as_str(), kebab);
        }
    }

    #[test]
    fn meanings_and_remedies_are_whole_sentences() {
        for code in Code::all() {
            for text in [code.meaning(), code.remedy()] {
                assert!(text.ends_with('.') && !text.contains('\n'), "{code}: {text}");
                assert!(text.starts_with(|c: char| c.is_uppercase() || c == '`'), "{code}: {text}");
                assert!(!text.contains("  ") && !text.contains('|'), "{code}: {text}");
            }
        }
    }
}
