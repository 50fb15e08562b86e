//! Overlap scheduling: steps launched before the tokens of the previous one are read. The CPU runs each step at once, so
//! these tests check which sequences a step has and with which tokens; [`super::mixes`] checks random traffic.

use loramux_engine::{
    CompletionOutput, EngineStats, FinishReason, GenerateRequest, GuidedDecodingParams,
    KvCacheConfig, Llm, SamplingParams, StopReason,
};

use loramux_tests::settle::{
    ask, assert_nothing_held, builder, greedy, lora, settled, start, tiers,
};

/// Tokens of a KV block.
const BLOCK: usize = 4;

/// An engine with overlap scheduling on or off.
fn engine(overlaps: bool) -> Llm {
    let kv = KvCacheConfig { tokens_per_block: BLOCK, ..KvCacheConfig::default() };
    start(builder(tiers(4, 4)).kv_cache_config(kv).disable_overlap_scheduler(!overlaps))
}

fn params(tokens: usize) -> SamplingParams {
    SamplingParams { return_generation_logits: false, ..greedy(tokens) }
}

fn sampled(tokens: usize, seed: u64) -> SamplingParams {
    SamplingParams { temperature: Some(1.3), seed: Some(seed), ..params(tokens) }
}

/// As [`sampled`], up to a stop token.
fn ending(tokens: usize, seed: u64, stop: u32) -> SamplingParams {
    // Otherwise the stop token would be banned at first, and other tokens sampled.
    SamplingParams { min_tokens: Some(0), stop_token_ids: vec![stop], ..sampled(tokens, seed) }
}

fn prompt(which: u32) -> Vec<u32> {
    (0..5 + which).map(|i| (which * 131 + i * 37) % 512).collect()
}

/// Requests of different lengths, with and without adapters.
fn mix() -> Vec<GenerateRequest> {
    vec![
        ask(&prompt(1), params(9), None),
        ask(&prompt(2), sampled(23, 5), Some(lora("llama.attn-r8", 1))),
        ask(&prompt(3), sampled(31, 6), Some(lora("llama.dora-r8", 2))),
        ask(&prompt(4), params(40), None),
    ]
}

/// The answers of requests run concurrently.
fn together(llm: &Llm, requests: Vec<GenerateRequest>) -> Vec<Vec<CompletionOutput>> {
    let streams: Vec<_> = requests.into_iter().map(|r| llm.generate_async(r).unwrap()).collect();
    streams.into_iter().map(|stream| stream.finish().unwrap().outputs).collect()
}

/// The answer to one request, and the engine's stats afterwards.
fn one(llm: &Llm, sampling: SamplingParams) -> (CompletionOutput, EngineStats) {
    let answer = llm.generate_async(ask(&prompt(1), sampling, None)).unwrap().finish().unwrap();
    (answer.outputs.into_iter().next().unwrap(), settled(llm))
}

#[test]
fn tokens_do_not_depend_on_when_steps_are_launched() {
    let (ahead, after) = (engine(true), engine(false));
    assert_eq!(together(&ahead, mix()), together(&after, mix()));
    let (ahead, after) = (settled(&ahead), settled(&after));
    assert!(ahead.overlapped_steps > 20, "{ahead:?}");
    assert_eq!(after.overlapped_steps, 0);
    assert_eq!(ahead.generated_tokens, after.generated_tokens);
}

#[test]
fn a_device_that_computes_at_once_is_not_worked_ahead_for() {
    let llm = start(builder(tiers(1, 1)));
    assert_eq!(one(&llm, params(9)).1.overlapped_steps, 0);
}

#[test]
fn a_lone_sequence_has_all_its_decoding_steps_launched_ahead() {
    let llm = engine(true);
    let (_, stats) = one(&llm, params(9));
    assert_eq!((stats.steps, stats.overlapped_steps), (9, 8), "the first computes the prompt");
}

#[test]
fn a_row_of_a_sequence_that_has_ended_is_dropped() {
    let (ahead, after) = (engine(true), engine(false));
    let free = one(&after, sampled(30, 3)).0.token_ids;
    for at in [0, 1, 6, 17] {
        let ending = || ask(&prompt(1), ending(30, 3, free[at]), None);
        let others = || mix().into_iter().chain([ending()]).collect();
        let before = [settled(&ahead), settled(&after)].map(|stats| stats.generated_tokens);
        let found = together(&ahead, others());
        assert_eq!(found, together(&after, others()));
        let last = &found[4][0];
        assert_eq!(last.stop_reason, Some(StopReason::Token(free[at])));
        let tokens = [settled(&ahead), settled(&after)].map(|stats| stats.generated_tokens);
        assert_eq!(tokens[0] - before[0], tokens[1] - before[1], "a wasted row is not counted");
        assert_nothing_held(&ahead);
    }
}

#[test]
fn what_a_dropped_row_wrote_is_never_found_as_a_prefix() {
    let (ahead, after) = (engine(true), engine(false));
    let free = one(&after, sampled(30, 3)).0.token_ids;
    // Let answers end at every position in a block.
    for at in 4..4 + 2 * BLOCK {
        let (answer, _) = one(&ahead, ending(30, 3, free[at]));
        assert_eq!(answer.stop_reason, Some(StopReason::Token(free[at])));
        // Continue the prompt with the token sampled after the end token, and with other tokens.
        for next in [free[at + 1], 7] {
            let longer = [&prompt(1)[..], &free[..=at], &[next, 11]].concat();
            let request = || vec![ask(&longer, params(6), None)];
            let hits = settled(&ahead).kv.prefix.hit_tokens;
            assert_eq!(together(&ahead, request()), together(&after, request()));
            assert!(
                settled(&ahead).kv.prefix.hit_tokens > hits,
                "the prompt hits the prefix cache"
            );
        }
    }
}

#[test]
fn outputs_of_one_prompt_and_requests_that_come_later_join() {
    let (ahead, after) = (engine(true), engine(false));
    let several = || ask(&prompt(7), SamplingParams { n: 3, ..sampled(20, 1) }, None);
    let run = |llm: &Llm| {
        let mut first = llm.generate_async(several()).unwrap();
        for _ in 0..4 {
            first.blocking().next().unwrap().unwrap();
        }
        let mut answers = together(llm, mix());
        answers.push(first.finish().unwrap().outputs);
        answers
    };
    assert_eq!(run(&ahead), run(&after));
    assert_nothing_held(&ahead);
}

#[test]
fn an_aborted_sequence_leaves_the_others_alone() {
    let (ahead, after) = (engine(true), engine(false));
    let expected = together(&after, mix());
    let mut given_up = ahead.generate_async(ask(&prompt(9), params(120), None)).unwrap();
    let streams: Vec<_> = mix().into_iter().map(|r| ahead.generate_async(r).unwrap()).collect();
    for _ in 0..6 {
        given_up.blocking().next().unwrap().unwrap();
    }
    given_up.abort();
    let found: Vec<_> = streams.into_iter().map(|s| s.finish().unwrap().outputs).collect();
    assert_eq!(found, expected);
    let output = given_up.finish().unwrap().outputs.remove(0);
    assert_eq!(output.finish_reason, FinishReason::Cancelled);
    assert_nothing_held(&ahead);
}

#[test]
fn what_depends_on_tokens_waits_for_them() {
    let (ahead, after) = (engine(true), engine(false));
    let guide = GuidedDecodingParams { regex: Some("[a-z]{30}".to_owned()), ..Default::default() };
    for sampling in [
        SamplingParams { repetition_penalty: Some(1.3), ..params(20) },
        SamplingParams { logprobs: Some(2), ..params(20) },
        SamplingParams { return_generation_logits: true, ..params(20) },
        SamplingParams { guided_decoding: Some(guide), ..params(20) },
    ] {
        let (found, stats) = one(&ahead, sampling.clone());
        assert_eq!(found, one(&after, sampling.clone()).0);
        assert_eq!(stats.overlapped_steps, 0, "{sampling:?}");
    }
    // An end by length is known in advance, so no row is wasted.
    let free = one(&after, params(20)).0.token_ids;
    let late = SamplingParams {
        min_tokens: Some(12),
        stop_token_ids: free.clone(),
        bad_token_ids: vec![free[3]],
        ..params(20)
    };
    let (found, stats) = one(&ahead, late.clone());
    assert_eq!(found, one(&after, late).0);
    assert!(found.token_ids.len() >= 11 && stats.overlapped_steps > 10, "{stats:?}");
}
