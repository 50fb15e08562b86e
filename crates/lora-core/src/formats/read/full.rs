//! Full weights in an adapter's files, judged by their content.

use rayon::prelude::*;

use super::plan::{Plan, ReadProblem};
use crate::adapter::generation::Digest;
use crate::formats::AdapterError;
use crate::formats::base::BaseWeights;
use crate::formats::hashed::Hashed;
use crate::modules::SiteKey;
use crate::rules::{Code, Rejection, listed};

/// A weight of the model as a file has it, in one copy or several.
#[derive(Debug)]
pub(crate) struct FullWeight {
    /// Names of the copies in the file.
    pub names: Vec<String>,
    /// The copies, which must agree.
    pub copies: Vec<Plan>,
    /// The site whose weight in the base model it is.
    pub site: SiteKey,
    pub meaning: Meaning,
}

/// What becomes of a full weight that is not the base model's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Meaning {
    /// It takes the place of the base model's at these sites.
    Replaces(Vec<SiteKey>),
    /// PEFT would load it into a module that this adapter does not use.
    Unused,
    /// It is said elsewhere what it does; the copies only have to agree.
    Copies,
    /// PEFT would load it nowhere, so it must not say anything new.
    Dropped,
}

impl Meaning {
    /// The sites whose weight it replaces.
    pub fn sites(&self) -> &[SiteKey] {
        match self {
            Self::Replaces(sites) => sites,
            Self::Unused | Self::Copies | Self::Dropped => &[],
        }
    }
}

/// What was found of a full weight.
pub(crate) struct Settled {
    pub meaning: Meaning,
    /// The tensor, if it replaces the base model's.
    pub replacement: Option<Hashed>,
    /// What to tell about it.
    pub note: String,
}

/// Reads the full weights and compares them with each other and with the base model, several at a time
/// on the threads of the current rayon pool. Without a base model every one counts as another weight.
///
/// # Errors
/// Files that cannot be read. Copies that disagree, and what PEFT would drop, are rejections.
pub(crate) fn resolve(
    weights: Vec<FullWeight>,
    base: Option<&BaseWeights>,
) -> Vec<Result<Settled, ReadProblem>> {
    weights.into_par_iter().map(|weight| resolve_one(weight, base)).collect()
}

fn resolve_one(weight: FullWeight, base: Option<&BaseWeights>) -> Result<Settled, ReadProblem> {
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
    // Weights for places that the model lacks are for the adapter's check to refuse.
    if base.has(weight.site) && base.is_weight(weight.site, &tensor).map_err(failed)? {
        return Ok(weight.without_effect(&names, "equals the model's weight"));
    }
    if weight.meaning == Meaning::Dropped {
        return Err(dropped(&names).into());
    }
    let note = format!("{names}: differs from the model's weight and replaces it");
    Ok(Settled { meaning: weight.meaning, replacement: Some(tensor), note })
}

impl FullWeight {
    fn without_effect(self, names: &str, note: &str) -> Settled {
        Settled { meaning: self.meaning, replacement: None, note: format!("{names}: {note}") }
    }

    /// Where the model is not known, a full weight counts as another one than the model's.
    fn without_model(self, names: &str, tensor: Hashed) -> Settled {
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
        Settled { meaning: self.meaning, replacement, note: format!("{names}: {note}") }
    }

    /// The first copy, if the others agree with it. They are read one at a time, as each may be large.
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
