//! Checkpoints that are broken or of another kind give clear errors, never a wrong model.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::path::Path;

use lora_cpu_ref::CpuRef;
use loramux_engine::Llm;
use loramux_tests::model_path;
use safetensors::tensor::{SafeTensors, TensorView, serialize};
use serde_json::{Value, json};

type Tensors = HashMap<String, (Vec<usize>, Vec<u8>)>;

/// Loads the qwen3 fixture after a change to its files and returns the error.
fn error_after(change: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::copy(model_path("qwen3").join(name), dir.path().join(name)).unwrap();
    }
    change(dir.path());
    match Llm::builder(dir.path()).build(|| CpuRef::with_threads(None)) {
        Ok(_) => "it loads".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn with_config(field: &str, value: Value) -> String {
    error_after(|dir| {
        let path = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[field] = value;
        std::fs::write(path, config.to_string()).unwrap();
    })
}

fn with_tensors(change: impl FnOnce(&mut Tensors)) -> String {
    error_after(|dir| {
        let path = dir.join("model.safetensors");
        let file = std::fs::read(&path).unwrap();
        let mut tensors: Tensors = SafeTensors::deserialize(&file)
            .unwrap()
            .tensors()
            .into_iter()
            .map(|(name, t)| (name, (t.shape().to_vec(), t.data().to_vec())))
            .collect();
        change(&mut tensors);
        let views = tensors.iter().map(|(name, (shape, data))| {
            (name, TensorView::new(safetensors::Dtype::BF16, shape.clone(), data).unwrap())
        });
        std::fs::write(path, serialize(views, None).unwrap()).unwrap();
    })
}

#[track_caller]
fn assert_names(error: &str, names: &[&str]) {
    for name in names {
        assert!(error.contains(name), "{error:?} does not name {name}");
    }
}

#[test]
fn an_unchanged_copy_loads() {
    assert_eq!(error_after(|_| ()), "it loads");
}

#[test]
fn missing_and_truncated_files_are_named() {
    let remove =
        |name: &'static str| error_after(move |dir| std::fs::remove_file(dir.join(name)).unwrap());
    assert_names(&remove("config.json"), &["config.json"]);
    assert_names(&remove("tokenizer.json"), &["tokenizer.json"]);
    assert_names(&remove("model.safetensors"), &["model.safetensors", "missing"]);
    let cut = error_after(|dir| {
        let path = dir.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    });
    assert_names(&cut, &["model.safetensors", "cut off"]);
    let garbled = error_after(|dir| std::fs::write(dir.join("config.json"), b"{\xff").unwrap());
    assert_names(&garbled, &["config.json"]);
}

#[test]
fn tensors_must_be_those_of_the_config() {
    const NORM: &str = "model.layers.1.self_attn.q_norm.weight";
    assert_names(&with_tensors(|t| drop(t.remove(NORM))), &[NORM, "missing"]);
    let strange = with_tensors(|t| drop(t.insert("extra.weight".into(), (vec![1], vec![0; 2]))));
    assert_names(&strange, &["extra.weight", "qwen3"]);
    let reshaped = with_tensors(|t| t.get_mut(NORM).unwrap().0 = vec![4, 8]);
    assert_names(&reshaped, &[NORM, "[4, 8]", "[32]"]);
    let poisoned = with_tensors(|t| t.get_mut(NORM).unwrap().1[..2].copy_from_slice(&[0xc0, 0x7f]));
    assert_names(&poisoned, &[NORM, "not finite"]);
}

#[test]
fn settings_that_are_not_run_are_refused() {
    assert_names(&with_config("model_type", json!("gpt2")), &["model_type", "gpt2", "qwen3"]);
    assert_names(&with_config("hidden_act", json!("gelu")), &["hidden_act", "gelu", "silu"]);
    assert_names(&with_config("hidden_size", json!(0)), &["hidden_size"]);
    assert_names(&with_config("hidden_size", json!("wide")), &["config.json", "hidden_size"]);
    assert_names(&with_config("num_hidden_layers", json!(2)), &["layers.2"]);
    assert_names(&with_config("num_hidden_layers", json!(4)), &["layers.3", "missing"]);
    let quantized = json!({"quant_method": "gptq"});
    assert_names(&with_config("quantization_config", quantized), &["gptq"]);
}

#[test]
fn shards_are_one_model_and_must_be_complete() {
    let shards = |dir: &Path| {
        let path = dir.join("model.safetensors");
        let file = std::fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap().tensors();
        let mut map = serde_json::Map::new();
        for (i, half) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
            let name = format!("model-{}-of-2.safetensors", i + 1);
            map.extend(half.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
            let views = half.iter().map(|(tensor, view)| (tensor, view));
            std::fs::write(dir.join(name), serialize(views, None).unwrap()).unwrap();
        }
        std::fs::remove_file(path).unwrap();
        let index = json!({ "weight_map": map });
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    };
    assert_eq!(error_after(shards), "it loads");
    let half = error_after(|dir| {
        shards(dir);
        std::fs::remove_file(dir.join("model-2-of-2.safetensors")).unwrap();
    });
    assert_names(&half, &["model-2-of-2.safetensors", "missing"]);
}

#[test]
fn what_is_no_model_is_refused() {
    let load = |path: &Path| {
        let built = Llm::builder(path).build(|| CpuRef::with_threads(None));
        built.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_names(&load(Path::new("no/such/model")), &["no/such/model", "does not exist"]);
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("broken.gguf");
    std::fs::write(&gguf, b"GGUF\x03\x00\x00\x00").unwrap();
    assert_names(&load(&gguf), &["broken.gguf"]);
}

#[test]
fn settings_of_the_engine_are_checked() {
    let built = |builder: loramux_engine::LlmBuilder| {
        builder
            .build(|| CpuRef::with_threads(None))
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default()
    };
    let new = || Llm::builder(model_path("qwen3"));
    assert_names(&built(new().max_batch_size(0)), &["max_batch_size", "1 to"]);
    assert_names(&built(new().max_seq_len(513)), &["max_seq_len", "513", "512"]);
    let lora = lora_core::LoraConfig {
        lora_target_modules: vec!["attn_x".to_owned()],
        ..lora_core::LoraConfig::default()
    };
    assert_names(&built(new().lora_config(lora)), &["lora_target_modules", "attn_x"]);
}
