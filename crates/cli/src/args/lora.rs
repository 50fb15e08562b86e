//! LoRA flags, which override the settings of a `--lora-config` file.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

/// Part of the help of every command that takes `--lora-config`.
pub(super) const FILE_HELP: &str = r#"
A file of --lora-config:
  {"max_lora_rank": 16, "allow_unknown_fields": true, "adapter_tokenizer": "base",
   "trtllm_modules_to_hf_modules": {"attn_q": ["q_proj", "wq"]}}
It may have any field of LoraConfig, under the names that error messages use: where a remedy says
"set allow_noop_adapter: true", add "allow_noop_adapter": true. Unknown fields are refused. Flags
override the file; the rest keeps LoraConfig's defaults.
"#;

/// LoRA settings for reading and checking adapters: a file, and flags that override it.
#[derive(Args, Clone, PartialEq, Default, Debug)]
pub struct LoraConfigArgs {
    /// JSON file with fields of LoraConfig, such as {"allow_noop_adapter": true}
    #[arg(long, value_name = "FILE.json")]
    pub(crate) lora_config: Option<PathBuf>,
    /// Largest rank that an adapter may have [default: 64]
    #[arg(long, value_name = "N")]
    pub(crate) max_lora_rank: Option<NonZeroUsize>,
}

impl LoraConfigArgs {
    /// The settings of a file, without flags.
    pub fn of_file(lora_config: Option<PathBuf>) -> Self {
        Self { lora_config, max_lora_rank: None }
    }
}
