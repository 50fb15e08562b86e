//! Streamed answers, and aborted requests.

use futures_executor::block_on;
use futures_util::{FutureExt, StreamExt, future, stream};
use loramux_engine::{Delta, FinishReason, ResponseStream, SamplingParams};
use loramux_tests::settle::{ask, assert_nothing_held, engine_with, greedy, lora, settled};

const PROMPT: [u32; 5] = [17, 250, 33, 401, 8];

/// Tokens of an answer long enough not to finish before the test aborts it, even on a busy machine.
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
    let pieces: Vec<Delta> =
        llm.generate_async(request()).unwrap().blocking().map(Result::unwrap).collect();
    for output in &whole.outputs {
        let of = || pieces.iter().filter(|piece| piece.output == output.index);
        assert_eq!(of().map(|p| p.text.as_str()).collect::<String>(), output.text);
        assert_eq!(of().flat_map(|p| p.token_ids.clone()).collect::<Vec<_>>(), output.token_ids);
        assert_eq!(of().map(|p| p.logprobs.len()).sum::<usize>(), output.token_ids.len());
        let ends: Vec<_> = of().filter_map(|piece| piece.finish_reason).collect();
        assert_eq!(
            ends,
            [FinishReason::Length],
            "the finish reason is reported once, in the last piece"
        );
    }
}

#[test]
fn an_aborted_request_ends_with_what_it_has() {
    let llm = engine_with(2, 2);
    let long = || ask(&PROMPT, greedy(LONG), Some(lora("llama.attn-r8", 1)));
    let mut stream = llm.generate_async(long()).unwrap();
    assert!(stream.blocking().next().unwrap().unwrap().finish_reason.is_none());
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
    let sampled = settled(&llm).generated_tokens - before;
    assert!(sampled < 40 + LONG as u64, "the dropped request ran on: {sampled} tokens");
}

#[test]
fn one_thread_serves_many_streams_without_waiting_for_any() {
    let llm = engine_with(2, 2);
    let request = |n: u32| ask(&[17, 250, n], greedy(12), Some(lora("llama.attn-r8", 1)));
    let alone = |n| llm.generate_async(request(n)).unwrap().finish().unwrap().outputs;
    let alone: Vec<_> = (0..4).map(alone).collect();

    let streams = || (0..4).map(|n| llm.generate_async(request(n)).unwrap());
    let together = block_on(future::join_all(streams().map(ResponseStream::output)));
    let together: Vec<_> = together.into_iter().map(|output| output.unwrap().outputs).collect();
    assert_eq!(together, alone);

    let tagged = streams().enumerate().map(|(n, stream)| stream.map(move |delta| (n, delta)));
    let deltas: Vec<_> = block_on(stream::select_all(tagged).collect());
    for (n, outputs) in alone.iter().enumerate() {
        let of_stream = deltas.iter().filter(|(from, _)| *from == n);
        let ids: Vec<u32> =
            of_stream.flat_map(|(_, delta)| delta.as_ref().unwrap().token_ids.clone()).collect();
        assert_eq!(ids, outputs[0].token_ids);
    }

    let mut stream = llm.generate_async(ask(&PROMPT, greedy(LONG), None)).unwrap();
    block_on(stream.next()).unwrap().unwrap();
    while let Some(Some(delta)) = stream.next().now_or_never() {
        delta.unwrap();
    }
    drop(stream);
    assert_nothing_held(&llm);
}

#[test]
fn an_engine_that_goes_away_ends_its_streams() {
    for pieces in 0..4 {
        let llm = engine_with(2, 2);
        let mut stream = llm.generate_async(ask(&PROMPT, greedy(LONG), None)).unwrap();
        for piece in stream.blocking().take(pieces) {
            piece.unwrap();
        }
        drop(llm);
        // The last tokens may already have been sent.
        if let Ok(output) = stream.finish() {
            assert_eq!(output.outputs[0].token_ids.len(), LONG);
        }
    }
}
