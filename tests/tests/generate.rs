//! `Llm::generate`: sampling, stop conditions, limits, adapters.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use lora_core::{DType, LoraConfig, LoraRequest};
use lora_cpu_ref::CpuRef;
use loramux_engine::{
    FinishReason, GenerateRequest, Llm, LlmError, PerPrompt, Prompt, RequestOutput, SamplingParams,
    StopReason,
};
use loramux_tests::{Case, Fixtures, adapter_path, engine, model_path, run};
use proptest::prelude::*;

const PROMPT: [u32; 5] = [17, 250, 33, 401, 8];

fn params(new: usize) -> SamplingParams {
    SamplingParams { max_tokens: Some(new), ignore_eos: true, ..SamplingParams::default() }
}

fn request(sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest { prompt: Prompt::Ids(PROMPT.to_vec()), sampling, lora: None }
}

fn one(llm: &Llm, sampling: SamplingParams) -> RequestOutput {
    run(llm, vec![request(sampling)]).remove(0)
}

fn tokens(llm: &Llm, sampling: SamplingParams) -> Vec<u32> {
    one(llm, sampling).outputs.remove(0).token_ids
}

fn lora(name: &str, id: i64) -> LoraRequest {
    LoraRequest::new(name, id, adapter_path(name))
}

fn llama() -> Llm {
    engine("llama", DType::F32)
}

#[test]
fn sampled_tokens_depend_on_the_seed_and_not_on_the_batch() {
    let llm = llama();
    let random = |seed| SamplingParams {
        temperature: Some(1.5),
        top_p: Some(0.95),
        seed: Some(seed),
        ..params(12)
    };
    let alone = tokens(&llm, random(7));
    assert_eq!(alone, tokens(&llm, random(7)));
    assert_ne!(alone, tokens(&llm, random(8)));
    let batch = run(&llm, (5..10).map(|seed| request(random(seed))).collect());
    assert_eq!(batch[2].outputs[0].token_ids, alone);
}

#[test]
fn several_outputs_differ_and_best_of_keeps_the_likeliest() {
    let llm = llama();
    let many = SamplingParams { n: 4, temperature: Some(2.0), logprobs: Some(0), ..params(6) };
    let all = one(&llm, many.clone()).outputs;
    assert_eq!(all.iter().map(|o| o.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_ne!(all[0].token_ids, all[1].token_ids);

    let best = SamplingParams { n: 2, best_of: Some(4), ..many };
    let kept = one(&llm, best).outputs;
    let mut sums: Vec<f32> = all.iter().map(|o| o.cumulative_logprob.unwrap()).collect();
    sums.sort_by(|a, b| b.total_cmp(a));
    let kept: Vec<f32> = kept.iter().map(|o| o.cumulative_logprob.unwrap()).collect();
    assert_eq!(kept, sums[..2]);
}

#[test]
fn logprobs_are_the_log_softmax_of_the_logits() {
    let llm = llama();
    let sampling = SamplingParams {
        logprobs: Some(3),
        prompt_logprobs: Some(2),
        return_generation_logits: true,
        return_context_logits: true,
        ..params(4)
    };
    let answer = one(&llm, sampling);
    let log_softmax = |logits: &[f32], token: u32| {
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        f64::from(logits[token as usize]) - total.ln()
    };
    let output = &answer.outputs[0];
    let logits = output.generation_logits.as_ref().unwrap();
    for ((token, map), logits) in
        output.token_ids.iter().zip(output.logprobs.iter().flatten()).zip(logits)
    {
        assert_eq!(map.len(), 3, "the greedy token is one of the three likeliest");
        assert_eq!(map[token].rank, 1);
        for (id, entry) in map {
            assert!((f64::from(entry.logprob) - log_softmax(logits, *id)).abs() < 1e-4);
        }
    }
    let sum: f32 =
        output.logprobs.iter().flatten().zip(&output.token_ids).map(|(m, t)| m[t].logprob).sum();
    assert!((output.cumulative_logprob.unwrap() - sum).abs() < 1e-5);

    let of_prompt = answer.prompt_logprobs.as_ref().unwrap();
    let context = answer.context_logits.as_ref().unwrap();
    assert_eq!((of_prompt.len(), context.len()), (PROMPT.len(), PROMPT.len()));
    assert_eq!(of_prompt[0], None);
    for i in 1..PROMPT.len() {
        let map = of_prompt[i].as_ref().unwrap();
        let found = f64::from(map[&PROMPT[i]].logprob);
        assert!((found - log_softmax(&context[i - 1], PROMPT[i])).abs() < 1e-4);
    }
}

#[test]
fn stops_end_the_output_and_are_cut_from_it() {
    let llm = llama();
    let free = one(&llm, params(12)).outputs.remove(0);
    let third = free.token_ids[2];
    let first_seen = free.token_ids.iter().position(|t| *t == third).unwrap();

    let by_token = SamplingParams { stop_token_ids: vec![third], ..params(12) };
    let output = one(&llm, by_token.clone()).outputs.remove(0);
    assert_eq!(output.token_ids, free.token_ids[..first_seen]);
    assert_eq!(output.finish_reason, FinishReason::Stop);
    assert_eq!(output.stop_reason, Some(StopReason::Token(third)));
    let kept = SamplingParams { include_stop_str_in_output: true, ..by_token };
    assert_eq!(tokens(&llm, kept), free.token_ids[..=first_seen]);

    let middle = free.text.char_indices().nth(free.text.chars().count() / 2).unwrap().0;
    let stop: String = free.text[middle..].chars().take(2).collect();
    let by_text = SamplingParams { stop: vec![stop.clone()], ..params(12) };
    let output = one(&llm, by_text).outputs.remove(0);
    assert_eq!(output.text, free.text[..free.text.find(&stop).unwrap()]);
    assert_eq!(output.stop_reason, Some(StopReason::Text(stop)));
    assert!(free.token_ids.starts_with(&output.token_ids));
}

#[test]
fn end_tokens_wait_for_min_tokens_and_can_be_ignored() {
    let llm = llama();
    let free = tokens(&llm, params(8));
    let ending = |min_tokens, ignore_eos| SamplingParams {
        end_id: Some(free[1] as i32),
        min_tokens,
        ignore_eos,
        ..params(8)
    };
    let ended = one(&llm, ending(None, false)).outputs.remove(0);
    assert_eq!(ended.finish_reason, FinishReason::Stop);
    assert_eq!((ended.stop_reason, ended.token_ids.last()), (None, Some(&free[1])));
    let later = tokens(&llm, ending(Some(5), false));
    assert!(later.len() >= 5 && !later[..5].contains(&free[1]));
    assert_eq!(tokens(&llm, ending(None, true)), free);
}

#[test]
fn banned_tokens_and_penalties_change_what_is_drawn() {
    let llm = llama();
    let free = tokens(&llm, params(10));
    let banned = SamplingParams { bad_token_ids: vec![free[0]], ..params(10) };
    assert!(!tokens(&llm, banned).contains(&free[0]));
    let penalised = SamplingParams { frequency_penalty: Some(100.0), ..params(10) };
    let mut seen: Vec<u32> = PROMPT.to_vec();
    for token in tokens(&llm, penalised) {
        assert!(!seen.contains(&token), "a strong penalty forbids repetition");
        seen.push(token);
    }
}

#[test]
fn the_prompt_can_be_cut_and_repeated() {
    let llm = llama();
    let cut = SamplingParams { truncate_prompt_tokens: Some(2), ..params(3) };
    let answer = one(&llm, cut.clone());
    assert_eq!(answer.prompt_token_ids, PROMPT[3..]);
    let echoed = SamplingParams { exclude_input_from_output: false, ..cut };
    let mut expected = PROMPT[3..].to_vec();
    expected.extend(&answer.outputs[0].token_ids);
    assert_eq!(tokens(&llm, echoed), expected);
}

#[test]
fn lengths_are_limited_by_request_and_engine() {
    let small = Llm::builder(model_path("llama"))
        .max_seq_len(8)
        .build(|| CpuRef::with_threads(None))
        .unwrap();
    let output = one(&small, SamplingParams { max_tokens: None, ..params(1) }).outputs.remove(0);
    assert_eq!((output.token_ids.len(), output.finish_reason), (3, FinishReason::Length));
    let long = GenerateRequest { prompt: Prompt::Ids(vec![5; 8]), ..request(params(1)) };
    let empty = GenerateRequest { prompt: Prompt::Ids(vec![]), ..request(params(1)) };
    let strange = GenerateRequest { prompt: Prompt::Ids(vec![5, 512]), ..request(params(1)) };
    let answers = small.generate_each(vec![long, request(params(2)), empty, strange], &mut |_| ());
    assert!(matches!(answers[0], Err(LlmError::PromptTooLong { found: 8, max_seq_len: 8 })));
    assert_eq!(answers[1].as_ref().unwrap().outputs[0].token_ids.len(), 2);
    assert!(matches!(answers[2], Err(LlmError::EmptyPrompt)));
    assert!(matches!(answers[3], Err(LlmError::TokenId { index: 1, found: 512, vocab: 512 })));
}

#[test]
fn lists_must_have_an_entry_for_each_prompt() {
    let llm = llama();
    let prompts = || vec![Prompt::Ids(PROMPT.to_vec()), Prompt::Ids(vec![4])];
    for loras in [vec![None], vec![None; 3]] {
        let error = llm.generate(prompts(), params(1), loras).unwrap_err();
        assert!(matches!(error, LlmError::ListLength { what: "lora_request", prompts: 2, .. }));
    }
    let error = llm.generate(prompts(), vec![params(1)], ()).unwrap_err();
    assert!(matches!(error, LlmError::ListLength { what: "sampling_params", found: 1, .. }));
    let mixed = vec![Some(lora("llama.attn-r8", 0)), None];
    assert_eq!(llm.generate(prompts(), params(1), mixed).unwrap().len(), 2);
    let all: PerPrompt<_> = lora("llama.attn-r8", 0).into();
    assert_eq!(llm.generate(prompts(), params(1), all).unwrap().len(), 2);
}

#[test]
fn an_adapter_is_never_silently_ignored_or_confused() {
    let base_only = Llm::builder(model_path("llama")).build(|| CpuRef::with_threads(None)).unwrap();
    let with = |lora| GenerateRequest { lora: Some(lora), ..request(params(2)) };
    let answers = base_only.generate_each(vec![with(lora("llama.attn-r8", 0))], &mut |_| ());
    assert!(answers[0].as_ref().unwrap_err().to_string().contains("lora_config"));

    let llm = llama();
    let good = run(&llm, vec![with(lora("llama.attn-r8", 0))]);
    let other_path = LoraRequest::new("llama.attn-r8", 1, adapter_path("llama.dora-r8"));
    let other_name = LoraRequest::new("another", 0, adapter_path("llama.dora-r8"));
    let other_id = lora("llama.attn-r8", 5);
    let swapped = LoraRequest::new("not its name", 0, adapter_path("llama.attn-r8"));
    let other_base = lora("qwen3.attn-r8", 9);
    let missing = LoraRequest::new("gone", 10, adapter_path("gone"));
    let bad = [other_path, other_name, other_id, swapped, other_base, missing];
    let mut requests: Vec<_> = bad.map(with).to_vec();
    requests.push(with(lora("llama.attn-r8", 0)));
    let mut answers = llm.generate_each(requests, &mut |_| ());
    let again = answers.pop().unwrap().unwrap();
    assert_eq!(again.outputs, good[0].outputs, "the others' failures do not touch it");
    for (answer, named) in answers.iter().zip([
        "llama.attn-r8",
        "lora_int_id 0",
        "lora_int_id 5",
        "not its name",
        "attn_q",
        "gone",
    ]) {
        let error = answer.as_ref().unwrap_err().to_string();
        assert!(error.contains(named), "{named}: {error}");
    }
}

#[test]
fn tokens_the_model_does_not_have_fail_their_request_alone() {
    let llm = llama();
    let alone = tokens(&llm, params(3));
    let strange = [
        SamplingParams { end_id: Some(999_999), ignore_eos: false, ..params(3) },
        SamplingParams { stop_token_ids: vec![512], ..params(3) },
        SamplingParams { bad_token_ids: vec![70_000], ..params(3) },
    ];
    let mut requests: Vec<_> = strange.map(request).to_vec();
    requests.push(request(params(3)));
    let mut answers = llm.generate_each(requests, &mut |_| ());
    assert_eq!(answers.pop().unwrap().unwrap().outputs[0].token_ids, alone);
    for (answer, setting) in answers.iter().zip(["end_id", "stop_token_ids", "bad_token_ids"]) {
        assert!(answer.as_ref().unwrap_err().to_string().contains(setting));
    }
}

#[test]
fn a_stop_leaves_no_text_behind_and_needs_none() {
    let llm = llama();
    let free = one(&llm, params(12)).outputs.remove(0);
    let stop = free.token_ids[4];
    let first = free.token_ids.iter().position(|t| *t == stop).unwrap();
    let by_token = SamplingParams { stop_token_ids: vec![stop], ..params(12) };
    let output = one(&llm, by_token).outputs.remove(0);
    let text = llm.text().tokenizer().unwrap().decode(&free.token_ids[..first], true).unwrap();
    assert_eq!(output.text, text);

    let word: String = free.text.chars().skip(3).take(2).collect();
    let silent = SamplingParams { stop: vec![word.clone()], detokenize: false, ..params(12) };
    let output = one(&llm, silent).outputs.remove(0);
    assert_eq!((output.text.as_str(), output.stop_reason), ("", Some(StopReason::Text(word))));
}

#[test]
fn the_adapter_in_lora_dir_decides_what_adapters_may_change() {
    let build = |dir: &str| {
        Llm::builder(model_path("llama"))
            .lora_config(LoraConfig { lora_dir: vec![adapter_path(dir)], ..LoraConfig::default() })
            .build(|| CpuRef::with_threads(None))
    };
    let llm = build("llama.attn-r8").unwrap();
    let with = |name| GenerateRequest { lora: Some(lora(name, 0)), ..request(params(1)) };
    run(&llm, vec![with("llama.attn-r8")]);
    let refused = llm.generate_each(vec![with("llama.all-r16-rslora")], &mut |_| ());
    assert!(refused[0].is_err());
    assert!(build("gone").is_err());
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    let built = Llm::builder(model_path("llama"))
        .kv_cache_config(loramux_engine::KvCacheConfig {
            max_tokens: Some(1 << 40),
            ..Default::default()
        })
        .build(|| CpuRef::with_threads(None));
    assert!(built.err().unwrap().to_string().contains("max_tokens"));
}

#[test]
fn requests_wait_where_adapters_outnumber_slots() {
    let fixtures = Fixtures::load();
    let cases = fixtures.of_model("llama");
    let few = Llm::builder(model_path("llama"))
        .dtype(Some(DType::F32))
        .lora_config(LoraConfig { max_loras: Some(2), ..LoraConfig::default() })
        .build(|| CpuRef::with_threads(None))
        .unwrap();
    let (few, many) = (run(&few, Case::requests(&cases)), run(&llama(), Case::requests(&cases)));
    for (few, many) in few.iter().zip(&many) {
        assert_eq!(few.outputs, many.outputs);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Chunked prefill, step and batch sizes, and the size of the KV cache affect when something is
    /// computed, but not the results.
    #[test]
    fn limits_do_not_change_a_bit(
        (step, batch, block, room) in (1usize..40, 1usize..6, 1usize..40, 60usize..200),
        bf16 in any::<bool>(),
    ) {
        let dtype = if bf16 { DType::Bf16 } else { DType::F32 };
        let fixtures = Fixtures::load();
        let cases: Vec<Case> =
            fixtures.of_model("mistral").into_iter().filter(|c| c.adapter.is_some()).collect();
        let limited = Llm::builder(model_path("mistral"))
            .dtype(Some(dtype))
            .lora_config(LoraConfig::default())
            .max_num_tokens(step)
            .max_batch_size(batch)
            .kv_cache_config(loramux_engine::KvCacheConfig {
                tokens_per_block: block,
                max_tokens: Some(room),
                ..Default::default()
            })
            .build(|| CpuRef::with_threads(None))
            .unwrap();
        let free = engine("mistral", dtype);
        let (limited, free) = (run(&limited, Case::requests(&cases)), run(&free, Case::requests(&cases)));
        for (limited, free) in limited.iter().zip(&free) {
            prop_assert_eq!(&limited.outputs, &free.outputs);
            prop_assert_eq!(&limited.context_logits, &free.context_logits);
        }
    }
}
