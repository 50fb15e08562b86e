//! `loramux diff`.

use std::io::{self, Write};
use std::path::Path;

use lora_core::formats::{self, ReadOptions};
use lora_core::{Adapter, DeltaDiff, LoraConfig, ModelGeometry, SiteDiff, diff};
use serde_json::{Value, json};

use crate::args::DiffJob;
use crate::exit::{Exit, Failure, OrExit};
use crate::streams::Streams;
use crate::{model_geometry, settings, table};

/// Maximum differences to list in the text report.
const MAX_LISTED: usize = 20;

/// Compares the adapters.
pub(super) fn run(job: &DiffJob, streams: &mut Streams<'_>) -> Result<Exit, Failure> {
    let config = settings::lora(&job.lora, None)?;
    let model = job.model.as_deref().map(model_geometry::read).transpose()?;
    let [one, other] = &job.paths;
    let read = |path| read(path, &config, model.as_ref());
    let report = Report { diffs: diff(&read(one)?, &read(other)?), tolerance: job.tolerance };
    if job.json {
        serde_json::to_writer_pretty(&mut *streams.stdout, &report.json())?;
        writeln!(streams.stdout)?;
    } else {
        report.write_text(streams.stdout)?;
    }
    Ok(if report.differing().next().is_none() { Exit::Fine } else { Exit::Refused })
}

fn read(
    path: &Path,
    config: &LoraConfig,
    model: Option<&ModelGeometry>,
) -> Result<Adapter, Failure> {
    let mut options = ReadOptions::from_config(config).or_exit(Exit::Usage)?;
    options.source = formats::source_of(path);
    options.model = model.cloned();
    Ok(formats::load(path, &options)?)
}

struct Report {
    diffs: Vec<SiteDiff>,
    tolerance: f64,
}

impl Report {
    fn differing(&self) -> impl Iterator<Item = &SiteDiff> {
        self.diffs.iter().filter(|diff| !diff.is_same(self.tolerance))
    }

    fn json(&self) -> Value {
        let update = |diff: &SiteDiff| {
            let (difference, largest, reason) = match &diff.delta {
                DeltaDiff::Identical => (Some(0.0), None, None),
                DeltaDiff::Measured { difference, largest } => {
                    (Some(*difference), Some(*largest), None)
                }
                DeltaDiff::Incomparable(reason) => (None, None, Some(reason)),
            };
            json!({
                "site": diff.site.to_string(),
                "expert": diff.expert,
                "same": diff.is_same(self.tolerance),
                "difference": difference,
                "largest": largest,
                "incomparable": reason,
                "unequal": diff.unequal,
            })
        };
        json!({
            "same": self.differing().next().is_none(),
            "tolerance": self.tolerance,
            "updates": self.diffs.iter().map(update).collect::<Vec<_>>(),
        })
    }

    fn write_text(&self, out: &mut dyn Write) -> io::Result<()> {
        let count = self.differing().count();
        let all = self.diffs.len();
        let tolerance = match self.tolerance {
            0.0 => "tolerance 0".to_owned(),
            share => format!("tolerance {share:e}"),
        };
        if count == 0 {
            return writeln!(out, "the same: {all} updates ({tolerance})");
        }
        let mut table = table::columns();
        for diff in self.differing().take(MAX_LISTED) {
            let expert = diff.expert.map(|expert| format!("expert {expert}")).unwrap_or_default();
            table.add_row([diff.site.to_string(), expert, found(diff)]);
        }
        for line in table.trim_fmt().lines() {
            writeln!(out, "{}", line.trim_start())?;
        }
        if count > MAX_LISTED {
            writeln!(out, "and {} more; --json lists all", count - MAX_LISTED)?;
        }
        writeln!(out, "\n{count} of {all} updates differ ({tolerance})")
    }
}

/// The differences of one update, in words.
fn found(diff: &SiteDiff) -> String {
    let update = match &diff.delta {
        DeltaDiff::Identical => None,
        DeltaDiff::Measured { difference, largest } => {
            Some(format!("differs by up to {difference:.3e}, where the largest is {largest:.3e}"))
        }
        DeltaDiff::Incomparable(reason) => Some(reason.clone()),
    };
    let others = diff.unequal.iter().map(|addition| format!("the {addition} differs"));
    update.into_iter().chain(others).collect::<Vec<_>>().join("; ")
}
