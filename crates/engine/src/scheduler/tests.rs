use lora_core::Generation;
use proptest::prelude::*;
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};

use super::*;
use crate::adapters::AdapterId;
use crate::adapters::{Order, TierSizes};
use crate::kv::KvPlan;

const BLOCK: usize = 4;
const BLOCKS: usize = 8;
const WINDOW: usize = 3;
const LIMITS: Limits = Limits {
    max_batch_size: 3,
    max_num_tokens: 8,
    max_logit_rows: 4,
    policy: CapacityPolicy::GuaranteedNoEvict,
    fairness_window: WINDOW,
};

fn scheduler(policy: CapacityPolicy, blocks: usize, slots: usize) -> Scheduler<usize> {
    let plan = KvPlan { blocks, tokens_per_block: BLOCK, reuse: true, partial_reuse: true };
    let tiers = AdapterTiers::new(TierSizes::of_adapters(slots + 1, slots), 1);
    Scheduler::new(Limits { policy, ..LIMITS }, KvBlocks::new(plan), tiers)
}

fn guaranteed(blocks: usize, slots: usize) -> Scheduler<usize> {
    scheduler(CapacityPolicy::GuaranteedNoEvict, blocks, slots)
}

fn sequence(id: usize, prompt: usize, new: usize, adapter: Option<u64>) -> Sequence<usize> {
    // All prompts share their prefix.
    let tokens = (0..prompt as u32).collect();
    Sequence::new(tokens, prompt + new, adapter.map(AdapterId), id)
}

/// Pretends that a step ran.
fn run_step(s: &mut Scheduler<usize>) -> Vec<Work> {
    let works = s.plan();
    for work in &works {
        s.commit(work, work.samples.then_some(7));
    }
    works
}

/// Rows of logits of a step.
fn rows(works: &[Work]) -> usize {
    works.iter().map(Work::logit_rows).sum()
}

/// Carries out one order.
fn carry_out(s: &mut Scheduler<usize>, order: Order) {
    match order {
        Order::Read(id) => s.tiers.loaded(id, Generation([id.0 as u8; 32]), 1).unwrap(),
        Order::Copy(id, _) => s.tiers.copied(id),
        Order::Drop(_) | Order::Clear(_) | Order::Forget(_) => (),
    }
}

fn running(s: &Scheduler<usize>) -> Vec<usize> {
    s.running().iter().map(|sequence| sequence.data).collect()
}

#[test]
fn decode_comes_before_prefill_and_prompts_are_chunked() {
    let mut s = guaranteed(16, 0);
    s.submit(sequence(0, 2, 4, None));
    s.admit();
    run_step(&mut s);
    s.submit(sequence(1, 20, 1, None));
    s.admit();
    let works = run_step(&mut s);
    assert_eq!(works[0].positions, 2..3);
    assert_eq!((works[1].positions.clone(), works[1].samples), (0..7, false));
}

#[test]
fn a_sequence_with_all_logits_never_exceeds_the_logit_rows() {
    let mut s = guaranteed(16, 0);
    s.submit(sequence(0, 6, 1, None));
    s.admit();
    run_step(&mut s);
    s.retire(&mut Vec::new(), |_| true);
    let mut all = sequence(0, 6, 1, None);
    all.all_logits = true;
    s.submit(all);
    s.admit();
    let rows: Vec<_> = (0..2).map(|_| run_step(&mut s)[0].positions.clone()).collect();
    assert_eq!(rows, [0..4, 4..6], "a known prefix is not reused, as its logits are needed");
}

#[test]
fn a_prompt_that_was_computed_before_is_not_computed_again() {
    let mut s = guaranteed(16, 0);
    for cached in [0, 5] {
        s.submit(sequence(0, 6, 1, None));
        let copies = s.admit();
        assert_eq!(copies.len(), usize::from(cached > 0));
        let work = run_step(&mut s).remove(0);
        assert_eq!(work.positions, cached..6);
        s.retire(&mut Vec::new(), |_| true);
    }
    assert_eq!((s.kv.stats().hit_tokens, s.kv.held()), (5, 0));
}

#[test]
fn equal_prompts_of_two_adapters_share_no_block() {
    let mut s = guaranteed(16, 2);
    for (id, adapter) in [(0, Some(1)), (1, Some(2)), (2, None)] {
        s.submit(sequence(id, 6, 1, adapter));
        for _ in 0..3 {
            s.admit();
            s.tiers.take_orders().into_iter().for_each(|order| carry_out(&mut s, order));
        }
        s.admit();
        run_step(&mut s);
    }
    assert_eq!((s.kv.held(), s.kv.stats().hit_tokens), (6, 0));
}

#[test]
fn a_cold_adapter_is_overtaken_up_to_the_window() {
    let mut s = guaranteed(16, 1);
    s.submit(sequence(0, 1, 1, Some(1)));
    for id in 1..=2 * WINDOW {
        s.submit(sequence(id, 1, 1, None));
    }
    let mut started = Vec::new();
    for _ in 0..4 {
        s.admit();
        started.extend(running(&s));
        s.retire(&mut Vec::new(), |_| true);
    }
    assert_eq!(started, (1..=WINDOW).collect::<Vec<_>>());
    assert_eq!(s.stats().most_overtaken, WINDOW);
    for _ in 0..2 {
        s.tiers.take_orders().into_iter().for_each(|order| carry_out(&mut s, order));
        s.admit();
    }
    assert_eq!(running(&s)[0], 0);
}

#[test]
fn a_sequence_that_lacks_blocks_is_not_overtaken() {
    let mut s = guaranteed(2, 0);
    for (id, new) in [(0, 4), (1, 4), (2, 1)] {
        s.submit(sequence(id, 1, new, None));
    }
    s.admit();
    assert_eq!(running(&s), [0]);
    s.retire(&mut Vec::new(), |_| true);
    s.admit();
    assert_eq!(running(&s), [1]);
}

#[test]
fn under_max_utilization_the_last_admitted_is_preempted_and_resumes() {
    let mut s = scheduler(CapacityPolicy::MaxUtilization, 3, 0);
    for id in 0..2 {
        s.submit(sequence(id, 4, 6, None));
    }
    let mut lengths = Vec::new();
    for _ in 0..40 {
        s.admit();
        run_step(&mut s);
        for ended in s.retire(&mut Vec::new(), |q| q.len() >= q.max_len) {
            lengths.push((ended.data, ended.len()));
        }
    }
    assert_eq!(lengths, [(0, 10), (1, 10)]);
    assert!(s.stats().preemptions > 0);
    assert_eq!(s.kv.held(), 0);
}

/// A scheduler with sequences in decode, each of one prompt token and up to `new` generated ones, and the plan
/// of their current step.
fn decoding(new: &[usize]) -> (Scheduler<usize>, Vec<Work>) {
    let mut s = guaranteed(16, 0);
    for (id, new) in new.iter().enumerate() {
        s.submit(sequence(id, 1, *new, None));
    }
    s.admit();
    run_step(&mut s);
    let works = s.plan();
    (s, works)
}

#[test]
fn the_next_step_is_planned_before_tokens_are_known() {
    let (mut s, mut works) = decoding(&[9, 2, 9]);
    let next = s.plan_after(&works, |_| false).unwrap();
    let of = |work: &Work| (work.sequence, work.positions.clone(), work.rows(), work.sampled_from);
    // The second one reaches its maximum length.
    let expected = [(0, 2..3, 0..1, Some(0)), (2, 2..3, 1..2, Some(2))];
    assert_eq!(next.iter().map(of).collect::<Vec<_>>(), expected);
    for work in &works {
        s.commit(work, Some(7));
    }
    // The first one ends early, so the last one moves to index 0.
    works = next;
    s.retire(&mut works, |sequence| sequence.data < 2);
    assert_eq!(works.iter().map(of).collect::<Vec<_>>(), [(0, 2..3, 1..2, Some(2))]);
    assert_eq!(s.kv.held(), 1);
    let after = s.plan_after(&works, |_| false).unwrap();
    assert_eq!(after.iter().map(of).collect::<Vec<_>>(), [(0, 3..4, 0..1, Some(1))]);
}

#[test]
fn a_step_is_not_planned_ahead_if_it_may_change() {
    let (mut s, works) = decoding(&[9, 9]);
    assert!(s.plan_after(&works, |_| true).is_none(), "no sequence continues");
    assert!(s.plan_after(&works[..1], |_| false).is_none(), "one samples nothing");
    assert_eq!(s.plan_after(&works[..1], |sequence| sequence.data == 1).unwrap().len(), 1);
    let mut prompt = works.clone();
    prompt[1].samples = false;
    assert!(s.plan_after(&prompt, |_| false).is_none(), "one is in prefill");
    s.submit(sequence(2, 1, 9, None));
    assert!(s.plan_after(&works, |_| false).is_none(), "one may be admitted");
    let (mut full, works) = decoding(&[9, 9, 9]);
    full.submit(sequence(3, 1, 9, None));
    assert!(full.plan_after(&works, |_| false).is_some(), "the batch is full");
    assert!(
        full.plan_after(&works, |sequence| sequence.data == 1).is_none(),
        "a place becomes free"
    );
    let (mut last, works) = decoding(&[2]);
    assert!(last.plan_after(&works, |_| false).is_none(), "its last token is being sampled");
}

/// Actions of users and of the device.
#[derive(Clone, Debug)]
enum Action {
    Submit {
        prompt: usize,
        new: usize,
        adapter: Option<u64>,
        all_logits: bool,
    },
    Step,
    /// An order of the tiers is carried out, not necessarily the oldest one.
    Answer(prop::sample::Index),
    /// A read or copy fails.
    Fail(prop::sample::Index),
    Abort(prop::sample::Index),
    Unload(u64),
}

/// Actions may come in any order, so the reference state is only the policy.
struct Anything;

impl ReferenceStateMachine for Anything {
    type State = CapacityPolicy;
    type Transition = Action;

    fn init_state() -> BoxedStrategy<CapacityPolicy> {
        let policies = [CapacityPolicy::GuaranteedNoEvict, CapacityPolicy::MaxUtilization];
        prop::sample::select(policies.to_vec()).boxed()
    }

    fn transitions(_: &CapacityPolicy) -> BoxedStrategy<Action> {
        let submit = (1usize..20, 1usize..6, prop::option::of(0u64..6), prop::bool::weighted(0.1))
            .prop_map(|(prompt, new, adapter, all_logits)| Action::Submit {
                prompt,
                new,
                adapter,
                all_logits,
            });
        let index = any::<prop::sample::Index>;
        prop_oneof![
            4 => submit,
            8 => Just(Action::Step),
            6 => index().prop_map(Action::Answer),
            1 => index().prop_map(Action::Fail),
            1 => index().prop_map(Action::Abort),
            1 => (0u64..6).prop_map(Action::Unload),
        ]
        .boxed()
    }

    fn apply(state: CapacityPolicy, _: &Action) -> CapacityPolicy {
        state
    }
}

/// The scheduler with a device that answers late, in any order.
struct Machine {
    scheduler: Scheduler<usize>,
    /// The step in progress.
    in_progress: Option<Vec<Work>>,
    orders: Vec<Order>,
    /// How often each sequence has ended, by its id.
    ended: Vec<usize>,
    retired: std::collections::BTreeSet<AdapterId>,
}

impl Machine {
    fn submit(&mut self, prompt: usize, new: usize, adapter: Option<u64>, all_logits: bool) {
        // A name that was unloaded comes back as another adapter.
        let adapter = adapter.map(|mut id| {
            while self.retired.contains(&AdapterId(id)) {
                id += 10;
            }
            id
        });
        let mut sequence = sequence(self.ended.len(), prompt, new, adapter);
        sequence.all_logits = all_logits;
        self.ended.push(0);
        self.scheduler.submit(sequence);
    }

    /// Begins a step, or ends the one in progress; the next one is begun first where it can be.
    fn step(&mut self) -> bool {
        let Some(works) = self.in_progress.take() else {
            self.scheduler.admit();
            self.orders.extend(self.scheduler.tiers.take_orders());
            let works = self.scheduler.plan();
            return self.begin(works);
        };
        if let Some(next) = self.scheduler.plan_after(&works, |_| false) {
            for work in &next {
                let before = works.iter().find(|before| before.sequence == work.sequence).unwrap();
                assert_eq!(work.sampled_from, before.rows().last());
            }
            self.begin(next);
        }
        for work in &works {
            self.scheduler.commit(work, work.samples.then_some(7));
        }
        // Every third one samples an end token after its first.
        let ended = |s: &mut Sequence<usize>| {
            s.len() >= s.max_len || (s.data.is_multiple_of(3) && s.generated() > 1)
        };
        let done =
            self.scheduler.retire(self.in_progress.as_mut().unwrap_or(&mut Vec::new()), ended);
        done.iter().for_each(|sequence| self.ended[sequence.data] += 1);
        true
    }

    fn begin(&mut self, works: Vec<Work>) -> bool {
        let tokens: usize = works.iter().map(|work| work.positions.len()).sum();
        assert!(tokens <= LIMITS.max_num_tokens && rows(&works) <= LIMITS.max_logit_rows);
        assert!(self.scheduler.running().len() <= LIMITS.max_batch_size);
        let taken: Vec<usize> = works.iter().flat_map(Work::rows).collect();
        assert_eq!(taken, (0..taken.len()).collect::<Vec<_>>(), "rows of logits in order");
        self.in_progress = (!works.is_empty()).then_some(works);
        self.in_progress.is_some()
    }

    fn answer(&mut self, at: usize, fails: bool) {
        let order = self.orders.remove(at);
        let (Order::Read(id) | Order::Copy(id, _)) = order else { return };
        if !fails {
            return carry_out(&mut self.scheduler, order);
        }
        self.scheduler.tiers.failed(id);
        for gone in self.scheduler.cancel_waiting(|sequence| sequence.adapter == Some(id)) {
            self.ended[gone.data] += 1;
        }
    }

    fn abort(&mut self, index: &prop::sample::Index) {
        if self.ended.is_empty() {
            return;
        }
        let id = index.index(self.ended.len());
        let mut gone = self.scheduler.cancel_waiting(|sequence| sequence.data == id);
        let in_progress = self.in_progress.as_mut();
        let running = |sequence: &mut Sequence<usize>| sequence.data == id;
        gone.extend(self.scheduler.retire(in_progress.unwrap_or(&mut Vec::new()), running));
        gone.iter().for_each(|sequence| self.ended[sequence.data] += 1);
    }

    fn check(&self) {
        let s = &self.scheduler;
        let in_use = s.running().iter().filter(|sequence| sequence.adapter.is_some()).count();
        assert_eq!(s.tiers.in_use(), in_use);
        let (host, device) = s.tiers.fill();
        assert!(host.adapters() <= 3 && device.adapters() <= 2);
        assert!(s.waiting().all(|sequence| sequence.overtaken() <= WINDOW));
        let unended = self.ended.iter().filter(|count| **count == 0).count();
        assert_eq!(unended, s.waiting().len() + s.running().len());
        assert!(self.ended.iter().all(|count| *count <= 1), "a sequence ended twice");
        for work in self.in_progress.iter().flatten() {
            let sequence = &s.running()[work.sequence];
            assert_eq!(sequence.computed(), work.positions.start, "work follows its sequence");
            assert!(sequence.blocks().len() * BLOCK >= work.positions.end);
        }
        for sequence in s.running() {
            assert!(sequence.blocks().len() * BLOCK >= sequence.computed());
            if let Some(id) = sequence.adapter {
                assert_eq!(sequence.root, s.tiers.ready(id), "its adapter stays on the device");
            }
        }
    }
}

impl StateMachineTest for Machine {
    type SystemUnderTest = Self;
    type Reference = Anything;

    fn init_test(policy: &CapacityPolicy) -> Self {
        let scheduler = scheduler(*policy, BLOCKS, 2);
        let (orders, ended) = (Vec::new(), Vec::new());
        Self { scheduler, in_progress: None, orders, ended, retired: Default::default() }
    }

    fn apply(mut machine: Self, _: &CapacityPolicy, action: Action) -> Self {
        match action {
            Action::Submit { prompt, new, adapter, all_logits } => {
                machine.submit(prompt, new, adapter, all_logits);
            }
            Action::Step => drop(machine.step()),
            Action::Answer(at) if !machine.orders.is_empty() => {
                machine.answer(at.index(machine.orders.len()), false);
            }
            Action::Fail(at) if !machine.orders.is_empty() => {
                machine.answer(at.index(machine.orders.len()), true);
            }
            Action::Answer(_) | Action::Fail(_) => (),
            Action::Abort(index) => machine.abort(&index),
            Action::Unload(adapter) => {
                let mut id = AdapterId(adapter);
                while !machine.retired.insert(id) {
                    id.0 += 10;
                }
                machine.scheduler.tiers.retire(id);
            }
        }
        machine
    }

    fn check_invariants(machine: &Self, _: &CapacityPolicy) {
        machine.check();
    }

    /// Every sequence ends once the device answers, and nothing stays held.
    fn teardown(mut machine: Self, _: CapacityPolicy) {
        let mut idle = 0;
        while !machine.scheduler.is_idle() {
            let worked = machine.step();
            let answers = !machine.orders.is_empty();
            while !machine.orders.is_empty() {
                machine.answer(0, false);
            }
            idle = if worked || answers { 0 } else { idle + 1 };
            assert!(idle < 2, "deadlock: sequences wait, and nothing moves");
            machine.check();
        }
        let s = &machine.scheduler;
        assert!(machine.ended.iter().all(|count| *count == 1));
        assert_eq!((s.tiers.in_use(), s.kv.held(), s.running.reserved), (0, 0, 0));
        assert_eq!(s.kv.available(), BLOCKS);
    }
}

prop_state_machine! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]
    #[test]
    fn under_any_actions_nothing_leaks_and_every_sequence_ends_once(sequential 1..80 => Machine);
}
