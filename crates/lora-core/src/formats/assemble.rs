//! Reads the tensors of an adapter whose plan breaks no rule.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use rayon::prelude::*;

use super::AdapterError;
use super::plan::{Plan, ReadProblem};
use crate::adapter::generation::{self, Digest};
use crate::adapter::{Adapter, AdapterInfo, Declaration, SiteKey, SiteWeights};
use crate::host::HostTensor;
use crate::rules::Rejections;

/// Sites whose tensors are still in their files.
pub(crate) type PlannedSites = BTreeMap<SiteKey, SiteWeights<Plan>>;

/// Reads every tensor, several at a time on the threads of the current rayon pool.
///
/// # Errors
/// Files that cannot be read; tensors with NaN or infinity, all of them together.
pub(crate) fn read(
    path: &Path,
    sites: PlannedSites,
    source: AdapterInfo,
    declaration: Option<Declaration>,
) -> Result<Adapter, AdapterError> {
    let plans = sites.values().flat_map(SiteWeights::tensors);
    let plans: BTreeMap<usize, &Plan> = plans.map(|plan| (plan.identity(), plan)).collect();
    let results: Vec<_> = plans.into_par_iter().map(|(id, plan)| (id, read_one(plan))).collect();
    let mut tensors = HashMap::with_capacity(results.len());
    let mut problems = Vec::new();
    for (id, result) in results {
        match result {
            Ok(read) => drop(tensors.insert(id, read)),
            Err(ReadProblem::File(error)) => return Err(error),
            Err(ReadProblem::Rejected(rejection)) => problems.push(rejection),
        }
    }
    if !problems.is_empty() {
        let (path, rejections) = (path.to_owned(), Rejections(problems));
        return Err(AdapterError::Rejected { path, rejections });
    }
    let of = |plan: &Plan| &tensors[&plan.identity()];
    let digests = sites.iter().map(|(key, site)| (*key, site.as_ref().map(|plan| of(plan).1)));
    let generation = generation::of_sites(&digests.collect());
    let read = sites.into_iter().map(|(key, site)| (key, site.map(|plan| of(&plan).0.clone())));
    Ok(Adapter { sites: read.collect(), generation, source, declaration })
}

/// A tensor and its hash, taken while the tensor is still in a cache.
fn read_one(plan: &Plan) -> Result<(HostTensor, Digest), ReadProblem> {
    let tensor = plan.read()?;
    let digest = Digest::of(&tensor);
    Ok((tensor, digest))
}
