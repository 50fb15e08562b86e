//! Engines and requests that the tests of serving share.

use std::time::{Duration, Instant};

use engine::{EngineStats, GenerateRequest, Llm, LlmBuilder, Prompt, SamplingParams};
use lora_core::{DType, LoraConfig, LoraRequest};
use lora_cpu_ref::CpuRef;
use polylora_tests::{adapter_path, model_path};

/// Exact settings over the small Llama, with LoRA.
pub fn builder(lora: LoraConfig) -> LlmBuilder {
    Llm::builder(model_path("llama")).dtype(Some(DType::F32)).lora_config(lora)
}

/// An engine with room for `device` adapters on the device and `host` in host memory.
pub fn engine_with(device: usize, host: usize) -> Llm {
    start(builder(tiers(device, host)))
}

pub fn tiers(device: usize, host: usize) -> LoraConfig {
    LoraConfig { max_loras: Some(device), max_cpu_loras: Some(host), ..LoraConfig::default() }
}

pub fn start(builder: LlmBuilder) -> Llm {
    builder.build(|| CpuRef::with_threads(None)).unwrap()
}

/// Greedy past any end token, with the logits of each step.
pub fn greedy(tokens: usize) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(tokens),
        ignore_eos: true,
        return_generation_logits: true,
        ..SamplingParams::default()
    }
}

pub fn ask(prompt: &[u32], sampling: SamplingParams, lora: Option<LoraRequest>) -> GenerateRequest {
    GenerateRequest { prompt: Prompt::Ids(prompt.to_vec()), sampling, lora }
}

/// A fixture adapter under its own name.
pub fn lora(name: &str, id: i64) -> LoraRequest {
    LoraRequest::new(name, id, adapter_path(name))
}

/// What the engine says once nothing runs any more.
pub fn settled(llm: &Llm) -> EngineStats {
    let begin = Instant::now();
    loop {
        let stats = llm.stats().unwrap();
        if stats.scheduler.waiting + stats.scheduler.running == 0 {
            return stats;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "the engine never settles: {stats:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Nothing is held once nothing runs.
pub fn assert_nothing_held(llm: &Llm) {
    let stats = settled(llm);
    assert_eq!((stats.kv.held, stats.adapters.pins), (0, 0), "{stats:?}");
    for status in llm.list_adapters().unwrap() {
        assert_eq!(status.leases, 0, "{status:?}");
    }
}
