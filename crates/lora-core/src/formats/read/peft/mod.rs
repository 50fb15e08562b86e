//! Adapters as Hugging Face PEFT writes them: `adapter_config.json` beside `adapter_model.*`.
//!
//! Every tensor is either used exactly once or named in an error, and every field of the configuration has
//! a policy.

use std::borrow::Cow;
use std::path::Path;

use super::assemble::PlannedAdapter;
use super::safetensors::{self, Residence};
use super::{fused, read_file, torch};
use crate::adapter::{Adapter, AdapterFormat, AdapterInfo, Declaration};
use crate::files;
use crate::formats::{AdapterError, RawTensors, ReadOptions, Source};
use crate::rules::{Rejection, Rejections};

mod assemble;
mod collect;
mod config;
mod experts;
mod foreign;
mod full;
mod keys;
mod saved;
mod tokens;
mod vocabulary;
mod wrapping;

use config::PeftConfig;
use wrapping::Wrapping;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model";
/// Extensions of torch files, in order of preference.
const PICKLES: [&str; 2] = ["bin", "pth"];

/// The tensors of an adapter, whose values may still be in their files.
struct Weights {
    format: AdapterFormat,
    tensors: RawTensors,
}

/// Reads the PEFT adapter in the directory `dir`.
///
/// # Errors
/// See [`AdapterError`].
pub fn read(dir: &Path, options: &ReadOptions) -> Result<Adapter, AdapterError> {
    let (config, weights) = open(dir, options)?;
    assemble_adapter(dir, config, weights, options)
}

/// Reads the configuration of a directory, and the headers of its tensors.
fn open(dir: &Path, options: &ReadOptions) -> Result<(PeftConfig, Weights), AdapterError> {
    if !dir.is_dir() {
        let what = "an adapter directory".to_owned();
        return Err(AdapterError::Missing { path: dir.to_owned(), what });
    }
    let config = parse_config(dir, &read_file(&dir.join(CONFIG))?, options)?;
    Ok((config, read_weights(dir)?))
}

/// As [`read`], without reading the values of tensors.
///
/// # Errors
/// See [`AdapterError`].
pub fn probe(dir: &Path, options: &ReadOptions) -> Result<(), AdapterError> {
    let (config, weights) = open(dir, options)?;
    let planned = plan(weights.tensors, config, AdapterInfo::default(), options);
    planned.map(drop).map_err(|problems| rejected(dir, problems))
}

/// Makes an adapter from the text of an `adapter_config.json` and tensors in memory; `dir` is for
/// messages.
///
/// # Errors
/// See [`AdapterError`].
pub fn read_parts(
    dir: &Path,
    config: &[u8],
    tensors: RawTensors,
    options: &ReadOptions,
) -> Result<Adapter, AdapterError> {
    let config = parse_config(dir, config, options)?;
    let weights = Weights { format: AdapterFormat::Memory, tensors };
    assemble_adapter(dir, config, weights, options)
}

fn parse_config(
    dir: &Path,
    text: &[u8],
    options: &ReadOptions,
) -> Result<PeftConfig, AdapterError> {
    let json = serde_json::from_slice(text)
        .map_err(|source| AdapterError::Json { path: dir.join(CONFIG), source })?;
    PeftConfig::read(&json, options.allow_unknown_fields)
        .map_err(|problems| rejected(dir, problems))
}

fn rejected(dir: &Path, problems: Vec<Rejection>) -> AdapterError {
    AdapterError::Rejected { path: dir.to_owned(), rejections: Rejections(problems) }
}

fn assemble_adapter(
    dir: &Path,
    config: PeftConfig,
    weights: Weights,
    options: &ReadOptions,
) -> Result<Adapter, AdapterError> {
    let Weights { format, tensors } = weights;
    let info = AdapterInfo {
        format,
        path: dir.to_owned(),
        files: tensors.files.clone(),
        base_model_name: config.base_model_name.clone(),
        peft_version: config.peft_version.clone(),
        rank: Some(config.ranks.default),
        alpha: Some(config.alphas.default),
        ..AdapterInfo::default()
    };
    let planned =
        plan(tensors, config, info, options).map_err(|problems| rejected(dir, problems))?;
    super::assemble::read(dir, planned, options.base.as_ref())
}

/// Opens the weight files of a directory. As in PEFT, safetensors take precedence.
fn read_weights(dir: &Path) -> Result<Weights, AdapterError> {
    let missing = match safetensors::read_folder(dir, WEIGHTS, Residence::File) {
        Err(missing @ AdapterError::Missing { .. }) => missing,
        read => return Ok(Weights { format: AdapterFormat::PeftSafetensors, tensors: read? }),
    };
    let pickles = PICKLES.map(|extension| dir.join(WEIGHTS).with_extension(extension));
    match pickles.into_iter().find(|path| files::is_present(path)) {
        Some(path) => {
            let tensors = torch::parse(&Source::open(&path)?)?;
            Ok(Weights { format: AdapterFormat::PeftTorch, tensors })
        }
        None => Err(missing),
    }
}

/// Plans an adapter from the configuration and the headers of tensors; all problems are reported
/// together.
fn plan(
    raw: RawTensors,
    config: PeftConfig,
    mut info: AdapterInfo,
    options: &ReadOptions,
) -> Result<PlannedAdapter, Vec<Rejection>> {
    let mut problems = foreign::check(&raw.tensors);
    if !problems.is_empty() {
        return Err(problems);
    }
    let mut file = collect::collect(raw.tensors, &options.modules, &mut problems);
    if let Some(resized) = options.model.as_ref().and_then(|m| vocabulary::check(&file, m)) {
        return Err(vec![resized]);
    }
    let tied = options.model.as_ref().is_some_and(|model| model.tied_embeddings);
    let wrapping = Wrapping { file: &file, config: &config, tied };
    let mut sites = assemble::assemble(&wrapping, &mut problems);
    let mut full_weights = wrapping.full_weights();
    full_weights.extend(tokens::copies(&wrapping));
    let saved = saved::check(&wrapping, options.model.as_ref(), &mut problems);
    info.notes.extend(wrapping.tying_note());
    let mut expert_names = Vec::new();
    if let Some(planned) = experts::plan(&file.experts, file.root, &config, options, &mut problems)
    {
        sites.extend(planned.sites);
        file.naming.extend(planned.naming);
        info.expert_layout = Some(planned.layout);
        expert_names = planned.names;
    }
    if !options.gate_first {
        fused::put_gate_first(&mut sites);
    }
    if let Some(model) = &options.model {
        fused::cut(&mut sites, &mut file.naming, model, &mut problems);
    }
    if !problems.is_empty() {
        // A pattern that is too complex is reported for every module.
        problems.dedup();
        return Err(problems);
    }
    info.bytes = file.bytes;
    info.warnings = config.warnings;
    info.warnings.extend(saved.warnings);
    let dense = file.sites.values().map(|parts| config.declaration.trained(&parts.module));
    let names: Vec<Cow<'_, str>> = dense.chain(expert_names.iter().map(Into::into)).collect();
    for unused in [config.ranks.unused(&names), config.alphas.unused(&names)] {
        info.warnings.extend(unused.map_err(|problem| vec![problem])?);
    }
    let declaration = Declaration {
        root: file.root.to_owned(),
        naming: file.naming,
        saved_sites: saved.sites,
        ..config.declaration
    };
    Ok(PlannedAdapter { sites, full_weights, source: info, declaration: Some(declaration) })
}
