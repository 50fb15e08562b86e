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
    /// A file or directory does not exist.
    #[error("{}: {what} is missing", path.display())]
    Missing {
        /// Where it was expected.
        path: PathBuf,
        /// What was expected there.
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
    /// A pickle names a global other than the functions by which torch rebuilds tensors.
    #[error(
        "{}: its pickle asks for {global}, where only tensors may be built; it was not run. Do not \
         load the file elsewhere: ask its author for safetensors",
        path.display()
    )]
    ForbiddenGlobal {
        /// The file.
        path: PathBuf,
        /// The global, as `module.name`.
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
    /// The adapter has the other format that `lora_ckpt_source` can name.
    #[error("{}: is a {found}; set lora_ckpt_source: {source_name}", path.display())]
    OtherFormat {
        /// The adapter.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// The value of `lora_ckpt_source` for it.
        source_name: &'static str,
    },
    /// The path holds something other than an adapter, which was recognised.
    #[error("{}: {found}", path.display())]
    NotAnAdapter {
        /// The file or folder.
        path: PathBuf,
        /// What it is.
        found: Found,
    },
    /// The reader for this container was not compiled in.
    #[error(
        "{}: is a {container}, and this program was built without the feature {feature:?}; build \
         it with that feature, or convert the adapter to safetensors",
        path.display()
    )]
    NotCompiledIn {
        /// The file.
        path: PathBuf,
        /// Name of the container.
        container: &'static str,
        /// The feature of `lora-core` that enables its reader.
        feature: &'static str,
    },
    /// A full weight of the adapter could not be compared, as the model's own weight is unreadable.
    #[error("the model's weight of {site} cannot be read: {source}; check the model's files")]
    Base {
        /// The site.
        site: SiteKey,
        /// The error of the checkpoint reader.
        source: BaseError,
    },
    /// The adapter can be read but breaks rules, all of which are listed.
    #[error("{}: {rejections}", path.display())]
    Rejected {
        /// The adapter's directory.
        path: PathBuf,
        /// The broken rules.
        rejections: Rejections,
    },
}

impl AdapterError {
    /// Whether no adapter is at the path, or the operating system does not let it be read.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Io { .. } | Self::NotAnAdapter { .. })
    }

    /// The broken rules of [`AdapterError::Rejected`].
    pub fn rejections(&self) -> Option<&Rejections> {
        match self {
            Self::Rejected { rejections, .. } => Some(rejections),
            _ => None,
        }
    }
}

/// The file names of paths, for a message.
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
