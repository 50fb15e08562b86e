//! Answers as JSON lines.

use loramux_engine::{CompletionOutput, Logprobs, RequestOutput};
use serde::Serialize;
use serde_json::value::RawValue;

/// The outcome of one request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The request's `id`, verbatim.
    pub id: Box<RawValue>,
    /// Name of the requested adapter.
    pub lora: Option<String>,
    /// Seed of a request that sampled at random; `None` under greedy decoding.
    pub seed: Option<u64>,
    /// The outputs, or the error message.
    pub result: Result<RequestOutput, String>,
}

/// An answer's line.
#[derive(Serialize)]
struct AnswerLine<'a> {
    id: &'a RawValue,
    lora: Option<&'a str>,
    #[serde(flatten)]
    content: Content<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Content<'a> {
    Output {
        #[serde(skip_serializing_if = "Option::is_none")]
        seed: Option<u64>,
        prompt_token_ids: &'a [u32],
        outputs: &'a [CompletionOutput],
        prompt_logprobs: Option<&'a [Option<Logprobs>]>,
    },
    Error {
        error: &'a str,
    },
}

impl Answer {
    /// `{"id", "lora", "seed", "prompt_token_ids", "outputs", "prompt_logprobs"}`, where `seed` may be
    /// missing, or `{"id", "lora", "error"}`, as one line with its newline.
    ///
    /// # Errors
    /// If the answer cannot be serialised.
    pub fn line(&self) -> serde_json::Result<Vec<u8>> {
        let content = match &self.result {
            Ok(output) => Content::Output {
                seed: self.seed,
                prompt_token_ids: &output.prompt_token_ids,
                outputs: &output.outputs,
                prompt_logprobs: output.prompt_logprobs.as_deref(),
            },
            Err(error) => Content::Error { error },
        };
        let line = AnswerLine { id: &self.id, lora: self.lora.as_deref(), content };
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn line(id: &str, seed: Option<u64>, result: Result<RequestOutput, String>) -> String {
        let id = RawValue::from_string(id.to_owned()).unwrap();
        let answer = Answer { id, lora: Some("a".to_owned()), seed, result };
        let line = String::from_utf8(answer.line().unwrap()).unwrap();
        assert_eq!(line.matches('\n').count(), 1);
        line
    }

    #[test]
    fn an_answer_is_one_line_with_outputs_or_an_error() {
        let error = line("[1]", None, Err("first\nsecond".to_owned()));
        let error: Value = serde_json::from_str(&error).unwrap();
        assert_eq!(error, json!({"id": [1], "lora": "a", "error": "first\nsecond"}));
        let output = RequestOutput {
            request_id: 9,
            prompt: None,
            prompt_token_ids: vec![5],
            outputs: Vec::new(),
            prompt_logprobs: Some(vec![None]),
            context_logits: None,
        };
        let digits = "123456789012345678901234567890.10";
        let expected = format!(
            "{{\"id\":{digits},\"lora\":\"a\",\"seed\":3,\"prompt_token_ids\":[5],\"outputs\":[],\
             \"prompt_logprobs\":[null]}}\n"
        );
        assert_eq!(line(digits, Some(3), Ok(output)), expected);
    }
}
