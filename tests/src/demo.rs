//! Expected answers of the demo model and its four adapters, from transformers and PEFT.

use std::path::{Path, PathBuf};

use lora_core::LoraRequest;
use loramux_engine::{GenerateRequest, Prompt, RequestOutput, SamplingParams};
use serde::Deserialize;

use crate::{assert_greedy, fixtures_dir};

/// One row of `demo-expected.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct DemoCase {
    /// Folder under `demo/adapters`; `None` is the base model.
    pub adapter: Option<String>,
    /// The prompt.
    pub user: String,
    /// Token ids of the prompt in the chat template.
    pub prompt_ids: Vec<u32>,
    /// The greedy answer.
    pub greedy: Vec<u32>,
    /// Best minus second-best logit at each token of the answer.
    pub margin: Vec<f32>,
    /// The answer's text.
    pub text: String,
}

impl DemoCase {
    /// All cases.
    ///
    /// # Panics
    /// If they cannot be read: the checkout is broken.
    pub fn all() -> Vec<Self> {
        let file = std::fs::read(fixtures_dir().join("demo-expected.json")).expect("a fixture");
        serde_json::from_slice(&file).expect("demo-expected.json")
    }

    /// The request that the case describes, with the adapters of a folder.
    ///
    /// # Panics
    /// If the adapter is none of the demo's.
    pub fn request(&self, adapters: &Path) -> GenerateRequest {
        const NAMES: [&str; 4] = ["pirate", "json", "sql", "shout"];
        let lora = self.adapter.as_ref().map(|name| {
            let id = NAMES.iter().position(|n| n == name).expect("an adapter of the demo");
            LoraRequest::new(name, id as i64, adapters.join(name))
        });
        GenerateRequest {
            prompt: Prompt::Ids(self.prompt_ids.clone()),
            sampling: SamplingParams { max_tokens: Some(40), ..SamplingParams::default() },
            lora,
        }
    }

    /// Checks the tokens up to the first step whose margin is below `tie`, and the text if there is no such
    /// step.
    ///
    /// # Panics
    /// If they differ.
    pub fn check(&self, answer: &RequestOutput, tie: f32) {
        let name = format!("{:?}: {}", self.adapter, self.user);
        let output = &answer.outputs[0];
        assert_greedy(&name, &output.token_ids, &self.greedy, &self.margin, tie);
        if self.margin.iter().all(|margin| *margin >= tie) {
            assert_eq!(output.text, self.text, "{name}");
        }
    }
}

/// The folder of the demo's adapters in the checkout.
pub fn demo_adapters() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/adapters")
}
