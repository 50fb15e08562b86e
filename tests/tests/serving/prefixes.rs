//! Counts prefix cache hits; `mixes` checks the results computed with them.

use lora_core::LoraRequest;
use loramux_engine::{KvCacheConfig, Llm, RequestOutput, SamplingParams};
use loramux_tests::settle::{ask, builder, engine_with, greedy, lora, settled, start, tiers};

/// Tokens of a KV block.
const BLOCK: usize = 4;

fn llm(partial: bool) -> Llm {
    let kv = KvCacheConfig {
        tokens_per_block: BLOCK,
        enable_partial_reuse: partial,
        ..KvCacheConfig::default()
    };
    start(builder(tiers(4, 4)).kv_cache_config(kv))
}

fn prompt(tail: u32) -> Vec<u32> {
    (0..17).map(|i| 100 + i).chain([tail]).collect()
}

/// The answer, and the prompt tokens that came from the prefix cache.
fn run(llm: &Llm, tail: u32, lora: Option<LoraRequest>) -> (RequestOutput, u64) {
    let before = settled(llm);
    let answer = llm.generate_async(ask(&prompt(tail), greedy(3), lora)).unwrap().finish().unwrap();
    let after = settled(llm);
    let computed = after.prompt_tokens - before.prompt_tokens;
    let hits = after.kv.prefix.hit_tokens - before.kv.prefix.hit_tokens;
    assert_eq!(computed + hits, prompt(tail).len() as u64, "each token is computed or a cache hit");
    (answer, hits)
}

#[test]
fn the_same_prefix_under_another_adapter_is_never_shared() {
    let llm = llm(true);
    let of = [None, Some(lora("llama.attn-r8", 1)), Some(lora("llama.dora-r8", 2))];
    for adapter in &of {
        let (_, hits) = run(&llm, 1, adapter.clone());
        assert_eq!(hits, 0, "{adapter:?}");
    }
    for adapter in &of {
        let (again, hits) = run(&llm, 1, adapter.clone());
        assert_eq!(hits, 17, "all but the last token, whose logits are needed: {adapter:?}");
        let fresh = engine_with(4, 4);
        assert_eq!(again.outputs, run(&fresh, 1, adapter.clone()).0.outputs);
    }
}

#[test]
fn a_prefix_is_shared_by_whole_blocks_or_to_the_token() {
    for (partial, expected) in [(false, 16), (true, 17)] {
        let llm = llm(partial);
        let adapter = || Some(lora("llama.all-r16-rslora", 1));
        assert_eq!(run(&llm, 1, adapter()).1, 0);
        assert_eq!(run(&llm, 2, adapter()).1, expected, "partial reuse: {partial}");
    }
}

#[test]
fn one_adapter_under_two_names_shares_its_prefixes() {
    let llm = llm(true);
    let dir = tempfile::tempdir().unwrap();
    let original = lora("llama.attn-r8", 1);
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(original.lora_path.join(file), dir.path().join(file)).unwrap();
    }
    let (first, _) = run(&llm, 1, Some(original));
    let (second, hits) = run(&llm, 1, Some(LoraRequest::new("its copy", 2, dir.path())));
    assert_eq!(
        (hits, second.outputs),
        (17, first.outputs),
        "prefixes are keyed by adapter content, not by name"
    );
}

#[test]
fn several_outputs_compute_the_blocks_of_their_prompt_once() {
    let llm = llm(true);
    let sampling = SamplingParams { n: 5, temperature: Some(1.0), seed: Some(3), ..greedy(4) };
    let request = ask(&prompt(9), sampling, Some(lora("llama.attn-r8", 1)));
    llm.generate_async(request).unwrap().finish().unwrap();
    // The other four find four full blocks, and compute the two tokens of the last one.
    assert_eq!(settled(&llm).prompt_tokens, 18 + 4 * 2);
}

#[test]
fn nothing_is_shared_where_reuse_is_off() {
    let kv = KvCacheConfig { enable_block_reuse: false, ..KvCacheConfig::default() };
    let llm = start(builder(tiers(1, 1)).kv_cache_config(kv));
    assert_eq!((run(&llm, 1, None).1, run(&llm, 1, None).1), (0, 0));
}

#[test]
fn prefixes_make_room_for_running_requests() {
    let kv =
        KvCacheConfig { tokens_per_block: BLOCK, max_tokens: Some(24), ..KvCacheConfig::default() };
    let llm = start(builder(tiers(1, 1)).max_seq_len(24).kv_cache_config(kv));
    let first = run(&llm, 1, None).0;
    for other in 0..4 {
        let tokens: Vec<u32> = (0..20).map(|i| other * 20 + i).collect();
        llm.generate_async(ask(&tokens, greedy(3), None)).unwrap().finish().unwrap();
    }
    let (again, hits) = run(&llm, 1, None);
    assert_eq!((again.outputs, hits), (first.outputs, 0));
}
