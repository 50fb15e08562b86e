//! Adapters are loaded, reloaded and unloaded while requests run.

use std::path::Path;

use lora_core::LoraRequest;
use loramux_engine::{CompletionOutput, Llm, LlmError};
use loramux_tests::adapter_path;
use loramux_tests::settle::{ask, assert_nothing_held, engine_with, greedy, lora, settled};
use tempfile::TempDir;

const PROMPT: [u32; 9] = [17, 250, 33, 401, 8, 9, 10, 11, 12];

/// Replaces the files in `dir` by those of a fixture adapter.
fn put(adapter: &str, dir: &Path) {
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(adapter_path(adapter).join(file), dir.join(file)).unwrap();
    }
}

/// A folder with the files of a fixture adapter, and a request for it.
fn changing(adapter: &str) -> (TempDir, LoraRequest) {
    let dir = tempfile::tempdir().unwrap();
    put(adapter, dir.path());
    let request = LoraRequest::new("changing", 7, dir.path());
    (dir, request)
}

fn answer(llm: &Llm, lora: &LoraRequest, tokens: usize) -> Result<CompletionOutput, LlmError> {
    let stream = llm.generate_async(ask(&PROMPT, greedy(tokens), Some(lora.clone())))?;
    Ok(stream.finish()?.outputs.remove(0))
}

/// The answer with a fixture adapter in a separate engine.
fn alone(adapter: &str, tokens: usize) -> CompletionOutput {
    answer(&engine_with(1, 1), &lora(adapter, 0), tokens).unwrap()
}

#[test]
fn a_reload_serves_new_weights_and_lets_old_requests_end_with_the_old() {
    let llm = engine_with(2, 2);
    let (dir, request) = changing("llama.attn-r8");
    assert_eq!(answer(&llm, &request, 5).unwrap(), alone("llama.attn-r8", 5));

    let long = ask(&PROMPT, greedy(100), Some(request.clone()));
    let mut in_flight = llm.generate_async(long).unwrap();
    in_flight.blocking().next().unwrap().unwrap();
    put("llama.all-r16-rslora", dir.path());
    let status = llm.load_adapter(&request, false).unwrap();
    assert!(status.on_host, "{status:?}");

    let found_before = llm.stats().unwrap().kv.prefix.hit_tokens;
    assert_eq!(answer(&llm, &request, 5).unwrap(), alone("llama.all-r16-rslora", 5));
    let found = llm.stats().unwrap().kv.prefix.hit_tokens;
    assert_eq!(found, found_before, "the prefix cache of the old weights was used");
    assert_eq!(in_flight.finish().unwrap().outputs[0], alone("llama.attn-r8", 100));

    put("llama.attn-r8", dir.path());
    llm.load_adapter(&request, false).unwrap();
    assert_eq!(answer(&llm, &request, 5).unwrap(), alone("llama.attn-r8", 5));
    assert_nothing_held(&llm);
    assert_eq!(llm.list_adapters().unwrap().len(), 1);
}

#[test]
fn files_that_changed_unasked_are_refused_and_never_served() {
    let llm = engine_with(1, 1);
    let (dir, request) = changing("llama.attn-r8");
    answer(&llm, &request, 2).unwrap();
    put("llama.dora-r8", dir.path());
    assert_eq!(answer(&llm, &request, 2).unwrap(), alone("llama.attn-r8", 2), "still in memory");
    answer(&llm, &lora("llama.mixed-ranks", 1), 2).unwrap();

    let refused = answer(&llm, &request, 2).unwrap_err().to_string();
    assert!(refused.contains("changed since it was read"), "{refused}");
    answer(&llm, &lora("llama.mixed-ranks", 1), 2).unwrap();
    llm.load_adapter(&request, false).unwrap();
    assert_eq!(answer(&llm, &request, 2).unwrap(), alone("llama.dora-r8", 2));
    assert_nothing_held(&llm);
}

#[test]
fn a_reload_that_fails_changes_nothing() {
    let llm = engine_with(2, 2);
    let (dir, request) = changing("llama.attn-r8");
    let before = answer(&llm, &request, 3).unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), "{\"r\": 8").unwrap();
    let error = llm.load_adapter(&request, true).unwrap_err().to_string();
    assert!(error.contains("changing"), "{error}");
    assert_eq!(answer(&llm, &request, 3).unwrap(), before);
    let unknown = LoraRequest::new("other", 8, dir.path().join("gone"));
    assert!(llm.load_adapter(&unknown, false).is_err());
    let names: Vec<_> = llm.list_adapters().unwrap().into_iter().map(|s| s.name).collect();
    assert_eq!(names, ["changing"]);
}

#[test]
fn an_unloaded_adapter_serves_only_requests_in_flight() {
    let llm = engine_with(2, 2);
    let request = lora("llama.attn-r8", 1);
    let mut stream = llm.generate_async(ask(&PROMPT, greedy(100), Some(request.clone()))).unwrap();
    stream.blocking().next().unwrap().unwrap();
    llm.unload_adapter("llama.attn-r8").unwrap();
    assert_eq!(llm.list_adapters().unwrap(), []);
    let error = llm.unload_adapter("llama.attn-r8").unwrap_err().to_string();
    assert!(error.contains("llama.attn-r8"), "{error}");
    assert_eq!(stream.finish().unwrap().outputs[0], alone("llama.attn-r8", 100));

    let stats = settled(&llm);
    assert_eq!(stats.adapters.host.adapters(), 0, "{stats:?}");
    // Its name and id are free for another adapter now.
    let other = LoraRequest::new("llama.attn-r8", 1, adapter_path("llama.dora-r8"));
    assert_eq!(answer(&llm, &other, 3).unwrap(), alone("llama.dora-r8", 3));
}

#[test]
fn a_loaded_adapter_is_there_before_its_first_request() {
    let llm = engine_with(2, 2);
    let status = llm.load_adapter(&lora("llama.attn-r8", 1), false).unwrap();
    assert!(status.on_host && !status.pinned && status.generation.is_some(), "{status:?}");
    assert_eq!(status.bytes, Some(settled(&llm).adapters.host.bytes()));
    answer(&llm, &lora("llama.attn-r8", 1), 2).unwrap();
    let uses = settled(&llm).adapters.use_of_tiers;
    assert_eq!((uses.misses, uses.host_hits), (0, 1));
}

#[test]
fn pinned_adapters_stay_and_may_leave_no_room() {
    let llm = engine_with(1, 2);
    llm.load_adapter(&lora("llama.attn-r8", 1), true).unwrap();
    for _ in 0..2 {
        for (id, name) in [(2, "llama.dora-r8"), (3, "llama.mixed-ranks")] {
            answer(&llm, &lora(name, id), 2).unwrap();
        }
    }
    let status =
        |name: &str| llm.list_adapters().unwrap().into_iter().find(|s| s.name == name).unwrap();
    assert!(status("llama.attn-r8").on_host && status("llama.attn-r8").pinned);
    assert_eq!(settled(&llm).adapters.use_of_tiers.misses, 4, "the other two evict each other");

    llm.load_adapter(&lora("llama.dora-r8", 2), true).unwrap();
    let full = answer(&llm, &lora("llama.some-layers", 4), 2).unwrap_err().to_string();
    assert!(full.contains("pinned") && full.contains("max_cpu_loras"), "{full}");
    assert_eq!(answer(&llm, &lora("llama.attn-r8", 1), 2).unwrap(), alone("llama.attn-r8", 2));
    llm.unload_adapter("llama.dora-r8").unwrap();
    answer(&llm, &lora("llama.some-layers", 4), 2).unwrap();
}
