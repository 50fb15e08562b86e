//! Recognises files and folders that are not adapters, so that an error can say what to do with them.
//!
//! This is used after a reader has failed, and never loads anything. It lists a bounded number of names
//! and looks at the first bytes of files.

use std::fmt;
use std::path::{Path, PathBuf};

use super::AdapterError;
use crate::rules::{Code, listed};

mod file;
mod folder;
mod listing;

pub use file::FileKind;
pub(super) use file::refuse_others;

/// Something that was found in place of an adapter.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Found {
    /// A file that is not an adapter.
    File(FileKind),
    /// A folder without files.
    Empty,
    /// The folder of a repository in Hugging Face's cache.
    HubCache {
        /// The folder with the files, `snapshots/HASH`, if it is the only one or `refs/main` names it.
        snapshot: Option<String>,
    },
    /// The output folder of a trainer, with adapters in subfolders `checkpoint-N`.
    RunFolder {
        /// The latest checkpoint, if possible one with an adapter.
        newest: String,
    },
    /// A folder whose subfolders are adapters.
    AdaptersBelow {
        /// Their names.
        folders: Vec<String>,
    },
    /// An adapter of Apple's MLX.
    Mlx,
    /// A training state of DeepSpeed.
    DeepSpeed,
    /// A checkpoint in torch's distributed format, as FSDP and NeMo 2 write it.
    Distributed,
    /// A training state of Megatron.
    Megatron,
    /// An adapter with torchtune's own tensor names.
    Torchtune {
        /// The weight file.
        file: String,
    },
    /// A LoRA of an image model.
    Diffusers,
    /// A complete model.
    Model,
    /// A PEFT configuration beside weights whose file name is not PEFT's.
    OtherName {
        /// The weight file.
        file: String,
    },
}

impl Found {
    /// A description, as the predicate of a sentence about the path.
    pub fn what(&self) -> String {
        match self {
            Self::File(kind) => kind.what().to_owned(),
            Self::Empty => "is an empty folder".to_owned(),
            Self::HubCache { .. } => "is a folder of Hugging Face's cache".to_owned(),
            Self::RunFolder { .. } => {
                "is the output folder of a training run, without an adapter of its own".to_owned()
            }
            Self::AdaptersBelow { folders } => {
                format!("holds no adapter itself; there are adapters in {}", named(folders))
            }
            Self::Mlx => "is an adapter of Apple's MLX, whose matrices are transposed".to_owned(),
            Self::DeepSpeed => "is a training state of DeepSpeed, cut into partitions".to_owned(),
            Self::Distributed => {
                "is a checkpoint in torch's distributed format (FSDP, NeMo 2)".to_owned()
            }
            Self::Megatron => "is a training state of Megatron".to_owned(),
            Self::Torchtune { file } => {
                format!("is an adapter under torchtune's own names ({})", file.escape_debug())
            }
            Self::Diffusers => "is a LoRA of an image model (diffusers)".to_owned(),
            Self::Model => "is a whole model, not an adapter".to_owned(),
            Self::OtherName { file } => format!(
                "has adapter_config.json and weights named {}, but no adapter_model.safetensors",
                file.escape_debug()
            ),
        }
    }

    /// The remedy.
    fn remedy(&self) -> String {
        match self {
            Self::File(kind) => kind.remedy().to_owned(),
            Self::Empty => {
                "an adapter is a folder with adapter_config.json and adapter_model.safetensors, or \
                 an archive *.nemo"
                    .to_owned()
            }
            Self::HubCache { snapshot: Some(name) } => format!("give {name} below it"),
            Self::HubCache { snapshot: None } => "give one of the folders in snapshots".to_owned(),
            Self::RunFolder { newest } => format!("give a checkpoint; the newest is {newest}"),
            Self::AdaptersBelow { .. } => "give the path of one of them".to_owned(),
            Self::Mlx => {
                "transpose lora_a and lora_b and write them under PEFT's names, or train with PEFT"
                    .to_owned()
            }
            Self::DeepSpeed => {
                "save the adapter with the trainer's save_model, or gather it by its zero_to_fp32.py"
                    .to_owned()
            }
            Self::Distributed => {
                "gather it and save the adapter by PEFT's save_pretrained, or export it to Hugging \
                 Face's format by the program that wrote it"
                    .to_owned()
            }
            Self::Megatron => "export the adapter to PEFT's or NeMo's format".to_owned(),
            Self::Torchtune { .. } => {
                "save it with save_adapter_weights_only and the output format of PEFT".to_owned()
            }
            Self::Diffusers => "language models take LoRA as PEFT saves it for them".to_owned(),
            Self::Model => {
                "give it as the model; a merged model already has its adapter in its weights"
                    .to_owned()
            }
            Self::OtherName { .. } => {
                "rename the file if PEFT wrote it, or save the adapter again".to_owned()
            }
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what(), self.remedy())
    }
}

fn named(names: &[String]) -> String {
    listed(&names.iter().map(|name| name.escape_debug().to_string()).collect::<Vec<_>>())
}

/// Recognises the file or folder at `path`, if users commonly pass such a thing in place of an adapter.
/// Returns the path that it was recognised by, which may be a file in the folder.
pub fn recognise(path: &Path) -> Option<(PathBuf, Found)> {
    if path.is_dir() {
        return folder::recognise(path);
    }
    FileKind::of_file(path).map(|kind| (path.to_owned(), Found::File(kind)))
}

/// Replaces the error of a reader that failed at `path` by one that says what the path holds, if that is
/// recognised.
pub(super) fn explain(path: &Path, error: AdapterError) -> AdapterError {
    let unexplained = match &error {
        AdapterError::Missing { .. } | AdapterError::Io { .. } | AdapterError::Json { .. } => true,
        // Other programs write an adapter_config.json too, with other fields.
        AdapterError::Rejected { rejections, .. } => rejections.has(Code::MissingConfigField),
        _ => false,
    };
    match recognise(path).filter(|_| unexplained) {
        Some((path, found)) => AdapterError::NotAnAdapter { path, found },
        None => error,
    }
}
