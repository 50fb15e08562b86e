//! Requests added while others run, and adapters selected by name.

use std::collections::BTreeMap;
use std::time::Duration;

use loramux_engine::{Batch, FinishReason, SamplingParams};
use loramux_tests::settle::{ask, assert_nothing_held, engine_with, greedy, lora, settled};

const PROMPT: [u32; 5] = [17, 250, 33, 401, 8];

#[test]
fn what_is_added_while_others_run_is_answered_as_alone() {
    let llm = engine_with(2, 2);
    let request = |tokens| ask(&PROMPT, greedy(tokens), Some(lora("llama.attn-r8", 1)));
    let alone = llm.generate_async(request(3)).unwrap().finish().unwrap().outputs.remove(0);
    let mut batch = llm.batch();
    assert_eq!(batch.add(request(100)).unwrap(), 0);
    assert!(batch.add(ask(&[], greedy(1), None)).is_err());
    assert_eq!(batch.add(request(3)).unwrap(), 1);
    let mut answers = BTreeMap::new();
    let mut next = |batch: &mut Batch<'_>| {
        let (number, answer) = batch.next(&mut |_| ()).unwrap();
        answers.insert(number, answer.unwrap().outputs.remove(0));
    };
    next(&mut batch);
    assert_eq!(batch.running(), 1);
    assert_eq!(batch.add(request(3)).unwrap(), 2);
    next(&mut batch);
    next(&mut batch);
    // It is cancelled at once, unless it finishes before this thread gets there.
    assert_eq!(batch.add(request(120)).unwrap(), 3);
    batch.abort();
    batch.close();
    assert!(batch.add(request(3)).is_err());
    next(&mut batch);
    assert!(batch.next_within(Duration::ZERO, &mut |_| ()).is_none());
    assert_eq!((answers[&1].clone(), answers[&2].clone()), (alone.clone(), alone.clone()));
    assert_eq!(answers[&0].token_ids[..3], alone.token_ids);
    assert!(matches!(answers[&3].finish_reason, FinishReason::Cancelled | FinishReason::Length));
    drop(batch);
    assert_nothing_held(&llm);
}

#[test]
fn a_dropped_batch_ends_its_requests() {
    let llm = engine_with(2, 2);
    let mut batch = llm.batch();
    batch.add(ask(&PROMPT, greedy(120), None)).unwrap();
    drop(batch);
    assert!(settled(&llm).generated_tokens < 120);
    assert_nothing_held(&llm);
}

#[test]
fn an_adapter_that_is_known_is_asked_for_by_its_name() {
    let llm = engine_with(2, 2);
    let known = lora("llama.attn-r8", 1);
    assert!(llm.adapter(&known.lora_name).unwrap_err().to_string().contains("no adapter is named"));
    llm.register_adapter(&known).unwrap();
    let named = llm.adapter(&known.lora_name).unwrap();
    let mut other = lora("llama.dora-r8", 2);
    other.lora_name.clone_from(&known.lora_name);
    assert!(llm.register_adapter(&other).is_err());
    let ask = |lora| ask(&PROMPT, greedy(4), Some(lora));
    let answers = llm.generate_each(vec![ask(known), ask(named)], &mut |_| ());
    let outputs: Vec<_> = answers.into_iter().map(|answer| answer.unwrap().outputs).collect();
    assert_eq!(outputs[0], outputs[1]);
}

#[test]
fn a_bias_decides_what_is_drawn_under_any_sampling() {
    let llm = engine_with(2, 2);
    let biased = |temperature| SamplingParams {
        logit_bias: [(77, 100.0)].into(),
        temperature,
        ignore_eos: true,
        ..greedy(3)
    };
    for temperature in [None, Some(1.0)] {
        let request = ask(&PROMPT, biased(temperature), Some(lora("llama.attn-r8", 1)));
        let output = llm.generate_async(request).unwrap().finish().unwrap();
        assert_eq!(output.outputs[0].token_ids, [77, 77, 77]);
    }
    let beyond = SamplingParams { logit_bias: [(512, 1.0)].into(), ..greedy(1) };
    let error = llm.generate_async(ask(&PROMPT, beyond, None)).err().unwrap();
    assert!(error.to_string().contains("logit_bias is 512"), "{error}");
}

#[test]
fn a_tier_that_nothing_limits_has_no_size_in_the_stats() {
    let stats = settled(&engine_with(2, 2)).adapters;
    assert_eq!(stats.device.size().adapters, Some(2));
    assert_eq!(stats.device.size().bytes, None);
}
