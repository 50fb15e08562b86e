//! Requests: prompts with sampling parameters and adapters.

use lora_core::LoraRequest;

use crate::llm::LlmError;
use crate::sampling::SamplingParams;
use crate::text::ChatMessage;

/// A prompt in one of its forms.
#[derive(Clone, PartialEq, Debug)]
pub enum Prompt {
    /// Text, to be tokenized.
    Text(String),
    /// Token ids, used unchanged.
    Ids(Vec<u32>),
    /// A conversation, to be rendered by the chat template.
    Chat(Vec<ChatMessage>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<ChatMessage>> for Prompt {
    fn from(messages: Vec<ChatMessage>) -> Self {
        Self::Chat(messages)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Self::Ids(ids)
    }
}

/// One prompt with its sampling parameters and adapter.
#[derive(Clone, PartialEq, Debug)]
pub struct GenerateRequest {
    /// The prompt.
    pub prompt: Prompt,
    /// Sampling parameters.
    pub sampling: SamplingParams,
    /// The adapter; `None`: the base model.
    pub lora: Option<LoraRequest>,
}

impl GenerateRequest {
    /// A request to the base model, for one greedy sequence of up to 32 tokens.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Self { prompt: prompt.into(), sampling: SamplingParams::default(), lora: None }
    }

    /// The same with other sampling parameters.
    #[must_use]
    pub fn with_sampling(mut self, sampling: SamplingParams) -> Self {
        self.sampling = sampling;
        self
    }

    /// The same with an adapter. [`crate::Llm::adapter`] finds a registered one by its name.
    #[must_use]
    pub fn with_lora(mut self, lora: LoraRequest) -> Self {
        self.lora = Some(lora);
        self
    }
}

/// A value for every prompt: one for all, or a list with one for each.
#[derive(Clone, PartialEq, Debug)]
pub enum PerPrompt<T> {
    /// The same for every prompt.
    All(T),
    /// By position.
    Each(Vec<T>),
}

impl<T: Clone> PerPrompt<T> {
    /// The values of `prompts` prompts.
    ///
    /// # Errors
    /// [`LlmError::ListLength`] if a list has another length.
    pub fn expand(self, what: &'static str, prompts: usize) -> Result<Vec<T>, LlmError> {
        match self {
            Self::All(value) => Ok(vec![value; prompts]),
            Self::Each(values) if values.len() == prompts => Ok(values),
            Self::Each(values) => Err(LlmError::ListLength { what, found: values.len(), prompts }),
        }
    }
}

impl From<SamplingParams> for PerPrompt<SamplingParams> {
    fn from(params: SamplingParams) -> Self {
        Self::All(params)
    }
}

impl From<Vec<SamplingParams>> for PerPrompt<SamplingParams> {
    fn from(params: Vec<SamplingParams>) -> Self {
        Self::Each(params)
    }
}

/// The base model for every prompt.
impl From<()> for PerPrompt<Option<LoraRequest>> {
    fn from((): ()) -> Self {
        Self::All(None)
    }
}

impl From<LoraRequest> for PerPrompt<Option<LoraRequest>> {
    fn from(lora: LoraRequest) -> Self {
        Self::All(Some(lora))
    }
}

impl From<Vec<LoraRequest>> for PerPrompt<Option<LoraRequest>> {
    fn from(loras: Vec<LoraRequest>) -> Self {
        Self::Each(loras.into_iter().map(Some).collect())
    }
}

impl From<Vec<Option<LoraRequest>>> for PerPrompt<Option<LoraRequest>> {
    fn from(loras: Vec<Option<LoraRequest>>) -> Self {
        Self::Each(loras)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_built_from_a_prompt_and_options() {
        let lora = LoraRequest::new("a", 1, "p");
        let sampling = SamplingParams { seed: Some(3), ..SamplingParams::default() };
        let messages = vec![ChatMessage::system("s"), ChatMessage::user("u")];
        let request = GenerateRequest::new(messages.clone())
            .with_sampling(sampling.clone())
            .with_lora(lora.clone());
        let expected =
            GenerateRequest { prompt: Prompt::Chat(messages), sampling, lora: Some(lora) };
        assert_eq!(request, expected);
        assert_eq!(GenerateRequest::new("p").lora, None);
    }

    #[test]
    fn shorter_and_longer_lists_are_refused() {
        for found in [1, 3] {
            let error = PerPrompt::Each(vec![0; found]).expand("lora_request", 2).unwrap_err();
            assert!(
                matches!(error, LlmError::ListLength { prompts: 2, found: f, .. } if f == found)
            );
        }
        assert_eq!(PerPrompt::All(7).expand("lora_request", 2).unwrap(), [7, 7]);
    }
}
