//! Tests of an engine on a device without free memory. They run on any backend with its own memory,
//! simulated or a GPU, and need the device exclusively.

use std::fs;

use lora_core::testkit::{Recipe, write_peft};
use lora_core::{Backend, DType, Error, LoraConfig, LoraRequest, PeftCacheConfig, Pool, Result};
use loramux_engine::model::ModelError;
use loramux_engine::{
    GenerateRequest, KvCacheConfig, Llm, LlmBuilder, LlmError, LoadFormat, SamplingParams,
};
use serde_json::json;
use tempfile::TempDir;

use crate::settle::{
    ask, assert_names, assert_nothing_held, builder, greedy, lora, refused, tiers,
};

/// Creates the device on the thread that uses it.
pub trait Make<B>: Fn() -> Result<B> + Clone + Send + 'static {}

impl<B, F: Fn() -> Result<B> + Clone + Send + 'static> Make<B> for F {}

/// Memory that is occupied by others.
pub struct Held<B: Backend>(Vec<B::Buf>);

/// Block sizes for occupying memory: large ones first, so that there are few blocks, down to the allocation
/// granularity of a GPU.
const PIECES: [usize; 10] = {
    let mut pieces = [1 << 30; 10];
    let mut i = 1;
    while i < pieces.len() {
        pieces[i] = pieces[i - 1] / 2;
        i += 1;
    }
    pieces
};

impl<B: Backend> Held<B> {
    /// Occupies the memory of a device, except for about `room` bytes.
    ///
    /// # Panics
    /// If the device does not report free memory, or fails for another reason than being full.
    pub fn all_but(be: &B, room: usize) -> Self {
        let free = || be.free_memory().unwrap().expect("a device with memory of its own");
        let mut blocks = Vec::new();
        for piece in PIECES {
            while free() >= room + piece {
                match be.alloc(Pool::Kv, piece) {
                    Ok(block) => blocks.push(block),
                    Err(Error::OutOfMemory { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
            }
        }
        Self(blocks)
    }

    /// Frees it.
    pub fn release(self) {
        drop(self.0);
    }
}

/// Free bytes that suffice to create a device, but not for the engines that must not fit.
const ROOM: usize = 160 << 20;

/// Free bytes that suffice for a running engine, but not for an adapter of [`Wide`].
const ADAPTER_ROOM: usize = 16 << 20;

/// A prompt whose continuation has no near ties, so that it does not depend on rounding.
const PROMPT: [u32; 5] = [17, 250, 33, 401, 8];

/// The small Llama with small steps, which needs few megabytes.
fn small() -> LlmBuilder {
    builder(tiers(2, 2)).max_batch_size(4).max_num_tokens(16).max_seq_len(64)
}

/// A greedy request without end tokens. Only tokens are compared, as on some devices other bits depend on the
/// batch.
fn tokens(count: usize) -> SamplingParams {
    SamplingParams { return_generation_logits: false, ..greedy(count) }
}

/// The base model and an adapter.
fn both() -> Vec<GenerateRequest> {
    let adapters = [None, Some(lora("llama.all-r16-rslora", 1))];
    adapters.map(|lora| ask(&PROMPT, tokens(40), lora)).into()
}

fn answers(llm: &Llm) -> Vec<std::result::Result<Vec<u32>, LlmError>> {
    let answers = llm.generate_each(both(), &mut |_| ()).into_iter();
    answers.map(|answer| Ok(answer?.outputs.remove(0).token_ids)).collect()
}

/// The answers of an engine, which must not fail.
fn served(llm: &Llm) -> Vec<Vec<u32>> {
    answers(llm).into_iter().map(|answer| answer.unwrap_or_else(|e| panic!("{e}"))).collect()
}

fn start<B: Backend>(builder: LlmBuilder, make: &impl Make<B>) -> Llm {
    builder.build(make.clone()).unwrap_or_else(|error| panic!("{error}"))
}

/// The error of an engine that starts with only `room` bytes free.
fn refusal<B: Backend>(
    builder: LlmBuilder,
    device: &B,
    room: usize,
    make: &impl Make<B>,
) -> LlmError {
    let held = Held::all_but(device, room);
    let error = builder.build(make.clone()).err().expect("there is no room for the engine");
    held.release();
    error
}

/// A start on a full device fails with an error that says what did not fit and what to do. Once memory is
/// free again, the same engines start and answer correctly.
///
/// # Panics
/// If they do not.
pub fn a_full_device_refuses_engines_until_there_is_room<B: Backend>(make: &impl Make<B>) {
    // A gigabyte of activations.
    let many_rows = || small().max_num_tokens(1 << 18);
    let (wide, llm) = (Wide::new(), start(small(), make));
    let expected = served(&llm);
    drop(llm);
    let device = make().unwrap();

    let error = refusal(small(), &device, 0, make);
    assert!(is_full(&error), "{error}");
    assert_names(&error, &["the device is full"]);
    let error = refusal(wide.builder(), &device, ROOM, make);
    assert!(matches!(error, LlmError::OutOfMemory { pool: Pool::Weights, .. }), "{error}");
    assert_names(&error, &["the device is full", "weights", "bytes", "quant_config"]);
    let error = refusal(many_rows(), &device, ROOM, make);
    assert!(matches!(error, LlmError::OutOfMemory { pool: Pool::Activations, .. }), "{error}");
    assert_names(&error, &["the device is full", "activations", "bytes", "max_num_tokens"]);

    for builder in [small(), many_rows()] {
        assert_eq!(served(&start(builder, make)), expected);
    }
}

/// Whether an error means that memory was exhausted.
fn is_full(error: &LlmError) -> bool {
    let by_driver = matches!(error, LlmError::Model(ModelError::Device(Error::Device(_))));
    let by_size = matches!(error, LlmError::OutOfMemory { .. } | LlmError::NoRoomForKv { .. });
    let text = error.to_string();
    // cuBLASLt does not always report the reason.
    let named = text.contains("the device is full") || text.contains("free memory on the device");
    by_size || (by_driver && named)
}

/// However little memory is free, either an engine fails to start with an error that says what did not fit,
/// or each of its answers is correct or an error.
///
/// # Panics
/// If it is not so, or if even a gigabyte is too little.
pub fn an_engine_in_any_room_answers_right_or_says_why<B: Backend>(make: &impl Make<B>) {
    let expected = served(&start(small(), make));
    let device = make().unwrap();
    for room in [2, 8, 24, 33, 36, 40, 48, 64, 96].map(|mib| mib << 20) {
        let held = Held::all_but(&device, room);
        match small().build(make.clone()) {
            Err(error) => assert!(is_full(&error), "in {room} bytes: {error}"),
            Ok(llm) => assert_right_or_failed(&llm, &expected, room),
        }
        held.release();
    }
    let held = Held::all_but(&device, 1 << 30);
    assert_eq!(served(&start(small(), make)), expected);
    held.release();
}

fn assert_right_or_failed(llm: &Llm, expected: &[Vec<u32>], room: usize) {
    for (answer, expected) in answers(llm).into_iter().zip(expected) {
        match answer {
            Ok(found) => assert_eq!(&found, expected, "in {room} bytes"),
            Err(LlmError::Failed(_) | LlmError::Adapter(_)) => (),
            Err(error) => panic!("in {room} bytes: {error}"),
        }
    }
    assert_nothing_held(llm);
}

/// A start without memory for one KV block fails with an error that names the configured fraction. Once
/// memory is free again, an engine starts and answers correctly.
///
/// # Panics
/// If it does not.
pub fn keys_and_values_without_room_are_refused<B: Backend>(make: &impl Make<B>) {
    let expected = served(&start(small(), make));
    let device = make().unwrap();
    // A block takes 48 MiB, and its share is at most 8.
    let large_blocks = small().kv_cache_config(KvCacheConfig {
        tokens_per_block: 1 << 16,
        free_gpu_memory_fraction: Some(0.05),
        ..KvCacheConfig::default()
    });
    let error = refusal(large_blocks, &device, ROOM, make);
    assert!(matches!(error, LlmError::NoRoomForKv { .. }), "{error}");
    assert_names(&error, &["free_gpu_memory_fraction", "0.05", "bytes", "max_num_tokens"]);
    assert_eq!(served(&start(small(), make)), expected);
}

/// A request for an adapter that exceeds the device tier fails without affecting a running request; a smaller
/// adapter is served afterwards.
///
/// # Panics
/// If it is not so.
pub fn an_adapter_larger_than_its_tier_fails_alone<B: Backend>(make: &impl Make<B>) {
    let of_bytes = LoraConfig { max_loras: None, ..tiers(1, 2) };
    // 48,000 bytes: more than the smaller adapter takes, and half of what the larger one does.
    let cache = PeftCacheConfig { num_device_module_layer: 100, ..PeftCacheConfig::default() };
    let llm = start(builder(of_bytes).peft_cache_config(cache), make);
    let base = ask(&PROMPT, tokens(200), None);
    let large = ask(&PROMPT, tokens(4), Some(lora("llama.all-r16-rslora", 1)));
    let small = ask(&PROMPT, tokens(4), Some(lora("llama.attn-r8", 2)));
    for _ in 0..2 {
        let error = refused(&llm, &base, large.clone());
        assert!(matches!(error, LlmError::Adapter(_)), "{error}");
        let words = ["llama.all-r16-rslora", "bytes", "device tier", "device_cache_percent"];
        assert_names(&error, &words);
        llm.generate_each(vec![small.clone()], &mut |_| ()).remove(0).unwrap();
    }
    assert_nothing_held(&llm);
}

/// A request for an adapter that fits its tier, but not the free memory of the device, fails without
/// affecting a running request. A smaller adapter is served before and after memory is free again.
///
/// # Panics
/// If it is not so.
pub fn an_adapter_that_finds_the_device_full_fails_alone<B: Backend>(make: &impl Make<B>) {
    let wide = Wide::new();
    let llm = start(wide.builder(), make);
    let (large, small) = (wide.adapter(&llm, "large", 256), wide.adapter(&llm, "small", 8));
    let base = ask(&PROMPT, tokens(40), None);
    let of = |lora: &LoraRequest| ask(&PROMPT, tokens(40), Some(lora.clone()));
    let answer = || {
        let answer = llm.generate_each(vec![of(&small)], &mut |_| ()).remove(0);
        // So that it is read and copied again next time.
        llm.unload_adapter("small").unwrap();
        answer.unwrap_or_else(|error| panic!("{error}")).outputs
    };
    // Runs such steps once, so that later ones allocate nothing.
    llm.generate_each(vec![base.clone(), of(&small), base.clone()], &mut |_| ());
    let expected = answer();
    // It is in host memory already, so that it is copied while the others run.
    llm.load_adapter(&large, false).unwrap();

    let device = make().unwrap();
    let held = Held::all_but(&device, ADAPTER_ROOM);
    for _ in 0..2 {
        let error = refused(&llm, &base, of(&large));
        assert!(matches!(error, LlmError::Adapter(_)), "{error}");
        assert_names(&error, &["large", "the device is full", "bytes", "max_loras"]);
        assert_eq!(answer(), expected);
    }
    held.release();
    assert_eq!(answer(), expected);
    assert_nothing_held(&llm);
}

/// A model with random weights that is wider than the fixtures: 240 MiB, and 360 KiB for each rank of an
/// adapter, which is too large for little memory.
struct Wide(TempDir);

impl Wide {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
            "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 512,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
            "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": false,
        });
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        Self(dir)
    }

    fn builder(&self) -> LlmBuilder {
        let config = LoraConfig { max_lora_rank: 256, ..tiers(4, 4) };
        let builder = Llm::builder(self.0.path()).load_format(LoadFormat::Dummy);
        let builder = builder.dtype(Some(DType::F32)).lora_config(config);
        builder.max_batch_size(4).max_num_tokens(16).max_seq_len(64)
    }

    /// An adapter of a rank on every module, with elements small enough not to dominate the model.
    fn adapter(&self, llm: &Llm, name: &str, rank: usize) -> LoraRequest {
        let dir = self.0.path().join(name);
        let recipe = Recipe { rank, alpha: rank as f64, limit: 0.02, seed: rank as u64 };
        write_peft(&dir, &llm.info().geometry, recipe).unwrap();
        LoraRequest::new(name, rank as i64, dir)
    }
}
