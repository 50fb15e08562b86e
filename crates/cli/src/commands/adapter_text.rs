//! What stands beside an adapter's weights: tokenizer, chat template and end tokens.

use std::io::{self, Write};
use std::path::Path;

use lora_core::{AdapterTokenizer, CkptSource, Rejection, formats};
use loramux_engine::text::AdapterTextFiles;
use loramux_engine::{AdapterText, AdapterTextError, TextChanges, TextModel};
use serde::Serialize;

/// What requests for an adapter take of its files, as part of a report on it.
#[derive(Default, Serialize)]
pub(super) struct TextReport {
    /// What the folder has.
    pub present: Vec<&'static str>,
    /// What of it is taken, as it is not the model's; `None` without a model, or if it is refused.
    pub taken: Option<TextChanges>,
    /// What could not be compared.
    pub warnings: Vec<String>,
    /// Rules that it breaks.
    #[serde(skip)]
    pub rejections: Vec<Rejection>,
    /// Why it cannot be read.
    #[serde(skip)]
    pub unreadable: Option<String>,
}

/// Looks at the files beside the weights at `path`, and compares them with those of `model`.
pub(super) fn examine(path: &Path, model: Option<&Path>, whose: AdapterTokenizer) -> TextReport {
    let mut report = TextReport::default();
    if whose == AdapterTokenizer::Base || formats::source_of(path) == CkptSource::Nemo {
        return report;
    }
    match AdapterTextFiles::read(path) {
        Ok(files) => report.present = files.present(),
        Err(error) => report.unreadable = Some(error.to_string()),
    }
    let Some(model) = model.filter(|_| !report.present.is_empty()) else { return report };
    match TextModel::of_model(model) {
        Ok(model) => report.compare(AdapterText::read(path, &model, whose)),
        Err(error) => {
            report.warnings.push(format!("the model's tokenizer cannot be read: {error}"))
        }
    }
    report
}

impl TextReport {
    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.present.is_empty() && self.warnings.is_empty()
    }

    fn compare(&mut self, text: Result<AdapterText, AdapterTextError>) {
        match text {
            Ok(text) => {
                self.warnings.extend(text.changes.warnings());
                self.taken = Some(text.changes);
            }
            Err(AdapterTextError::Rejected(rejections)) => self.rejections = rejections.0,
            Err(error) => self.unreadable = Some(error.to_string()),
        }
    }

    /// Writes what is beside the weights, and what of it is taken.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let lines = self.taken.as_ref().map(TextChanges::lines);
        if !self.present.is_empty() {
            let said = match &lines {
                None => "; requests use what is not the model's: --model says what",
                Some(lines) if lines.is_empty() => ": as the model's",
                Some(_) => "; not as the model's, and used by requests for this adapter:",
            };
            let refused = self.unreadable.is_some() || !self.rejections.is_empty();
            let said = if refused { "" } else { said };
            writeln!(out, "\nbeside the weights: {}{said}", self.present.join(", "))?;
        }
        for line in lines.iter().flatten() {
            writeln!(out, "  {line}")?;
        }
        for warning in &self.warnings {
            writeln!(out, "\nwarning: {warning}")?;
        }
        Ok(())
    }
}
