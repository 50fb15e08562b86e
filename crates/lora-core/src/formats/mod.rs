//! Readers of adapter files.

use std::path::{Path, PathBuf};

use crate::adapter::{Adapter, SiteKey};
use crate::config::{CkptSource, ExpertLayout, LoraConfig, NemoQkvLayout};
use crate::files;
use crate::geometry::ModelGeometry;
use crate::modules::ModuleMap;
use crate::rules::{Rejections, listed};

mod assemble;
pub mod base;
#[cfg(feature = "torch")]
mod bounded;
mod fields;
mod full;
mod fused;
mod pair;
mod plan;
mod raw;
mod recognise;
mod rows;
mod source;
mod view;

#[cfg(feature = "nemo")]
pub mod nemo;
#[cfg(not(feature = "nemo"))]
#[path = "nemo/off.rs"]
pub mod nemo;
pub mod peft;
pub mod safetensors;
#[cfg(feature = "torch")]
pub mod torch;
#[cfg(not(feature = "torch"))]
#[path = "torch/off.rs"]
pub mod torch;
pub mod write;

pub use base::{BaseError, BaseTensors, BaseWeights};
pub use raw::{ElementType, RawTensor, RawTensors};
pub use recognise::{FileKind, Found, recognise};
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
    /// The model's weights, against which full weights in the files are held. Without them, each counts
    /// as another weight than the model's.
    pub base: Option<BaseWeights>,
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
            base: None,
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
            base: None,
        })
    }

    /// The same options for an adapter that will be served on `model`.
    #[must_use]
    pub fn for_model(mut self, model: ModelGeometry) -> Self {
        self.model = Some(model);
        self
    }

    /// The same options with the weights of the model.
    #[must_use]
    pub fn with_base(mut self, base: BaseWeights) -> Self {
        self.base = Some(base);
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
    /// The broken rules, when the adapter was readable.
    pub fn rejections(&self) -> Option<&Rejections> {
        match self {
            Self::Rejected { rejections, .. } => Some(rejections),
            _ => None,
        }
    }
}

/// The configuration with `lora_target_modules` filled in: where it names none, the modules of the
/// adapter in `lora_dir`, read for `model` where there is one. Where there is no such adapter either,
/// none are named, which means all.
///
/// # Errors
/// See [`load`].
pub fn settle_targets(
    mut config: LoraConfig,
    model: Option<&ModelGeometry>,
) -> Result<LoraConfig, AdapterError> {
    if let (Some(dir), []) = (config.lora_dir.first(), &config.lora_target_modules[..]) {
        let mut options = ReadOptions::from_config(&config)
            .map_err(|rejections| AdapterError::Rejected { path: dir.clone(), rejections })?;
        options.model = model.cloned();
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
    read(path, options).map_err(|error| recognise::explain(path, error))
}

fn read(path: &Path, options: &ReadOptions) -> Result<Adapter, AdapterError> {
    match options.source {
        CkptSource::Nemo => nemo::read(path, options),
        CkptSource::Hf => match nemo_in_place(path)? {
            None => peft::read(path, options),
            Some(path) => {
                Err(AdapterError::OtherFormat { path, found: "NeMo archive", source_name: "nemo" })
            }
        },
    }
}

/// Reads the configuration of the adapter at `path` and the headers of its tensors, but not their
/// values: whatever [`load`] refuses without looking at a value is refused here, in little time.
///
/// # Errors
/// See [`load`].
pub fn probe(path: &Path, options: &ReadOptions) -> Result<(), AdapterError> {
    probe_files(path, options).map_err(|error| recognise::explain(path, error))
}

fn probe_files(path: &Path, options: &ReadOptions) -> Result<(), AdapterError> {
    match options.source {
        // The tensors of an archive lie behind its configuration, and may be compressed with it.
        CkptSource::Nemo => nemo::probe(path),
        CkptSource::Hf => match nemo_in_place(path)? {
            None => peft::probe(path, options),
            Some(_) => read(path, options).map(drop),
        },
    }
}

/// The format of the adapter at `path`, as far as names of files tell: NeMo for an archive `*.nemo`
/// and for a folder that holds one in place of a PEFT adapter. For where nobody is asked for it.
pub fn source_of(path: &Path) -> CkptSource {
    match nemo_in_place(path) {
        Ok(Some(_)) => CkptSource::Nemo,
        Ok(None) | Err(_) => CkptSource::Hf,
    }
}

fn is_archive(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "nemo")
}

/// The NeMo archive that `path` is, or that it holds in place of a PEFT adapter.
fn nemo_in_place(path: &Path) -> Result<Option<PathBuf>, AdapterError> {
    if path.is_file() {
        return Ok(is_archive(path).then(|| path.to_owned()));
    }
    if !path.is_dir() || files::is_present(&path.join("adapter_config.json")) {
        return Ok(None);
    }
    Ok(archives_in(path)?.into_iter().next())
}

/// Most archives of a folder that are listed; more than one are an error anyhow.
const MAX_ARCHIVES: usize = 1000;

/// The NeMo archives of a folder, in the order of their names.
fn archives_in(folder: &Path) -> Result<Vec<PathBuf>, AdapterError> {
    let failed = |error| io_error(folder, error);
    let entries = std::fs::read_dir(folder).map_err(failed)?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let archives = paths.filter(|path| path.as_ref().map_or(true, |path| is_archive(path)));
    let archives: Result<Vec<PathBuf>, _> = archives.take(MAX_ARCHIVES).collect();
    let mut archives = archives.map_err(failed)?;
    archives.sort();
    Ok(archives)
}

/// The last parts of paths, for a message.
fn file_names(paths: &[PathBuf]) -> String {
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    listed(&paths.iter().map(name).collect::<Vec<_>>())
}

fn read_file(path: &Path) -> Result<Vec<u8>, AdapterError> {
    files::read(path, files::MAX_CONFIG).map_err(|source| io_error(path, source))
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
    fn an_adapter_of_the_other_format_is_told_from_a_missing_one() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("adapter.nemo");
        std::fs::write(&archive, b"").unwrap();
        let options = ReadOptions::default();
        for path in [dir.path(), &archive] {
            let error = load(path, &options).unwrap_err().to_string();
            assert!(error.contains("adapter.nemo"), "{error}");
            assert!(error.contains("lora_ckpt_source: nemo"), "{error}");
        }
    }

    #[test]
    fn missing_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let load = |path: &Path| {
            let error = load(path, &ReadOptions::default()).unwrap_err();
            let probed = probe(path, &ReadOptions::default()).unwrap_err();
            assert_eq!(error.to_string(), probed.to_string());
            error
        };
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
