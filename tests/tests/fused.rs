//! Fused modules: an adapter of `qkv_proj` or `gate_up_proj` equals that of the separate modules.

#![allow(clippy::unwrap_used, reason = "a fixture that cannot be read is a failed test")]

use std::collections::BTreeMap;

use lora_core::formats::{self, ReadOptions};
use lora_core::{Adapter, Code, LoraConfig, TargetModule};
use loramux_tests::{AdapterFiles, FileTensor, geometry};
use serde_json::json;

const LAYERS: usize = 3;

fn read(files: &AdapterFiles, config: &LoraConfig) -> Adapter {
    let dir = tempfile::tempdir().unwrap();
    files.write(dir.path());
    let options = ReadOptions::from_config(config).unwrap().for_model(geometry("llama"));
    let adapter = formats::load(dir.path(), &options).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(adapter.check(&geometry("llama"), config), []);
    adapter
}

fn name(layer: usize, path: &str, side: &str) -> String {
    format!("base_model.model.model.layers.{layer}.{path}.lora_{side}.weight")
}

/// The same adapter with the parts, which share A, fused into one module.
fn fused(files: &AdapterFiles, block: &str, parts: &[&str], whole: &str) -> AdapterFiles {
    let mut fused = AdapterFiles { config: files.config.clone(), tensors: BTreeMap::new() };
    fused.config["target_modules"] = json!([whole]);
    for layer in 0..LAYERS {
        let part =
            |part: &str, side| &files.tensors[&name(layer, &format!("{block}.{part}"), side)];
        let path = format!("{block}.{whole}");
        let a = part(parts[0], "A");
        assert!(parts.iter().all(|p| part(p, "A") == a), "parts share A");
        let mut b = part(parts[0], "B").clone();
        for other in &parts[1..] {
            let other = part(other, "B");
            b.shape[0] += other.shape[0];
            b.data.extend(&other.data);
        }
        fused.tensors.insert(name(layer, &path, "A"), a.clone());
        fused.tensors.insert(name(layer, &path, "B"), b);
    }
    fused
}

/// An adapter on gate and up projections that share A.
fn gate_and_up() -> AdapterFiles {
    let mut files = AdapterFiles::open("llama.qkv-tied");
    files.config["target_modules"] = json!(["gate_proj", "up_proj"]);
    files.tensors.clear();
    let values = |seed: usize| move |i: usize| ((i * 31 + seed * 7) % 127) as f32 / 64.0 - 1.0;
    for layer in 0..LAYERS {
        for (seed, part) in ["gate_proj", "up_proj"].into_iter().enumerate() {
            let path = format!("mlp.{part}");
            let a = FileTensor::bf16(&[8, 64], (0..512).map(values(layer)));
            let b = FileTensor::bf16(&[176, 8], (0..1408).map(values(10 * seed + layer)));
            files.tensors.extend([(name(layer, &path, "A"), a), (name(layer, &path, "B"), b)]);
        }
    }
    files
}

#[test]
fn fused_query_key_value_is_cut_into_its_parts() {
    let parts = AdapterFiles::open("llama.qkv-tied");
    let whole = fused(&parts, "self_attn", &["q_proj", "k_proj", "v_proj"], "qkv_proj");
    let config = LoraConfig::default();
    let (whole, parts) = (read(&whole, &config), read(&parts, &config));
    assert_eq!(whole.sites, parts.sites);
    assert_eq!(whole.generation, parts.generation);
    let config = LoraConfig { lora_target_modules: vec!["attn_qkv".into()], ..config };
    assert_eq!(whole.check(&geometry("llama"), &config), []);
}

#[test]
fn fused_gate_and_up_follow_the_swap_setting() {
    let parts = gate_and_up();
    let gate_first = fused(&parts, "mlp", &["gate_proj", "up_proj"], "gate_up_proj");
    let up_first = fused(&parts, "mlp", &["up_proj", "gate_proj"], "gate_up_proj");
    let swapped = LoraConfig { swap_gate_up_proj_lora_b_weight: false, ..LoraConfig::default() };
    let expected = read(&parts, &LoraConfig::default());
    assert_eq!(read(&gate_first, &LoraConfig::default()).sites, expected.sites);
    assert_eq!(read(&up_first, &swapped).sites, expected.sites);
    assert_ne!(read(&up_first, &LoraConfig::default()).sites, expected.sites);
    assert_ne!(read(&gate_first, &swapped).generation, expected.generation);
}

#[test]
fn a_fused_module_stays_whole_until_a_model_is_known() {
    let parts = AdapterFiles::open("llama.qkv-tied");
    let whole = fused(&parts, "self_attn", &["q_proj", "k_proj", "v_proj"], "qkv_proj");
    let dir = tempfile::tempdir().unwrap();
    whole.write(dir.path());
    let adapter = formats::load(dir.path(), &ReadOptions::default()).unwrap();
    assert_eq!(adapter.modules(), [TargetModule::AttnQkv].into());
    let codes: Vec<Code> = adapter
        .check(&geometry("llama"), &LoraConfig::default())
        .iter()
        .map(|rejection| rejection.code)
        .collect();
    assert!(codes.contains(&Code::ModuleNotInModel), "{codes:?}");
}

#[test]
fn a_module_fused_and_in_parts_at_once_is_refused() {
    let parts = AdapterFiles::open("llama.qkv-tied");
    let mut both = fused(&parts, "self_attn", &["q_proj", "k_proj", "v_proj"], "qkv_proj");
    both.config["target_modules"] = json!(["qkv_proj", "q_proj"]);
    let q = |name: &&String| name.contains("q_proj");
    for name in parts.tensors.keys().filter(q) {
        both.tensors.insert(name.clone(), parts.tensors[name].clone());
    }
    let dir = tempfile::tempdir().unwrap();
    both.write(dir.path());
    let options = ReadOptions::default().for_model(geometry("llama"));
    let error = formats::load(dir.path(), &options).unwrap_err();
    assert!(error.rejections().unwrap().has(Code::DuplicateTensor), "{error}");
}
