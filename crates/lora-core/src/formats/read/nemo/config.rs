//! `model_config.yaml`: the LoRA settings, which are among those of the base model.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Map, Value};
use serde_saphyr::options::NonFiniteFloatPolicy;

use crate::formats::read::fields::Policy::{self, Applied, Irrelevant, MustBeEmpty};
use crate::formats::read::fields::{Fields, as_count, as_names, check_policies, shown};
use crate::formats::{AdapterError, Source};
use crate::ids::LayerIdx;
use crate::modules::TargetModule;
use crate::rules::{Code, Rejection};

pub(super) const CONFIG: &str = "model_config.yaml";

/// Fields of `peft`. Every file also has settings of other schemes than LoRA.
const PEFT: &[(&str, Policy)] = &[
    ("peft_scheme", Applied),
    ("lora_tuning", Applied),
    ("restore_from_path", Irrelevant),
    ("restore_from_ckpt", Irrelevant),
    ("restore_from_hparams_path", Irrelevant),
    ("adapter_tuning", Irrelevant),
    ("p_tuning", Irrelevant),
    ("ia3_tuning", Irrelevant),
    ("selective_tuning", Irrelevant),
];

/// Fields of `peft.lora_tuning`.
const LORA_TUNING: &[(&str, Policy)] = &[
    ("adapter_dim", Applied),
    ("alpha", Applied),
    ("target_modules", Applied),
    ("layer_selection", Applied),
    ("variant", Applied),
    ("weight_tying", MustBeEmpty("train the adapter with a pair of its own for each layer")),
    ("norm_position", MustBeEmpty("train the adapter without a norm of its own")),
    ("norm_type", Irrelevant),
    ("adapter_dropout", Irrelevant),
    ("dropout", Irrelevant),
    ("dropout_position", Irrelevant),
    ("column_init_method", Irrelevant),
    ("row_init_method", Irrelevant),
    ("position_embedding_strategy", Irrelevant),
    ("a2a_experimental", Irrelevant),
];

use TargetModule::{AttnDense, AttnQkv, Mlp4hToH, MlpGateUp};

/// NeMo's names of target modules. All supported models have gated MLPs, so the first layer of the MLP is
/// the fused gate and up projection.
const TARGETS: [(&str, &[TargetModule]); 7] = [
    ("attention_qkv", &[AttnQkv]),
    ("attention_dense", &[AttnDense]),
    ("mlp_fc1", &[MlpGateUp]),
    ("mlp_fc2", &[Mlp4hToH]),
    ("attention", &[AttnQkv, AttnDense]),
    ("mlp", &[MlpGateUp, Mlp4hToH]),
    ("all", &[AttnQkv, AttnDense, MlpGateUp, Mlp4hToH]),
];

/// The LoRA settings of an archive.
#[derive(Default, Debug)]
pub(super) struct LoraTuning {
    /// `adapter_dim`.
    pub rank: Option<usize>,
    /// `alpha`; the scale is 1 without it.
    pub alpha: Option<f64>,
    /// Modules of `target_modules`; `None` if the file has no LoRA settings.
    pub targets: Option<BTreeSet<TargetModule>>,
    /// Layers of `layer_selection`, zero-based; `None` for all.
    pub layers: Option<BTreeSet<LayerIdx>>,
    pub warnings: Vec<String>,
}

/// Parses the value of `peft`, the only part of the file that concerns the adapter.
pub(super) fn parse(file: &Source) -> Result<Option<Value>, AdapterError> {
    #[derive(Deserialize)]
    struct Document {
        peft: Option<Value>,
    }
    // Real configurations have hundreds of nodes, and hardly any aliases.
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: 50_000,
            max_events: 200_000,
            max_aliases: 1_000,
            max_documents: 1,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 10_000 },
        // Numbers that JSON lacks (infinity, NaN) become strings, which no field accepts as numbers.
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        with_snippet: false,
    };
    let document: Document = serde_saphyr::from_slice_with_options(&file.bytes()?, options)
        .map_err(|error| AdapterError::InvalidNemo {
            path: file.path().to_owned(),
            problem: format!("{CONFIG}: {error}"),
        })?;
    Ok(document.peft)
}

impl LoraTuning {
    /// Reads and checks the value of `peft`; all problems are returned together.
    pub fn read(peft: Option<Value>, allow_unknown: bool) -> Result<Self, Vec<Rejection>> {
        let none = || Self { warnings: vec![NOTHING_SAID.to_owned()], ..Self::default() };
        let Some(peft) = peft else { return Ok(none()) };
        let map = object("peft", &peft)?;
        let mut fields = Fields { map, file: CONFIG, problems: Vec::new() };
        // Another scheme has other fields: one message instead of one for each of them.
        check_scheme(&mut fields);
        if !fields.problems.is_empty() {
            return Err(fields.problems);
        }
        let mut problems = fields.problems;
        let mut warnings = check_policies(map, PEFT, allow_unknown, &mut problems);
        let tuning = match map.get("lora_tuning").filter(|tuning| !tuning.is_null()) {
            Some(tuning) => {
                let map = object("lora_tuning", tuning)?;
                warnings.extend(check_policies(map, LORA_TUNING, allow_unknown, &mut problems));
                Self::from_fields(
                    &mut Fields { map, file: CONFIG, problems: Vec::new() },
                    &mut problems,
                )
            }
            None => none(),
        };
        warnings.extend(tuning.warnings);
        if problems.is_empty() { Ok(Self { warnings, ..tuning }) } else { Err(problems) }
    }

    fn from_fields(fields: &mut Fields<'_>, problems: &mut Vec<Rejection>) -> Self {
        const RANK: &str = "a whole number of at least 1";
        let alpha = fields.typed("alpha", "a number", Value::as_f64);
        let rank = match alpha {
            Some(_) => fields.required("adapter_dim", RANK, as_count),
            None => fields.typed("adapter_dim", RANK, as_count),
        };
        if let Some(variant) = fields.get("variant").filter(|variant| *variant != "nemo") {
            fields.problems.push(Rejection::new(
                Code::UnsupportedConfigField,
                "variant",
                shown(variant),
                "\"nemo\", one update for a fused projection",
                "train or convert the adapter as that variant",
            ));
        }
        let tuning = Self {
            rank,
            alpha,
            targets: Some(read_targets(fields)),
            layers: read_layers(fields),
            warnings: Vec::new(),
        };
        problems.append(&mut fields.problems);
        tuning
    }
}

const NOTHING_SAID: &str =
    "model_config.yaml: no peft.lora_tuning, so the scale is 1 and any module may be changed";

fn object<'a>(name: &str, value: &'a Value) -> Result<&'a Map<String, Value>, Vec<Rejection>> {
    let map = Map::new();
    let mut fields = Fields { map: &map, file: CONFIG, problems: Vec::new() };
    value.as_object().ok_or_else(|| {
        fields.invalid(name, value, "a map");
        fields.problems
    })
}

fn check_scheme(fields: &mut Fields<'_>) {
    if let Some(scheme) = fields.get("peft_scheme").filter(|scheme| *scheme != "lora") {
        fields.problems.push(Rejection::new(
            Code::UnsupportedPeftType,
            "peft_scheme",
            shown(scheme),
            "\"lora\"",
            "train or convert the adapter as LoRA",
        ));
    }
}

/// The modules of `target_modules`, which defaults to `attention_qkv` in NeMo.
fn read_targets(fields: &mut Fields<'_>) -> BTreeSet<TargetModule> {
    let allowed = TARGETS.map(|(name, _)| name).join(", ");
    let names = fields.typed("target_modules", "a list of module names", as_names);
    let names = names.unwrap_or_else(|| vec![TARGETS[0].0.to_owned()]);
    let mut targets = BTreeSet::new();
    for name in names {
        match TARGETS.iter().find(|(known, _)| *known == name) {
            Some((_, modules)) => targets.extend(*modules),
            None => fields.invalid("target_modules", &Value::String(name), &allowed),
        }
    }
    targets
}

/// The layers of `layer_selection`, which is one-based like Megatron's `layer_number`. As in NeMo, an empty
/// list selects all layers.
fn read_layers(fields: &mut Fields<'_>) -> Option<BTreeSet<LayerIdx>> {
    let as_layer = |value: &Value| {
        let number = value.as_u64()?.checked_sub(1)?;
        u32::try_from(number).ok().map(LayerIdx)
    };
    let as_layers = |value: &Value| value.as_array()?.iter().map(as_layer).collect();
    let layers: Option<BTreeSet<LayerIdx>> =
        fields.typed("layer_selection", "layer numbers, counted from 1", as_layers);
    layers.filter(|layers| !layers.is_empty())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn codes(peft: &Value) -> Vec<Code> {
        match LoraTuning::read(Some(peft.clone()), false) {
            Ok(_) => Vec::new(),
            Err(problems) => problems.iter().map(|problem| problem.code).collect(),
        }
    }

    fn tuning(tuning: &Value) -> Vec<Code> {
        codes(&json!({"peft_scheme": "lora", "lora_tuning": tuning}))
    }

    #[test]
    fn what_nemo_writes_by_default_is_accepted() {
        let peft = json!({
            "peft_scheme": "lora",
            "restore_from_path": null,
            "adapter_tuning": {"adapter_dim": 32},
            "lora_tuning": {
                "target_modules": ["attention", "mlp_fc2"], "variant": "nemo",
                "adapter_dim": 32, "alpha": 16, "adapter_dropout": 0.1,
                "column_init_method": "xavier", "row_init_method": "zero",
                "layer_selection": [1, 12], "weight_tying": false,
                "position_embedding_strategy": null, "brand_new": null,
            },
        });
        let read = LoraTuning::read(Some(peft), false).unwrap();
        assert_eq!((read.rank, read.alpha), (Some(32), Some(16.0)));
        assert_eq!(read.targets, Some([AttnQkv, AttnDense, Mlp4hToH].into()));
        assert_eq!(read.layers, Some([LayerIdx(0), LayerIdx(11)].into()));
        assert_eq!(read.warnings.len(), 1);
        assert_eq!(LoraTuning::read(None, false).unwrap().warnings, [NOTHING_SAID]);
    }

    #[test]
    fn each_wrong_field_is_told_by_its_code() {
        let cases = [
            (json!({"alpha": 16}), Code::MissingConfigField),
            (json!({"alpha": "${.adapter_dim}"}), Code::InvalidConfigField),
            (json!({"alpha": ".nan", "adapter_dim": 8}), Code::InvalidConfigField),
            (json!({"adapter_dim": 0}), Code::InvalidConfigField),
            (json!({"target_modules": ["q_proj"]}), Code::InvalidConfigField),
            (json!({"target_modules": "all"}), Code::InvalidConfigField),
            (json!({"layer_selection": [0]}), Code::InvalidConfigField),
            (json!({"weight_tying": true}), Code::UnsupportedConfigField),
            (json!({"variant": "canonical"}), Code::UnsupportedConfigField),
            (json!({"rank_stabilised": true}), Code::UnknownConfigField),
            (json!([]), Code::InvalidConfigField),
        ];
        for (fields, code) in cases {
            assert_eq!(tuning(&fields), [code], "{fields}");
        }
        assert_eq!(codes(&json!({"peft_scheme": "ia3"})), [Code::UnsupportedPeftType]);
        assert_eq!(codes(&json!({"future": 1})), [Code::UnknownConfigField]);
        assert_eq!(codes(&json!(1)), [Code::InvalidConfigField]);
    }

    #[test]
    fn settings_of_the_base_model_are_passed_over() {
        let read =
            |text: &str| parse(&Source::in_memory(Path::new("a.nemo"), text.as_bytes().to_vec()));
        let text = "mcore_gpt: true\nnorm: !custom {1: .nan}\npeft:\n  alpha: .nan\n";
        assert_eq!(read(text).unwrap(), Some(json!({"alpha": ".nan"})));
        assert_eq!(read("layers: 2\n").unwrap(), None);
        for text in [
            "peft: {a: 1, a: 2}",
            "peft: {}\npeft: {}",
            "peft: [",
            "peft: {}\n---\npeft: {}\n",
            "just a text",
            "peft: \"\\xff",
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains("a.nemo") && error.contains(CONFIG), "{error}");
        }
    }

    #[test]
    fn a_bomb_of_aliases_is_refused() {
        let mut text = "peft:\n  a: &a [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for (name, of) in ('b'..='k').zip('a'..) {
            let copies = vec![format!("*{of}"); 10].join(", ");
            text += &format!("  {name}: &{name} [{copies}]\n");
        }
        let file = Source::in_memory(Path::new("a.nemo"), text.into_bytes());
        assert!(parse(&file).is_err());
    }
}
