//! Tokenizers and end tokens in an adapter's folder that do not fit the model.

use std::fs;

use lora_core::{AdapterTokenizer, Code, Rejection};
use loramux_engine::{AdapterText, AdapterTextError, TextModel};
use loramux_tests::model_path;
use serde_json::{Value, json};

use crate::Case;

/// The rejections of a folder with a changed copy of the small Llama's `tokenizer.json` and one more file.
fn beside(change: Option<fn(&mut Value)>, name: &str, content: &Value) -> Vec<Rejection> {
    let (dir, model) = (tempfile::tempdir().unwrap(), model_path("llama"));
    if let Some(change) = change {
        let text = fs::read(model.join("tokenizer.json")).unwrap();
        let mut json = serde_json::from_slice(&text).unwrap();
        change(&mut json);
        fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    }
    fs::write(dir.path().join(name), content.to_string()).unwrap();
    let model = TextModel::of_model(&model).unwrap();
    match AdapterText::read(dir.path(), &model, AdapterTokenizer::Auto) {
        Err(AdapterTextError::Rejected(rejections)) => rejections.0,
        other => panic!("{:?}", other.err()),
    }
}

fn swap_two(json: &mut Value) {
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let (a, b) = (vocab["a"].clone(), vocab["b"].clone());
    vocab.insert("a".to_owned(), b);
    vocab.insert("b".to_owned(), a);
}

pub const CASES: &[Case] = &[
    (Code::OtherVocabulary, || beside(Some(swap_two), "tokenizer_config.json", &json!({}))),
    (Code::TokensWithoutRows, || {
        beside(None, "generation_config.json", &json!({"eos_token_id": [2, 512]}))
    }),
    (Code::UnknownEndToken, || {
        beside(None, "tokenizer_config.json", &json!({"eos_token": "<|im_end|>"}))
    }),
    (Code::AddedTokensAlone, || beside(None, "added_tokens.json", &json!({"<tool>": 510}))),
];
