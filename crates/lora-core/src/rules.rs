//! Why something was refused, in a form that a person can act on and a program can match.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Serialize, Serializer};

/// When a rule is checked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Stage {
    /// A configuration value by itself, before a model or adapter is read.
    Config,
    /// Configuration against the model, when the engine is built.
    Construction,
    /// An adapter, when it is loaded.
    Load,
    /// A request or a step.
    Runtime,
}

/// The rule that was broken. The strings of [`Code::as_str`] are stable across releases.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
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
    /// An adapter's name is empty or has characters that its users cannot carry.
    InvalidAdapterName,
    /// A request's adapter path is empty or does not exist.
    AdapterPath,
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
    /// The adapter was trained on changed base weights.
    MutatedBaseWeights,
    /// A tensor's name does not follow the grammar of adapter files.
    UnknownTensor,
    /// A tensor belongs to a module that the module map does not know.
    UnknownModule,
    /// Two tensors of a file claim the same role.
    DuplicateTensor,
    /// The file holds more than one adapter.
    SeveralAdapters,
    /// A routed-expert layout that is not read.
    RoutedExpertLayout,
    /// The layout of routed experts cannot be told from the file.
    AmbiguousExpertLayout,
    /// Routed experts of one module have unequal ranks or scales.
    ExpertRankMismatch,
    /// A routed expert has no weights.
    MissingExperts,
    /// DoRA on routed experts.
    DoraOnExperts,
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
    /// DoRA on `embed_tokens`.
    DoraOnEmbedding,
    /// A layer index is not below the model's number of layers.
    LayerOutOfRange,
    /// A rank is above `max_lora_rank`.
    RankOverLimit,
    /// A module is not among the effective `lora_target_modules`.
    ModuleNotServed,
    /// The model has no such module.
    ModuleNotInModel,
    /// A tensor does not fit the model's dimensions.
    ShapeMismatch,
    /// The configuration targets a module of the model for which the file has no weights.
    TargetWithoutWeights,
    /// The file has weights of a module that the configuration does not target.
    WeightsWithoutTarget,
    /// The adapter would change nothing.
    NoopAdapter,
    /// The adapter needs tied embedding and output weights to stay tied.
    TiedEmbeddings,
    /// The adapter replaces a bias that the model does not have.
    BiasNotInModel,
}

impl Code {
    /// Every code, in the order of the enum.
    pub const fn all() -> &'static [Self] {
        use Code::*;
        &[
            UnknownTargetModule,
            ModuleMapConflict,
            SettingOutOfRange,
            UnsupportedSetting,
            SeveralLoraDirs,
            InvalidAdapterName,
            AdapterPath,
            UnsupportedPeftType,
            UnsupportedConfigField,
            UnknownConfigField,
            MissingConfigField,
            InvalidConfigField,
            InvalidPattern,
            MutatedBaseWeights,
            UnknownTensor,
            UnknownModule,
            DuplicateTensor,
            SeveralAdapters,
            RoutedExpertLayout,
            AmbiguousExpertLayout,
            ExpertRankMismatch,
            MissingExperts,
            DoraOnExperts,
            IncompletePair,
            TensorShape,
            TensorDtype,
            NonFinite,
            RankMismatch,
            UndeclaredTensor,
            MissingTensor,
            DoraOnEmbedding,
            LayerOutOfRange,
            RankOverLimit,
            ModuleNotServed,
            ModuleNotInModel,
            ShapeMismatch,
            TargetWithoutWeights,
            WeightsWithoutTarget,
            NoopAdapter,
            TiedEmbeddings,
            BiasNotInModel,
        ]
    }

    /// The stable name, in kebab case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UnknownTargetModule => "unknown-target-module",
            Self::ModuleMapConflict => "module-map-conflict",
            Self::SettingOutOfRange => "setting-out-of-range",
            Self::UnsupportedSetting => "unsupported-setting",
            Self::SeveralLoraDirs => "several-lora-dirs",
            Self::InvalidAdapterName => "invalid-adapter-name",
            Self::AdapterPath => "adapter-path",
            Self::UnsupportedPeftType => "unsupported-peft-type",
            Self::UnsupportedConfigField => "unsupported-config-field",
            Self::UnknownConfigField => "unknown-config-field",
            Self::MissingConfigField => "missing-config-field",
            Self::InvalidConfigField => "invalid-config-field",
            Self::InvalidPattern => "invalid-pattern",
            Self::MutatedBaseWeights => "mutated-base-weights",
            Self::UnknownTensor => "unknown-tensor",
            Self::UnknownModule => "unknown-module",
            Self::DuplicateTensor => "duplicate-tensor",
            Self::SeveralAdapters => "several-adapters",
            Self::RoutedExpertLayout => "routed-expert-layout",
            Self::AmbiguousExpertLayout => "ambiguous-expert-layout",
            Self::ExpertRankMismatch => "expert-rank-mismatch",
            Self::MissingExperts => "missing-experts",
            Self::DoraOnExperts => "dora-on-experts",
            Self::IncompletePair => "incomplete-pair",
            Self::TensorShape => "tensor-shape",
            Self::TensorDtype => "tensor-dtype",
            Self::NonFinite => "non-finite",
            Self::RankMismatch => "rank-mismatch",
            Self::UndeclaredTensor => "undeclared-tensor",
            Self::MissingTensor => "missing-tensor",
            Self::DoraOnEmbedding => "dora-on-embedding",
            Self::LayerOutOfRange => "layer-out-of-range",
            Self::RankOverLimit => "rank-over-limit",
            Self::ModuleNotServed => "module-not-served",
            Self::ModuleNotInModel => "module-not-in-model",
            Self::ShapeMismatch => "shape-mismatch",
            Self::TargetWithoutWeights => "target-without-weights",
            Self::WeightsWithoutTarget => "weights-without-target",
            Self::NoopAdapter => "noop-adapter",
            Self::TiedEmbeddings => "tied-embeddings",
            Self::BiasNotInModel => "bias-not-in-model",
        }
    }

    /// When the rule is checked.
    pub const fn stage(self) -> Stage {
        match self {
            Self::UnknownTargetModule
            | Self::ModuleMapConflict
            | Self::SettingOutOfRange
            | Self::UnsupportedSetting
            | Self::SeveralLoraDirs => Stage::Config,
            Self::InvalidAdapterName | Self::AdapterPath => Stage::Runtime,
            _ => Stage::Load,
        }
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

/// One broken rule.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Rejection {
    /// The rule.
    pub code: Code,
    /// The setting, tensor, module or file that breaks it.
    pub setting: String,
    /// What was found there.
    pub found: String,
    /// What is allowed there.
    pub allowed: String,
    /// What to do about it.
    pub remedy: String,
}

impl Rejection {
    /// A rejection of `setting`, from its four phrases; none of them ends with a full stop.
    pub fn new(
        code: Code,
        setting: impl Into<String>,
        found: impl Into<String>,
        allowed: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            code,
            setting: setting.into(),
            found: found.into(),
            allowed: allowed.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, setting, found, allowed, remedy } = self;
        write!(f, "{setting}: found {found}, allowed is {allowed}; {remedy} [{code}]")
    }
}

/// All rules that one thing breaks, in the order in which they were found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejections(pub Vec<Rejection>);

impl Rejections {
    /// `Ok` when nothing is broken.
    pub fn into_result(self) -> Result<(), Self> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }

    /// Whether one of them is of this code.
    pub fn has(&self, code: Code) -> bool {
        self.0.iter().any(|r| r.code == code)
    }
}

impl fmt::Display for Rejections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A rule that is broken in one layer is often broken in all of them.
        const SHOWN: usize = 3;
        let mut by_code: BTreeMap<Code, Vec<&Rejection>> = BTreeMap::new();
        for rejection in &self.0 {
            by_code.entry(rejection.code).or_default().push(rejection);
        }
        let mut separator = "";
        for (code, broken) in by_code {
            for rejection in broken.iter().take(SHOWN) {
                write!(f, "{separator}{rejection}")?;
                separator = "\n";
            }
            if broken.len() > SHOWN {
                write!(f, "\nand {} more [{code}]", broken.len() - SHOWN)?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Rejections {}

/// The first few of `names` and how many more there are: messages stay readable on deep models.
#[cfg(feature = "formats")]
pub(crate) fn listed<S: fmt::Display>(names: &[S]) -> String {
    const SHOWN: usize = 8;
    let mut text: Vec<String> = names.iter().take(SHOWN).map(ToString::to_string).collect();
    if names.len() > SHOWN {
        text.push(format!("and {} more", names.len() - SHOWN));
    }
    text.join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_distinct_and_in_kebab_case() {
        let names: BTreeSet<&str> = Code::all().iter().map(|c| c.as_str()).collect();
        assert_eq!(names.len(), Code::all().len());
        assert!(names.iter().all(|n| n.chars().all(|c| c.is_ascii_lowercase() || c == '-')));
    }

    #[test]
    fn a_rejection_reads_as_one_sentence() {
        let r = Rejection::new(Code::RankOverLimit, "max_lora_rank", "rank 16", "at most 8", "x");
        assert_eq!(
            r.to_string(),
            "max_lora_rank: found rank 16, allowed is at most 8; x [rank-over-limit]"
        );
        assert!(Rejections(vec![]).into_result().is_ok());
        assert!(Rejections(vec![r]).into_result().is_err());
    }

    #[cfg(feature = "formats")]
    #[test]
    fn long_lists_are_cut() {
        assert_eq!(listed(&[1, 2]), "1, 2");
        assert!(listed(&[0; 20]).ends_with("and 12 more"));
    }
}
