//! `adapter_config.json`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::CONFIG;
use super::keys::{DOWN, GATE_UP};
use crate::adapter::targets::TargetMatcher;
use crate::adapter::{Declaration, LayerFilter, Selector};
use crate::formats::read::fields::{Fields, as_count, as_names, check_policies, is_empty, shown};
use crate::modules::{ModuleMap, TargetModule::MoeRouter};
use crate::rules::{Code, Rejection};

mod fields;
mod scale;
mod token_indices;

use fields::FIELDS;
use scale::{Patterned, Scaling};
pub(super) use token_indices::TOKEN_INDICES;
use token_indices::TokenIndices;

/// Extras beside A and B, which PEFT does not combine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Variant {
    /// Nothing.
    Plain,
    /// A bias of B (`lora_bias`).
    OutputBias,
    /// A magnitude (`use_dora`).
    Dora,
}

/// Which biases of base layers were trained.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Biases {
    None,
    LoraOnly,
    All,
}

/// The checked configuration.
pub(super) struct PeftConfig {
    pub ranks: Patterned<usize>,
    pub alphas: Patterned<f64>,
    pub scaling: Scaling,
    pub variant: Variant,
    pub biases: Biases,
    /// `trainable_token_indices`.
    pub token_indices: TokenIndices,
    /// The targets. What depends on the tensors is filled in later.
    pub declaration: Declaration,
    pub base_model_name: Option<String>,
    pub peft_version: Option<String>,
    pub warnings: Vec<String>,
}

impl PeftConfig {
    /// Reads and checks every field; all problems are returned together.
    pub fn read(json: &Value, allow_unknown: bool) -> Result<Self, Vec<Rejection>> {
        let none = Map::new();
        let mut fields =
            Fields { map: json.as_object().unwrap_or(&none), file: CONFIG, problems: Vec::new() };
        if !json.is_object() {
            fields.invalid("adapter_config.json", json, "an object");
            return Err(fields.problems);
        }
        // Another `peft_type` has other fields: one message instead of one for each of them.
        check_kind(&mut fields);
        if !fields.problems.is_empty() {
            return Err(fields.problems);
        }
        let warnings = check_policies(fields.map, FIELDS, allow_unknown, &mut fields.problems);
        check_task(&mut fields);
        check_initialisation(&mut fields);
        let config = Self::from_fields(&mut fields, warnings);
        if let Some(config) = &config
            && let Err(broken) = TargetMatcher::new(&config.declaration)
        {
            fields.problems.extend(broken);
        }
        config.filter(|_| fields.problems.is_empty()).ok_or(fields.problems)
    }

    fn from_fields(fields: &mut Fields<'_>, warnings: Vec<String>) -> Option<Self> {
        const RANK: &str = "a whole number of at least 1";
        let rank = fields.required("r", RANK, as_count);
        let alpha = fields.required("lora_alpha", "a number", Value::as_f64);
        let ranks = Patterned::read(fields, "rank_pattern", rank.unwrap_or(1), RANK, as_count);
        let alphas = Patterned::read(
            fields,
            "alpha_pattern",
            alpha.unwrap_or(1.0),
            "a number",
            Value::as_f64,
        );
        let rank_stabilised = fields.flag("use_rslora");
        let scaling = if rank_stabilised { Scaling::ByRootOfRank } else { Scaling::ByRank };
        Some(Self {
            ranks,
            alphas,
            scaling,
            variant: read_variant(fields),
            biases: read_biases(fields),
            token_indices: token_indices::read(fields),
            declaration: read_declaration(fields)?,
            base_model_name: fields.text("base_model_name_or_path"),
            peft_version: fields.text("peft_version"),
            warnings,
        })
    }
}

fn check_kind(fields: &mut Fields<'_>) {
    match fields.required("peft_type", "\"LORA\"", Value::as_str) {
        None | Some("LORA") => {}
        Some(kind) => fields.problems.push(Rejection::new(
            Code::UnsupportedPeftType,
            "peft_type",
            format!("{kind:?}"),
            "\"LORA\"",
            "convert the adapter to LoRA, for instance by an SVD of its weight change",
        )),
    }
}

fn check_task(fields: &mut Fields<'_>) {
    let task = fields.text("task_type");
    if let Some(task) = task.filter(|task| task != "CAUSAL_LM") {
        fields.problems.push(Rejection::new(
            Code::UnsupportedConfigField,
            "task_type",
            format!("{task:?}"),
            "\"CAUSAL_LM\" or null",
            "serve an adapter that was trained to generate text",
        ));
    }
}

/// Initialisations that do not change the base weights, so that the saved pair is plain LoRA.
const HARMLESS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// Refuses initialisations that change the base weights (PiSSA, OLoRA, ...): A and B are trained against
/// weights that differ from those of the base model.
fn check_initialisation(fields: &mut Fields<'_>) {
    let harmless = |value: &Value| match value {
        Value::Bool(_) => true,
        Value::String(method) => HARMLESS.iter().any(|known| method.eq_ignore_ascii_case(known)),
        _ => false,
    };
    let Some(value) = fields.get("init_lora_weights").filter(|value| !harmless(value)) else {
        return;
    };
    fields.problems.push(Rejection::new(
        Code::MutatedBaseWeights,
        "init_lora_weights",
        shown(value),
        format!("true, false or one of {HARMLESS:?}, which leave base weights alone"),
        "convert the adapter to plain LoRA: PEFT's save_pretrained with \
         path_initial_model_for_weight_conversion does it",
    ));
}

fn read_variant(fields: &mut Fields<'_>) -> Variant {
    match (fields.flag("use_dora"), fields.flag("lora_bias")) {
        (false, false) => Variant::Plain,
        (false, true) => Variant::OutputBias,
        (true, false) => Variant::Dora,
        (true, true) => {
            fields.problems.push(Rejection::new(
                Code::UnsupportedConfigField,
                "lora_bias",
                "true together with use_dora",
                "only one of use_dora and lora_bias",
                "train the adapter with one of them",
            ));
            Variant::Dora
        }
    }
}

fn read_biases(fields: &mut Fields<'_>) -> Biases {
    let allowed = "\"none\", \"lora_only\" or \"all\"";
    let read = |value: &Value| match value.as_str()? {
        "none" => Some(Biases::None),
        "lora_only" => Some(Biases::LoraOnly),
        "all" => Some(Biases::All),
        _ => None,
    };
    fields.typed("bias", allowed, read).unwrap_or(Biases::None)
}

fn read_declaration(fields: &mut Fields<'_>) -> Option<Declaration> {
    let selector = "a list of module names, or a pattern";
    let parameters = read_parameters(fields);
    let targets = if parameters.is_empty() {
        fields.required("target_modules", selector, as_selector)
    } else {
        // Parameters may be all that is trained.
        let modules = fields.typed("target_modules", selector, as_selector);
        Some(modules.unwrap_or(Selector::Names(Vec::new())))
    };
    let exclude = fields.typed("exclude_modules", selector, as_selector);
    let layers = read_layers(fields, targets.as_ref());
    let saved = fields.typed("modules_to_save", "a list of module names", as_names);
    let saved = saved.unwrap_or_default();
    Some(Declaration {
        targets: targets?,
        parameters,
        exclude: exclude.filter(|selector| *selector != Selector::Names(Vec::new())),
        layers,
        saved,
        ensure_weight_tying: fields.flag("ensure_weight_tying"),
        root: String::new(),
        naming: BTreeMap::new(),
        saved_sites: BTreeSet::new(),
    })
}

/// `target_parameters`; only parameters of routed experts and of routers are supported.
fn read_parameters(fields: &mut Fields<'_>) -> Vec<String> {
    let allowed = "a list of parameter names";
    let names = fields.typed("target_parameters", allowed, as_names).unwrap_or_default();
    let map = ModuleMap::default();
    let router = |name: &str| {
        name.strip_suffix(".weight").and_then(|module| map.lookup(module)) == Some(MoeRouter)
    };
    let strange =
        |name: &&String| !matches!(name.rsplit('.').next(), Some(GATE_UP | DOWN)) && !router(name);
    for name in names.iter().filter(strange) {
        fields.problems.push(Rejection::new(
            Code::UnsupportedConfigField,
            "target_parameters",
            format!("`{name}`"),
            format!("{GATE_UP} and {DOWN} of routed experts, and gate.weight of their router"),
            "train the other parameters through target_modules",
        ));
    }
    names
}

fn as_selector(value: &Value) -> Option<Selector> {
    match value.as_str() {
        Some(text) if text.eq_ignore_ascii_case("all-linear") => Some(Selector::AllLinear),
        Some(pattern) => Some(Selector::Pattern(pattern.to_owned())),
        None => as_names(value).map(Selector::Names),
    }
}

fn read_layers(fields: &mut Fields<'_>, targets: Option<&Selector>) -> Option<LayerFilter> {
    let as_layer = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
    let as_layers = |value: &Value| match value.as_array() {
        Some(items) => items.iter().map(as_layer).collect(),
        None => as_layer(value).map(|layer| BTreeSet::from([layer])),
    };
    let as_patterns = |value: &Value| match value.as_str() {
        Some("") => Some(Vec::new()),
        Some(pattern) => Some(vec![pattern.to_owned()]),
        None => as_names(value),
    };
    let layers = fields.typed("layers_to_transform", "layer numbers", as_layers);
    let patterns = fields.typed("layers_pattern", "a name or a list of names", as_patterns);
    let layers: BTreeSet<u32> = layers.unwrap_or_default();
    let patterns = patterns.unwrap_or_default();
    // PEFT raises an error for both of these, too.
    if layers.is_empty() && !patterns.is_empty() {
        let value = fields.get("layers_pattern").filter(|value| !is_empty(value));
        fields.invalid("layers_pattern", value?, "no value without layers_to_transform");
    }
    if !layers.is_empty() && matches!(targets, Some(Selector::Pattern(_))) {
        let value = fields.get("layers_to_transform")?;
        fields.invalid("layers_to_transform", value, "no value beside a target_modules pattern");
    }
    (!layers.is_empty()).then_some(LayerFilter { layers, patterns })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn codes(changes: &Value) -> Vec<Code> {
        let mut config = json!({
            "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"],
        });
        for (name, value) in changes.as_object().unwrap() {
            config[name] = value.clone();
        }
        match PeftConfig::read(&config, false) {
            Ok(_) => Vec::new(),
            Err(problems) => problems.iter().map(|r| r.code).collect(),
        }
    }

    #[test]
    fn a_minimal_config_is_enough() {
        assert!(codes(&json!({})).is_empty());
        assert!(codes(&json!({"init_lora_weights": "eva", "task_type": null})).is_empty());
        assert!(codes(&json!({"init_lora_weights": "MiCA", "fan_in_fan_out": true})).is_empty());
        let parameters = ["down_proj", "gate.weight", "mlp.gate.weight"];
        let parameters = json!({"target_modules": null, "target_parameters": parameters});
        assert!(codes(&parameters).is_empty());
        assert!(
            codes(&json!({"target_modules": "all-linear", "layers_to_transform": 1})).is_empty()
        );
    }

    #[test]
    fn each_wrong_field_is_told_by_its_code() {
        let cases = [
            (json!({"peft_type": "LOHA", "r": 0}), Code::UnsupportedPeftType),
            (json!({"peft_type": null}), Code::MissingConfigField),
            (json!({"r": null}), Code::MissingConfigField),
            (json!({"target_modules": null}), Code::MissingConfigField),
            (json!({"r": 0}), Code::InvalidConfigField),
            (json!({"lora_alpha": "16"}), Code::InvalidConfigField),
            (json!({"bias": "some"}), Code::InvalidConfigField),
            (json!({"layers_pattern": "layers"}), Code::InvalidConfigField),
            (json!({"layers_to_transform": [-1]}), Code::InvalidConfigField),
            (json!({"target_modules": ".*", "layers_to_transform": 0}), Code::InvalidConfigField),
            (json!({"target_modules": "(?<n>q)_proj"}), Code::InvalidPattern),
            (json!({"target_modules": ".{9999999}"}), Code::PatternTooComplex),
            (
                json!({"target_modules": null, "target_parameters": ["x"]}),
                Code::UnsupportedConfigField,
            ),
            (json!({"task_type": "SEQ_CLS"}), Code::UnsupportedConfigField),
            (json!({"use_dora": true, "lora_bias": true}), Code::UnsupportedConfigField),
            (json!({"modules_to_save": [1]}), Code::InvalidConfigField),
            (json!({"trainable_token_indices": [1, 1]}), Code::InvalidConfigField),
            (json!({"trainable_token_indices": {"lm_head": [-1]}}), Code::InvalidConfigField),
            (json!({"alora_invocation_tokens": [1]}), Code::UnsupportedConfigField),
            (json!({"init_lora_weights": "pissa_niter_4"}), Code::MutatedBaseWeights),
            (json!({"brand_new": 1}), Code::UnknownConfigField),
        ];
        for (changes, code) in cases {
            assert_eq!(codes(&changes), [code], "{changes}");
        }
        assert_eq!(PeftConfig::read(&json!([]), false).err().unwrap().len(), 1);
    }

    #[test]
    fn all_problems_are_told_together() {
        let changes = json!({"r": 0, "bias": 1, "use_qalora": true, "init_lora_weights": "olora"});
        assert_eq!(codes(&changes).len(), 4);
    }
}
