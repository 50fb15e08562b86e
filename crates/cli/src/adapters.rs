//! The adapters named on the command line.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use lora_core::formats::{self, ReadOptions};
use lora_core::{CkptSource, LoraConfig, LoraRequest, ModelGeometry, validate_adapter_name};

use crate::exit::{Exit, Failure, OrExit};

/// Name and path of every adapter in `dir`, whose subfolders hold one each; the subfolder's name is the adapter's.
///
/// # Errors
/// If the folder cannot be read, holds no adapter, or a subfolder's name is not valid for an adapter.
pub(crate) fn in_folder(dir: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let help = || format!("cannot read {}; give a folder with --adapters DIR", dir.display());
    let mut adapters = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(help)? {
        let path = entry.with_context(help)?.path();
        if path.is_dir() && is_adapter(&path) {
            adapters.push((name(&path)?, path));
        }
    }
    if adapters.is_empty() {
        bail!("{} has no folder with an adapter_config.json; give --adapters DIR", dir.display());
    }
    adapters.sort();
    Ok(adapters)
}

fn is_adapter(path: &Path) -> bool {
    path.join("adapter_config.json").is_file() || formats::source_of(path) == CkptSource::Nemo
}

fn name(path: &Path) -> anyhow::Result<String> {
    let name = path.file_name().unwrap_or_default();
    let name = name
        .to_str()
        .ok_or_else(|| anyhow!("{}: its name is not UTF-8; rename the folder", path.display()))?;
    validate_adapter_name(name).map_err(|problem| anyhow!("{}: {problem}", path.display()))?;
    Ok(name.to_owned())
}

/// Assigns ids 0, 1, 2, ... in the order given.
///
/// # Errors
/// A message with the first name that is given twice.
pub(crate) fn numbered(adapters: Vec<(String, PathBuf)>) -> Result<Vec<LoraRequest>, String> {
    let mut requests: Vec<LoraRequest> = Vec::with_capacity(adapters.len());
    for (id, (name, path)) in (0..).zip(adapters) {
        if requests.iter().any(|known| known.lora_name == name) {
            return Err(format!("adapter {name:?} is given twice; give each adapter its name"));
        }
        let source = formats::source_of(&path);
        requests.push(LoraRequest::new(name, id, path).with_ckpt_source(source));
    }
    Ok(requests)
}

/// Checks the configuration and the tensor headers of every adapter, so that one that cannot be served is reported
/// before the model is loaded.
///
/// # Errors
/// The problem of the first adapter that cannot be read or breaks a rule.
pub(crate) fn probe(
    adapters: &[LoraRequest],
    config: &LoraConfig,
    model: &ModelGeometry,
) -> Result<(), Failure> {
    let options = ReadOptions::from_config(config).or_exit(Exit::Usage)?.for_model(model.clone());
    for LoraRequest { lora_name, lora_path, lora_ckpt_source, .. } in adapters {
        formats::probe(lora_path, &options.clone().with_source(*lora_ckpt_source))
            .with_context(|| format!("adapter {lora_name:?}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_the_order_and_names_are_unique() {
        let read = |names: &[&str]| {
            numbered(names.iter().map(|name| ((*name).to_owned(), "1".into())).collect())
        };
        let requests = read(&["x", "y"]).unwrap();
        assert_eq!(requests.iter().map(|r| r.lora_int_id).collect::<Vec<_>>(), [0, 1]);
        assert!(read(&["x", "x"]).unwrap_err().contains("\"x\" is given twice"));
    }

    #[test]
    fn adapters_are_named_after_their_folders() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| std::fs::create_dir(dir.path().join(name)).unwrap();
        ["b", "a", "notes"].into_iter().for_each(make);
        assert!(in_folder(dir.path()).unwrap_err().to_string().contains("no folder with"));
        for name in ["b", "a"] {
            std::fs::write(dir.path().join(name).join("adapter_config.json"), "{}").unwrap();
        }
        let names: Vec<String> =
            in_folder(dir.path()).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "b"]);
        std::fs::rename(dir.path().join("b"), dir.path().join("b,c")).unwrap();
        assert!(in_folder(dir.path()).unwrap_err().to_string().contains("b,c"));
    }
}
