//! One step of the batch loop: admit, plan, launch (forward pass and sampling), then read and report.
//!
//! With overlap scheduling the next step is launched before the tokens of the step in progress are read,
//! so that the device computes while the host reads, reports and plans.

use lora_core::Result;
use lora_core::ops::SampleRow;

use super::constraint::{self, Mask};
use super::event::{EndReason, Event};
use super::{Active, Core, Inbox, Pipeline};
use crate::executor::{Executor, SampleInputs, StepRows};
use crate::sampling::TokenLogprobs;
use crate::scheduler::{Sequence, Work};

/// The results of a step for its rows of logits, in order.
struct StepOutput {
    tokens: Vec<i32>,
    logprobs: Vec<TokenLogprobs>,
    logits: Vec<Vec<f32>>,
}

/// A step that was launched and whose tokens have not been read.
pub struct Launched {
    /// The work of the sequences that still run.
    pub(super) works: Vec<Work>,
}

impl<E: Executor> Core<E> {
    /// Launches a step if none is in progress. Otherwise finishes the one in progress, and launches the
    /// next one first if it does not depend on the tokens that are still being computed.
    ///
    /// # Errors
    /// Errors of the backend. All running sequences are then in an unknown state.
    pub(super) fn step(&mut self, pipeline: Pipeline, inbox: Inbox) -> Result<Pipeline> {
        let Pipeline::Launched(launched) = pipeline else { return self.begin() };
        // Commands may have changed what the next step contains, so it is planned between steps.
        let next = match inbox {
            Inbox::Empty => self.launch_after(&launched)?,
            _ => None,
        };
        self.finish(launched)?;
        self.counts.steps += 1;
        self.counts.overlapped_steps += u64::from(next.is_some());
        Ok(next.map_or(Pipeline::Ready, Pipeline::Launched))
    }

    /// Admits sequences, moves adapters and launches a step.
    fn begin(&mut self) -> Result<Pipeline> {
        let copies = self.scheduler.admit();
        self.executor.copy_blocks(&copies)?;
        let moved = self.move_adapters();
        let works = self.scheduler.plan();
        if !works.is_empty() {
            return self.launch(works).map(Pipeline::Launched);
        }
        Ok(if moved { Pipeline::Ready } else { Pipeline::Idle })
    }

    /// Launches the step after `before`, whose tokens are gathered on the device. If one of those tokens
    /// ends a sequence, the row computed for it is wasted and dropped, which is cheaper than an idle
    /// device. `None` if the next step has to wait for `before`.
    fn launch_after(&mut self, before: &Launched) -> Result<Option<Launched>> {
        let all_can_overlap = || self.scheduler.running().iter().all(|s| s.data.can_overlap());
        if !self.overlaps || self.has_adapter_work() || !all_can_overlap() {
            return Ok(None);
        }
        let works = self.scheduler.plan_after(&before.works, |s| s.data.finished);
        works.map(|works| self.launch(works)).transpose()
    }

    fn launch(&mut self, works: Vec<Work>) -> Result<Launched> {
        let tokens_per_block = self.scheduler.kv.plan().tokens_per_block;
        let running = self.scheduler.running();
        self.executor.forward(step_rows(running, &works, tokens_per_block))?;
        // The masks are computed while the device runs the forward pass.
        let masks = constraint::masks(self.scheduler.running_mut(), &works);
        self.executor.sample(sample_inputs(self.scheduler.running(), &works, &masks))?;
        Ok(Launched { works })
    }

    /// Waits for a step and reports its results.
    fn finish(&mut self, launched: Launched) -> Result<()> {
        let Launched { works } = launched;
        let tokens = self.executor.tokens()?;
        let output = self.output(&works, tokens)?;
        let mut siblings = Vec::new();
        for work in &works {
            let token = work.samples.then(|| output.tokens[work.rows().end - 1] as u32);
            let sequence = &mut self.scheduler.running_mut()[work.sequence];
            self.counts.generated_tokens += u64::from(work.samples);
            let of_prompt = work.positions.end.min(sequence.prompt_len);
            self.counts.prompt_tokens += of_prompt.saturating_sub(work.positions.start) as u64;
            // Before the report: if this sequence ends with its first token, its siblings still run.
            if token.is_some() {
                siblings.append(&mut sequence.data.submission.siblings);
            }
            if !sequence.data.finished {
                report(sequence, work, &output);
            }
            self.scheduler.commit(work, token);
        }
        siblings.into_iter().for_each(|sibling| self.submit(Box::new(sibling)));
        Ok(())
    }

    /// Adds the log-probabilities and logits that sequences of the step asked for to its tokens.
    fn output(&mut self, works: &[Work], tokens: Vec<i32>) -> Result<StepOutput> {
        let running = self.scheduler.running();
        let wanted = works.iter().map(|w| &running[w.sequence].data.submission.plan);
        let wants_logits = wanted.clone().any(|p| p.context_logits || p.generation_logits);
        let k = wanted.filter_map(|p| p.logprobs.max(p.prompt_logprobs)).max();
        let next_of_prompt = prompt_targets(running, works, tokens.len());
        let logprobs = match k {
            Some(k) => {
                let known = next_of_prompt.iter().zip(&tokens);
                let targets: Vec<i32> =
                    known.map(|(known, sampled)| known.unwrap_or(*sampled)).collect();
                self.executor.logprobs(&targets, k)?
            }
            None => Vec::new(),
        };
        let logits = if wants_logits { self.executor.logits(tokens.len())? } else { Vec::new() };
        Ok(StepOutput { tokens, logprobs, logits })
    }
}

/// The rows of a step as the executor takes them.
fn step_rows(running: &[Sequence<Active>], works: &[Work], tokens_per_block: usize) -> StepRows {
    let max_blocks = works.iter().map(|w| running[w.sequence].blocks().len()).max().unwrap_or(0);
    let mut rows = StepRows { max_blocks, ..StepRows::default() };
    for (i, work) in works.iter().enumerate() {
        let sequence = &running[work.sequence];
        for position in work.positions.clone() {
            if position >= work.logits_from {
                rows.logit_rows.push(rows.ids.len() as i32);
            }
            // A token that is still being sampled is gathered on the device: see `sampled_from`.
            rows.ids.push(sequence.tokens.get(position).map_or(0, |token| *token as i32));
            rows.positions.push(position as i32);
            rows.kv_slots.push(sequence.kv_slot(position, tokens_per_block) as i32);
            rows.sequences.push(i as i32);
            rows.lora_slots.push(sequence.slot().map_or(-1, |slot| slot as i32));
        }
        rows.sampled_from.extend(work.sampled_from.map(|row| row as i32));
        let blocks = sequence.blocks().iter().map(|b| *b as i32);
        let padding = max_blocks - sequence.blocks().len();
        rows.block_tables.extend(blocks.chain(std::iter::repeat_n(0, padding)));
    }
    rows
}

/// Sampling inputs for each row of logits. Rows inside a prompt are sampled greedily, and their tokens
/// are ignored.
fn sample_inputs(
    running: &[Sequence<Active>],
    works: &[Work],
    masks: &[Option<Mask>],
) -> SampleInputs {
    let mut inputs = SampleInputs::default();
    for work in works {
        let sequence = &running[work.sequence];
        let inside = work.logit_rows() - usize::from(work.samples);
        for _ in 0..inside {
            inputs.push(SampleRow::GREEDY, std::iter::empty(), &[], &[]);
        }
        if work.samples {
            let (active, plan) = (&sequence.data, &sequence.data.submission.plan);
            let position = work.positions.end;
            let row = SampleRow { position: position as u32, ..plan.row };
            let (history, bias) = (active.history.entries(), &plan.bias);
            match &masks[work.sequence] {
                Some(mask) => inputs.push_masked(row, history, bias, mask),
                None => {
                    let generated = position - sequence.prompt_len;
                    let banned = plan.banned_after(&sequence.tokens, generated);
                    inputs.push(row, history, bias, &banned);
                }
            }
        }
    }
    inputs
}

/// For each of `rows` rows of logits: the prompt token at the next position, for rows inside a prompt.
fn prompt_targets(running: &[Sequence<Active>], works: &[Work], rows: usize) -> Vec<Option<i32>> {
    let mut targets = vec![None; rows];
    for work in works {
        let next = &running[work.sequence].tokens[work.logits_from + 1..];
        let known = next.iter().map(|token| Some(*token as i32));
        targets[work.rows()].iter_mut().zip(known).for_each(|(target, known)| *target = known);
    }
    targets
}

/// Reports a step's results to a sequence, and ends it if its token does.
fn report(sequence: &mut Sequence<Active>, work: &Work, output: &StepOutput) {
    let rows = work.rows();
    let plan = sequence.data.submission.plan.clone();
    let cut = |entry: &TokenLogprobs, k: usize| TokenLogprobs {
        top: entry.top[..k.min(entry.top.len())].to_vec(),
        ..entry.clone()
    };
    if sequence.all_logits && work.logits_from < sequence.prompt_len {
        let inside = rows.start..rows.end - usize::from(work.samples);
        let logprobs = plan.prompt_logprobs.map_or_else(Vec::new, |k| {
            output.logprobs[inside].iter().map(|entry| cut(entry, k)).collect()
        });
        let logits =
            if plan.context_logits { output.logits[rows.clone()].to_vec() } else { Vec::new() };
        sequence.data.emit(Event::Prompt { logprobs, logits });
    }
    if !work.samples {
        return;
    }
    let last = rows.end - 1;
    let id = output.tokens[last] as u32;
    sequence.data.history.push(id);
    sequence.data.emit(Event::Token {
        id,
        logprobs: plan.logprobs.map(|k| cut(&output.logprobs[last], k)),
        logits: plan.generation_logits.then(|| output.logits[last].clone()),
    });
    let last = if plan.end_ids.contains(&id) {
        Some(Event::Finished(EndReason::End))
    } else if plan.stop_ids.contains(&id) {
        Some(Event::Finished(EndReason::StopToken(id)))
    } else if let Some(last) = constraint::advance(&mut sequence.data, id) {
        Some(last)
    } else if sequence.len() + 1 >= sequence.max_len {
        Some(Event::Finished(EndReason::Length))
    } else {
        None
    };
    if let Some(last) = last {
        sequence.data.finish(&last);
    }
}
