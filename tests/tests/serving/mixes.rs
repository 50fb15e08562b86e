//! Batch invariance of the engine: whatever else runs, a request gets the same bits as when run alone.

use std::collections::VecDeque;
use std::sync::LazyLock;

use lora_core::LoraConfig;
use loramux_engine::{
    CapacityPolicy, CompletionOutput, GenerateRequest, KvCacheConfig, Llm, ResponseStream,
    SamplingParams, SchedulerConfig,
};
use loramux_tests::settle::{
    ask, assert_nothing_held, builder, engine_with, greedy, lora, start, tiers,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

const ADAPTERS: [&str; 9] = [
    "llama.attn-r8",
    "llama.all-r16-rslora",
    "llama.dora-r8",
    "llama.mixed-ranks",
    "llama.lora-bias",
    "llama.some-layers",
    "llama.embed-r8",
    "llama.lm-head-r8",
    "llama.saved-head",
];

/// Longest prompt and answer of these tests.
const MAX_SEQ_LEN: usize = 48;

/// Settings that affect when something is computed, but never the result.
#[derive(Clone, Copy, Debug)]
struct Settings {
    batch: usize,
    step: usize,
    block: usize,
    room: usize,
    policy: CapacityPolicy,
    reuse: (bool, bool),
    device: usize,
    host: usize,
    window: usize,
    overlaps: bool,
}

fn settings() -> impl Strategy<Value = Settings> {
    let policy =
        prop_oneof![Just(CapacityPolicy::GuaranteedNoEvict), Just(CapacityPolicy::MaxUtilization)];
    let sizes = (2usize..7, 1usize..40, 1usize..10, MAX_SEQ_LEN..160);
    let adapters = (1usize..5, 0usize..3, 0usize..5);
    (sizes, policy, any::<(bool, bool)>(), adapters, any::<bool>()).prop_map(
        |((batch, step, block, room), policy, reuse, (device, more, window), overlaps)| Settings {
            batch,
            step,
            block,
            room: room.next_multiple_of(block),
            policy,
            reuse,
            device,
            host: device + more,
            window,
            overlaps,
        },
    )
}

impl Settings {
    fn engine(self) -> Llm {
        let lora =
            LoraConfig { adapter_fairness_window: self.window, ..tiers(self.device, self.host) };
        let kv = KvCacheConfig {
            tokens_per_block: self.block,
            max_tokens: Some(self.room),
            enable_block_reuse: self.reuse.0,
            enable_partial_reuse: self.reuse.1,
            ..KvCacheConfig::default()
        };
        let engine = builder(lora)
            .max_batch_size(self.batch)
            .max_num_tokens(self.step)
            .max_seq_len(MAX_SEQ_LEN)
            .disable_overlap_scheduler(!self.overlaps)
            .kv_cache_config(kv)
            .scheduler_config(SchedulerConfig { capacity_scheduler_policy: self.policy });
        start(engine)
    }
}

/// A request, with its arrival and an optional abort.
#[derive(Clone, Debug)]
struct Asked {
    prompt: Vec<u32>,
    adapter: Option<usize>,
    tokens: usize,
    seed: Option<u64>,
    outputs: usize,
    prompt_logits: bool,
    /// Whether to return logits of the answer, which turns overlap scheduling off.
    logits: bool,
    /// This token and every eighth after it are stop tokens.
    stop: Option<u32>,
    /// Arrives after this many pieces of earlier answers were read.
    after: usize,
    /// Is aborted once this many of its pieces were read.
    cut: Option<usize>,
}

/// Prompts with few different beginnings, so that they share prefixes.
fn prompts() -> impl Strategy<Value = Vec<u32>> {
    (0u32..2, 0usize..30, vec(0u32..512, 1..4)).prop_map(|(which, shared, tail)| {
        let beginning = (0..shared as u32).map(|i| (which * 131 + i * 37) % 512);
        beginning.chain(tail).collect()
    })
}

fn requests() -> impl Strategy<Value = Vec<Asked>> {
    let what = (prompts(), option::weighted(0.8, 0..ADAPTERS.len()), 1usize..14);
    let logits = (prop::bool::weighted(0.1), prop::bool::weighted(0.1));
    let how = (option::of(0u64..4), 1usize..3, logits, option::of(0u32..8));
    let when = (0usize..4, option::weighted(0.15, 0usize..4));
    let asked = (what, how, when).prop_map(|(what, how, when)| Asked {
        prompt: what.0,
        adapter: what.1,
        tokens: what.2,
        seed: how.0,
        outputs: how.1,
        prompt_logits: how.2.0,
        logits: how.2.1,
        stop: how.3,
        after: when.0,
        cut: when.1,
    });
    vec(asked, 1..14)
}

impl Asked {
    fn request(&self) -> GenerateRequest {
        let sampling = SamplingParams {
            n: self.outputs,
            temperature: Some(if self.seed.is_some() { 1.3 } else { 0.0 }),
            top_k: self.seed.map(|_| 50),
            seed: Some(self.seed.unwrap_or(0)),
            return_context_logits: self.prompt_logits,
            return_generation_logits: self.logits,
            include_stop_str_in_output: true,
            stop_token_ids: self
                .stop
                .map_or_else(Vec::new, |stop| (stop..512).step_by(8).collect()),
            ..greedy(self.tokens)
        };
        // Several greedy outputs would be identical, so the engine refuses them.
        let n = if self.seed.is_some() { self.outputs } else { 1 };
        let adapter = self.adapter.map(|i| lora(ADAPTERS[i], i as i64));
        ask(&self.prompt, SamplingParams { n, ..sampling }, adapter)
    }
}

/// Outputs and logits of the prompt.
type Answer = (Vec<CompletionOutput>, Option<Vec<Vec<f32>>>);

/// The answer from an engine that runs nothing else, without prefix reuse.
fn alone(asked: &Asked) -> Answer {
    static ALONE: LazyLock<Llm> = LazyLock::new(|| {
        let kv = KvCacheConfig { enable_block_reuse: false, ..KvCacheConfig::default() };
        start(builder(tiers(ADAPTERS.len(), ADAPTERS.len())).kv_cache_config(kv))
    });
    let answer = ALONE.generate_async(asked.request()).unwrap().finish().unwrap();
    (answer.outputs, answer.context_logits)
}

/// A stream with the index of its request and the tokens read so far, by output.
struct Reading {
    index: usize,
    stream: ResponseStream,
    tokens: [Vec<u32>; 2],
    pieces: usize,
}

/// Runs the requests in their order of arrival; `None` for aborted ones, whose tokens so far were checked.
fn run(llm: &Llm, all: &[Asked], expected: &[Answer]) -> Vec<Option<Answer>> {
    let mut answers: Vec<Option<Answer>> = all.iter().map(|_| None).collect();
    let mut live: VecDeque<Reading> = VecDeque::new();
    for (index, asked) in all.iter().enumerate() {
        for _ in 0..asked.after {
            let Some(mut reading) = live.pop_front() else { break };
            if let Some(piece) = reading.stream.blocking().next() {
                let piece = piece.unwrap();
                reading.tokens[piece.output].extend(piece.token_ids);
                reading.pieces += 1;
            }
            if all[reading.index].cut.is_some_and(|cut| reading.pieces > cut) {
                for (output, tokens) in expected[reading.index].0.iter().zip(&reading.tokens) {
                    assert!(output.token_ids.starts_with(tokens), "{:?}", all[reading.index]);
                }
            } else {
                live.push_back(reading);
            }
        }
        let stream = llm.generate_async(asked.request()).unwrap();
        live.push_back(Reading { index, stream, tokens: Default::default(), pieces: 0 });
    }
    for reading in live {
        let answer = reading.stream.finish().unwrap();
        answers[reading.index] = Some((answer.outputs, answer.context_logits));
    }
    answers
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn any_mix_answers_as_each_request_alone(settings in settings(), all in requests()) {
        let expected: Vec<Answer> = all.iter().map(alone).collect();
        let llm = settings.engine();
        for ((found, expected), asked) in run(&llm, &all, &expected).iter().zip(&expected).zip(&all) {
            if let Some(found) = found {
                prop_assert_eq!(found, expected, "{:?}", asked);
            }
        }
        assert_nothing_held(&llm);
    }
}

#[test]
fn preempted_requests_go_on_where_they_were() {
    let settings = Settings {
        batch: 6,
        step: 16,
        block: 4,
        room: MAX_SEQ_LEN,
        policy: CapacityPolicy::MaxUtilization,
        reuse: (true, true),
        device: 3,
        host: 3,
        window: 2,
        overlaps: true,
    };
    let asked = |i: usize| Asked {
        prompt: (0..8).map(|t| (i as u32 * 50 + t) % 512).collect(),
        adapter: (i % 4).checked_sub(1),
        tokens: 24,
        seed: Some(i as u64),
        outputs: 1,
        prompt_logits: false,
        logits: false,
        stop: None,
        after: 0,
        cut: None,
    };
    let all: Vec<Asked> = (0..6).map(asked).collect();
    let expected: Vec<Answer> = all.iter().map(alone).collect();
    let llm = settings.engine();
    let answers = run(&llm, &all, &expected);
    assert_eq!(answers.into_iter().flatten().collect::<Vec<_>>(), expected);
    assert!(llm.stats().unwrap().scheduler.preemptions > 0, "the blocks never ran out");

    let patient = Settings { policy: CapacityPolicy::GuaranteedNoEvict, ..settings }.engine();
    let answers = run(&patient, &all, &expected);
    assert_eq!(answers.into_iter().flatten().collect::<Vec<_>>(), expected);
    assert_eq!(patient.stats().unwrap().scheduler.preemptions, 0);
}

#[test]
fn an_engine_that_serves_nothing_holds_nothing() {
    assert_nothing_held(&engine_with(2, 2));
}
