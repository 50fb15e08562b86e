//! Runs the examples of the engine on the fixtures.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use lora_cpu_ref::CpuRef;
use loramux_engine::{GenerateRequest, Llm, Prompt, RequestOutput, SamplingParams};
use loramux_tests::{adapter_path, model_path, run};

#[path = "../../crates/engine/examples/cache_sizes.rs"]
mod cache_sizes;
#[path = "../../crates/engine/examples/nemo.rs"]
mod nemo;
#[path = "../../crates/engine/examples/quantized.rs"]
mod quantized;
#[path = "../../crates/engine/examples/several_adapters.rs"]
mod several_adapters;
#[path = "../../crates/engine/examples/single_adapter.rs"]
mod single_adapter;

fn tokens(outputs: &[RequestOutput]) -> Vec<Vec<u32>> {
    outputs.iter().map(|output| output.outputs[0].token_ids.clone()).collect()
}

/// The base model's answers to the same prompts.
fn of_the_base(outputs: &[RequestOutput]) -> Vec<Vec<u32>> {
    let llm = Llm::builder(model_path("llama")).build(|| CpuRef::with_threads(None)).unwrap();
    let request = |output: &RequestOutput| GenerateRequest {
        prompt: Prompt::Ids(output.prompt_token_ids.clone()),
        sampling: SamplingParams { max_tokens: Some(50), ..SamplingParams::default() },
        lora: None,
    };
    tokens(&run(&llm, outputs.iter().map(request).collect()))
}

#[test]
fn a_single_adapter_answers_every_prompt() {
    let (model, adapter) = (model_path("llama"), adapter_path("llama.attn-r8"));
    let outputs = single_adapter::run(single_adapter::Args { model, adapter }).unwrap();
    assert_eq!(outputs.len(), 2);
    for (adapted, base) in tokens(&outputs).iter().zip(of_the_base(&outputs)) {
        assert_ne!(*adapted, base);
    }
}

#[test]
fn several_adapters_and_the_base_model_share_a_batch() {
    let args = several_adapters::Args {
        model: model_path("llama"),
        first: adapter_path("llama.attn-r8"),
        second: adapter_path("llama.qkv-tied"),
    };
    let outputs = several_adapters::run(args).unwrap();
    let (answers, base) = (tokens(&outputs), of_the_base(&outputs));
    assert!(answers[0] != base[0] && answers[1] != base[1] && answers[2] == base[2]);
}

#[test]
fn adapters_work_on_a_model_in_fp8() {
    for model in ["llama", "llama-fp8"] {
        let args =
            quantized::Args { model: model_path(model), adapter: adapter_path("llama.attn-r8") };
        let answers = tokens(&quantized::run(args).unwrap());
        assert_ne!(answers[0], answers[1], "{model}");
    }
}

#[test]
fn an_adapter_of_nemo_does_what_its_twin_does() {
    let args =
        nemo::Args { model: model_path("llama"), adapter: adapter_path("llama.qkv-tied-nemo") };
    let of_nemo = tokens(&nemo::run(args).unwrap());
    let twin = single_adapter::Args {
        model: model_path("llama"),
        adapter: adapter_path("llama.qkv-tied"),
    };
    assert_eq!(of_nemo[0], tokens(&single_adapter::run(twin).unwrap())[0]);
}

#[test]
fn cache_sizes_hold_and_are_reported() {
    let (model, adapter) = (model_path("llama"), adapter_path("llama.attn-r8"));
    let (outputs, stats) = cache_sizes::run(cache_sizes::Args { model, adapter }).unwrap();
    assert_eq!(tokens(&outputs)[0], tokens(&outputs)[1]);
    let tiers = stats.adapters.use_of_tiers;
    assert_eq!((tiers.reads, tiers.copies, tiers.host_evictions), (1, 1, 0));
}
