//! The demo model's tokenizer and chat template: those written by transformers and those rebuilt from the GGUF metadata
//! must agree.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use candle_core::quantized::gguf_file::Content;
use loramux_engine::text::{ChatMessage, ChatTemplate, GgufVocab, SpecialTokens, Tokenizer};
use proptest::prelude::*;
use serde::Deserialize;

/// One answer of `demo-expected.json`.
#[derive(Deserialize)]
struct Expected {
    user: String,
    prompt_ids: Vec<u32>,
    greedy: Vec<u32>,
    text: String,
}

/// Metadata of the demo model.
fn demo_metadata() -> Content {
    let path = loramux::model_fetch::fetch_model().unwrap();
    Content::read(&mut File::open(path).unwrap()).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn fixture_tokenizer() -> Tokenizer {
    Tokenizer::from_file(&fixture("demo-tokenizer").join("tokenizer.json")).unwrap()
}

fn expected() -> Vec<Expected> {
    serde_json::from_reader(File::open(fixture("demo-expected.json")).unwrap()).unwrap()
}

fn strings(content: &Content, key: &str) -> Vec<String> {
    let list = content.metadata[key].to_vec().unwrap();
    list.iter().map(|value| value.to_string().unwrap().clone()).collect()
}

fn string(content: &Content, key: &str) -> String {
    content.metadata[key].to_string().unwrap().clone()
}

fn vocab(content: &Content) -> GgufVocab {
    let id = |key: &str| content.metadata.get(key).map(|value| value.to_u32().unwrap());
    let types = content.metadata["tokenizer.ggml.token_type"].to_vec().unwrap();
    GgufVocab {
        model: string(content, "tokenizer.ggml.model"),
        pre: string(content, "tokenizer.ggml.pre"),
        tokens: strings(content, "tokenizer.ggml.tokens"),
        token_types: types.iter().map(|value| value.to_i32().unwrap()).collect(),
        merges: strings(content, "tokenizer.ggml.merges"),
        bos: id("tokenizer.ggml.bos_token_id"),
        eos: id("tokenizer.ggml.eos_token_id"),
        unk: id("tokenizer.ggml.unknown_token_id"),
        add_bos: content.metadata.get("tokenizer.ggml.add_bos_token").map(|v| v.to_bool().unwrap()),
    }
}

fn assert_prompts_and_answers(tokenizer: &Tokenizer, template: &ChatTemplate) {
    for case in expected() {
        let message = ChatMessage { role: "user".to_owned(), content: case.user.clone() };
        let prompt = template.render(&[message], true).unwrap();
        let ids = tokenizer.encode(&prompt, SpecialTokens::Skip).unwrap();
        assert_eq!(ids, case.prompt_ids, "{}", case.user);
        assert_eq!(tokenizer.decode(&case.greedy, true).unwrap(), case.text);

        let mut stream = tokenizer.detokenizer(true);
        let mut text = String::new();
        for id in &case.greedy {
            text += &stream.push(*id).unwrap();
        }
        assert_eq!(text + &stream.finish().unwrap(), case.text);
    }
}

#[test]
fn prompts_and_answers_by_the_model_folder_are_those_of_transformers() {
    let template = ChatTemplate::from_model_dir(&fixture("demo-tokenizer")).unwrap();
    assert_prompts_and_answers(&fixture_tokenizer(), &template);
}

#[test]
fn prompts_and_answers_by_the_gguf_file_are_those_of_transformers() {
    let content = demo_metadata();
    let vocab = vocab(&content);
    let token = |id: Option<u32>| vocab.tokens[usize::try_from(id.unwrap()).unwrap()].clone();
    let (bos, eos) = (token(vocab.bos), token(vocab.eos));
    let source = string(&content, "tokenizer.chat_template");
    let template = ChatTemplate::from_source(&source, Some(&bos), Some(&eos)).unwrap();
    assert_prompts_and_answers(&Tokenizer::try_from(vocab).unwrap(), &template);
}

/// Whether the fixture splits `text` as the model's own tokenizer does. transformers drops the GGUF's `smollm`
/// pre-tokenizer, which splits off every digit first; the result differs for spaces before a digit and for numerals
/// that are no ASCII digits.
fn fixture_is_faithful(text: &str) -> bool {
    let letters: Vec<char> = text.chars().collect();
    let spaced_digit =
        |w: &[char]| w[0].is_whitespace() && w[1].is_whitespace() && w[2].is_ascii_digit();
    !letters.iter().any(|c| c.is_numeric() && !c.is_ascii())
        && !letters.windows(3).any(spaced_digit)
}

#[test]
fn the_gguf_file_gives_the_ids_of_tokenizer_json() {
    let content = demo_metadata();
    let (built, saved) = (Tokenizer::try_from(vocab(&content)).unwrap(), fixture_tokenizer());
    assert_eq!(built.vocab_size(), saved.vocab_size());
    for text in [
        "",
        "Hello, world! It's 2024-05-17 at 10:30:59.",
        "fn main() {\n    let x: Vec<u32> = (0..10).map(|i| i * 2).collect();\n}\n",
        "def f(a, b=3):\n\treturn a**b  # comment\n\n\n",
        "  leading and trailing   spaces   ",
        "Ελληνικά, русский, العربية, हिन्दी, 日本語, 한국어",
        "🦙 👩‍👩‍👧‍👦 e\u{301} \u{200b}\u{feff}\u{a0}x \u{0}\u{7f}",
        "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x",
        "1234567890 3.14159 1,000,000 v1.2 x86_64 7\n8",
        "don't we'll I'M CAN'T\r\n\r\nTabs\t\t\tend",
    ] {
        assert_same_ids(&built, &saved, text);
    }
    let random = proptest::test_runner::TestRunner::deterministic().run(
        &"(\\PC|[a-z']{1,8}|[0-9]{1,4}| [A-Z]| ?<\\|im_end\\|>|\n\t?){0,30}",
        |text| {
            prop_assume!(fixture_is_faithful(&text));
            assert_same_ids(&built, &saved, &text);
            Ok(())
        },
    );
    random.unwrap();
}

#[test]
fn the_gguf_file_cuts_digits_off_before_spaces_are_joined() {
    let content = demo_metadata();
    let tokenizer = Tokenizer::try_from(vocab(&content)).unwrap();
    let ids = tokenizer.encode("a  1", SpecialTokens::Skip).unwrap();
    let tokens = ["a", "ĠĠ", "1"].map(|token| tokenizer.token_id(token).unwrap());
    assert_eq!(ids, tokens);
}

fn assert_same_ids(built: &Tokenizer, saved: &Tokenizer, text: &str) {
    let ids = built.encode(text, SpecialTokens::Add).unwrap();
    assert_eq!(ids, saved.encode(text, SpecialTokens::Add).unwrap(), "{text:?}");
    let built_text = built.decode(&ids, true).unwrap();
    assert_eq!(built_text, saved.decode(&ids, true).unwrap(), "{text:?}");
}
