//! Adapters on a base model and a KV cache in FP8.
//!
//! ```sh
//! cargo run --release -p loramux-engine --example quantized -- MODEL ADAPTER
//! ```

use std::path::PathBuf;

use clap::Parser;
use lora_core::{LoraConfig, LoraRequest, QuantAlgo, QuantConfig};
use lora_cpu_ref::CpuRef;
use loramux_engine::{Llm, LlmError, RequestOutput, SamplingParams};

/// Arguments of the example.
#[derive(Parser)]
pub struct Args {
    /// Folder or .gguf file of the base model, in 16 bits or in FP8
    pub model: PathBuf,
    /// Folder of the adapter
    pub adapter: PathBuf,
}

/// Answers a prompt with the adapter and with the base model.
pub fn run(args: Args) -> Result<Vec<RequestOutput>, LlmError> {
    // A 16-bit model is quantised while it is loaded. The adapter keeps its precision.
    let quant_config = QuantConfig {
        quant_algo: Some(QuantAlgo::Fp8),
        kv_cache_quant_algo: Some(QuantAlgo::Fp8),
        ..QuantConfig::default()
    };
    let llm = Llm::builder(args.model)
        .quant_config(quant_config)
        .lora_config(LoraConfig { max_lora_rank: 16, ..LoraConfig::default() })
        .build(|| CpuRef::with_threads(None))?;

    let sampling_params = SamplingParams { max_tokens: Some(50), ..SamplingParams::default() };
    let lora_requests = vec![Some(LoraRequest::new("my-lora-task", 0, args.adapter)), None];
    llm.generate(["Hello, how are you?"; 2], sampling_params, lora_requests)
}

#[allow(dead_code, reason = "tests call `run`")]
fn main() -> Result<(), LlmError> {
    for output in run(Args::parse())? {
        println!("{}", output.outputs[0].text);
    }
    Ok(())
}
