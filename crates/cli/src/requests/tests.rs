//! Lines of requests, right and wrong.

use serde_json::json;

use super::*;

fn defaults() -> Defaults {
    let adapters = vec![LoraRequest::new("a", 0, "pa"), LoraRequest::new("b", 1, "pb")];
    let lora = adapters.first().cloned();
    let Value::Object(sampling) = json!({"max_tokens": 5, "stop": "x"}) else { unreachable!() };
    Defaults { model: "base".to_owned(), adapters, lora, sampling }
}

fn read(text: &[u8]) -> Vec<Line> {
    let lines = text.split(|byte| *byte == b'\n').zip(1..);
    let raw = lines.map(|(bytes, number)| RawLine { number, bytes: Some(bytes.to_vec()) });
    raw.map(|raw| Line::read(&raw, &defaults())).collect()
}

fn adapter(line: &str) -> Option<String> {
    let [line] = &read(line.as_bytes())[..] else { panic!("{line}") };
    let used = line.request.as_ref().unwrap().lora.as_ref().map(|lora| lora.lora_name.clone());
    assert_eq!(used, line.lora);
    used
}

#[test]
fn a_line_overrides_sampling_field_by_field() {
    let lines = read(br#"{"id": 7, "prompt": "p", "sampling": {"max_tokens": 9, "n": 1}}"#);
    let params = &lines[0].request.as_ref().unwrap().sampling;
    assert_eq!((params.max_tokens, params.stop.as_slice()), (Some(9), &["x".to_owned()][..]));
    assert_eq!(lines[0].id.get(), "7");
    let lines = read(br#"{"prompt": "p", "sampling": {"max_tokens": null, "stop": null}}"#);
    let params = &lines[0].request.as_ref().unwrap().sampling;
    assert_eq!((params.max_tokens, params.stop.len()), (None, 0));
}

#[test]
fn null_selects_the_base_model_and_absence_the_default() {
    assert_eq!(adapter(r#"{"prompt": "p"}"#).as_deref(), Some("a"));
    assert_eq!(adapter(r#"{"prompt": "p", "lora": null}"#), None);
    assert_eq!(adapter(r#"{"prompt": "p", "lora": "b"}"#).as_deref(), Some("b"));
    let own = r#"{"prompt": "p", "lora_request": {"lora_name": "c", "lora_int_id": 3}}"#;
    assert_eq!(adapter(own).as_deref(), Some("c"));
}

#[test]
fn malformed_lines_keep_their_id_and_get_an_error() {
    for (line, part) in [
        (r#"{"id": "q", "promt": "p"}"#, "unknown field `promt`"),
        (r#"{"id": "q"}"#, "exactly one of prompt, input_ids and messages"),
        (r#"{"id": "q", "prompt": "p", "input_ids": [1]}"#, "exactly one of"),
        (r#"{"id": "q", "input_ids": [-1]}"#, "-1"),
        (r#"{"id": "q", "prompt": "p", "lora": "z"}"#, "known: a, b"),
        (r#"{"id": "q", "prompt": "p", "prompt": "r"}"#, "duplicate field `prompt`"),
        (r#"{"id": "q", "prompt": "p", "sampling": {"top_p": "x"}}"#, "`top_p`"),
        (r#"{"id": "q", "prompt": "p", "sampling": {"topp": 1}}"#, "`topp`"),
        (r#"{"id": "q", "prompt": "p", "sampling": {"return_context_logits": true}}"#, "logits"),
    ] {
        let lines = read(line.as_bytes());
        let error = lines[0].request.as_ref().unwrap_err();
        assert!(error.contains(part), "{line}: {error}");
        assert_eq!(lines[0].id.get(), "\"q\"");
    }
    let both = r#"{"prompt": "p", "lora": "a",
        "lora_request": {"lora_name": "c", "lora_int_id": 3}}"#;
    let error = read(both.replace('\n', "").as_bytes()).remove(0).request.unwrap_err();
    assert!(error.contains("at most one"), "{error}");
}

#[test]
fn columns_are_reported_without_a_misleading_line() {
    let lines = read(b"{\"prompt\": }");
    let error = lines[0].request.as_ref().unwrap_err();
    assert!(!error.contains("line") && error.ends_with("at column 12"), "{error}");
}

#[test]
fn invalid_utf8_and_too_long_lines_get_an_error() {
    let error = |bytes| Line::read(&RawLine { number: 4, bytes }, &defaults()).request.unwrap_err();
    assert!(error(Some(b"\xff".to_vec())).contains("not UTF-8 from byte 0"));
    assert!(error(None).contains("more than 16777216 bytes"));
}

#[test]
fn ids_keep_their_digits() {
    for id in ["12345678901234567890123", "1.10", "-0", "1e400", "[1, 2]", "\"\\u00e9\"", "null"] {
        for field in ["id", "custom_id"] {
            let line = format!("{{\"{field}\": {id}, \"x\": 1}}");
            assert_eq!(read(line.as_bytes())[0].id.get(), id);
        }
    }
}

#[test]
fn lists_in_the_place_of_objects_are_refused() {
    for line in [
        r#"[null, "p"]"#,
        r#"{"messages": [["user", "x"]]}"#,
        r#"{"prompt": "p", "lora_request": ["c", 3, "p", "hf"]}"#,
        r#"{"prompt": "p", "sampling": [1]}"#,
        r#"{"prompt": "p", "sampling": {"guided_decoding": [null, "a"]}}"#,
        r#"{"custom_id": "a", "body": ["m"]}"#,
    ] {
        let error = read(line.as_bytes()).remove(0).request.unwrap_err();
        assert!(error.contains("a map") || error.contains("object"), "{line}: {error}");
    }
}

#[test]
fn content_may_be_a_list_of_texts() {
    let parts = r#"[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]"#;
    let line =
        format!(r#"{{"messages": [{{"role": "user", "content": {parts}}}], "max_tokens": 3}}"#);
    let request = read(line.as_bytes()).remove(0).request.unwrap();
    assert_eq!(request.prompt, Prompt::Chat(vec![loramux_engine::text::ChatMessage::user("a\nb")]));
    assert_eq!(request.sampling.max_tokens, Some(3));
    let twice = r#"{"prompt": "p", "max_tokens": 3, "sampling": {"max_tokens": 3}}"#;
    assert!(read(twice.as_bytes()).remove(0).request.unwrap_err().contains("once"));
    let image = r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#;
    assert!(read(image.as_bytes()).remove(0).request.unwrap_err().contains("image_url"));
}

#[test]
fn an_openai_line_names_an_adapter_or_the_model() {
    let line = |model: &str| {
        let body = json!({"model": model, "prompt": "p", "max_tokens": 2});
        json!({"custom_id": "x", "url": "/v1/completions", "body": body}).to_string()
    };
    assert_eq!(adapter(&line("b")).as_deref(), Some("b"));
    assert_eq!(adapter(&line("org/base")), None);
    let refused = read(line("other").as_bytes()).remove(0);
    assert!(refused.request.unwrap_err().contains("a, b"));
    assert_eq!(refused.id.get(), "\"x\"");
}

#[test]
fn a_line_that_samples_at_random_gets_its_own_seed() {
    let line = r#"{"prompt": "p", "sampling": {"temperature": 1}}"#;
    let seeds: Vec<Option<u64>> =
        (0..2).map(|_| read(line.as_bytes()).remove(0)).map(|line| line.seed).collect();
    assert!(seeds[0].is_some() && seeds[0] != seeds[1], "{seeds:?}");
    let given = r#"{"prompt": "p", "sampling": {"temperature": 1, "seed": 18446744073709551615}}"#;
    assert_eq!(read(given.as_bytes())[0].seed, Some(u64::MAX));
    assert_eq!(read(br#"{"prompt": "p", "sampling": {"seed": 3}}"#)[0].seed, None);
}

#[test]
fn a_line_cannot_take_the_name_or_number_of_an_adapter_of_the_command_line() {
    for (name, id, part) in [("a", 7, "lora_name \"a\""), ("c", 1, "lora_int_id 1")] {
        let lora = json!({"lora_name": name, "lora_int_id": id, "lora_path": "elsewhere"});
        let line = json!({"prompt": "p", "lora_request": lora}).to_string();
        let error = read(line.as_bytes()).remove(0).request.unwrap_err();
        assert!(error.contains(part) && error.contains("elsewhere"), "{error}");
    }
    let same = json!({"lora_name": "a", "lora_int_id": 0, "lora_path": "pa"});
    let line = json!({"prompt": "p", "lora_request": same}).to_string();
    assert_eq!(adapter(&line).as_deref(), Some("a"));
}
