//! `polylora inspect`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use lora_core::formats::{self, AdapterError, ReadOptions};
use lora_core::{Adapter, Code, LoraConfig, ModelGeometry, Rejection};
use serde_json::{Value, json};

use super::sites::{Group, groups, ranges};
use crate::args::InspectJob;
use crate::exit::{Exit, Failure, OrExit};
use crate::streams::Streams;
use crate::{lora_file, model_geometry, table};

/// How many breaches of one rule are written in full.
const SHOWN: usize = 3;

/// How the weights of dense modules lie in all files.
const DENSE_LAYOUT: &str = "one pair of matrices for each dense module";

/// What was found out about an adapter.
struct Report<'a> {
    path: &'a Path,
    /// The adapter, if it can be read at all.
    adapter: Option<Adapter>,
    /// Every rule that it breaks.
    rejections: Vec<Rejection>,
    /// What a person should know about it, on this model if there is one.
    warnings: Vec<String>,
    /// Why its files cannot be read.
    unreadable: Option<String>,
}

/// Describes and checks the adapter.
pub(super) fn run(job: &InspectJob, streams: &mut Streams<'_>) -> Result<Exit, Failure> {
    let config = lora_file::resolve(&job.lora)?;
    let model = job.model.as_deref().map(model_geometry::read).transpose()?;
    let report = examine(&job.path, model.as_ref(), config)?;
    if job.json {
        serde_json::to_writer_pretty(&mut *streams.stdout, &report.json())?;
        writeln!(streams.stdout)?;
    } else {
        report.write_text(streams.stdout)?;
    }
    Ok(if report.accepted() { Exit::Fine } else { Exit::Refused })
}

fn examine<'a>(
    path: &'a Path,
    model: Option<&ModelGeometry>,
    config: LoraConfig,
) -> Result<Report<'a>, Failure> {
    let mut options = ReadOptions::from_config(&config).or_exit(Exit::Usage)?;
    options.model = model.cloned();
    let config = formats::settle_targets(config, model).context("cannot use lora_dir");
    let config = config.or_exit(Exit::Usage)?;
    let mut report = Report {
        path,
        adapter: None,
        rejections: Vec::new(),
        warnings: Vec::new(),
        unreadable: None,
    };
    // `lora_ckpt_source` is the format of `lora_dir`; the format of an adapter by its path shows.
    match formats::load(path, &options.with_source(formats::source_of(path))) {
        Ok(adapter) => {
            report.rejections = match model {
                Some(model) => adapter.check(model, &config),
                None => adapter.check_limits(&config),
            };
            report.warnings.clone_from(&adapter.source.warnings);
            report.warnings.extend(model.into_iter().flat_map(|model| adapter.warnings(model)));
            report.adapter = Some(adapter);
        }
        Err(AdapterError::Rejected { rejections, .. }) => report.rejections = rejections.0,
        Err(error) => report.unreadable = Some(error.to_string()),
    }
    Ok(report)
}

impl Report<'_> {
    fn accepted(&self) -> bool {
        self.rejections.is_empty() && self.unreadable.is_none()
    }

    fn json(&self) -> Value {
        let mut object = json!({
            "path": self.path,
            "accepted": self.accepted(),
            "error": self.unreadable,
            "rejections": self.rejections,
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
                "warnings": self.warnings,
            });
            fields.extend(about.as_object().cloned().unwrap_or_default());
        }
        object
    }

    fn write_text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.path.display())?;
        if let Some(adapter) = &self.adapter {
            write_origin(out, adapter)?;
            write_modules(out, &groups(adapter))?;
            for warning in &self.warnings {
                writeln!(out, "\nwarning: {warning}")?;
            }
        }
        if let Some(problem) = &self.unreadable {
            return writeln!(out, "\nunreadable: {problem}");
        }
        if self.rejections.is_empty() {
            return writeln!(out, "\nno rule is broken");
        }
        write_rejections(out, &self.rejections)
    }
}

/// Writes what is broken; of one rule, which may be broken in every layer, only the first few.
fn write_rejections(out: &mut dyn Write, rejections: &[Rejection]) -> io::Result<()> {
    let mut by_code: BTreeMap<Code, Vec<&Rejection>> = BTreeMap::new();
    for rejection in rejections {
        by_code.entry(rejection.code).or_default().push(rejection);
    }
    for (code, broken) in by_code {
        for Rejection { setting, found, allowed, remedy, .. } in broken.iter().take(SHOWN) {
            writeln!(out, "\nrefused [{code}]")?;
            writeln!(out, "  setting  {setting}")?;
            writeln!(out, "  found    {found}")?;
            writeln!(out, "  allowed  {allowed}")?;
            writeln!(out, "  remedy   {remedy}")?;
        }
        if broken.len() > SHOWN {
            writeln!(out, "\nand {} more [{code}]; --json lists all", broken.len() - SHOWN)?;
        }
    }
    Ok(())
}

/// How the weights lie in the files.
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
        let layers = match layers.is_empty() {
            true => String::new(),
            false => format!("layers {}", ranges(layers)),
        };
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
