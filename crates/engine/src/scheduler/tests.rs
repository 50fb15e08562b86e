use proptest::prelude::*;

use super::*;
use lora_core::Generation;

const LIMITS: Limits = Limits { max_batch_size: 3, max_num_tokens: 8, max_logit_rows: 4 };

fn scheduler(blocks: usize, slots: usize) -> Scheduler<usize> {
    Scheduler::new(LIMITS, BlockPool::new(blocks, 4), SlotTable::new(slots))
}

fn sequence(id: usize, prompt: usize, new: usize, adapter: Option<u8>) -> Sequence<usize> {
    let adapter = adapter.map(|n| Generation([n; 32]));
    Sequence::new(vec![0; prompt], prompt + new, adapter, id)
}

/// Pretends that a step ran: marks what was computed and appends a token where one was sampled.
fn run_step(s: &mut Scheduler<usize>) -> Vec<Work> {
    let works = s.plan();
    for work in &works {
        let sequence = &mut s.running()[work.sequence];
        sequence.computed = work.positions.end;
        if work.samples {
            sequence.tokens.push(0);
        }
    }
    works
}

#[test]
fn decoding_comes_before_new_prompts_and_prompts_are_cut() {
    let mut s = scheduler(16, 0);
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
fn a_sequence_that_wants_all_logits_never_exceeds_the_logit_rows() {
    let mut s = scheduler(16, 0);
    let mut all = sequence(0, 6, 1, None);
    all.all_logits = true;
    s.submit(all);
    s.admit();
    let rows: Vec<_> = (0..2).map(|_| run_step(&mut s)[0].positions.clone()).collect();
    assert_eq!(rows, [0..4, 4..6]);
}

#[test]
fn the_queue_keeps_its_order_while_the_slots_are_taken() {
    let mut s = scheduler(16, 1);
    for (id, adapter) in [(0, Some(1)), (1, Some(2)), (2, None)] {
        s.submit(sequence(id, 1, 1, adapter));
    }
    assert_eq!(s.admit(), [0]);
    assert_eq!(s.running().len(), 1);
    s.retire(|_| true);
    assert_eq!(s.admit(), [0]);
    let running: Vec<_> = s.running().iter().map(|q| q.data).collect();
    assert_eq!(running, [1, 2]);
}

proptest! {
    #[test]
    fn every_sequence_ends_once_and_gives_back_what_it_held(
        requests in prop::collection::vec((1usize..20, 1usize..6, prop::option::of(0u8..4)), 0..20),
    ) {
        let mut s = scheduler(8, 2);
        for (id, (prompt, new, adapter)) in requests.iter().enumerate() {
            s.submit(sequence(id, *prompt, *new, *adapter));
        }
        let mut ended = Vec::new();
        for _ in 0..2000 {
            if s.is_idle() {
                break;
            }
            s.admit();
            let works = run_step(&mut s);
            prop_assert!(!works.is_empty(), "a step must make progress");
            prop_assert!(works.iter().map(|w| w.positions.len()).sum::<usize>() <= 8);
            prop_assert!(works.iter().map(Work::logit_rows).sum::<usize>() <= 4);
            ended.extend(s.retire(|q| q.len() >= q.max_len).into_iter().map(|q| q.data));
        }
        ended.sort_unstable();
        prop_assert_eq!(ended, (0..requests.len()).collect::<Vec<_>>());
        prop_assert_eq!(s.blocks.available(), s.blocks.total());
        prop_assert_eq!(s.slots.pins(), 0);
    }
}
