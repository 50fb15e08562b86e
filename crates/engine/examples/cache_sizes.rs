//! Limits the memory of adapters on the host and on the device, and prints the cache's counters.
//!
//! ```sh
//! cargo run --release -p loramux-engine --example cache_sizes -- MODEL ADAPTER
//! ```

use std::path::PathBuf;

use clap::Parser;
use lora_core::{LoraConfig, LoraRequest, PeftCacheConfig};
use lora_cpu_ref::CpuRef;
use loramux_engine::{EngineStats, Llm, LlmError, RequestOutput, SamplingParams};

/// Arguments of the example.
#[derive(Parser)]
pub struct Args {
    /// Folder or .gguf file of the base model
    pub model: PathBuf,
    /// Folder of the adapter
    pub adapter: PathBuf,
}

/// Answers a prompt twice with the adapter. Also returns the engine's counters.
pub fn run(args: Args) -> Result<(Vec<RequestOutput>, EngineStats), LlmError> {
    let peft_cache_config = PeftCacheConfig {
        host_cache_size: 1 << 30,
        device_cache_percent: 0.1,
        ..PeftCacheConfig::default()
    };
    let llm = Llm::builder(args.model)
        .lora_config(LoraConfig { max_lora_rank: 16, ..LoraConfig::default() })
        .peft_cache_config(peft_cache_config)
        .build(|| CpuRef::with_threads(None))?;

    let sampling_params = SamplingParams { max_tokens: Some(50), ..SamplingParams::default() };
    let lora_request = LoraRequest::new("my-lora-task", 0, args.adapter);
    let outputs = llm.generate(["Hello, how are you?"; 2], sampling_params, lora_request)?;
    Ok((outputs, llm.stats()?))
}

#[allow(dead_code, reason = "tests call `run`")]
fn main() -> Result<(), LlmError> {
    let (outputs, stats) = run(Args::parse())?;
    for output in outputs {
        println!("{}", output.outputs[0].text);
    }
    println!("{:#?}", stats.adapters);
    Ok(())
}
