//! Engines and requests for the tests of serving, and checks for when they are done.

use std::time::{Duration, Instant};

use lora_core::{DType, LoraConfig, LoraRequest};
use lora_cpu_ref::CpuRef;
use loramux_engine::{
    EngineStats, GenerateRequest, Llm, LlmBuilder, LlmError, Prompt, SamplingParams,
};

use crate::{adapter_path, model_path};

/// Exact settings over the small Llama, with LoRA.
pub fn builder(lora: LoraConfig) -> LlmBuilder {
    Llm::builder(model_path("llama")).dtype(Some(DType::F32)).lora_config(lora)
}

/// An engine on the CPU with room for `device` adapters on the device and `host` in host memory.
///
/// # Panics
/// If it cannot start.
pub fn engine_with(device: usize, host: usize) -> Llm {
    start(builder(tiers(device, host)))
}

/// LoRA with room for `device` adapters on the device and `host` in host memory.
pub fn tiers(device: usize, host: usize) -> LoraConfig {
    LoraConfig { max_loras: Some(device), max_cpu_loras: Some(host), ..LoraConfig::default() }
}

/// An engine on the CPU.
///
/// # Panics
/// If it cannot start.
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

/// A request.
pub fn ask(prompt: &[u32], sampling: SamplingParams, lora: Option<LoraRequest>) -> GenerateRequest {
    GenerateRequest { prompt: Prompt::Ids(prompt.to_vec()), sampling, lora }
}

/// A fixture adapter under its own name.
pub fn lora(name: &str, id: i64) -> LoraRequest {
    LoraRequest::new(name, id, adapter_path(name))
}

/// The statistics of the engine once nothing runs any more.
///
/// # Panics
/// If something still runs after a minute.
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

/// Checks that no blocks and slots are in use once nothing runs.
///
/// # Panics
/// If something is still in use.
pub fn assert_nothing_held(llm: &Llm) {
    let stats = settled(llm);
    assert_eq!((stats.kv.held, stats.adapters.in_use), (0, 0), "{stats:?}");
    for status in llm.list_adapters().unwrap() {
        assert_eq!(status.leases, 0, "{status:?}");
    }
}

/// Sends a request that must be refused between two valid ones, which must not be affected. Returns the
/// error.
///
/// # Panics
/// If the others are affected, or if nothing is refused.
pub fn refused(llm: &Llm, good: &GenerateRequest, bad: GenerateRequest) -> LlmError {
    let alone = llm.generate_each(vec![good.clone()], &mut |_| ()).remove(0).unwrap();
    let answers = llm.generate_each(vec![good.clone(), bad, good.clone()], &mut |_| ());
    let [first, refused, last] = answers.try_into().unwrap();
    for answer in [first, last] {
        assert_eq!(answer.unwrap().outputs, alone.outputs);
    }
    assert_nothing_held(llm);
    refused.unwrap_err()
}

/// Checks that an error contains these words.
///
/// # Panics
/// If one is missing.
pub fn assert_names(error: &LlmError, words: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{word} is missing in: {text}");
    }
}
