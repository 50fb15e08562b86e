//! NeMo archives: a tar file, compressed or not, of `model_weights.ckpt` (a torch file) and
//! `model_config.yaml`.
//!
//! `lora_kqv_adapter` is the update of Megatron's fused query, key and value projection. Its rows are in
//! Megatron's order unless [`NemoQkvLayout`](crate::NemoQkvLayout) says otherwise. The scale is
//! `alpha / adapter_dim`, as in NeMo's `ParallelLinearAdapter.forward`.

use std::path::{Path, PathBuf};

use super::assemble::PlannedAdapter;
use super::{archives_in, assemble, torch};
use crate::adapter::{Adapter, AdapterFormat, AdapterInfo};
use crate::files;
use crate::formats::recognise::refuse_others;
use crate::formats::{AdapterError, FileKind, ReadOptions, Source};
use crate::rules::{Rejection, Rejections};

mod archive;
mod config;
mod gzip;
mod keys;
mod sites;

use config::LoraTuning;

/// Reads the NeMo archive at `path`, or the only one in the folder `path`.
///
/// # Errors
/// See [`AdapterError`].
pub fn read(path: &Path, options: &ReadOptions) -> Result<Adapter, AdapterError> {
    let archive = Source::open(&find(path)?)?;
    let mut adapter = read_archive(&archive, options)?;
    path.clone_into(&mut adapter.source.path);
    Ok(adapter)
}

/// Opens the archive that [`read`] would read.
///
/// # Errors
/// See [`AdapterError`].
pub fn probe(path: &Path) -> Result<(), AdapterError> {
    Source::open(&find(path)?).map(drop)
}

/// Reads a NeMo archive. Nothing is unpacked: tensors are read in place or, if the archive is compressed,
/// from an unnamed temporary file.
///
/// # Errors
/// See [`AdapterError`].
pub fn read_archive(archive: &Source, options: &ReadOptions) -> Result<Adapter, AdapterError> {
    refuse_others(archive, &[FileKind::Archive])?;
    let path = archive.path();
    let rejected = |problems: Vec<Rejection>| AdapterError::Rejected {
        path: path.to_owned(),
        rejections: Rejections(problems),
    };
    let members = archive::members(&gzip::plain(archive)?)?;
    let peft = config::parse(&members.config)?;
    let tuning = LoraTuning::read(peft, options.allow_unknown_fields).map_err(rejected)?;
    let raw = torch::parse(&members.weights)?;
    let bytes = raw.tensors.values().map(|tensor| tensor.source().len()).sum();
    let sites = sites::plan(raw.tensors, &tuning, options).map_err(rejected)?;
    let info = AdapterInfo {
        format: AdapterFormat::Nemo,
        path: path.to_owned(),
        files: raw.files,
        rank: tuning.rank,
        alpha: tuning.alpha,
        bytes,
        warnings: [members.warnings, tuning.warnings].concat(),
        ..AdapterInfo::default()
    };
    let planned =
        PlannedAdapter { sites, full_weights: Vec::new(), source: info, declaration: None };
    assemble::read(path, planned, None)
}

/// The archive at a path.
fn find(path: &Path) -> Result<PathBuf, AdapterError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let mut archives = archives_in(path)?;
    match (archives.pop(), archives.is_empty()) {
        (Some(archive), true) => Ok(archive),
        (Some(last), false) => {
            archives.push(last);
            Err(AdapterError::SeveralArchives { path: path.to_owned(), archives })
        }
        (None, _) if files::is_present(&path.join("adapter_config.json")) => {
            Err(AdapterError::OtherFormat {
                path: path.to_owned(),
                found: "PEFT adapter",
                source_name: "hf",
            })
        }
        (None, _) => Err(AdapterError::Missing {
            path: path.to_owned(),
            what: "an archive *.nemo".to_owned(),
        }),
    }
}
