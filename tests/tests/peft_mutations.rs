//! Applies single changes of every kind to the files and configurations of real adapters. None may pass
//! unnoticed: the adapter is refused, or its generation changes.

#![allow(clippy::unwrap_used, reason = "a fixture that cannot be read is a failed test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use lora_core::formats::{self, ReadOptions};
use lora_core::{Code, Generation, LoraConfig, ModelGeometry};
use loramux_tests::{AdapterFiles, fixtures_dir, geometry};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// Fixtures that together cover every kind of tensor and configuration.
const ADAPTERS: [&str; 14] = [
    "llama.attn-r8",
    "llama.mixed-ranks",
    "llama.some-layers",
    "llama.dora-r8",
    "llama.lm-head-r8",
    "llama.embed-r8",
    "llama.saved-head",
    "llama.lora-bias",
    "qwen2.bias-lora-only",
    "mixtral.experts-r4",
    "mixtral.experts-r4-peft-0.18",
    "mixtral.experts-r4-stacked",
    "mixtral.experts-r4-per-expert",
    "qwen3-moe.experts-r4-stacked",
];

/// Fields that cannot change what a trained adapter computes.
const IRRELEVANT: [&str; 14] = [
    "base_model_name_or_path",
    "peft_version",
    "auto_mapping",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "corda_config",
    "eva_config",
    "lora_ga_config",
    "merge_weights",
    "runtime_config",
];

/// The outcome for a changed adapter.
#[derive(PartialEq, Debug)]
enum Verdict {
    Accepted(Generation),
    /// Accepted with a warning.
    Warned(Generation),
    Refused(BTreeSet<Code>),
    Unreadable,
}

fn verdict_of(files: &AdapterFiles, model: &ModelGeometry) -> Verdict {
    let dir = tempfile::tempdir().unwrap();
    files.write(dir.path());
    judge(dir.path(), model)
}

fn judge(dir: &Path, model: &ModelGeometry) -> Verdict {
    let codes = |rejections: &[lora_core::Rejection]| rejections.iter().map(|r| r.code).collect();
    let options = ReadOptions::default().with_source(formats::source_of(dir));
    match formats::load(dir, &options.for_model(model.clone())) {
        Ok(adapter) => match adapter.check(model, &LoraConfig::default()) {
            broken if broken.is_empty() => {
                let silent =
                    adapter.source.warnings.is_empty() && adapter.warnings(model).is_empty();
                let verdict = if silent { Verdict::Accepted } else { Verdict::Warned };
                verdict(adapter.generation)
            }
            broken => Verdict::Refused(codes(&broken)),
        },
        Err(error) => match error.rejections() {
            Some(rejections) => Verdict::Refused(codes(&rejections.0)),
            None => Verdict::Unreadable,
        },
    }
}

/// Runs `body` on each adapter with its model and its generation.
fn for_each_adapter(body: impl Fn(&str, &AdapterFiles, &ModelGeometry, Generation)) {
    for adapter in ADAPTERS {
        let files = AdapterFiles::open(adapter);
        let model = geometry(adapter.split_once('.').unwrap().0);
        let Verdict::Accepted(generation) = verdict_of(&files, &model) else {
            panic!("{adapter} is not accepted as it is: {:?}", verdict_of(&files, &model))
        };
        body(adapter, &files, &model, generation);
    }
}

/// It is refused, or there is a warning.
fn assert_reported(verdict: &Verdict, what: &str) {
    let reported = matches!(verdict, Verdict::Refused(_) | Verdict::Warned(_));
    assert!(reported, "{what}: {verdict:?}");
}

fn assert_refused(verdict: &Verdict, what: &str) {
    assert!(matches!(verdict, Verdict::Refused(_)), "{what}: {verdict:?}");
}

#[test]
fn every_fixture_is_accepted_and_is_itself_wherever_it_lies() {
    for entry in fs::read_dir(fixtures_dir().join("adapters")).unwrap() {
        let dir = entry.unwrap().path();
        let adapter = dir.file_name().unwrap().to_str().unwrap();
        let model = geometry(adapter.split_once('.').unwrap().0);
        let in_place = judge(&dir, &model);
        assert!(matches!(in_place, Verdict::Accepted(_)), "{adapter}: {in_place:?}");
        if dir.join("adapter_model.safetensors").is_file() {
            assert_eq!(in_place, verdict_of(&AdapterFiles::open(adapter), &model), "{adapter}");
        }
    }
}

#[test]
fn no_component_of_a_tensor_name_can_change_unnoticed() {
    for_each_adapter(|adapter, files, model, _| {
        for name in files.tensors.keys() {
            for at in 0..name.split('.').count() {
                let renamed = name
                    .split('.')
                    .enumerate()
                    .map(|(i, part)| if i == at { format!("{part}x") } else { part.to_owned() });
                let renamed = renamed.collect::<Vec<_>>().join(".");
                let changed = files.renamed(|n| if n == name { renamed.clone() } else { n.into() });
                assert_refused(
                    &verdict_of(&changed, model),
                    &format!("{adapter}: {name} -> {renamed}"),
                );
            }
        }
    });
}

#[test]
fn a_module_or_layer_renamed_throughout_is_noticed() {
    let renames = [
        ("q_proj", "k_proj"),
        ("q_proj", "gate_proj"),
        ("self_attn", "cross_attn"),
        ("self_attn", "mlp"),
        ("layers.0.", "layers.7."),
        ("layers.", "h."),
        ("model.model.layers", "model.layers"),
        ("lora_A", "lora_A.first"),
        ("lm_head", "embed_tokens"),
        ("lora_B", "lora_A"),
    ];
    for_each_adapter(|adapter, files, model, generation| {
        for (from, to) in renames {
            let changed = files.renamed(|name| name.replace(from, to));
            if changed.tensors.len() < files.tensors.len()
                || changed.tensors.keys().eq(files.tensors.keys())
            {
                continue;
            }
            // An adapter name in the keys, and a root that all keys lack, have no effect.
            let harmless = matches!(to, "lora_A.first" | "model.layers");
            let verdict = verdict_of(&changed, model);
            let noticed = verdict != Verdict::Accepted(generation);
            assert!(noticed || harmless, "{adapter}: {from} -> {to}");
            if !harmless {
                assert_refused(&verdict, &format!("{adapter}: {from} -> {to}"));
            }
        }
        let swapped = files.renamed(|name| {
            let other = name.replace(".0.", ".x.").replace(".2.", ".0.");
            other.replace(".x.", ".2.")
        });
        let verdict = verdict_of(&swapped, model);
        assert_ne!(verdict, Verdict::Accepted(generation), "{adapter}: layers 0 and 2 swapped");
    });
}

#[test]
fn no_tensor_can_be_dropped() {
    for_each_adapter(|adapter, files, model, _| {
        for name in files.tensors.keys() {
            let mut changed = files.clone();
            changed.tensors.remove(name);
            assert_refused(&verdict_of(&changed, model), &format!("{adapter}: without {name}"));
        }
    });
}

#[test]
fn no_module_can_be_dropped_whole_unnoticed() {
    for_each_adapter(|adapter, files, model, _| {
        let modules: BTreeSet<&str> = files
            .tensors
            .keys()
            .filter_map(|name| name.find(".lora_").map(|at| &name[..at]))
            .collect();
        for module in modules {
            let mut changed = files.clone();
            changed.tensors.retain(|name, _| !name.starts_with(module));
            assert_reported(&verdict_of(&changed, model), &format!("{adapter}: without {module}"));
        }
    });
}

#[test]
fn no_tensor_can_be_reshaped() {
    for_each_adapter(|adapter, files, model, _| {
        for (name, tensor) in &files.tensors {
            let mut shapes =
                vec![[&[1], &tensor.shape[..]].concat(), [&tensor.shape[..], &[1]].concat()];
            shapes.push(tensor.shape.iter().rev().copied().collect());
            shapes.push(vec![tensor.shape.iter().product()]);
            for shape in shapes.into_iter().filter(|shape| *shape != tensor.shape) {
                let what = format!("{adapter}: {name} as {shape:?}");
                let changed = files.with(name, |t| t.shape = shape);
                assert_refused(&verdict_of(&changed, model), &what);
            }
            let shorter = files.with(name, |t| {
                t.shape[0] -= 1;
                let left = t.shape.iter().product::<usize>() * 2;
                t.data.truncate(left);
            });
            assert_refused(
                &verdict_of(&shorter, model),
                &format!("{adapter}: {name} with a row less"),
            );
        }
    });
}

#[test]
fn no_tensor_can_change_its_type_or_values_unnoticed() {
    for_each_adapter(|adapter, files, model, generation| {
        for name in files.tensors.keys() {
            for (dtype, width) in
                [(Dtype::F16, 2), (Dtype::F32, 4), (Dtype::F64, 8), (Dtype::I32, 4)]
            {
                let changed = files.with(name, |t| {
                    t.dtype = dtype;
                    t.data = vec![1; t.shape.iter().product::<usize>() * width];
                });
                let verdict = verdict_of(&changed, model);
                assert_ne!(verdict, Verdict::Accepted(generation), "{adapter}: {name} {dtype:?}");
                if dtype == Dtype::I32 {
                    assert_eq!(verdict, Verdict::Refused(BTreeSet::from([Code::TensorDtype])));
                }
            }
            let flipped = files.with(name, |t| t.data[1] ^= 1);
            let verdict = verdict_of(&flipped, model);
            assert!(
                matches!(verdict, Verdict::Accepted(g) if g != generation),
                "{adapter}: {name}"
            );
            let poisoned = files.with(name, |t| {
                let end = t.data.len();
                t.data[end - 2..].copy_from_slice(&[0xc0, 0x7f]);
            });
            let expected = Verdict::Refused(BTreeSet::from([Code::NonFinite]));
            assert_eq!(verdict_of(&poisoned, model), expected, "{adapter}: NaN in {name}");
        }
    });
}

#[test]
fn an_adapter_whose_b_is_zero_is_refused_as_no_adapter() {
    let mut files = AdapterFiles::open("llama.attn-r8");
    for (_, tensor) in files.tensors.iter_mut().filter(|(name, _)| name.contains("lora_B")) {
        tensor.data.fill(0);
    }
    let verdict = verdict_of(&files, &geometry("llama"));
    assert_eq!(verdict, Verdict::Refused(BTreeSet::from([Code::NoopAdapter])));
}

/// Values to set a field to, one at a time; `None` removes it.
fn values(field: &str) -> Vec<Option<Value>> {
    let special = match field {
        "layers_pattern" => vec![json!("h"), json!(["h"])],
        "exclude_modules" => vec![json!(".*"), json!(["q_proj", "k_proj", "v_proj"])],
        "bias" => vec![json!("lora_only"), json!("all"), json!("none")],
        "init_lora_weights" => vec![json!("pissa"), json!("olora"), json!("corda"), json!("loftq")],
        "task_type" => vec![json!("SEQ_CLS"), json!("FEATURE_EXTRACTION")],
        "target_modules" => {
            vec![json!("all-linear"), json!(["q_proj"]), json!(["q_proj", "o_proj"]), json!(".*")]
        }
        "modules_to_save" => vec![json!(["lm_head"]), json!(["embed_tokens"]), json!(["norm"])],
        "layers_to_transform" => vec![json!(0), json!([1]), json!([0, 1]), json!([0, 1, 9])],
        _ => vec![json!(".*"), json!(["q_proj"])],
    };
    let common = [
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(3),
        json!(-1),
        json!(0.5),
        json!(""),
        json!([]),
        json!({}),
        json!({".*": 3}),
    ];
    special.into_iter().chain(common).map(Some).chain([None]).collect()
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Number(_) => false,
    }
}

/// Whether two values of a field mean the same for the adapters of these fixtures.
fn means_the_same(field: &str, old: &Value, new: &Value) -> bool {
    let plain_init = |v: &Value| v.is_null() || v.is_boolean();
    match field {
        _ if IRRELEVANT.contains(&field) || old == new => true,
        _ if is_empty(old) && is_empty(new) => true,
        "init_lora_weights" => plain_init(new),
        "task_type" => new.is_null(),
        // No tensor is declared or left undeclared by it: the files have the biases that they
        // have, and a model without biases has none to save.
        "bias" => new == "all" || new == "lora_only" || (new.is_null() && old == "none"),
        // Whole weights are loaded whether they are declared or not.
        "modules_to_save" => is_empty(new),
        // The models of these adapters do not tie their embeddings.
        "ensure_weight_tying" => new.is_boolean(),
        // Some of them target every linear module by its name.
        "target_modules" => new == "all-linear" && old.as_array().is_some_and(|l| l.len() == 7),
        _ => false,
    }
}

#[test]
fn no_field_of_the_configuration_can_change_unnoticed() {
    for_each_adapter(|adapter, files, model, generation| {
        let fields: Vec<String> = files.config.as_object().unwrap().keys().cloned().collect();
        for field in &fields {
            for value in values(field) {
                let mut changed = files.clone();
                match &value {
                    Some(value) => changed.config[field] = value.clone(),
                    None => drop(changed.config.as_object_mut().unwrap().shift_remove(field)),
                }
                let verdict = verdict_of(&changed, model);
                assert_ne!(verdict, Verdict::Unreadable);
                let new = value.unwrap_or(Value::Null);
                let unnoticed = verdict == Verdict::Accepted(generation);
                let same = means_the_same(field, &files.config[field], &new);
                assert!(!unnoticed || same, "{adapter}: {field} = {new} changes nothing");
            }
        }
    });
}

#[test]
fn limits_of_the_engine_are_kept() {
    let dir = fixtures_dir().join("adapters/llama.all-r16-rslora");
    let adapter = formats::load(&dir, &ReadOptions::default()).unwrap();
    let codes = |config: &LoraConfig, model: &str| -> BTreeSet<Code> {
        adapter.check(&geometry(model), config).iter().map(|r| r.code).collect()
    };
    let limit = LoraConfig { max_lora_rank: 8, ..LoraConfig::default() };
    assert_eq!(codes(&limit, "llama"), BTreeSet::from([Code::RankOverLimit]));
    let targets = vec!["attn_q".to_owned(), "mlp_gate".to_owned()];
    let limit = LoraConfig { lora_target_modules: targets, ..LoraConfig::default() };
    assert_eq!(codes(&limit, "llama"), BTreeSet::from([Code::ModuleNotServed]));
    let any = LoraConfig::default();
    assert_eq!(codes(&any, "qwen3"), BTreeSet::from([Code::ShapeMismatch]));
    assert_eq!(adapter.max_rank(), 16);
    assert_eq!(adapter.modules().len(), 7);
}

const Q0: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// The codes with which an adapter is refused after a change of its files.
fn codes_after(
    adapter: &str,
    model: &str,
    change: impl FnOnce(&mut AdapterFiles),
) -> BTreeSet<Code> {
    let mut files = AdapterFiles::open(adapter);
    change(&mut files);
    match verdict_of(&files, &geometry(model)) {
        Verdict::Refused(codes) => codes,
        other => panic!("{adapter}: {other:?}"),
    }
}

fn copy(files: &mut AdapterFiles, from: &str, to: String) {
    let tensor = files.tensors[from].clone();
    files.tensors.insert(to, tensor);
}

#[test]
fn each_rule_about_tensors_is_reported_by_its_own_code() {
    let a = format!("{Q0}.lora_A.weight");
    let plain = |change: &dyn Fn(&mut AdapterFiles)| codes_after("llama.attn-r8", "llama", change);
    let other = a.replace("layers.0", "layers.1");
    let twice = plain(&|f| copy(f, &other, format!("{Q0}.lora_A.default.weight")));
    assert_eq!(twice, [Code::DuplicateTensor].into());
    let two = plain(&|f| {
        copy(f, &a, format!("{Q0}.lora_A.one.weight"));
        copy(f, &a, format!("{Q0}.lora_A.two.weight"));
    });
    assert!(two.contains(&Code::SeveralAdapters));
    let half = plain(&|f| drop(f.tensors.remove(&a)));
    assert_eq!(half, [Code::IncompletePair].into());
    let bias = plain(&|f| copy(f, &a, format!("{Q0}.base_layer.bias")));
    assert_eq!(bias, [Code::UndeclaredTensor].into());
    let full = plain(&|f| copy(f, &a, "base_model.model.lm_head.weight".into()));
    assert_eq!(full, [Code::VocabularyMismatch].into());
    let strange = plain(&|f| copy(f, &a, "optimizer.step".into()));
    assert_eq!(strange, [Code::UnknownTensor].into());
    let module = plain(&|f| copy(f, &a, format!("{Q0}_norm.lora_A.weight")));
    assert_eq!(module, [Code::UnknownModule].into());
    let flat = plain(&|f| f.tensors.get_mut(&a).unwrap().shape = vec![512]);
    assert_eq!(flat, [Code::TensorShape].into());
    let rank = plain(&|f| f.config["rank_pattern"] = json!({"q_proj": 4}));
    assert_eq!(rank, [Code::RankMismatch].into());
    let missing = plain(&|f| f.config["modules_to_save"] = json!(["lm_head"]));
    assert_eq!(missing, [Code::MissingTensor].into());
}

#[test]
fn each_rule_about_the_model_is_reported_by_its_own_code() {
    let plain = |change: &dyn Fn(&mut AdapterFiles)| codes_after("llama.attn-r8", "llama", change);
    let fewer = plain(&|f| f.config["target_modules"] = json!(["q_proj"]));
    assert_eq!(fewer, [Code::WeightsWithoutTarget].into());
    let beyond = plain(&|f| *f = f.renamed(|name| name.replace("layers.2.", "layers.3.")));
    assert!(beyond.contains(&Code::LayerOutOfRange));
    let absent = plain(&|f| *f = f.renamed(|name| name.replace("self_attn.", "cross_attn.")));
    assert!(absent.contains(&Code::ModuleNotInModel), "{absent:?}");
    let tied = codes_after("llama.embed-r8", "llama-tied", |f| {
        f.config["ensure_weight_tying"] = json!(true);
    });
    assert_eq!(tied, [Code::TiedEmbeddings].into());
    let dora = codes_after("llama.embed-r8", "llama", |f| f.config["use_dora"] = json!(true));
    assert!(dora.contains(&Code::MissingTensor), "{dora:?}");
}

#[test]
fn a_base_weight_saved_beside_its_lora_is_a_replacement() {
    let mut files = AdapterFiles::open("llama.lm-head-r8");
    let head =
        AdapterFiles::open("llama.saved-head").tensors["base_model.model.lm_head.weight"].clone();
    files.tensors.insert("base_model.model.lm_head.base_layer.weight".into(), head);
    assert!(matches!(verdict_of(&files, &geometry("llama")), Verdict::Accepted(_)));
    // Tied embeddings are one weight, so it replaces both.
    assert!(matches!(verdict_of(&files, &geometry("llama-tied")), Verdict::Accepted(_)));
}

#[test]
fn shards_give_the_adapter_that_one_file_gives() {
    let whole = fixtures_dir().join("adapters/llama.attn-r8");
    let files = AdapterFiles::open("llama.attn-r8");
    let dir = tempfile::tempdir().unwrap();
    let mut map = BTreeMap::new();
    for (i, (name, t)) in files.tensors.iter().enumerate() {
        let shard = format!("adapter_model-{i:05}.safetensors");
        let view = TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap();
        let bytes = safetensors::serialize([(name, view)], None).unwrap();
        fs::write(dir.path().join(&shard), bytes).unwrap();
        map.insert(name, shard);
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    fs::write(dir.path().join("adapter_model.safetensors.index.json"), index).unwrap();
    fs::copy(whole.join("adapter_config.json"), dir.path().join("adapter_config.json")).unwrap();
    let load = |dir: &Path| formats::load(dir, &ReadOptions::default()).unwrap();
    let (whole, sharded) = (load(&whole), load(dir.path()));
    assert_eq!(whole.generation, sharded.generation);
    assert_eq!(whole.bytes() as u64, sharded.source.bytes);
    assert_eq!(sharded.source.files.len(), files.tensors.len());
}
