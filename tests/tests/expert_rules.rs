//! Engines that are refused if LoRA targets routed experts.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use lora_core::{LoraConfig, QuantAlgo, QuantConfig};
use lora_cpu_ref::CpuRef;
use loramux_engine::Llm;
use loramux_moe::MoeBackendName;
use loramux_tests::model_path;

const EXPERTS: [&str; 3] = ["moe_h_to_4h", "moe_gate", "moe_4h_to_h"];
const ATTENTION: [&str; 3] = ["attn_q", "attn_k", "attn_v"];

/// The error of starting an engine with these settings; empty if it starts.
fn refusal(targets: &[&str], backend: MoeBackendName, quant: QuantConfig) -> String {
    let lora = LoraConfig {
        lora_target_modules: targets.iter().map(ToString::to_string).collect(),
        ..LoraConfig::default()
    };
    let builder = Llm::builder(model_path("llama"))
        .lora_config(lora)
        .moe_backend(backend)
        .quant_config(quant);
    let started = builder.build(|| CpuRef::with_threads(None));
    started.err().map(|error| error.to_string()).unwrap_or_default()
}

fn fp8() -> QuantConfig {
    QuantConfig { quant_algo: Some(QuantAlgo::Fp8), ..QuantConfig::default() }
}

#[test]
fn experts_need_cutlass() {
    for backend in [MoeBackendName::Trtllm, MoeBackendName::Vanilla, MoeBackendName::Triton] {
        let error = refusal(&EXPERTS, backend, QuantConfig::default());
        assert!(error.contains("moe_backend") && error.contains("CUTLASS"), "{error}");
    }
    for backend in [MoeBackendName::Auto, MoeBackendName::Cutlass] {
        assert_eq!(refusal(&EXPERTS, backend, QuantConfig::default()), "");
    }
}

#[test]
fn experts_need_weights_in_16_bits() {
    let error = refusal(&EXPERTS, MoeBackendName::Auto, fp8());
    assert!(error.contains("quant_algo") && error.contains("FP8"), "{error}");
    let kv_only = QuantConfig { kv_cache_quant_algo: Some(QuantAlgo::Fp8), ..Default::default() };
    assert_eq!(refusal(&EXPERTS, MoeBackendName::Auto, kv_only), "");
}

#[test]
fn experts_need_both_projections() {
    for targets in [&["moe_gate"][..], &["moe_4h_to_h", "attn_q"], &["moe_h_to_4h", "moe_gate"]] {
        let error = refusal(targets, MoeBackendName::Auto, QuantConfig::default());
        assert!(error.contains("moe_gate") && error.contains("moe_4h_to_h"), "{error}");
    }
}

#[test]
fn all_broken_rules_are_reported_at_once() {
    let error = refusal(&["moe_gate"], MoeBackendName::Triton, fp8());
    for named in ["TRITON", "FP8", "moe_4h_to_h"] {
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn attention_goes_with_any_backend_and_quantised_weights() {
    assert_eq!(refusal(&ATTENTION, MoeBackendName::Trtllm, fp8()), "");
    assert_eq!(refusal(&[], MoeBackendName::Trtllm, fp8()), "");
}
