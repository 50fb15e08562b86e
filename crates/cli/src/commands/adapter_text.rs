//! `loramux inspect`: the tokenizer, chat template and end tokens in an adapter's folder.

use std::io::{self, Write};
use std::path::Path;

use lora_core::{AdapterTokenizer, CkptSource, Rejection, formats};
use loramux_engine::text::AdapterTextFiles;
use loramux_engine::{AdapterText, AdapterTextError, TextChanges, TextModel};
use serde::Serialize;

/// The part of a report about an adapter's text files.
#[derive(Default, Serialize)]
pub(super) struct TextReport {
    /// Text files in the folder.
    pub present: Vec<&'static str>,
    /// Where they differ from the model's, and so are used for the adapter's requests; `None` without a model, or if
    /// they are refused.
    pub taken: Option<TextChanges>,
    /// What could not be compared with the model.
    pub warnings: Vec<String>,
    /// Rules that the files break.
    #[serde(skip)]
    pub rejections: Vec<Rejection>,
    /// Why the files cannot be read.
    #[serde(skip)]
    pub unreadable: Option<String>,
}

/// Reads the text files in the adapter's folder `path` and compares them with those of `model`.
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
    /// Whether the report has nothing to show.
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

    /// Lists the files and their differences from the model's.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let lines = self.taken.as_ref().map(TextChanges::lines);
        if !self.present.is_empty() {
            let note = match &lines {
                None => "; add --model to see how they differ from the model's",
                Some(lines) if lines.is_empty() => ": same as the model's",
                Some(_) => {
                    "; these differ from the model's and are used for this adapter's requests:"
                }
            };
            let refused = self.unreadable.is_some() || !self.rejections.is_empty();
            let note = if refused { "" } else { note };
            writeln!(out, "\nbeside the weights: {}{note}", self.present.join(", "))?;
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
