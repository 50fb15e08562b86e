//! Answers in pieces, and requests that are given up.

use std::time::Duration;

use loramux_engine::{Delta, FinishReason, SamplingParams};
use loramux_tests::settle::{ask, assert_nothing_held, engine_with, greedy, lora, settled};

const PROMPT: [u32; 5] = [17, 250, 33, 401, 8];

/// Tokens of an answer that is not done by the time that the test asks for its end, on a busy machine either.
const LONG: usize = 480;

#[test]
fn pieces_make_up_the_whole_answer() {
    let llm = engine_with(2, 2);
    let sampling = SamplingParams {
        n: 2,
        temperature: Some(1.0),
        seed: Some(5),
        logprobs: Some(1),
        ..greedy(9)
    };
    let request = || ask(&PROMPT, sampling.clone(), Some(lora("llama.attn-r8", 1)));
    let whole = llm.generate_async(request()).unwrap().finish().unwrap();
    let pieces: Vec<Delta> = llm.generate_async(request()).unwrap().map(Result::unwrap).collect();
    for output in &whole.outputs {
        let of = || pieces.iter().filter(|piece| piece.output == output.index);
        assert_eq!(of().map(|p| p.text.as_str()).collect::<String>(), output.text);
        assert_eq!(of().flat_map(|p| p.token_ids.clone()).collect::<Vec<_>>(), output.token_ids);
        assert_eq!(of().map(|p| p.logprobs.len()).sum::<usize>(), output.token_ids.len());
        let ends: Vec<_> = of().filter_map(|piece| piece.finish_reason).collect();
        assert_eq!(ends, [FinishReason::Length], "the last piece of an output says so, once");
    }
}

#[test]
fn an_aborted_request_ends_with_what_it_has() {
    let llm = engine_with(2, 2);
    let long = || ask(&PROMPT, greedy(LONG), Some(lora("llama.attn-r8", 1)));
    let mut stream = llm.generate_async(long()).unwrap();
    assert!(stream.next().unwrap().unwrap().finish_reason.is_none());
    stream.abort();
    let output = stream.finish().unwrap().outputs.remove(0);
    assert_eq!(output.finish_reason, FinishReason::Cancelled);
    assert!((1..LONG).contains(&output.token_ids.len()));

    let waiting = llm.generate_async(long()).unwrap();
    llm.abort(waiting.request_id()).unwrap();
    llm.abort(waiting.request_id()).unwrap();
    llm.abort(u64::MAX).unwrap();
    let output = waiting.finish().unwrap().outputs.remove(0);
    assert_eq!(output.finish_reason, FinishReason::Cancelled);
    assert_nothing_held(&llm);
}

#[test]
fn a_dropped_stream_ends_its_request_alone() {
    let llm = engine_with(2, 2);
    let request = |tokens| ask(&PROMPT, greedy(tokens), Some(lora("llama.attn-r8", 1)));
    let alone = llm.generate_async(request(40)).unwrap().finish().unwrap();
    let before = settled(&llm).generated_tokens;
    let (kept, dropped) =
        (llm.generate_async(request(40)).unwrap(), llm.generate_async(request(LONG)).unwrap());
    drop(dropped);
    assert_eq!(kept.finish().unwrap().outputs, alone.outputs);
    assert_nothing_held(&llm);
    let drawn = settled(&llm).generated_tokens - before;
    assert!(drawn < 40 + LONG as u64, "the dropped request ran on: {drawn} tokens");
}

#[test]
fn waiting_for_news_can_be_limited() {
    let llm = engine_with(2, 2);
    let mut stream = llm.generate_async(ask(&PROMPT, greedy(2), None)).unwrap();
    let mut pieces = 0;
    loop {
        match stream.next_within(Some(Duration::from_secs(20))).unwrap() {
            loramux_engine::News::Delta(_) => pieces += 1,
            loramux_engine::News::Nothing => panic!("two tokens take no 20 seconds"),
            loramux_engine::News::End => break,
        }
    }
    assert!(pieces >= 2);
    assert!(stream.next().is_none());
}

#[test]
fn an_engine_that_goes_away_ends_its_streams() {
    for pieces in 0..4 {
        let llm = engine_with(2, 2);
        let mut stream = llm.generate_async(ask(&PROMPT, greedy(LONG), None)).unwrap();
        for piece in stream.by_ref().take(pieces) {
            piece.unwrap();
        }
        drop(llm);
        // The last tokens may have been on their way already.
        if let Ok(output) = stream.finish() {
            assert_eq!(output.outputs[0].token_ids.len(), LONG);
        }
    }
}
