//! `loramux convert`.

use std::path::Path;
use std::{fs, io};

use anyhow::{Context, anyhow};
use lora_core::formats::write;
use lora_core::formats::{self, ReadOptions};
use lora_core::{
    Adapter, CkptSource, DeltaDiff, ExpertLayout, LoraConfig, ModelGeometry, Rejections, SiteDiff,
    diff,
};

use crate::args::{ConvertJob, Target};
use crate::exit::{Exit, Failure, OrExit};
use crate::streams::Streams;
use crate::{model_geometry, settings};

/// Reads the adapter, writes the copy, and reports success only after the copy is verified.
pub(super) fn run(job: &ConvertJob, streams: &mut Streams<'_>) -> Result<Exit, Failure> {
    let config = settings::lora(&job.lora, None)?;
    let model = job.model.as_deref().map(model_geometry::read).transpose()?;
    let adapter = read(job, &config, model.as_ref())?;
    let on_model = model.as_ref().map_or_else(Vec::new, |model| adapter.warnings(model));
    for warning in adapter.source.warnings.iter().chain(&on_model) {
        writeln!(streams.stderr, "warning: {warning}")?;
    }
    let layout = layout(job.to, adapter.source.expert_layout);
    let made = !job.output.exists();
    let written = match job.to {
        Target::Nemo => write::nemo(&job.output, &adapter, model.as_ref(), config.nemo_qkv_layout),
        _ => write::peft(&job.output, &adapter, layout),
    };
    written?;
    let copy = verify(job, &adapter, &config, model.as_ref(), layout).inspect_err(|_| {
        // The verification error matters more than one from removing the copy.
        let _ = remove(&job.output, made);
    })?;
    let out = &mut *streams.stdout;
    writeln!(out, "read      {}: {}", job.input.display(), described(&adapter))?;
    writeln!(out, "wrote     {}: {}", job.output.display(), described(&copy))?;
    let sites = adapter.sites.len();
    writeln!(out, "verified  {sites} modules: every update of the copy equals the adapter's")?;
    if let Some(layout) = copy.source.expert_layout.filter(|layout| !is_detectable(*layout)) {
        writeln!(
            out,
            "note      the layout cannot be detected from the files: set moe_layout to {layout}"
        )?;
    }
    Ok(Exit::Fine)
}

/// Reads the adapter under every rule except the limits of an engine's configuration.
fn read(
    job: &ConvertJob,
    config: &LoraConfig,
    model: Option<&ModelGeometry>,
) -> Result<Adapter, Failure> {
    let mut options = ReadOptions::from_config(config)
        .or_exit(Exit::Usage)?
        .with_source(formats::source_of(&job.input));
    options.model = model.cloned();
    options.moe_layout = job.moe_layout.or(options.moe_layout);
    let adapter = formats::load(&job.input, &options)?;
    if let Some(model) = model {
        check(&adapter, model).with_context(|| job.input.display().to_string())?;
    }
    Ok(adapter)
}

/// Checks an adapter against a model, without the limits of an engine's configuration.
fn check(adapter: &Adapter, model: &ModelGeometry) -> Result<(), Rejections> {
    let unlimited =
        LoraConfig { max_lora_rank: usize::MAX, allow_noop_adapter: true, ..LoraConfig::default() };
    Rejections(adapter.check(model, &unlimited)).into_result()
}

/// The routed-expert layout of the copy.
fn layout(to: Target, source: Option<ExpertLayout>) -> ExpertLayout {
    use ExpertLayout::*;
    match (to, source) {
        (Target::Stacked, _) => Stacked,
        (Target::PeftTargetParameters, Some(FusedInterleaved | TargetParametersInterleaved)) => {
            TargetParametersInterleaved
        }
        (Target::PeftTargetParameters, _) => TargetParameters,
        (Target::Peft, Some(layout)) => layout,
        (Target::Peft | Target::PerExpert | Target::Nemo, _) => PerExpert,
    }
}

/// Whether a layout can be detected from its files.
fn is_detectable(layout: ExpertLayout) -> bool {
    use ExpertLayout::*;
    !matches!(layout, FusedInterleaved | TargetParametersInterleaved | UnslothExpertSlowest)
}

/// Reads the copy back and compares it with the adapter.
fn verify(
    job: &ConvertJob,
    adapter: &Adapter,
    config: &LoraConfig,
    model: Option<&ModelGeometry>,
    layout: ExpertLayout,
) -> Result<Adapter, Failure> {
    let context = || format!("cannot verify {}, which is removed again", job.output.display());
    let mut options = ReadOptions::from_config(config).or_exit(Exit::Usage)?;
    options.model = model.cloned();
    // The writer puts gate before up, whatever the order in the input was.
    options.gate_first = true;
    (options.source, options.moe_layout) = match job.to {
        Target::Nemo => (CkptSource::Nemo, None),
        _ => (CkptSource::Hf, Some(layout)),
    };
    let copy = formats::load(&job.output, &options).with_context(context)?;
    if let Some(model) = model {
        check(&copy, model).with_context(context)?;
    }
    let diffs = diff(adapter, &copy);
    // Layouts only move elements and add zeros, so the copy must be exact.
    match diffs.iter().find(|diff| !diff.is_same(0.0)) {
        Some(different) => {
            Err(anyhow!(words(different))).with_context(context).or_exit(Exit::Refused)
        }
        None => Ok(copy),
    }
}

fn words(SiteDiff { site, expert, delta, unequal }: &SiteDiff) -> String {
    let expert = expert.map(|expert| format!(" expert {expert}")).unwrap_or_default();
    let what = match (delta, &unequal[..]) {
        (DeltaDiff::Incomparable(reason), _) => reason.clone(),
        (_, [addition, ..]) => format!("the {addition} differs"),
        (DeltaDiff::Measured { difference, .. }, []) => format!("the update is {difference} off"),
        (DeltaDiff::Identical, []) => "no difference".to_owned(),
    };
    format!("{site}{expert}: {what}")
}

fn described(adapter: &Adapter) -> String {
    let source = &adapter.source;
    let experts = match source.expert_layout {
        Some(layout) => format!(", routed experts {layout}"),
        None => String::new(),
    };
    format!("{}{experts}, {} bytes", source.format, source.bytes)
}

/// Removes the copy: a file, or the files of a directory, and the directory itself if `made` here.
fn remove(path: &Path, made: bool) -> io::Result<()> {
    if !path.is_dir() {
        return fs::remove_file(path);
    }
    for entry in fs::read_dir(path)? {
        fs::remove_file(entry?.path())?;
    }
    if made { fs::remove_dir(path) } else { Ok(()) }
}
