//! A full device: reserved memory is available, and what does not fit fails alone.

use lora_core::LoraConfig;
use lora_core::testkit::{CountedMemory, NullBackend};
use lora_cpu_ref::CpuRef;
use loramux_engine::{KvCacheConfig, Llm, LlmBuilder, LlmError};
use loramux_tests::faults;
use loramux_tests::settle::{ask, assert_nothing_held, builder, greedy, lora, settled, tiers};

const PROMPT: [u32; 5] = [17, 250, 33, 401, 8];

/// An engine with small steps and few tokens, so that its buffers are small.
fn small(lora: LoraConfig) -> LlmBuilder {
    builder(lora).max_batch_size(4).max_num_tokens(16).max_seq_len(64)
}

fn on(builder: LlmBuilder, memory: &CountedMemory) -> Result<Llm, LlmError> {
    let memory = memory.clone();
    builder.build(|| Ok(NullBackend::new(512).with_memory(memory)))
}

/// Memory of everything except adapters and KV cache, in bytes.
fn needed(lora: &LoraConfig) -> usize {
    let llm = on(small(lora.clone()), &CountedMemory::new(1 << 30)).unwrap();
    llm.info().memory.weights + llm.info().memory.activations
}

#[test]
fn the_plan_adds_up_to_what_was_free() {
    let memory = CountedMemory::new(1 << 26);
    let llm = on(small(tiers(2, 2)), &memory).unwrap();
    let plan = llm.info().memory;
    assert!(plan.weights > 0 && plan.activations > 0 && plan.adapters > 0 && plan.kv > 0);
    let sum = plan.weights + plan.activations + plan.adapters as usize + plan.kv;
    assert_eq!(plan.free_at_start, Some(1 << 26));
    assert_eq!(sum + plan.left.unwrap(), 1 << 26);
    assert_eq!(memory.free(), plan.left.unwrap() + plan.adapters as usize);
    assert_eq!((plan.adapter_slots, plan.kv_tokens), (2, llm.info().kv_tokens));
}

#[test]
fn adapters_as_large_as_allowed_fit_beside_keys_and_values() {
    let config = LoraConfig { max_lora_rank: 16, ..tiers(2, 2) };
    let room = needed(&config);
    // The KV cache would need far more.
    let builder = small(config).max_batch_size(256).max_num_tokens(256);
    let builder = builder.kv_cache_config(KvCacheConfig {
        free_gpu_memory_fraction: Some(0.99),
        ..KvCacheConfig::default()
    });
    let llm = on(builder, &CountedMemory::new(room + (8 << 20))).unwrap();
    let names = ["llama.all-r16-rslora", "llama.mixed-ranks", "llama.attn-r8"];
    let requests = names.iter().zip(0..).map(|(name, id)| lora(name, id));
    let requests = requests.map(|lora| ask(&PROMPT, greedy(4), Some(lora))).collect();
    for answer in llm.generate_each(requests, &mut |_| ()) {
        answer.unwrap();
    }
    assert_nothing_held(&llm);
}

#[test]
fn an_adapter_that_does_not_fit_fails_alone_and_leaves_nothing_behind() {
    let config = tiers(4, 4);
    // Three KV blocks; a few of the large adapter's 112 KB do not fit beside them.
    let memory = CountedMemory::new(needed(&config) + 180_000);
    let llm = on(small(config), &memory).unwrap();
    let base = || ask(&PROMPT, greedy(4), None);
    let large = || ask(&PROMPT, greedy(4), Some(lora("llama.all-r16-rslora", 1)));
    let alone = llm.generate_each(vec![base()], &mut |_| ()).remove(0).unwrap();
    let free = memory.free();
    for _ in 0..2 {
        let answers = llm.generate_each(vec![base(), large(), base()], &mut |_| ());
        let [first, refused, last] = answers.try_into().unwrap();
        for answer in [first, last] {
            assert_eq!(answer.unwrap().outputs, alone.outputs);
        }
        let error = refused.unwrap_err();
        assert!(matches!(error, LlmError::Adapter(_)), "{error}");
        for word in ["llama.all-r16-rslora", "is full", "bytes", "max_loras"] {
            assert!(error.to_string().contains(word), "{word} is missing in: {error}");
        }
        settled(&llm);
        assert_nothing_held(&llm);
        assert_eq!(memory.free(), free, "a part of the adapter was not freed");
    }
    let small = ask(&PROMPT, greedy(4), Some(lora("llama.some-layers", 2)));
    llm.generate_each(vec![small], &mut |_| ()).remove(0).unwrap();
}

#[test]
fn a_device_too_small_says_for_what() {
    let config = tiers(1, 1);
    let needed = needed(&config);
    let refused = |bytes| on(small(config.clone()), &CountedMemory::new(bytes)).err().unwrap();
    let error = refused(1000);
    assert!(matches!(error, LlmError::OutOfMemory { .. }), "{error}");
    assert!(error.to_string().contains("weights"), "{error}");
    let error = refused(needed - 1000);
    assert!(error.to_string().contains("max_num_tokens"), "{error}");
    let error = refused(needed + 1000);
    assert!(matches!(error, LlmError::NoRoomForKv { .. }), "{error}");
}

/// Runs a fault on a device of four gigabytes.
fn meet<M: faults::Make<NullBackend>>(fault: fn(&M), make: impl FnOnce(CountedMemory) -> M) {
    let memory = CountedMemory::new(4 << 30);
    fault(&make(memory.clone()));
    assert_eq!(memory.free(), 4 << 30, "memory was not freed");
}

fn counted(memory: CountedMemory) -> impl faults::Make<NullBackend> {
    move || Ok(NullBackend::new(512).with_memory(memory.clone()))
}

#[test]
fn a_full_device_refuses_engines_until_there_is_room() {
    meet(faults::a_full_device_refuses_engines_until_there_is_room, counted);
}

#[test]
fn an_engine_in_any_room_answers_right_or_says_why() {
    meet(faults::an_engine_in_any_room_answers_right_or_says_why, counted);
}

#[test]
fn keys_and_values_without_room_are_refused() {
    meet(faults::keys_and_values_without_room_are_refused, counted);
}

#[test]
fn an_adapter_larger_than_its_tier_fails_alone() {
    meet(faults::an_adapter_larger_than_its_tier_fails_alone, counted);
    faults::an_adapter_larger_than_its_tier_fails_alone(&|| CpuRef::with_threads(None));
}

#[test]
fn an_adapter_that_finds_the_device_full_fails_alone() {
    meet(faults::an_adapter_that_finds_the_device_full_fails_alone, counted);
}
