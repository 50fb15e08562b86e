//! An adapter in NeMo's format.
//!
//! ```sh
//! cargo run --release -p loramux-engine --example nemo -- MODEL ADAPTER.nemo
//! ```

use std::path::PathBuf;

use clap::Parser;
use lora_core::{CkptSource, LoraConfig, LoraRequest};
use lora_cpu_ref::CpuRef;
use loramux_engine::{Llm, LlmError, RequestOutput, SamplingParams};

/// Arguments of the example.
#[derive(Parser)]
pub struct Args {
    /// Folder or .gguf file of the base model
    pub model: PathBuf,
    /// The .nemo file of the adapter, or its folder
    pub adapter: PathBuf,
}

/// Answers a prompt with the adapter.
pub fn run(args: Args) -> Result<Vec<RequestOutput>, LlmError> {
    let lora_config = LoraConfig {
        lora_dir: vec![args.adapter.clone()],
        lora_ckpt_source: CkptSource::Nemo,
        max_lora_rank: 8,
        ..LoraConfig::default()
    };
    let llm =
        Llm::builder(args.model).lora_config(lora_config).build(|| CpuRef::with_threads(None))?;

    let sampling_params = SamplingParams { max_tokens: Some(50), ..SamplingParams::default() };
    let lora_request =
        LoraRequest::new("nemo-task", 0, args.adapter).with_ckpt_source(CkptSource::Nemo);
    llm.generate(["Hello, how are you?"], sampling_params, lora_request)
}

#[allow(dead_code, reason = "tests call `run`")]
fn main() -> Result<(), LlmError> {
    for output in run(Args::parse())? {
        println!("{}", output.outputs[0].text);
    }
    Ok(())
}
