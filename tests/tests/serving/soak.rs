//! A long run with more adapters than fit any tier: popular, rare and broken ones, and aborted requests. Every answer
//! must equal the one that the request gets alone.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use lora_core::{LoraConfig, LoraRequest};
use loramux_engine::{GenerateRequest, KvCacheConfig, Llm, ResponseStream};
use loramux_tests::settle::{ask, assert_nothing_held, builder, greedy, settled, start, tiers};
use loramux_tests::{AdapterFiles, FileTensor};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Size of a run.
#[derive(Clone, Copy, Debug)]
struct Size {
    adapters: usize,
    requests: usize,
    host: usize,
    device: usize,
    /// Maximum requests in flight.
    in_flight: usize,
}

/// One adapter in this many is broken.
const BROKEN: usize = 50;

/// Number of different prompts.
const PROMPTS: u32 = 4;

fn prompt(which: u32) -> Vec<u32> {
    (0..6 + which * 5).map(|i| (which * 97 + i * 13) % 512).collect()
}

/// Adapters of ranks 1 to 64 on queries and values, with random weights.
fn write_adapters(dir: &Path, count: usize, rng: &mut StdRng) -> Vec<PathBuf> {
    let template = AdapterFiles::open("llama.attn-r8");
    let write = |number: usize| {
        let rank = rng.random_range(1..=64usize);
        let mut files = template.clone();
        files.config["r"] = rank.into();
        files.config["lora_alpha"] = (2 * rank).into();
        for (name, tensor) in &mut files.tensors {
            let shape = if name.contains("lora_A") {
                [rank, tensor.shape[1]]
            } else {
                [tensor.shape[0], rank]
            };
            let values: Vec<f32> =
                (0..shape[0] * shape[1]).map(|_| rng.random_range(-0.1..0.1)).collect();
            *tensor = FileTensor::bf16(&shape, values);
        }
        if number % BROKEN == BROKEN - 1 {
            // Contradicts the rank of the tensors.
            files.config["r"] = (rank + 1).into();
        }
        let path = dir.join(number.to_string());
        std::fs::create_dir(&path).unwrap();
        files.write(&path);
        path
    };
    (0..count).map(write).collect()
}

/// Which adapter and which prompt; adapter 0 is the base model.
type Choice = (usize, u32);

fn request(paths: &[PathBuf], (adapter, which): Choice) -> GenerateRequest {
    let lora = adapter
        .checked_sub(1)
        .map(|i| LoraRequest::new(format!("adapter-{i}"), i as i64, &paths[i]));
    ask(&prompt(which), greedy(4), lora)
}

fn is_broken((adapter, _): Choice) -> bool {
    adapter > 0 && adapter % BROKEN == 0
}

/// Popularity by Zipf's law with exponent 1.
fn choose(size: Size, rng: &mut StdRng) -> Choice {
    let popular = ((size.adapters + 1) as f64).powf(rng.random::<f64>()) as usize;
    (popular - 1, rng.random_range(0..PROMPTS))
}

/// The answer to each choice from an engine that runs one request at a time.
fn alone(paths: &[PathBuf], choices: &[Choice]) -> BTreeMap<Choice, Answer> {
    let kv = KvCacheConfig { enable_block_reuse: false, ..KvCacheConfig::default() };
    let llm = start(builder(tiers(1, 1)).kv_cache_config(kv));
    let mut answers = BTreeMap::new();
    for choice in choices.iter().filter(|choice| !is_broken(**choice)) {
        answers.entry(*choice).or_insert_with(|| {
            digest(llm.generate_async(request(paths, *choice)).unwrap().finish().unwrap())
        });
    }
    answers
}

/// Tokens, and the bits of all logits.
type Answer = (Vec<u32>, u64);

fn digest(mut answer: loramux_engine::RequestOutput) -> Answer {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let output = answer.outputs.remove(0);
    let mut hasher = DefaultHasher::new();
    for logit in output.generation_logits.unwrap().iter().flatten() {
        logit.to_bits().hash(&mut hasher);
    }
    (output.token_ids, hasher.finish())
}

/// Resident memory of this process in kilobytes, if the system reports it.
fn resident_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches("kB").trim().parse().ok()
}

fn check(choice: Choice, stream: ResponseStream, expected: &BTreeMap<Choice, Answer>) {
    match (stream.finish(), is_broken(choice)) {
        (Ok(answer), false) => assert_eq!(digest(answer), expected[&choice], "{choice:?}"),
        (Err(error), true) => assert!(error.to_string().contains("adapter-"), "{error}"),
        (outcome, _) => panic!("{choice:?}: {outcome:?}"),
    }
}

/// Runs all choices and aborts some; returns resident memory after the first fifth and at the end.
fn run(
    llm: &Llm,
    size: Size,
    paths: &[PathBuf],
    choices: &[Choice],
    rng: &mut StdRng,
) -> [Option<u64>; 2] {
    let expected = alone(paths, choices);
    let mut live: VecDeque<(Choice, ResponseStream)> = VecDeque::new();
    let mut early = None;
    for (number, choice) in choices.iter().enumerate() {
        if number == choices.len() / 5 {
            early = resident_kib();
        }
        if live.len() == size.in_flight {
            let which = rng.random_range(0..live.len());
            let (choice, mut stream) = live.remove(which).unwrap();
            if rng.random_bool(0.1) {
                // Abort it, sometimes in the middle of its answer.
                let _ = rng.random_bool(0.5).then(|| stream.blocking().next());
                drop(stream);
            } else {
                check(choice, stream, &expected);
            }
        }
        live.push_back((*choice, llm.generate_async(request(paths, *choice)).unwrap()));
    }
    live.into_iter().for_each(|(choice, stream)| check(choice, stream, &expected));
    [early, resident_kib()]
}

fn soak(size: Size) {
    let rng = &mut StdRng::seed_from_u64(11);
    let dir = tempfile::tempdir().unwrap();
    let paths = write_adapters(dir.path(), size.adapters, rng);
    let choices: Vec<Choice> = (0..size.requests).map(|_| choose(size, rng)).collect();
    let lora = LoraConfig { max_lora_rank: 64, ..tiers(size.device, size.host) };
    let window = lora.adapter_fairness_window;
    let llm = start(builder(lora).max_batch_size(24).max_seq_len(64));
    let begin = std::time::Instant::now();
    let memory = run(&llm, size, &paths, &choices, rng);
    let took = begin.elapsed();
    assert_nothing_held(&llm);
    let stats = settled(&llm);
    assert!(stats.scheduler.most_overtaken <= window, "{stats:?}");
    assert!(stats.adapters.host.adapters() <= size.host, "{stats:?}");
    assert!(stats.adapters.use_of_tiers.misses > 0, "{stats:?}");
    if let [Some(early), Some(end)] = memory {
        assert!(end < early + early / 5 + 32 * 1024, "memory grew from {early} to {end} KiB");
    }
    println!("{size:?}, {took:?} with all solo answers, memory {memory:?} KiB, window {window}");
    println!("{stats:?}");
}

#[test]
fn a_thousand_adapters_in_little_room_all_get_their_own_answers() {
    soak(Size { adapters: 1000, requests: 10_000, host: 100, device: 8, in_flight: 64 });
}
