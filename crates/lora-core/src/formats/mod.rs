//! Readers of adapter files.

use std::path::{Path, PathBuf};

use crate::adapter::Adapter;
use crate::config::{CkptSource, ExpertLayout, LoraConfig, NemoQkvLayout};
use crate::geometry::ModelGeometry;
use crate::modules::ModuleMap;
use crate::rules::Rejections;

mod assemble;
mod fused;
mod plan;
mod raw;
mod source;
mod view;

pub mod peft;
pub mod safetensors;

pub use raw::{ElementType, RawTensor, RawTensors};
pub use source::{Source, SourceReader};

/// How adapter files are read.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Which file format the path holds.
    pub source: CkptSource,
    /// Target modules of the names in the file.
    pub modules: ModuleMap,
    /// Tolerate, with a warning, configuration fields that are not known.
    pub allow_unknown_fields: bool,
    /// Give experts without weights a change of zero.
    pub allow_missing_experts: bool,
    /// The layout of routed-expert weights; `None`: the one that the file shows.
    pub moe_layout: Option<ExpertLayout>,
    /// Order of fused query, key and value rows in NeMo archives.
    pub nemo_qkv_layout: NemoQkvLayout,
    /// Order of the rows of `gate_up_proj`: gate first, or up first.
    pub gate_first: bool,
    /// The model that the adapter is read for, where there is one. It settles what a file leaves
    /// open: fused modules are cut into the parts that the model has, and layouts are told apart
    /// that only the model's dimensions can tell apart.
    pub model: Option<ModelGeometry>,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            source: CkptSource::Hf,
            modules: ModuleMap::default(),
            allow_unknown_fields: false,
            allow_missing_experts: false,
            moe_layout: None,
            nemo_qkv_layout: NemoQkvLayout::default(),
            gate_first: true,
            model: None,
        }
    }
}

impl ReadOptions {
    /// The options that an engine's configuration asks for.
    ///
    /// # Errors
    /// A `trtllm_modules_to_hf_modules` that is no map.
    pub fn from_config(config: &LoraConfig) -> Result<Self, Rejections> {
        Ok(Self {
            source: config.lora_ckpt_source,
            modules: ModuleMap::from_user(&config.trtllm_modules_to_hf_modules)?,
            allow_unknown_fields: config.allow_unknown_fields,
            allow_missing_experts: config.allow_missing_experts,
            moe_layout: config.moe_layout,
            nemo_qkv_layout: config.nemo_qkv_layout,
            gate_first: config.swap_gate_up_proj_lora_b_weight,
            model: None,
        })
    }

    /// The same options for an adapter that will be served on `model`.
    #[must_use]
    pub fn for_model(mut self, model: ModelGeometry) -> Self {
        self.model = Some(model);
        self
    }

    /// The same options for a file of another format.
    #[must_use]
    pub fn with_source(mut self, source: CkptSource) -> Self {
        self.source = source;
        self
    }
}

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
    /// The weights are in a container that is not read.
    #[error(
        "{}: {container} files are not readable yet; convert it to safetensors",
        path.display()
    )]
    UnsupportedContainer {
        /// The file.
        path: PathBuf,
        /// The container's name.
        container: &'static str,
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
    /// The broken rules, when the adapter was readable.
    pub fn rejections(&self) -> Option<&Rejections> {
        match self {
            Self::Rejected { rejections, .. } => Some(rejections),
            _ => None,
        }
    }
}

/// The configuration with `lora_target_modules` filled in: where it names none, the modules of the
/// adapter in `lora_dir`. Where there is no such adapter either, none are named, which means all.
///
/// # Errors
/// See [`load`].
pub fn settle_targets(mut config: LoraConfig) -> Result<LoraConfig, AdapterError> {
    if let (Some(dir), []) = (config.lora_dir.first(), &config.lora_target_modules[..]) {
        let options = ReadOptions::from_config(&config)
            .map_err(|rejections| AdapterError::Rejected { path: dir.clone(), rejections })?;
        let adapter = load(dir, &options)?;
        config.lora_target_modules = adapter.modules().iter().map(ToString::to_string).collect();
    }
    Ok(config)
}

/// Reads the adapter at `path` and checks everything that can be checked without a model;
/// [`Adapter::check`] does the rest.
///
/// The files are read once and copied whole, so what happens to them afterwards does not touch the
/// adapter: its tensors are windows of one buffer for each file.
///
/// # Errors
/// See [`AdapterError`]. A readable adapter that breaks rules is [`AdapterError::Rejected`] with
/// all of them.
pub fn load(path: &Path, options: &ReadOptions) -> Result<Adapter, AdapterError> {
    let archive = nemo_archive(path);
    match (options.source, archive) {
        (CkptSource::Hf, None) => peft::read(path, options),
        (CkptSource::Hf, Some(path)) => {
            Err(AdapterError::UnsupportedContainer { path, container: "NeMo" })
        }
        (CkptSource::Nemo, archive) => Err(AdapterError::UnsupportedContainer {
            path: archive.unwrap_or_else(|| path.to_owned()),
            container: "NeMo",
        }),
    }
}

/// The NeMo archive that `path` is, or that it holds in place of a PEFT adapter.
fn nemo_archive(path: &Path) -> Option<PathBuf> {
    let is_nemo = |path: &Path| path.extension().is_some_and(|extension| extension == "nemo");
    if path.is_file() && is_nemo(path) {
        return Some(path.to_owned());
    }
    if path.join("adapter_config.json").is_file() {
        return None;
    }
    let mut archives: Vec<PathBuf> = std::fs::read_dir(path)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|entry| is_nemo(entry))
        .collect();
    archives.sort();
    archives.into_iter().next()
}

fn read_file(path: &Path) -> Result<Vec<u8>, AdapterError> {
    std::fs::read(path).map_err(|source| io_error(path, source))
}

fn io_error(path: &Path, source: std::io::Error) -> AdapterError {
    let path = path.to_owned();
    if source.kind() == std::io::ErrorKind::NotFound {
        AdapterError::Missing { path, what: "this file".to_owned() }
    } else {
        AdapterError::Io { path, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nemo_archive_is_named_wherever_it_is_met() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("adapter.nemo");
        std::fs::write(&archive, b"").unwrap();
        let options = ReadOptions::default();
        let nemo = options.clone().with_source(CkptSource::Nemo);
        for (path, options) in [(dir.path(), &options), (&archive, &options), (dir.path(), &nemo)] {
            let error = load(path, options).unwrap_err().to_string();
            assert!(error.contains("adapter.nemo") && error.contains("NeMo"), "{error}");
        }
    }

    #[test]
    fn missing_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let load = |path: &Path| load(path, &ReadOptions::default()).unwrap_err();
        assert!(load(&dir.path().join("absent")).to_string().contains("absent"));
        assert!(load(dir.path()).to_string().contains("adapter_config.json"));
        let config = r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": []}"#;
        let path = dir.path().join("adapter_config.json");
        std::fs::write(&path, config).unwrap();
        assert!(load(dir.path()).to_string().contains("adapter_model.safetensors"));
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(load(dir.path()), AdapterError::Json { .. }));
    }
}
