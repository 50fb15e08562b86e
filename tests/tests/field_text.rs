//! Tokenizer, chat template and end tokens in an adapter's folder: kind K4 of `fixtures/field`, and files that cannot be
//! used.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lora_core::{AdapterTokenizer, DType, LoraConfig, LoraRequest};
use lora_cpu_ref::CpuRef;
use loramux_engine::text::ChatMessage;
use loramux_engine::{
    FinishReason, GenerateRequest, GuidedDecodingParams, Llm, LlmError, Prompt, RequestOutput,
    SamplingParams,
};
use loramux_tests::{adapter_path, builder, field_cases, field_dir, field_model, run};
use serde::Deserialize;
use serde_json::{Value, json};

/// A case with text requests.
#[derive(Clone)]
struct Case {
    id: String,
    model: String,
    adapter: String,
    note: Note,
}

/// The expected result of a request with the adapter's own files.
#[derive(Clone, Deserialize)]
struct Note {
    messages: Option<Vec<ChatMessage>>,
    text: Option<String>,
    prompt_ids: Vec<u32>,
    prompt_ids_of_the_base: Option<Vec<u32>>,
    stop_ids: Vec<u32>,
    greedy_before_stop: Vec<u32>,
    finish_reason: String,
}

impl Case {
    fn all() -> Vec<Self> {
        let noted = field_cases().into_iter().filter_map(|case| Some((case.case, case.note?)));
        let in_words = noted.map(|(case, note)| Self {
            id: case.id,
            model: case.model,
            adapter: case.adapter.unwrap(),
            note: serde_json::from_value(note).unwrap(),
        });
        in_words.collect()
    }

    fn of(adapter: &str) -> Self {
        Self::all().into_iter().find(|case| case.adapter == adapter).unwrap()
    }

    fn prompt(&self) -> Prompt {
        match (&self.note.messages, &self.note.text) {
            (Some(messages), None) => Prompt::Chat(messages.clone()),
            (None, Some(text)) => Prompt::Text(text.clone()),
            _ => panic!("{} has neither messages nor text", self.id),
        }
    }

    fn request(&self, adapter: Option<LoraRequest>) -> GenerateRequest {
        let sampling = SamplingParams {
            max_tokens: Some(12),
            add_special_tokens: false,
            ..SamplingParams::default()
        };
        GenerateRequest { prompt: self.prompt(), sampling, lora: adapter }
    }

    fn check(&self, answer: &RequestOutput) {
        let (note, output) = (&self.note, &answer.outputs[0]);
        assert_eq!(answer.prompt_token_ids, note.prompt_ids, "{}", self.id);
        let tokens = match output.token_ids.split_last() {
            Some((last, before)) if note.stop_ids.contains(last) => before,
            _ => &output.token_ids,
        };
        assert_eq!(tokens, note.greedy_before_stop, "{}", self.id);
        let reason = match note.finish_reason.as_str() {
            "stop" => FinishReason::Stop,
            _ => FinishReason::Length,
        };
        assert_eq!(output.finish_reason, reason, "{}", self.id);
    }
}

fn adapter_dir(name: &str) -> PathBuf {
    field_dir().join("adapters").join(name)
}

fn adapter(name: &str, id: i64) -> LoraRequest {
    LoraRequest::new(name, id, adapter_dir(name))
}

fn engine(name: &str, adapter_tokenizer: AdapterTokenizer) -> Llm {
    let lora = LoraConfig { max_loras: Some(8), adapter_tokenizer, ..LoraConfig::default() };
    let builder = builder(&field_model(name), DType::F32).lora_config(lora);
    builder.build(|| CpuRef::with_threads(None)).expect("the fixture model loads")
}

fn auto(name: &str) -> Llm {
    engine(name, AdapterTokenizer::Auto)
}

fn chat() -> GenerateRequest {
    Case::of("llama.own-eos").request(None)
}

/// A copy of a case's adapter folder, to be changed.
struct Copy(tempfile::TempDir);

impl Copy {
    fn of(adapter: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(adapter_dir(adapter)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        Self(dir)
    }

    fn write(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        fs::write(self.0.path().join(name), content).unwrap();
        self
    }

    fn without(self, name: &str) -> Self {
        fs::remove_file(self.0.path().join(name)).unwrap();
        self
    }

    fn edit(self, name: &str, change: impl FnOnce(&mut Value)) -> Self {
        let mut json: Value =
            serde_json::from_slice(&fs::read(self.0.path().join(name)).unwrap()).unwrap();
        change(&mut json);
        self.write(name, json.to_string())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn lora(&self, id: i64) -> LoraRequest {
        LoraRequest::new(format!("copy-{id}"), id, self.path())
    }
}

/// Adds a token to a `tokenizer.json`.
fn add_token(json: &mut Value, token: &str, id: u32) {
    json["added_tokens"].as_array_mut().unwrap().push(json!({"id": id, "content": token,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true}));
}

#[test]
fn every_note_is_served_alone_and_among_others() {
    for name in ["llama", "llama520"] {
        let llm = auto(name);
        let cases: Vec<_> = Case::all().into_iter().filter(|case| case.model == name).collect();
        assert!(!cases.is_empty());
        let asked = |(case, id): (&Case, i64)| case.request(Some(adapter(&case.adapter, id)));
        let alone: Vec<_> =
            cases.iter().zip(1..).flat_map(|case| run(&llm, vec![asked(case)])).collect();
        let base = GenerateRequest { prompt: Prompt::Text("How many books?".to_owned()), ..chat() };
        let base_alone = run(&llm, vec![base.clone()]);
        let mut requests: Vec<_> = cases.iter().zip(1..).map(asked).collect();
        requests.insert(1, base);
        let mut mixed = run(&llm, requests);
        assert_eq!(mixed.remove(1).outputs, base_alone[0].outputs, "{name}: the base model");
        for ((case, alone), mixed) in cases.iter().zip(&alone).zip(&mixed) {
            case.check(alone);
            case.check(mixed);
            assert_eq!(alone.outputs, mixed.outputs, "{}: the batch matters", case.id);
        }
    }
}

#[test]
fn the_text_of_the_base_is_used_where_the_setting_says_so() {
    for case in Case::all() {
        let llm = engine(&case.model, AdapterTokenizer::Base);
        let request = case.request(Some(adapter(&case.adapter, 1)));
        match &case.note.prompt_ids_of_the_base {
            Some(ids) => assert_eq!(run(&llm, vec![request])[0].prompt_token_ids, *ids),
            None => assert!(matches!(fails(&llm, request), LlmError::NoChatTemplate { .. })),
        }
    }
    let llm = engine("llama", AdapterTokenizer::Base);
    assert_eq!(llm.adapter_text(&adapter("llama.own-eos", 1)).unwrap().end_ids(), [2]);
}

fn fails(llm: &Llm, request: GenerateRequest) -> LlmError {
    llm.generate_each(vec![request], &mut |_| ()).remove(0).unwrap_err()
}

#[test]
fn a_template_of_the_adapter_is_not_the_models() {
    let llm = auto("llama");
    let case = Case::of("llama.own-eos");
    case.check(&run(&llm, vec![case.request(Some(adapter(&case.adapter, 1)))])[0]);
    assert!(matches!(fails(&llm, chat()), LlmError::NoChatTemplate { .. }));
    let plain = LoraRequest::new("plain", 2, adapter_path("llama.attn-r8"));
    let other = GenerateRequest { lora: Some(plain), ..chat() };
    assert!(matches!(fails(&llm, other), LlmError::NoChatTemplate { .. }));
    assert_eq!(llm.text().end_ids(), [2]);
}

#[test]
fn a_stream_is_detokenized_by_the_adapters_tokenizer() {
    let llm = auto("llama520");
    let case = Case::of("llama520.added-tokens");
    // The only allowed next token is one that the model's tokenizer lacks.
    let only = (0..520).filter(|id| *id != 512).collect();
    let sampling = SamplingParams {
        max_tokens: Some(2),
        bad_token_ids: only,
        skip_special_tokens: false,
        ..SamplingParams::default()
    };
    let text = |lora| {
        let request = GenerateRequest { sampling: sampling.clone(), ..case.request(lora) };
        let mut stream = llm.generate_async(request).unwrap();
        stream.blocking().map(|delta| delta.unwrap().text).collect::<String>()
    };
    assert_eq!(text(Some(adapter(&case.adapter, 1))), "<tool><tool>");
    assert_eq!(text(None), "");
}

#[test]
fn guides_and_bad_words_use_the_adapters_tokenizer() {
    let copy = Copy::of("llama520.added-tokens").edit("tokenizer.json", |json| {
        for token in json["added_tokens"].as_array_mut().unwrap() {
            token["special"] = json!(token["id"].as_u64() < Some(512));
        }
    });
    let llm = auto("llama520");
    let case = Case::of("llama520.added-tokens");
    let lora = copy.lora(1);
    let guide = GuidedDecodingParams {
        regex: Some("<tool>|<result>".to_owned()),
        ..GuidedDecodingParams::default()
    };
    let ask = |bad: &[&str]| {
        let sampling = SamplingParams {
            max_tokens: Some(20),
            guided_decoding: Some(guide.clone()),
            bad_token_ids: (3..512).collect(),
            bad: bad.iter().map(ToString::to_string).collect(),
            ..SamplingParams::default()
        };
        let request = GenerateRequest { sampling, ..case.request(Some(lora.clone())) };
        run(&llm, vec![request]).remove(0).outputs.remove(0)
    };
    let free = ask(&[]);
    let other = ["<tool>", "<result>"].into_iter().find(|word| *word != free.text).unwrap();
    assert!([512, 513].contains(&free.token_ids[0]), "{free:?}");
    assert_eq!(ask(&[&free.text]).text, other);
}

#[test]
fn the_same_tokenizer_in_another_form_is_the_models() {
    let llm = auto("llama520");
    let copy = Copy::of("llama520.own-template").without("chat_template.jinja");
    let copy = copy.edit("tokenizer.json", |json| json["padding"] = Value::Null);
    let text = llm.adapter_text(&copy.lora(1)).unwrap();
    assert!(std::ptr::eq(text.as_ref(), llm.text()), "nothing is taken");
}

#[test]
fn end_tokens_of_the_generation_config_replace_the_models() {
    let llm = auto("llama");
    let copy =
        Copy::of("llama.own-eos").write("generation_config.json", r#"{"eos_token_id": [5, 6]}"#);
    assert_eq!(llm.adapter_text(&copy.lora(1)).unwrap().end_ids(), [5, 6, 278]);
    let copy = copy.without("tokenizer_config.json");
    assert_eq!(llm.adapter_text(&copy.lora(2)).unwrap().end_ids(), [5, 6]);
}

#[test]
fn a_padding_token_without_a_row_does_not_matter() {
    let padded = |pad: &str| {
        Copy::of("llama.own-eos")
            .edit("tokenizer.json", |json| add_token(json, "<pad>", 512))
            .edit("tokenizer_config.json", |json| json["pad_token"] = json!(pad))
    };
    let llm = auto("llama");
    let (copy, case) = (padded("<pad>"), Case::of("llama.own-eos"));
    case.check(&run(&llm, vec![case.request(Some(copy.lora(1)))])[0]);
    let spelled = GenerateRequest {
        prompt: Prompt::Text("a <pad>".to_owned()),
        ..case.request(Some(copy.lora(1)))
    };
    assert!(matches!(fails(&llm, spelled), LlmError::TokenId { found: 512, vocab: 512, .. }));
    let other = padded("</s>");
    let error = fails(&llm, case.request(Some(other.lora(2)))).to_string();
    assert!(error.contains("<pad> (512)") && error.contains("tokens-without-rows"), "{error}");
}

#[test]
fn another_vocabulary_is_refused_unless_it_is_asked_for() {
    let swapped = |json: &mut Value| {
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        let (a, b) = (vocab["Ġa"].clone(), vocab["Ġb"].clone());
        vocab.insert("Ġa".to_owned(), b);
        vocab.insert("Ġb".to_owned(), a);
    };
    let copy = Copy::of("llama.own-eos").edit("tokenizer.json", swapped);
    let (text, lora) = (Prompt::Text("book a".to_owned()), Some(copy.lora(1)));
    let request = GenerateRequest { prompt: text, lora, ..chat() };
    let error = fails(&auto("llama"), request.clone()).to_string();
    assert!(error.contains("other-vocabulary") && error.contains("adapter_tokenizer"), "{error}");
    let ids =
        |whose| run(&engine("llama", whose), vec![request.clone()])[0].prompt_token_ids.clone();
    assert_ne!(ids(AdapterTokenizer::Adapter), ids(AdapterTokenizer::Base));
}

/// The error of a request for an adapter, while a request for the base model beside it is served.
fn refused(copy: &Copy) -> String {
    let llm = auto("llama");
    let good = GenerateRequest { prompt: Prompt::Ids(vec![5, 6]), ..chat() };
    let bad = GenerateRequest { lora: Some(copy.lora(1)), ..good.clone() };
    let mut answers = llm.generate_each(vec![good.clone(), bad.clone(), good], &mut |_| ());
    let refused = answers.remove(1).unwrap_err();
    assert!(answers.iter().all(Result::is_ok));
    assert!(matches!(refused, LlmError::Adapter(_)), "{refused:?}");
    let loaded = llm.load_adapter(&copy.lora(1), false).unwrap_err();
    assert_eq!(loaded.to_string(), refused.to_string());
    assert!(llm.list_adapters().unwrap().is_empty(), "it may be corrected and asked for again");
    let base = engine("llama", AdapterTokenizer::Base);
    assert!(base.generate_each(vec![bad], &mut |_| ()).remove(0).is_ok(), "the way out");
    refused.to_string()
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let copy = || Copy::of("llama.own-eos");
    let eos = |token: &'static str| {
        copy().edit("tokenizer_config.json", move |json| json["eos_token"] = json!(token))
    };
    let generation = |text: &str| copy().write("generation_config.json", text);
    for (copy, named) in [
        (copy().edit("tokenizer.json", |j| add_token(j, "<tool>", 512)), ["<tool> (512)", "511"]),
        (generation(r#"{"eos_token_id": [2, 600]}"#), ["generation_config.json", "600"]),
        (generation(r#"{"eos_token_id": "</s>"}"#), ["generation_config.json", "token id"]),
        (generation("{"), ["generation_config.json", "EOF"]),
        (eos("<nowhere>"), ["eos_token", "<nowhere>"]),
        (copy().write("tokenizer_config.json", "[1"), ["tokenizer_config.json", "cannot be used"]),
        (copy().write("tokenizer.json", "{}"), ["tokenizer.json", "not a usable tokenizer"]),
        (copy().write("chat_template.jinja", "{% if %}"), ["chat template", "compiled"]),
        (
            copy().without("tokenizer.json").write("added_tokens.json", r#"{"<tool>": 9}"#),
            ["added_tokens.json", "<tool> (9)"],
        ),
    ] {
        let error = refused(&copy);
        for name in named.iter().chain(&["copy-1", "adapter_tokenizer: base"]) {
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}

#[test]
fn files_that_never_end_are_refused_at_once() {
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "added_tokens.json",
    ] {
        let copy = Copy::of("llama.own-eos");
        let path = copy.path().join(name);
        let _ = fs::remove_file(&path);
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let error = refused(&copy);
        assert!(error.contains(name) && error.contains("not a regular file"), "{error}");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(refused(&copy).contains("not a regular file"));
        fs::remove_file(&path).unwrap();
        fs::File::create(&path).unwrap().set_len(1 << 35).unwrap();
        let error = refused(&copy);
        assert!(error.contains(name) && error.contains("at most"), "{error}");
    }
}

#[test]
fn text_is_read_once_and_again_when_the_adapter_is_loaded() {
    let llm = auto("llama");
    let copy = Copy::of("llama.own-eos");
    let ends = || llm.adapter_text(&copy.lora(1)).unwrap().end_ids().to_vec();
    assert_eq!(ends(), [2, 278]);
    let copy_file = copy.path().join("generation_config.json");
    fs::write(&copy_file, r#"{"eos_token_id": 7}"#).unwrap();
    assert_eq!(ends(), [2, 278], "a file that changes does not matter");
    llm.load_adapter(&copy.lora(1), false).unwrap();
    assert_eq!(ends(), [7, 278], "until the adapter is loaded again");
    fs::write(&copy_file, "{").unwrap();
    assert!(llm.load_adapter(&copy.lora(1), false).is_err());
    assert_eq!(ends(), [7, 278], "what cannot be loaded changes nothing");
}
