//! `loramux inspect`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use lora_core::formats::{self, AdapterError, BaseWeights, ReadOptions};
use lora_core::{Adapter, Code, LoraConfig, ModelGeometry, Rejection};
use loramux_engine::model::{ModelError, base_weights};
use loramux_engine::{BaseModel, geometry};
use serde_json::{Value, json};

use super::adapter_text::{self, TextReport};
use super::sites::{Group, groups, ranges};
use crate::args::InspectJob;
use crate::exit::{Exit, Failure, OrExit};
use crate::streams::Streams;
use crate::{model_geometry, settings, table};

/// Maximum rejections with the same code to show in the text report.
const MAX_SHOWN: usize = 3;

/// Description of the layout of dense modules, which is the same in all formats.
const DENSE_LAYOUT: &str = "one pair of matrices for each dense module";

/// The base model to check against; empty without `--model`.
#[derive(Default)]
struct Base {
    /// Its dimensions; `None` if the engine would refuse it.
    geometry: Option<ModelGeometry>,
    /// Its weights, read on demand to compare whole weights of the adapter with them.
    weights: Option<BaseWeights>,
    /// Why the engine would refuse it.
    rejection: Option<Rejection>,
    warnings: Vec<String>,
}

/// The findings about an adapter.
struct Report<'a> {
    path: &'a Path,
    /// The adapter, if it can be read at all.
    adapter: Option<Adapter>,
    /// Every rule that it breaks, or that its base model breaks.
    rejections: Vec<Rejection>,
    /// Warnings about it and its base model.
    warnings: Vec<String>,
    /// Why its files cannot be read.
    unreadable: Option<Unreadable>,
    /// The text files in its folder.
    text: TextReport,
}

/// Why files cannot be read.
struct Unreadable {
    problem: String,
    exit: Exit,
}

/// Describes and checks the adapter.
pub(super) fn run(job: &InspectJob, streams: &mut Streams<'_>) -> Result<Exit, Failure> {
    let config = settings::lora(&job.lora, None)?;
    let base = job.model.as_deref().map_or_else(|| Ok(Base::default()), Base::read)?;
    let served = job.model.as_deref().filter(|_| base.geometry.is_some());
    let whose = config.adapter_tokenizer;
    let mut report = examine(&job.path, base, config)?;
    report.add_text(adapter_text::examine(&job.path, served, whose));
    if job.json {
        serde_json::to_writer_pretty(&mut *streams.stdout, &report.json())?;
        writeln!(streams.stdout)?;
    } else {
        report.write_text(streams.stdout)?;
    }
    Ok(report.exit())
}

impl Base {
    /// Reads the configuration of the model at `path`.
    ///
    /// # Errors
    /// [`Exit::Model`] if it cannot be read. A model that would be refused is no error, but part of the report.
    fn read(path: &Path) -> Result<Self, Failure> {
        let read = BaseModel::read(path);
        let rejection = read.as_ref().err().and_then(ModelError::rejection);
        if rejection.is_some() {
            return Ok(Self { rejection, ..Self::default() });
        }
        let model = model_geometry::or_fail(path, read)?;
        let geometry = geometry(&model.config);
        Ok(Self {
            weights: Some(base_weights(path, geometry.clone())),
            geometry: Some(geometry),
            rejection: None,
            warnings: model.warnings,
        })
    }
}

fn examine(path: &Path, base: Base, config: LoraConfig) -> Result<Report<'_>, Failure> {
    let model = base.geometry.as_ref();
    let mut options = ReadOptions::from_config(&config).or_exit(Exit::Usage)?;
    (options.model, options.base) = (model.cloned(), base.weights);
    let config = formats::resolve_targets(config, model).context("cannot use lora_dir");
    let config = config.or_exit(Exit::Usage)?;
    let (mut rejections, mut warnings) = (Vec::from_iter(base.rejection), base.warnings);
    let (mut adapter, mut unreadable) = (None, None);
    // `lora_ckpt_source` applies to `lora_dir` only; the format of `path` follows from its files.
    match formats::load(path, &options.with_source(formats::source_of(path))) {
        Ok(read) => {
            rejections.extend(match model {
                Some(model) => read.check(model, &config),
                None => read.check_limits(&config),
            });
            warnings.extend(read.source.warnings.iter().cloned());
            warnings.extend(model.into_iter().flat_map(|model| read.warnings(model)));
            adapter = Some(read);
        }
        Err(AdapterError::Rejected { rejections: broken, .. }) => rejections.extend(broken.0),
        Err(error) => {
            let exit = Exit::of_adapter(&error);
            unreadable = Some(Unreadable { problem: error.to_string(), exit });
        }
    }
    Ok(Report { path, adapter, rejections, warnings, unreadable, text: TextReport::default() })
}

impl Report<'_> {
    fn add_text(&mut self, mut text: TextReport) {
        self.rejections.append(&mut text.rejections);
        let unreadable =
            text.unreadable.take().map(|problem| Unreadable { problem, exit: Exit::Refused });
        self.unreadable = self.unreadable.take().or(unreadable);
        self.text = text;
    }

    fn exit(&self) -> Exit {
        match &self.unreadable {
            Some(unreadable) => unreadable.exit,
            None if self.accepted() => Exit::Fine,
            None => Exit::Refused,
        }
    }

    fn accepted(&self) -> bool {
        self.rejections.is_empty() && self.unreadable.is_none()
    }

    /// Findings about the adapter that need no action, unlike warnings.
    fn notes(&self) -> &[String] {
        self.adapter.as_ref().map_or(&[], |adapter| &adapter.source.notes)
    }

    fn json(&self) -> Value {
        let mut object = json!({
            "path": self.path,
            "accepted": self.accepted(),
            "error": self.unreadable.as_ref().map(|unreadable| &unreadable.problem),
            "rejections": self.rejections,
            "warnings": self.warnings,
            "notes": self.notes(),
        });
        if let (Some(adapter), Some(fields)) = (&self.adapter, object.as_object_mut()) {
            let source = &adapter.source;
            let about = json!({
                "format": source.format.to_string(),
                "layout": layout(adapter),
                "files": source.files,
                "base_model_name_or_path": source.base_model_name,
                "peft_version": source.peft_version,
                "rank": source.rank,
                "alpha": source.alpha,
                "bytes": source.bytes,
                "generation": adapter.generation.to_string(),
                "modules": groups(adapter),
            });
            fields.extend(about.as_object().cloned().unwrap_or_default());
        }
        if !self.text.is_empty() {
            object["text"] = json!(self.text);
        }
        object
    }

    fn write_text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.path.display())?;
        if let Some(adapter) = &self.adapter {
            write_origin(out, adapter)?;
            write_modules(out, &groups(adapter))?;
        }
        self.text.write(out)?;
        for note in self.notes() {
            writeln!(out, "\nnote: {note}")?;
        }
        for warning in &self.warnings {
            writeln!(out, "\nwarning: {warning}")?;
        }
        if let Some(Unreadable { problem, .. }) = &self.unreadable {
            writeln!(out, "\nunreadable: {problem}")?;
        } else if self.rejections.is_empty() {
            writeln!(out, "\nno rule is broken")?;
        }
        write_rejections(out, &self.rejections)
    }
}

/// Writes the rejections, of each code only the first few, as one mistake often breaks a rule in every layer.
fn write_rejections(out: &mut dyn Write, rejections: &[Rejection]) -> io::Result<()> {
    let mut by_code: BTreeMap<Code, Vec<&Rejection>> = BTreeMap::new();
    for rejection in rejections {
        by_code.entry(rejection.code).or_default().push(rejection);
    }
    for (code, broken) in by_code {
        for Rejection { setting, found, allowed, remedy, .. } in broken.iter().take(MAX_SHOWN) {
            writeln!(out, "\nrefused [{code}]")?;
            writeln!(out, "  setting  {setting}")?;
            writeln!(out, "  found    {found}")?;
            writeln!(out, "  allowed  {allowed}")?;
            writeln!(out, "  remedy   {remedy}")?;
        }
        if broken.len() > MAX_SHOWN {
            writeln!(out, "\nand {} more [{code}]; --json lists all", broken.len() - MAX_SHOWN)?;
        }
    }
    Ok(())
}

/// The layout of the weights in the files.
fn layout(adapter: &Adapter) -> String {
    match adapter.source.expert_layout {
        Some(layout) => format!("routed experts {layout}, {DENSE_LAYOUT}"),
        None => DENSE_LAYOUT.to_owned(),
    }
}

fn write_origin(out: &mut dyn Write, adapter: &Adapter) -> io::Result<()> {
    let source = &adapter.source;
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let files = match source.files.len() {
        1 => "1 file".to_owned(),
        several => format!("{several} files"),
    };
    writeln!(out, "format      {}, {files}", source.format)?;
    writeln!(out, "layout      {}", layout(adapter))?;
    writeln!(out, "base model  {}", or_dash(&source.base_model_name))?;
    writeln!(out, "PEFT        {}", or_dash(&source.peft_version))?;
    writeln!(out, "bytes       {}", source.bytes)?;
    writeln!(out, "generation  {}", adapter.generation)
}

fn write_modules(out: &mut dyn Write, groups: &[Group]) -> io::Result<()> {
    let mut table = table::columns();
    for Group { module, layers, change } in groups {
        let layers =
            if layers.is_empty() { String::new() } else { format!("layers {}", ranges(layers)) };
        let rank = change.rank.map(|rank| format!("rank {rank}")).unwrap_or_default();
        let scale = change.scale.map(|scale| format!("scale {scale}")).unwrap_or_default();
        table.add_row([module.clone(), layers, rank, scale, change.extras()]);
    }
    writeln!(out)?;
    for line in table.trim_fmt().lines() {
        writeln!(out, "{}", line.trim_start())?;
    }
    Ok(())
}
