//! Readers of adapter files.

use std::path::{Path, PathBuf};

use crate::adapter::Adapter;
use crate::config::{CkptSource, LoraConfig};
use crate::files;
use crate::formats::{AdapterError, ReadOptions, io_error, recognise};
use crate::geometry::ModelGeometry;

mod assemble;
#[cfg(feature = "torch")]
mod bounded;
mod dora;
mod fields;
mod full;
mod fused;
mod pair;
mod plan;
mod rows;
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

/// Fills in `lora_target_modules` if it is empty: with the modules of the adapter in `lora_dir`, read for
/// `model` if it is given. Without `lora_dir` it stays empty, which means all modules.
///
/// # Errors
/// See [`load`].
pub fn resolve_targets(
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
/// Tensors are copied into memory, so later changes to the files do not affect the adapter.
///
/// # Errors
/// See [`AdapterError`]. If the adapter can be read but breaks rules, [`AdapterError::Rejected`] lists all
/// of them.
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
/// values. It refuses what [`load`] would refuse, except for problems in the values, and is fast.
///
/// # Errors
/// See [`load`].
pub fn probe(path: &Path, options: &ReadOptions) -> Result<(), AdapterError> {
    probe_files(path, options).map_err(|error| recognise::explain(path, error))
}

fn probe_files(path: &Path, options: &ReadOptions) -> Result<(), AdapterError> {
    match options.source {
        // Going further would mean to read the archive, and to decompress it if it is compressed.
        CkptSource::Nemo => nemo::probe(path),
        CkptSource::Hf => match nemo_in_place(path)? {
            None => peft::probe(path, options),
            Some(_) => read(path, options).map(drop),
        },
    }
}

/// Guesses the format of the adapter at `path` from file names: NeMo for a `*.nemo` archive and for a
/// folder with such an archive and no PEFT configuration, else PEFT.
pub fn source_of(path: &Path) -> CkptSource {
    match nemo_in_place(path) {
        Ok(Some(_)) => CkptSource::Nemo,
        Ok(None) | Err(_) => CkptSource::Hf,
    }
}

fn is_archive(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "nemo")
}

/// The NeMo archive at `path`, or in the folder `path` if that has no PEFT configuration.
fn nemo_in_place(path: &Path) -> Result<Option<PathBuf>, AdapterError> {
    if path.is_file() {
        return Ok(is_archive(path).then(|| path.to_owned()));
    }
    if !path.is_dir() || files::is_present(&path.join("adapter_config.json")) {
        return Ok(None);
    }
    Ok(archives_in(path)?.into_iter().next())
}

/// Maximum number of archives of a folder that are listed; more than one is an error in any case.
const MAX_ARCHIVES: usize = 1000;

/// The NeMo archives of a folder, sorted by name.
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

fn read_file(path: &Path) -> Result<Vec<u8>, AdapterError> {
    files::read(path, files::MAX_CONFIG).map_err(|source| io_error(path, source))
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
