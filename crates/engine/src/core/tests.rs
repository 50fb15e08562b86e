//! The batch loop over an executor without a model.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Receiver, Sender, unbounded};
use lora_core::Result;

use super::*;
use crate::adapters::{AdapterTiers, SiteWrite, TierSizes, WriteError};
use crate::executor::{GraphStats, SampleInputs, StepRows};
use crate::kv::{BlockCopy, KvBlocks, KvPlan};
use crate::sampling::{SamplingParams, SamplingPlan, TokenLogprobs};
use crate::scheduler::{CapacityPolicy, Limits};

/// A token that makes its step fail.
const FATAL: i32 = 666;

/// The calls that an executor received.
#[derive(Default)]
struct Seen {
    steps: Vec<StepRows>,
    forgotten: usize,
}

/// Samples the successor of each token.
#[derive(Default)]
struct Counting {
    asynchronous: bool,
    seen: Arc<Mutex<Seen>>,
    /// Ids of the last step's rows of logits.
    rows: Vec<i32>,
    /// Tokens of the last step.
    last: Vec<i32>,
    sampled: VecDeque<Vec<i32>>,
}

impl Executor for Counting {
    fn is_asynchronous(&self) -> bool {
        self.asynchronous
    }

    fn copy_blocks(&mut self, _: &[BlockCopy]) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, mut rows: StepRows) -> Result<()> {
        for (row, from) in rows.sampled_from.iter().enumerate() {
            rows.ids[row] = self.last[*from as usize];
        }
        if rows.ids.contains(&FATAL) {
            return Err(lora_core::Error::Device("a fatal token".to_owned()));
        }
        self.rows = rows.logit_rows.iter().map(|row| rows.ids[*row as usize]).collect();
        self.seen.lock().unwrap().steps.push(rows);
        Ok(())
    }

    fn sample(&mut self, inputs: SampleInputs) -> Result<()> {
        assert_eq!(inputs.rows.len(), self.rows.len());
        self.last = self.rows.iter().map(|id| id + 1).collect();
        self.sampled.push_back(self.last.clone());
        Ok(())
    }

    fn tokens(&mut self) -> Result<Vec<i32>> {
        Ok(self.sampled.pop_front().unwrap())
    }

    fn logprobs(&mut self, _: &[i32], _: usize) -> Result<Vec<TokenLogprobs>> {
        unreachable!("no request asks for log-probabilities")
    }

    fn logits(&mut self, _: usize) -> Result<Vec<Vec<f32>>> {
        unreachable!("no request asks for logits")
    }

    fn forget_steps(&mut self) {
        self.seen.lock().unwrap().forgotten += 1;
        self.sampled.clear();
    }

    fn sites(&self) -> usize {
        1
    }

    fn write_site(&mut self, _: SiteWrite<'_>) -> std::result::Result<usize, WriteError> {
        Ok(0)
    }

    fn graphs(&self) -> GraphStats {
        GraphStats::default()
    }
}

/// The batch loop on its own thread.
struct Rig {
    commands: Sender<Command>,
    reports: Sender<(u64, Event)>,
    events: Receiver<(u64, Event)>,
    seen: Arc<Mutex<Seen>>,
}

impl Rig {
    fn new(asynchronous: bool, sequences: usize) -> Self {
        let (commands, inbox) = unbounded();
        let limits = Limits {
            max_batch_size: sequences,
            max_num_tokens: 8,
            max_logit_rows: 8,
            policy: CapacityPolicy::GuaranteedNoEvict,
            fairness_window: 0,
        };
        let kv = KvPlan { blocks: 64, tokens_per_block: 4, reuse: true, partial_reuse: true };
        let tiers = AdapterTiers::new(TierSizes::of_adapters(1, 1), 1);
        let executor = Counting { asynchronous, ..Counting::default() };
        let seen = executor.seen.clone();
        let core = Core {
            overlaps: executor.is_asynchronous(),
            executor,
            scheduler: Scheduler::new(limits, KvBlocks::new(kv), tiers),
            adapters: AdapterStore::default(),
            inbox,
            counts: Counts::default(),
        };
        std::thread::spawn(|| core.run());
        let (reports, events) = unbounded();
        Self { commands, reports, events, seen }
    }

    fn submit(&self, id: u64, prompt: &[u32], new: usize) {
        let submission = Submission {
            id,
            request: id,
            prompt: prompt.to_vec(),
            max_len: prompt.len() + new,
            plan: Arc::new(SamplingPlan::resolve(&SamplingParams::default(), &[], 0)),
            guide: None,
            adapter: None,
            siblings: Vec::new(),
            events: Arc::new(self.reports.clone()),
        };
        self.commands.send(Command::Submit(Box::new(submission))).unwrap();
    }

    /// Waits for `sequences` sequences to end: their tokens by id, and the ids of those that failed.
    fn outcomes(&self, sequences: usize) -> (Vec<Vec<u32>>, Vec<u64>) {
        let (mut tokens, mut failed) = (vec![Vec::new(); sequences], Vec::new());
        let mut ended = 0;
        while ended < sequences {
            match self.events.recv().unwrap() {
                (id, Event::Token { id: token, .. }) => tokens[id as usize].push(token),
                (id, Event::Failed(_)) => {
                    failed.push(id);
                    ended += 1;
                }
                (_, Event::Finished(_)) => ended += 1,
                (_, Event::Prompt { .. }) => (),
            }
        }
        (tokens, failed)
    }
}

#[test]
fn sequences_share_steps_and_get_their_own_tokens() {
    for asynchronous in [false, true] {
        let rig = Rig::new(asynchronous, 4);
        rig.submit(0, &[10, 11, 12], 3);
        rig.submit(1, &[40], 5);
        rig.submit(2, &(100..120).collect::<Vec<_>>(), 2);
        let (tokens, failed) = rig.outcomes(3);
        assert!(failed.is_empty());
        assert_eq!(tokens[0], [13, 14, 15]);
        assert_eq!(tokens[1], [41, 42, 43, 44, 45]);
        assert_eq!(tokens[2], [120, 121]);
        let seen = rig.seen.lock().unwrap();
        assert!(seen.steps.iter().all(|rows| rows.ids.len() <= 8), "no step is too large");
        assert_eq!(asynchronous, seen.steps.iter().any(|rows| !rows.sampled_from.is_empty()));
    }
}

#[test]
fn a_failed_step_ends_the_running_sequences_only() {
    for asynchronous in [false, true] {
        let rig = Rig::new(asynchronous, 1);
        rig.submit(0, &[FATAL as u32 - 3], 9);
        rig.submit(1, &[20], 3);
        let (tokens, failed) = rig.outcomes(2);
        assert_eq!(failed, [0]);
        assert_eq!(tokens[1], [21, 22, 23]);
        assert_eq!(rig.seen.lock().unwrap().forgotten, 1);
    }
}
