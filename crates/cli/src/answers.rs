//! Answers as JSON lines.

use std::io::{self, Write};

use engine::{CompletionOutput, Logprobs, RequestOutput};
use serde::Serialize;
use serde_json::Value;

/// What became of one request.
#[derive(Clone, PartialEq, Debug)]
pub struct Answer {
    /// The request's `id`.
    pub id: Value,
    /// Name of the adapter that it asked for.
    pub lora: Option<String>,
    /// The outputs, or why there are none.
    pub result: Result<RequestOutput, String>,
}

/// An answer's line.
#[derive(Serialize)]
struct AnswerLine<'a> {
    id: &'a Value,
    lora: Option<&'a str>,
    #[serde(flatten)]
    content: Content<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Content<'a> {
    Output {
        prompt_token_ids: &'a [u32],
        outputs: &'a [CompletionOutput],
        prompt_logprobs: Option<&'a [Option<Logprobs>]>,
    },
    Error {
        error: &'a str,
    },
}

impl Answer {
    /// Writes `{"id", "lora", "prompt_token_ids", "outputs", "prompt_logprobs"}`, or
    /// `{"id", "lora", "error"}`, as one line.
    ///
    /// # Errors
    /// If `writer` fails.
    pub fn write_line(&self, writer: &mut dyn Write) -> io::Result<()> {
        let content = match &self.result {
            Ok(output) => Content::Output {
                prompt_token_ids: &output.prompt_token_ids,
                outputs: &output.outputs,
                prompt_logprobs: output.prompt_logprobs.as_deref(),
            },
            Err(error) => Content::Error { error },
        };
        let line = AnswerLine { id: &self.id, lora: self.lora.as_deref(), content };
        serde_json::to_writer(&mut *writer, &line)?;
        writer.write_all(b"\n")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(result: Result<RequestOutput, String>) -> Value {
        let mut bytes = Vec::new();
        let answer = Answer { id: json!([1]), lora: Some("a".to_owned()), result };
        answer.write_line(&mut bytes).unwrap();
        assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1);
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn an_answer_is_one_line_with_outputs_or_an_error() {
        let error = line(Err("first\nsecond".to_owned()));
        assert_eq!(error, json!({"id": [1], "lora": "a", "error": "first\nsecond"}));
        let output = RequestOutput {
            request_id: 9,
            prompt: None,
            prompt_token_ids: vec![5],
            outputs: Vec::new(),
            prompt_logprobs: Some(vec![None]),
            context_logits: None,
        };
        let expected = json!({"id": [1], "lora": "a", "prompt_token_ids": [5], "outputs": [],
            "prompt_logprobs": [null]});
        assert_eq!(line(Ok(output)), expected);
    }
}
