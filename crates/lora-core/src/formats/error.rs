//! Why an adapter could not be read.

use std::path::{Path, PathBuf};

use super::base::BaseError;
use super::recognise::Found;
use crate::modules::SiteKey;
use crate::rules::{Rejections, listed};

/// Why an adapter could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file or directory is not there.
    #[error("{}: {what} is missing", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// What was looked for.
        what: String,
    },
    /// The operating system refused to read a file.
    #[error("{}: cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A JSON file is malformed.
    #[error("{}: is not valid JSON: {source}; export it again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// A weight file ends too early.
    #[error(
        "{}: has {found} bytes, its header needs {needed}; copy the file again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that the file has.
        found: u64,
        /// Bytes that it should have at least.
        needed: u64,
    },
    /// A weight file is not in the safetensors format.
    #[error("{}: is not a safetensors file: {problem}; export it again", path.display())]
    InvalidSafetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An index of weight files contradicts itself or the files.
    #[error("{}: {problem}; copy all of its files again", path.display())]
    InvalidIndex {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A torch file is damaged, or holds something other than a state dict.
    #[error(
        "{}: is not a torch state dict that can be read: {problem}; save it again with torch.save, \
         or convert it to safetensors",
        path.display()
    )]
    InvalidTorch {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A pickle names something else than torch's builders of tensors.
    #[error(
        "{}: its pickle asks for {global}, where only tensors may be built; it was not run. Do not \
         load the file elsewhere: ask its author for safetensors",
        path.display()
    )]
    ForbiddenGlobal {
        /// The file.
        path: PathBuf,
        /// The module and the name in it.
        global: String,
    },
    /// A NeMo archive is damaged, or has members that an adapter does not have.
    #[error("{}: is not a NeMo adapter that can be read: {problem}", path.display())]
    InvalidNemo {
        /// The archive.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// A folder holds more than one NeMo archive.
    #[error(
        "{}: holds {} NeMo archives ({}); give the path of one of them",
        path.display(),
        archives.len(),
        file_names(archives)
    )]
    SeveralArchives {
        /// The folder.
        path: PathBuf,
        /// The archives.
        archives: Vec<PathBuf>,
    },
    /// The adapter is of the other format that can be asked for.
    #[error("{}: is a {found}; set lora_ckpt_source: {source_name}", path.display())]
    OtherFormat {
        /// The adapter.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// The value of `lora_ckpt_source` that reads it.
        source_name: &'static str,
    },
    /// Something else lies where an adapter, or a file of one, should be.
    #[error("{}: {found}", path.display())]
    NotAnAdapter {
        /// The file or folder.
        path: PathBuf,
        /// What it is.
        found: Found,
    },
    /// The weights are in a container whose reader was left out when this program was built.
    #[error(
        "{}: is a {container}, and this program was built without the feature {feature:?}; build \
         it with that feature, or convert the adapter to safetensors",
        path.display()
    )]
    NotCompiledIn {
        /// The file.
        path: PathBuf,
        /// The container's name.
        container: &'static str,
        /// The feature of `lora-core` that has its reader.
        feature: &'static str,
    },
    /// A weight of the model, with which one of the adapter's is to be compared, cannot be read.
    #[error("the model's weight of {site} cannot be read: {source}; check the model's files")]
    Base {
        /// The site.
        site: SiteKey,
        /// What the checkpoint's reader said.
        source: BaseError,
    },
    /// The adapter is readable and breaks rules; all of them are listed.
    #[error("{}: {rejections}", path.display())]
    Rejected {
        /// The adapter's directory.
        path: PathBuf,
        /// The rules that it breaks.
        rejections: Rejections,
    },
}

impl AdapterError {
    /// Whether no adapter is at the path, or the operating system does not let it be read.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Io { .. } | Self::NotAnAdapter { .. })
    }

    /// The broken rules, when the adapter was readable.
    pub fn rejections(&self) -> Option<&Rejections> {
        match self {
            Self::Rejected { rejections, .. } => Some(rejections),
            _ => None,
        }
    }
}

/// The last parts of paths, for a message.
fn file_names(paths: &[PathBuf]) -> String {
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    listed(&paths.iter().map(name).collect::<Vec<_>>())
}

pub(crate) fn io_error(path: &Path, source: std::io::Error) -> AdapterError {
    let path = path.to_owned();
    if source.kind() == std::io::ErrorKind::NotFound {
        AdapterError::Missing { path, what: "this file".to_owned() }
    } else {
        AdapterError::Io { path, source }
    }
}
