//! The host's share of a step: an engine on a device that computes nothing, with 256 requests
//! running. Steps a second are the ceiling that the scheduler sets to any device.
//!
//! `cargo bench -p loramux-tests --bench host_overhead`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark fails by panicking")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use divan::Bencher;
use divan::counter::ItemsCount;
use futures_util::{FutureExt, StreamExt};
use lora_core::testkit::NullBackend;
use lora_core::{LoraConfig, LoraRequest};
use loramux_engine::{GenerateRequest, Llm, LoadFormat, Prompt, ResponseStream, SamplingParams};
use loramux_tests::{adapter_path, model_path};
use serde_json::Value;

/// Requests that run at a time.
const RUNNING: usize = 256;

/// Steps of one sample.
const STEPS: u64 = 1000;

const ADAPTERS: [&str; 8] = [
    "llama.attn-r8",
    "llama.all-r16-rslora",
    "llama.mixed-ranks",
    "llama.lora-bias",
    "llama.some-layers",
    "llama.embed-r8",
    "llama.lm-head-r8",
    "llama.qkv-tied",
];

fn main() {
    divan::main();
}

/// The small Llama without weights, for sequences that outlast the benchmark.
fn write_model(dir: &Path) {
    let config = std::fs::read(model_path("llama").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["max_position_embeddings"] = (1 << 17).into();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

fn start(dir: &Path) -> Llm {
    let lora = LoraConfig { max_loras: Some(ADAPTERS.len()), ..LoraConfig::default() };
    let kv = loramux_engine::KvCacheConfig { max_tokens: Some(1 << 25), ..Default::default() };
    Llm::builder(dir)
        .load_format(LoadFormat::Dummy)
        .lora_config(lora)
        .kv_cache_config(kv)
        .max_batch_size(RUNNING)
        .build(|| Ok(NullBackend::new(512)))
        .unwrap()
}

fn request(number: usize, adapters: usize) -> GenerateRequest {
    let adapter = |i: usize| LoraRequest::new(ADAPTERS[i], i as i64, adapter_path(ADAPTERS[i]));
    GenerateRequest {
        prompt: Prompt::Ids((0..64).map(|i| (number as u32 * 7 + i) % 512).collect()),
        sampling: SamplingParams {
            max_tokens: Some(100_000),
            ignore_eos: true,
            detokenize: false,
            ..SamplingParams::default()
        },
        lora: (adapters > 0).then(|| adapter(number % adapters)),
    }
}

/// Takes tokens out of all streams, as servers do, until told to stop.
fn read(mut streams: Vec<ResponseStream>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        for stream in &mut streams {
            while let Some(Some(delta)) = stream.next().now_or_never() {
                delta.unwrap();
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[divan::bench(args = [0, 1, 8], sample_count = 10, sample_size = 1)]
fn steps(bencher: Bencher<'_, '_>, adapters: usize) {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path());
    let llm = start(dir.path());
    let streams = (0..RUNNING).map(|i| llm.generate_async(request(i, adapters)).unwrap()).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| read(streams, &stop));
        let steps = || llm.stats().unwrap().steps;
        while llm.stats().unwrap().scheduler.running < RUNNING || steps() < STEPS {
            std::thread::sleep(Duration::from_millis(1));
        }
        bencher.counter(ItemsCount::new(STEPS)).bench_local(|| {
            let end = steps() + STEPS;
            while steps() < end {
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        assert_eq!(llm.stats().unwrap().scheduler.running, RUNNING);
        stop.store(true, Ordering::Relaxed);
    });
}
