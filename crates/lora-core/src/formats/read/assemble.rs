//! Reads the tensors of an adapter once its plan has passed every check.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use rayon::prelude::*;

use super::full::{self, FullWeight, Resolved};
use super::plan::{PlannedSites, ReadProblem, TensorPlan};
use super::rows;
use crate::adapter::generation;
use crate::adapter::{Adapter, AdapterInfo, Declaration, SiteWeights};
use crate::formats::AdapterError;
use crate::formats::base::BaseWeights;
use crate::formats::hashed::Hashed;
use crate::formats::read::dora;
use crate::modules::SiteKey;
use crate::rules::{Rejection, Rejections};

/// An adapter whose tensors have not been read yet.
pub(crate) struct PlannedAdapter {
    pub sites: PlannedSites,
    /// Full weights. Their content decides whether they replace the model's or are copies of them.
    pub full_weights: Vec<FullWeight>,
    pub source: AdapterInfo,
    pub declaration: Option<Declaration>,
}

/// Reads every tensor, in parallel on the current rayon pool, and compares full weights with those of
/// `base`.
///
/// # Errors
/// Files that cannot be read. Tensors with NaN or infinity and full weights that contradict each other are
/// reported together.
pub(crate) fn read(
    path: &Path,
    planned: PlannedAdapter,
    base: Option<&BaseWeights>,
) -> Result<Adapter, AdapterError> {
    let PlannedAdapter { sites, full_weights, mut source, declaration } = planned;
    let mut problems = Vec::new();
    let tensors = read_tensors(&sites, &mut problems)?;
    let resolved = collect(full::resolve(full_weights, base), &mut problems)?;
    if !problems.is_empty() {
        let (path, rejections) = (path.to_owned(), Rejections(problems));
        return Err(AdapterError::Rejected { path, rejections });
    }
    let read = |plan: TensorPlan| tensors[&plan.identity()].clone();
    let mut sites: BTreeMap<SiteKey, SiteWeights<Hashed>> =
        sites.into_iter().map(|(key, site)| (key, site.map(read))).collect();
    for Resolved { replacement, note, meaning } in resolved {
        source.notes.push(note);
        let Some(tensor) = replacement else { continue };
        for key in meaning.sites() {
            rows::replace(sites.entry(*key).or_default(), tensor.clone());
        }
    }
    let digests = sites.iter().map(|(key, site)| (*key, site.as_ref().map(|hashed| hashed.digest)));
    let generation = generation::of_sites(&digests.collect());
    let sites: BTreeMap<SiteKey, SiteWeights> =
        sites.into_iter().map(|(key, site)| (key, site.map(|hashed| hashed.tensor))).collect();
    let norms = dora::norms(&sites, base)?;
    Ok(Adapter { sites, generation, source, declaration, norms })
}

/// Reads each planned tensor once; by [`TensorPlan::identity`].
fn read_tensors(
    sites: &PlannedSites,
    problems: &mut Vec<Rejection>,
) -> Result<HashMap<usize, Hashed>, AdapterError> {
    let plans = sites.values().flat_map(SiteWeights::tensors);
    let plans: BTreeMap<usize, &TensorPlan> = plans.map(|plan| (plan.identity(), plan)).collect();
    let read = |(id, plan): (usize, &TensorPlan)| Ok((id, Hashed::new(plan.read()?)));
    let results: Vec<_> = plans.into_par_iter().map(read).collect();
    Ok(collect(results, problems)?.into_iter().collect())
}

/// The values that were read. Rejections go to `problems`; the first unreadable file is an error.
fn collect<T>(
    results: Vec<Result<T, ReadProblem>>,
    problems: &mut Vec<Rejection>,
) -> Result<Vec<T>, AdapterError> {
    let mut read = Vec::with_capacity(results.len());
    for result in results {
        match result {
            Ok(value) => read.push(value),
            Err(ReadProblem::File(error)) => return Err(error),
            Err(ReadProblem::Rejected(rejection)) => problems.push(rejection),
        }
    }
    Ok(read)
}
