//! Prompts with different adapters, or none, in one batch.
//!
//! ```sh
//! cargo run --release -p loramux-engine --example several_adapters -- MODEL ADAPTER ADAPTER
//! ```

use std::path::PathBuf;

use clap::Parser;
use lora_core::{LoraConfig, LoraRequest};
use lora_cpu_ref::CpuRef;
use loramux_engine::{Llm, LlmError, RequestOutput, SamplingParams};

/// Arguments of the example.
#[derive(Parser)]
pub struct Args {
    /// Folder or .gguf file of the base model
    pub model: PathBuf,
    /// Folder of the first adapter
    pub first: PathBuf,
    /// Folder of the second adapter
    pub second: PathBuf,
}

/// Answers with the first adapter, the second, and the base model.
pub fn run(args: Args) -> Result<Vec<RequestOutput>, LlmError> {
    let lora_config = LoraConfig {
        lora_target_modules: ["attn_q", "attn_k", "attn_v", "attn_dense"].map(Into::into).into(),
        max_lora_rank: 8,
        max_loras: Some(4),
        max_cpu_loras: Some(8),
        ..LoraConfig::default()
    };
    let llm =
        Llm::builder(args.model).lora_config(lora_config).build(|| CpuRef::with_threads(None))?;

    let prompts = [
        "Translate to French: Hello world",
        "Summarize: This is a long document...",
        "What is the capital of France?",
    ];
    let lora_requests = vec![
        Some(LoraRequest::new("task-1", 0, args.first)),
        Some(LoraRequest::new("task-2", 1, args.second)),
        None,
    ];
    let sampling_params = SamplingParams { max_tokens: Some(50), ..SamplingParams::default() };
    llm.generate(prompts, sampling_params, lora_requests)
}

#[allow(dead_code, reason = "tests call `run`")]
fn main() -> Result<(), LlmError> {
    for output in run(Args::parse())? {
        println!("{}", output.outputs[0].text);
    }
    Ok(())
}
