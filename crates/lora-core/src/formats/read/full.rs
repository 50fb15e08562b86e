//! Full weights in adapter files. Their content decides whether they change the model.

use rayon::prelude::*;

use super::plan::{ReadProblem, TensorPlan};
use crate::adapter::generation::Digest;
use crate::formats::AdapterError;
use crate::formats::base::BaseWeights;
use crate::formats::hashed::Hashed;
use crate::modules::SiteKey;
use crate::rules::{Code, Rejection, listed};

/// A full weight of a file, possibly in several copies.
#[derive(Debug)]
pub(crate) struct FullWeight {
    /// Names of the copies in the file.
    pub names: Vec<String>,
    /// The copies, which must agree.
    pub copies: Vec<TensorPlan>,
    /// The site whose base weight it is compared with.
    pub site: SiteKey,
    pub meaning: Meaning,
}

/// What a full weight does if it differs from the base model's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Meaning {
    /// It replaces the base model's weight at these sites.
    Replaces(Vec<SiteKey>),
    /// PEFT would load it into a module that the adapter does not compute with.
    Unused,
    /// Nothing: it is handled elsewhere, and only its copies must agree.
    Copies,
    /// PEFT would not load it at all, so it must equal the base model's.
    Dropped,
}

impl Meaning {
    /// The sites where it replaces the weight.
    pub fn sites(&self) -> &[SiteKey] {
        match self {
            Self::Replaces(sites) => sites,
            Self::Unused | Self::Copies | Self::Dropped => &[],
        }
    }
}

/// The outcome for one full weight.
pub(crate) struct Resolved {
    pub meaning: Meaning,
    /// The tensor, if it replaces the base model's weight.
    pub replacement: Option<Hashed>,
    /// An explanation for the user.
    pub note: String,
}

/// Reads full weights and compares them with their copies and with the base model, in parallel on the
/// current rayon pool. Without a base model, every weight is assumed to differ from it.
///
/// # Errors
/// Files that cannot be read; rejections of copies that disagree, and of weights that PEFT would drop.
pub(crate) fn resolve(
    weights: Vec<FullWeight>,
    base: Option<&BaseWeights>,
) -> Vec<Result<Resolved, ReadProblem>> {
    weights.into_par_iter().map(|weight| resolve_one(weight, base)).collect()
}

fn resolve_one(weight: FullWeight, base: Option<&BaseWeights>) -> Result<Resolved, ReadProblem> {
    let names = listed(&weight.names);
    if weight.meaning == Meaning::Unused {
        let note = "does not matter, as the adapter has a weight of its own";
        return Ok(weight.without_effect(&names, note));
    }
    let tensor = weight.read()?;
    let Some(base) = base else { return Ok(weight.without_model(&names, tensor)) };
    if weight.meaning == Meaning::Copies {
        return Ok(weight.without_effect(&names, "copies that agree"));
    }
    let failed = |source| AdapterError::Base { site: weight.site, source };
    // A site that the model does not have is refused later, by the adapter's check.
    if base.has(weight.site) && base.is_weight(weight.site, &tensor).map_err(failed)? {
        return Ok(weight.without_effect(&names, "equals the model's weight"));
    }
    if weight.meaning == Meaning::Dropped {
        return Err(dropped(&names).into());
    }
    let note = format!("{names}: differs from the model's weight and replaces it");
    Ok(Resolved { meaning: weight.meaning, replacement: Some(tensor), note })
}

impl FullWeight {
    fn without_effect(self, names: &str, note: &str) -> Resolved {
        Resolved { meaning: self.meaning, replacement: None, note: format!("{names}: {note}") }
    }

    /// The outcome if the model is not known: the weight is assumed to differ from the model's.
    fn without_model(self, names: &str, tensor: Hashed) -> Resolved {
        let (replacement, note) = match self.meaning {
            Meaning::Replaces(_) => (
                Some(tensor),
                "replaces the model's weight unless it equals it, which depends on the model",
            ),
            Meaning::Dropped => {
                (None, "is refused unless it equals the model's weight, which depends on the model")
            }
            Meaning::Unused | Meaning::Copies => (None, "copies that agree"),
        };
        Resolved { meaning: self.meaning, replacement, note: format!("{names}: {note}") }
    }

    /// Reads the first copy and checks that the others agree, one at a time, as each may be large.
    fn read(&self) -> Result<Hashed, ReadProblem> {
        let [first, others @ ..] = &self.copies[..] else {
            unreachable!("a full weight has at least one copy")
        };
        let first = Hashed::new(first.read()?);
        for (copy, name) in others.iter().zip(&self.names[1..]) {
            let other = copy.read()?;
            let same = if other.dtype() == first.tensor.dtype() {
                Digest::of(&other) == first.digest
            } else {
                other.shape() == first.tensor.shape()
                    && other.iter_f32().eq(first.tensor.iter_f32())
            };
            if !same {
                return Err(self.disagreement(name).into());
            }
        }
        Ok(first)
    }

    fn disagreement(&self, name: &str) -> Rejection {
        Rejection::new(
            Code::DuplicateTensor,
            name,
            format!("another value than `{}`, which is the same weight", self.names[0]),
            "copies of a weight that agree",
            "remove the copy that was not trained, or export the adapter again",
        )
    }
}

fn dropped(names: &str) -> Rejection {
    Rejection::new(
        Code::UndeclaredTensor,
        names,
        "a full weight that differs from the model's, under a name that PEFT would not load",
        "full weights of modules_to_save, or the model's own",
        "name the module in modules_to_save, or export the adapter again",
    )
}
