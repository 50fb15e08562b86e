//! Settings of LoRA on the command line.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

/// Part of the help of every command that takes `--lora-config`.
pub(super) const FILE_HELP: &str = r#"
A file of --lora-config:
  {"max_lora_rank": 16, "allow_unknown_fields": true, "adapter_tokenizer": "base",
   "trtllm_modules_to_hf_modules": {"attn_q": ["q_proj", "wq"]}}
It has any of the fields of LoraConfig, under the names that refusals and their remedies use: where
one says "set allow_noop_adapter: true", add "allow_noop_adapter": true. Other fields are refused.
Flags override its values; what neither gives has LoraConfig's default.
"#;

/// Where the settings of LoRA come from: flags, then a file, then the defaults.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct LoraSettings {
    /// A JSON file with fields of [`lora_core::LoraConfig`].
    pub file: Option<PathBuf>,
    /// Largest rank of an adapter.
    pub max_lora_rank: Option<usize>,
    /// Adapters that one step can use.
    pub max_loras: Option<usize>,
}

/// The settings of LoRA that reading and checking an adapter need.
#[derive(Args)]
pub(super) struct LoraConfigArgs {
    /// JSON file with fields of LoraConfig, such as {"allow_noop_adapter": true}
    #[arg(long, value_name = "FILE.json")]
    lora_config: Option<PathBuf>,
    /// Largest rank that an adapter may have [default: 64]
    #[arg(long, value_name = "N")]
    max_lora_rank: Option<NonZeroUsize>,
}

impl LoraConfigArgs {
    /// Settings with nothing else chosen.
    pub fn settings(self) -> LoraSettings {
        LoraSettings {
            file: self.lora_config,
            max_lora_rank: self.max_lora_rank.map(NonZeroUsize::get),
            max_loras: None,
        }
    }
}
