//! One adapter for every prompt.
//!
//! ```sh
//! cargo run --release -p loramux-engine --example single_adapter -- MODEL ADAPTER
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
    /// Folder of the adapter
    pub adapter: PathBuf,
}

/// Answers two prompts with the adapter.
pub fn run(args: Args) -> Result<Vec<RequestOutput>, LlmError> {
    // `lora_target_modules` is taken from the adapter in `lora_dir`.
    let lora_config = LoraConfig {
        lora_dir: vec![args.adapter.clone()],
        max_lora_rank: 16,
        max_loras: Some(2),
        max_cpu_loras: Some(2),
        ..LoraConfig::default()
    };
    let llm =
        Llm::builder(args.model).lora_config(lora_config).build(|| CpuRef::with_threads(None))?;

    let sampling_params = SamplingParams { max_tokens: Some(50), ..SamplingParams::default() };
    let lora_request = LoraRequest::new("my-lora-task", 0, args.adapter);
    let prompts = ["Hello, how are you?", "What is the capital of France?"];
    llm.generate(prompts, sampling_params, lora_request)
}

#[allow(dead_code, reason = "tests call `run`")]
fn main() -> Result<(), LlmError> {
    for output in run(Args::parse())? {
        println!("{}", output.outputs[0].text);
    }
    Ok(())
}
