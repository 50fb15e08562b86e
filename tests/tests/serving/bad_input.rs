//! Requests that cannot be served fail alone, with the reason.

use lora_core::{LoraConfig, PeftCacheConfig};
use lora_cpu_ref::CpuRef;
use loramux_engine::{GenerateRequest, Llm, LlmBuilder, LlmError};
use loramux_tests::settle::{
    self, ask, assert_names, assert_nothing_held, builder, engine_with, greedy, lora, start, tiers,
};

const PROMPT: [u32; 5] = [17, 250, 33, 401, 8];

fn request(name: &str, id: i64) -> GenerateRequest {
    ask(&PROMPT, greedy(4), Some(lora(name, id)))
}

/// Runs a bad request between two good ones, which must be unaffected. Returns its error.
fn refused(llm: &Llm, bad: GenerateRequest) -> LlmError {
    settle::refused(llm, &ask(&PROMPT, greedy(4), None), bad)
}

#[test]
fn an_adapter_larger_than_a_tier_names_the_setting_to_raise() {
    let unsized_tiers = || LoraConfig { max_loras: None, max_cpu_loras: None, ..tiers(1, 1) };
    for (cache, knob) in [
        (PeftCacheConfig { host_cache_size: 1000, ..Default::default() }, "host_cache_size"),
        (PeftCacheConfig { num_host_module_layer: 1, ..Default::default() }, "host"),
        (PeftCacheConfig { num_device_module_layer: 1, ..Default::default() }, "device"),
    ] {
        let llm = start(builder(unsized_tiers()).peft_cache_config(cache));
        let error = refused(&llm, request("llama.all-r16-rslora", 1));
        assert_names(&error, &["llama.all-r16-rslora", "bytes", knob]);
    }
}

#[test]
fn a_rank_above_the_maximum_is_refused() {
    let llm = start(builder(LoraConfig { max_lora_rank: 4, ..tiers(2, 2) }));
    let error = refused(&llm, request("llama.attn-r8", 1));
    assert_names(&error, &["llama.attn-r8", "max_lora_rank", "8", "4"]);
}

#[test]
fn an_adapter_for_other_modules_is_refused() {
    let targets = vec!["attn_q".parse().unwrap()];
    let llm = start(builder(LoraConfig { lora_target_modules: targets, ..tiers(2, 2) }));
    let error = refused(&llm, request("llama.all-r16-rslora", 1));
    assert_names(&error, &["llama.all-r16-rslora", "mlp_h_to_4h", "lora_target_modules"]);
}

#[test]
fn an_adapter_of_another_model_or_of_none_is_refused() {
    let llm = engine_with(2, 2);
    assert_names(&refused(&llm, request("qwen3.all-r16-rslora", 1)), &["qwen3.all-r16-rslora"]);
    assert_names(&refused(&llm, request("is-not-there", 2)), &["is-not-there"]);
}

#[test]
fn more_adapters_than_room_wait_and_all_are_served() {
    let llm = engine_with(1, 1);
    let names = ["llama.attn-r8", "llama.dora-r8", "llama.mixed-ranks", "llama.some-layers"];
    let all = || names.iter().zip(0..).map(|(name, id)| request(name, id));
    let together: Vec<_> = all().chain(all()).collect();
    let answers = llm.generate_each(together, &mut |_| ());
    for (answer, request) in answers.into_iter().zip(all().chain(all())) {
        let alone = engine_with(1, 1).generate_each(vec![request], &mut |_| ()).remove(0).unwrap();
        assert_eq!(answer.unwrap().outputs, alone.outputs);
    }
    assert_nothing_held(&llm);
}

/// The error of an engine that does not start.
fn refusal(builder: LlmBuilder) -> LlmError {
    builder.build(|| CpuRef::with_threads(None)).err().unwrap()
}

#[test]
fn settings_out_of_range_name_themselves() {
    let broken = |change: fn(LoraConfig) -> LoraConfig| refusal(builder(change(tiers(1, 1))));
    assert_names(&broken(|c| LoraConfig { max_lora_rank: 0, ..c }), &["max_lora_rank"]);
    assert_names(&broken(|c| LoraConfig { max_loras: Some(0), ..c }), &["max_loras"]);
    let kv =
        loramux_engine::KvCacheConfig { free_gpu_memory_fraction: Some(1.5), ..Default::default() };
    let error = refusal(builder(tiers(1, 1)).kv_cache_config(kv));
    assert_names(&error, &["free_gpu_memory_fraction", "1.5"]);
    let copy = loramux_engine::KvCacheConfig { copy_on_partial_reuse: false, ..Default::default() };
    let error = refusal(builder(tiers(1, 1)).kv_cache_config(copy));
    assert_names(&error, &["copy_on_partial_reuse", "enable_partial_reuse"]);
}
