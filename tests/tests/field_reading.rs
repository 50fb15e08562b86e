//! Adapters as trainers save them: patterns, targets, fields and element types are interpreted as in PEFT.
//! See `tests/fixtures/field/README.md`.

#![allow(clippy::unwrap_used, reason = "a fixture that cannot be read is a failed test")]

use std::path::{Path, PathBuf};

use lora_core::formats::{self, ReadOptions};
use lora_core::{
    Adapter, Code, DType, LoraConfig, ModelGeometry, Rejection, SiteKey, TargetModule,
};
use lora_cpu_ref::CpuRef;
use loramux_engine::RequestOutput;
use loramux_engine::model::ModelConfig;
use loramux_tests::{
    AdapterFiles, FieldCase, builder, context_logits, field_cases, field_dir, field_model,
    geometry, relative_error, run,
};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

/// The kinds of fixtures that test reading; the others test whole weights, vocabulary rows and text.
const KINDS: [&str; 6] = ["K2", "K3", "K7", "dtype", "moe", "control"];

fn adapter_dir(name: &str) -> PathBuf {
    field_dir().join("adapters").join(name)
}

fn cases() -> Vec<FieldCase> {
    let mut cases = field_cases();
    cases.retain(|case| KINDS.contains(&case.kind.as_str()));
    cases
}

fn is_dense(model: &str) -> bool {
    !matches!(model, "mixtral" | "qwen3-moe")
}

fn geometry_of(model: &str) -> ModelGeometry {
    if is_dense(model) {
        loramux_engine::geometry(&ModelConfig::from_dir(&field_model(model)).unwrap())
    } else {
        geometry(model)
    }
}

/// Reads an adapter that its model accepts, with all warnings.
fn served(dir: &Path, model: &str) -> (Adapter, Vec<String>) {
    let model = geometry_of(model);
    let adapter = formats::load(dir, &ReadOptions::default().for_model(model.clone()));
    let adapter = adapter.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(adapter.check(&model, &LoraConfig::default()), [], "{}", dir.display());
    let warnings = [adapter.source.warnings.clone(), adapter.warnings(&model)].concat();
    (adapter, warnings)
}

#[test]
fn what_peft_serves_is_served_with_warnings_about_oddities() {
    let expected = |adapter: &str| match adapter {
        "llama.fan-in" => vec![vec!["fan_in_fan_out", "Conv1D"]],
        "llama.all-linear-attn-only" => {
            vec![vec!["target_modules", "mlp.up_proj", "self_attn.k_proj"]]
        }
        "llama.all-linear-with-head" | "llama-tied.all-linear-with-head-tied" => {
            vec![vec!["all-linear", "lm_head", "PEFT"]]
        }
        "llama.superset-targets" => {
            vec![vec!["target_modules", "mlp.down_proj", "self_attn.o_proj"]]
        }
        "llama.saved-superset" => {
            vec![vec!["modules_to_save", "`score`"], vec!["modules_to_save", "`wte`"]]
        }
        _ => Vec::new(),
    };
    let mut adapters: Vec<(String, String)> =
        cases().into_iter().filter_map(|c| Some((c.case.adapter?, c.case.model))).collect();
    adapters.dedup();
    assert_eq!(adapters.len(), 26);
    for (adapter, model) in adapters {
        let (_, warnings) = served(&adapter_dir(&adapter), &model);
        let expected = expected(&adapter);
        assert_eq!(warnings.len(), expected.len(), "{adapter}: {warnings:#?}");
        for (warning, words) in warnings.iter().zip(expected) {
            for word in words {
                assert!(warning.contains(word), "{adapter}: {word} is not in: {warning}");
            }
        }
    }
}

#[test]
fn dense_cases_compute_what_peft_computes() {
    let all = cases();
    for model in ["llama", "llama-two-dtypes"] {
        let cases: Vec<FieldCase> =
            all.iter().filter(|case| case.case.model == model).cloned().collect();
        let config = LoraConfig { max_loras: Some(32), ..LoraConfig::default() };
        let builder = builder(&field_model(model), DType::F32).lora_config(config);
        let llm = builder.build(|| CpuRef::with_threads(None)).unwrap();
        for (case, answer) in cases.iter().zip(run(&llm, FieldCase::requests(&cases))) {
            check(case, &answer);
        }
    }
}

fn check(case: &FieldCase, answer: &RequestOutput) {
    let logits = context_logits(answer);
    let rows = logits.chunks_exact(logits.len() / case.case.prompt.len());
    for (row, top) in rows.zip(&case.top) {
        let total = row.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln() as f32;
        let found: Vec<f32> = top.iter().map(|(token, _)| row[*token as usize] - total).collect();
        let expected: Vec<f32> = top.iter().map(|(_, probability)| *probability).collect();
        let error = relative_error(&found, &expected);
        assert!(error < 2e-3, "{}: log-probabilities off by {error}", case.case.id);
    }
    case.case.assert_greedy(&answer.outputs[0].token_ids, 0.01);
}

/// Rank and scale at a site of layer 1.
fn update(adapter: &Adapter, module: TargetModule) -> Option<(usize, f32)> {
    let sites = || adapter.low_ranks().map(|(key, low)| (key, (low.rank, low.scale)));
    let of_layer = |layer| {
        let mut of_layer = sites()
            .filter(|(key, _)| matches!(key, SiteKey::Layer(l, m) if l.0 == layer && *m == module));
        of_layer.next().map(|(_, update)| update)
    };
    assert_eq!(of_layer(0), of_layer(1), "layers are alike");
    of_layer(1)
}

#[test]
fn experts_and_routers_of_target_parameters_have_their_ranks_and_scales() {
    use TargetModule::{AttnQ, Moe4hToH, MoeGate, MoeHTo4h, MoeRouter};
    let (plain, double) = (Some((2, 4.0)), Some((4, 4.0)));
    for (adapter, [gate_up, router, q]) in [
        ("qwen3-moe.moe-all-linear", [double, plain, plain]),
        ("mixtral.moe-all-linear-params", [double, plain, plain]),
        ("qwen3-moe.moe-router-param", [plain, plain, plain]),
        ("qwen3-moe.moe-targets-null", [plain, None, None]),
    ] {
        let model = adapter.split_once('.').unwrap().0;
        let (read, _) = served(&adapter_dir(adapter), model);
        let of = |module| update(&read, module);
        assert_eq!([MoeHTo4h, MoeGate].map(of), [gate_up; 2], "{adapter}");
        assert_eq!([Moe4hToH, MoeRouter, AttnQ].map(of), [plain, router, q], "{adapter}");
    }
}

/// The files of a field adapter after a change, in a folder.
fn changed(adapter: &str, change: impl FnOnce(&mut AdapterFiles)) -> tempfile::TempDir {
    let mut files = AdapterFiles::read(&adapter_dir(adapter));
    change(&mut files);
    let dir = tempfile::tempdir().unwrap();
    files.write(dir.path());
    dir
}

/// The rejections of the adapter on its model after a change of its files.
fn refused(adapter: &str, change: impl FnOnce(&mut AdapterFiles)) -> Vec<Rejection> {
    let dir = changed(adapter, change);
    let model = geometry_of(adapter.split_once('.').unwrap().0);
    match formats::load(dir.path(), &ReadOptions::default().for_model(model.clone())) {
        Ok(adapter) => adapter.check(&model, &LoraConfig::default()),
        Err(error) => error.rejections().unwrap().0.clone(),
    }
}

#[test]
fn patterns_of_a_router_know_it_by_its_weight() {
    let scale = |key: &str| {
        let pattern = json!({key: 64});
        let dir = changed("qwen3-moe.moe-router-param", |f| f.config["alpha_pattern"] = pattern);
        update(&served(dir.path(), "qwen3-moe").0, TargetModule::MoeRouter).unwrap().1
    };
    assert_eq!(scale("gate.weight"), 32.0);
    // As in PEFT, which compares the name of the parameter and only warns.
    assert_eq!(scale("gate"), 4.0);
}

#[test]
fn tensors_that_peft_would_drop_stay_refused() {
    let codes = |adapter, field: &str, value: Value| -> Vec<Code> {
        let refused = refused(adapter, |files| files.config[field] = value);
        refused.iter().map(|rejection| rejection.code).collect()
    };
    let stray = [Code::WeightsWithoutTarget];
    assert_eq!(codes("llama.superset-targets", "target_modules", json!(["q_proj"])), stray);
    let narrow = json!(r".*\.(?!v_proj)\w+_proj");
    assert_eq!(codes("llama.lookahead-swift", "target_modules", narrow), stray);
    let head = json!("(?=lm_head).*");
    assert_eq!(codes("llama.all-linear-with-head", "exclude_modules", head), stray);
    let router = json!(["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]);
    assert_eq!(codes("qwen3-moe.moe-router-param", "target_parameters", router), stray);
}

#[test]
fn a_pattern_that_cannot_be_matched_is_no_pattern_that_does_not_match() {
    let hostile = r"((?!_)\w+\.?)+!";
    for (field, value) in [
        ("target_modules", json!(hostile)),
        ("exclude_modules", json!(hostile)),
        ("rank_pattern", json!({hostile: 8})),
        ("alpha_pattern", json!({hostile: 8})),
    ] {
        let refused = refused("llama.control-list", |files| files.config[field] = value);
        assert_eq!(refused.len(), 1, "{refused:#?}");
        assert_eq!(refused[0].code, Code::PatternTooComplex);
        assert_eq!(refused[0].setting, field);
        assert!(refused[0].found.contains(hostile), "{}", refused[0]);
    }
}

#[test]
fn an_alpha_of_zero_is_called_by_its_name() {
    let zero = refused("llama.control-list", |files| files.config["lora_alpha"] = json!(0));
    let pattern = refused("llama.control-list", |files| {
        files.config["alpha_pattern"] = json!({"q_proj": 0, "v_proj": 0});
    });
    for (rejections, word) in [(zero, "0, so"), (pattern, "alpha_pattern")] {
        assert_eq!(rejections.len(), 1);
        assert_eq!(rejections[0].code, Code::NoopAdapter);
        assert_eq!(rejections[0].setting, "lora_alpha");
        assert!(rejections[0].found.contains(word), "{}", rejections[0]);
    }
    // PEFT also accepts some modules of scale zero.
    let some = |files: &mut AdapterFiles| files.config["alpha_pattern"] = json!({"q_proj": 0});
    assert_eq!(refused("llama.control-list", some), []);
}

#[test]
fn float64_is_rounded_and_known_by_what_it_becomes() {
    let narrow = |files: &mut AdapterFiles| {
        for tensor in files.tensors.values_mut() {
            assert_eq!(tensor.dtype, Dtype::F64);
            let wide = tensor.data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
            tensor.data = wide.flat_map(|value| (value as f32).to_le_bytes()).collect();
            tensor.dtype = Dtype::F32;
        }
    };
    let (wide, _) = served(&adapter_dir("llama.f64"), "llama");
    let (narrow, _) = served(changed("llama.f64", narrow).path(), "llama");
    assert_eq!(wide.generation, narrow.generation);
    assert_eq!(wide.bytes(), narrow.bytes());
    let first = |value: f64| {
        move |files: &mut AdapterFiles| {
            let tensor = files.tensors.values_mut().next().unwrap();
            tensor.data[..8].copy_from_slice(&value.to_le_bytes());
        }
    };
    let (other, _) = served(changed("llama.f64", first(0.5)).path(), "llama");
    assert_ne!(other.generation, wide.generation);
    for value in [f64::NAN, f64::INFINITY, 1e39] {
        let refused = refused("llama.f64", first(value));
        assert_eq!(refused.len(), 1);
        assert_eq!(refused[0].code, Code::NonFinite);
    }
}
