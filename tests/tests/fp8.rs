//! FP8 base weights and KV cache: checkpoints, quantisation at load, and refusals.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{DType, QuantAlgo, QuantConfig};
use lora_cpu_ref::CpuRef;
use loramux_engine::{KvCacheConfig, KvCacheDtype, Llm, LlmBuilder, LoadFormat, RequestOutput};
use loramux_tests::{Case, Fixtures, builder, context_logits, model_path, relative_error, run};
use safetensors::Dtype;
use safetensors::tensor::{SafeTensors, TensorView, serialize};
use serde_json::{Value, json};

/// Tolerance for the logits of the FP8 fixture.
const TOLERANCE: f32 = 2e-2;

/// A builder with settings that make results exact.
fn exact(model: &Path) -> LlmBuilder {
    builder(model, DType::F32)
}

fn start(builder: LlmBuilder) -> Llm {
    builder.build(|| CpuRef::with_threads(None)).expect("the model loads")
}

fn fp8() -> QuantConfig {
    QuantConfig { quant_algo: Some(QuantAlgo::Fp8), ..QuantConfig::default() }
}

/// The largest error of the fixture's logits, each case alone and all in one batch.
fn worst_error(dtype: DType) -> f32 {
    let fixtures = Fixtures::load();
    let cases = fixtures.of_model("llama-fp8");
    assert_eq!(cases.len(), 9);
    let llm = start(builder(&model_path("llama-fp8"), dtype));
    assert_eq!(llm.info().quant_algo, Some(QuantAlgo::Fp8));
    assert_eq!(llm.info().kv_dtype, DType::F8E4m3);
    let requests = Case::requests(&cases);
    let mixed = run(&llm, requests.clone());
    let check = |((case, request), mixed): ((&Case, _), &RequestOutput)| {
        let alone = run(&llm, vec![request]).remove(0);
        assert_eq!(alone.context_logits, mixed.context_logits, "{}: the batch matters", case.id);
        assert_eq!(alone.outputs, mixed.outputs, "{}: the batch matters", case.id);
        let error = relative_error(&context_logits(mixed), &fixtures.logits(case));
        println!("{} in {dtype}: {error}", case.id);
        // Compare only tokens that do not change when an activation is rounded to a neighbouring code.
        if error < TOLERANCE {
            case.assert_greedy(&mixed.outputs[0].token_ids, 0.1);
        }
        error
    };
    cases.iter().zip(requests).zip(&mixed).map(check).fold(0.0, f32::max)
}

#[test]
fn the_fixture_is_exact_with_its_kv_cache_in_fp8() {
    let error = worst_error(DType::F32);
    assert!(error < TOLERANCE, "logits off by {error}");
}

#[test]
fn the_fixture_runs_in_bf16() {
    let error = worst_error(DType::Bf16);
    assert!(error < 5e-2, "logits off by {error}");
}

#[test]
fn quantising_on_loading_is_close_to_the_model_and_not_it() {
    let fixtures = Fixtures::load();
    let cases = fixtures.of_model("llama");
    let config = QuantConfig { kv_cache_quant_algo: Some(QuantAlgo::Fp8), ..fp8() };
    let llm = start(exact(&model_path("llama")).quant_config(config));
    assert_eq!(llm.info().quant_algo, Some(QuantAlgo::Fp8));
    assert_eq!(llm.info().kv_dtype, DType::F8E4m3);
    for (case, answer) in cases.iter().zip(run(&llm, Case::requests(&cases))) {
        let error = relative_error(&context_logits(&answer), &fixtures.logits(case));
        // Measured: 0.07 to 0.19. A part without its scale would be off by 1 or more.
        assert!((1e-4..0.3).contains(&error), "{}: {error}", case.id);
    }
}

#[test]
fn the_kv_cache_can_be_in_fp8_by_itself() {
    let fixtures = Fixtures::load();
    let cases = fixtures.of_model("qwen3");
    let tokens = |dtype| {
        let kv = KvCacheConfig { dtype, max_tokens: Some(4096), ..KvCacheConfig::default() };
        let llm = start(exact(&model_path("qwen3")).kv_cache_config(kv));
        assert_eq!(llm.info().quant_algo, None);
        let answers = run(&llm, Case::requests(&cases));
        let errors = cases.iter().zip(&answers);
        let error =
            |(case, answer)| relative_error(&context_logits(answer), &fixtures.logits(case));
        (llm.info().kv_dtype, errors.map(error).fold(0.0, f32::max))
    };
    let (dtype, error) = tokens(KvCacheDtype::Auto);
    assert!(dtype == DType::F32 && error < 2e-3, "{dtype} {error}");
    let (dtype, error) = tokens(KvCacheDtype::Fp8);
    assert!(dtype == DType::F8E4m3 && (1e-4..0.15).contains(&error), "{dtype} {error}");
}

#[test]
fn an_fp8_config_works_with_random_weights() {
    let llm = start(exact(&model_path("llama-fp8")).load_format(LoadFormat::Dummy));
    assert_eq!(llm.info().quant_algo, Some(QuantAlgo::Fp8));
}

/// The error of loading the fixture with these settings, after a change to its files.
fn refusal(change: impl FnOnce(&Path), config: Option<QuantConfig>) -> String {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(model_path("llama-fp8")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    change(dir.path());
    let builder = match config {
        Some(config) => exact(dir.path()).quant_config(config),
        None => exact(dir.path()),
    };
    match builder.build(|| CpuRef::with_threads(None)) {
        Ok(_) => "it loads".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn settings_that_contradict_the_checkpoint_are_refused() {
    let asked = |config| refusal(|_| (), Some(config));
    assert_eq!(asked(QuantConfig::default()), "it loads");
    assert_eq!(asked(fp8()), "it loads");
    let lm_head = Some(vec!["lm_head".to_owned()]);
    assert_eq!(asked(QuantConfig { exclude_modules: lm_head, ..fp8() }), "it loads");
    for (config, names) in [
        (QuantConfig { quant_algo: Some(QuantAlgo::NoQuant), ..fp8() }, ["NO_QUANT", "FP8"]),
        (QuantConfig { quant_algo: Some(QuantAlgo::Nvfp4), ..fp8() }, ["NVFP4", "FP8"]),
        (QuantConfig { quant_algo: Some(QuantAlgo::Int8), ..fp8() }, ["INT8", "quant_algo"]),
        (QuantConfig { kv_cache_quant_algo: Some(QuantAlgo::Int8), ..fp8() }, ["INT8", "kv_cache"]),
        (QuantConfig { exclude_modules: Some(vec![]), ..fp8() }, ["[]", "lm_head"]),
        (QuantConfig { clamp_val: Some(vec![1.0]), ..fp8() }, ["clamp_val", "unset"]),
    ] {
        let error = asked(config);
        assert!(names.iter().all(|name| error.contains(name)), "{error}");
    }
}

fn with_quantization(change: impl FnOnce(&mut Value)) -> String {
    refusal(
        |dir| {
            let path = dir.join("hf_quant_config.json");
            let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            change(&mut json["quantization"]);
            std::fs::write(path, json.to_string()).unwrap();
        },
        None,
    )
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn with_tensors(change: impl FnOnce(&mut Tensors)) -> String {
    refusal(
        |dir| {
            let path = dir.join("model.safetensors");
            let file = std::fs::read(&path).unwrap();
            let tensors = SafeTensors::deserialize(&file).unwrap().tensors();
            let owned = |t: &TensorView<'_>| (t.dtype(), t.shape().to_vec(), t.data().to_vec());
            let mut tensors: Tensors = tensors.iter().map(|(n, t)| (n.clone(), owned(t))).collect();
            change(&mut tensors);
            let views = tensors.iter().map(|(name, (dtype, shape, data))| {
                (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
            });
            std::fs::write(path, serialize(views, None).unwrap()).unwrap();
        },
        None,
    )
}

const K_PROJ: &str = "model.layers.1.self_attn.k_proj";

#[test]
fn files_that_contradict_each_other_are_refused() {
    assert_eq!(with_quantization(|_| ()), "it loads");
    for (change, names) in [
        (json!({"quant_algo": "NVFP4"}), vec!["NVFP4", "FP8"]),
        (json!({"kv_cache_quant_algo": "INT8"}), vec!["INT8", "FP8"]),
        (json!({"exclude_modules": ["*k_proj", "lm_head"]}), vec!["k_proj", "one matrix"]),
        (json!({"exclude_modules": []}), vec!["lm_head.weight", "bfloat16", "float8_e4m3fn"]),
        (json!({"quant_algo": null}), vec!["q_proj.weight", "float8_e4m3fn", "bfloat16"]),
        (json!({"exclude_modules": ["*o_proj", "lm_head"]}), vec!["o_proj.weight", "bfloat16"]),
    ] {
        let error = with_quantization(|block| {
            block.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        });
        assert!(names.iter().all(|name| error.contains(name)), "{error} does not name {names:?}");
    }
}

#[test]
fn tensors_that_are_missing_or_damaged_are_refused() {
    let f32_bytes = |value: f32| value.to_le_bytes().to_vec();
    let set = |name: &str, value: f32| {
        let name = format!("{K_PROJ}.{name}");
        move |t: &mut Tensors| t.get_mut(&name).unwrap().2 = f32_bytes(value)
    };
    assert_eq!(with_tensors(|_| ()), "it loads");
    let dropped = |name: &str| {
        let name = format!("{K_PROJ}.{name}");
        with_tensors(move |t| drop(t.remove(&name).unwrap()))
    };
    for (error, named) in [
        (dropped("weight_scale"), "weight_scale is missing"),
        (dropped("input_scale"), "input_scale is missing"),
        (dropped("weight"), "weight is missing"),
        (with_tensors(set("weight_scale", 0.0)), "positive"),
        (with_tensors(set("weight_scale", -1.0)), "positive"),
        (with_tensors(set("input_scale", f32::NAN)), "not finite"),
        (with_tensors(|t| t.get_mut(&format!("{K_PROJ}.weight")).unwrap().2[5] = 0x7f), "finite"),
    ] {
        assert!(error.contains(named) && error.contains(K_PROJ), "{error}");
    }
    let left = with_tensors(|t| {
        t.insert(
            "model.layers.0.mlp.down_proj.k_scale".into(),
            (Dtype::F32, vec![], f32_bytes(1.0)),
        );
    });
    assert!(left.contains("down_proj.k_scale"), "{left}");
}

#[test]
fn scales_may_have_one_dimension_and_inputs_be_dynamic() {
    let one_dimension = with_tensors(|t| {
        t.values_mut().filter(|t| t.1.is_empty()).for_each(|t| t.1 = vec![1]);
    });
    assert_eq!(one_dimension, "it loads");
    let dynamic = with_tensors(|t| t.retain(|name, _| !name.ends_with("input_scale")));
    assert_eq!(dynamic, "it loads");
}

#[test]
fn the_checkpoints_kv_scales_are_used_and_checked() {
    let scaled = |k: f32| {
        with_tensors(move |t| {
            t.insert(format!("{K_PROJ}.k_scale"), (Dtype::F32, vec![], k.to_le_bytes().to_vec()));
        })
    };
    assert_eq!(scaled(0.5), "it loads");
    assert!(scaled(0.0).contains("k_scale"), "{}", scaled(0.0));
}
