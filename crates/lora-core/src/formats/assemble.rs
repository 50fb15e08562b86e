//! Reads the tensors of an adapter whose plan breaks no rule.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;

use super::AdapterError;
use super::plan::{Plan, ReadProblem};
use crate::adapter::{Adapter, AdapterInfo, Declaration, SiteKey, SiteWeights};
use crate::rules::Rejections;

/// Sites whose tensors are still in their files.
pub(crate) type PlannedSites = BTreeMap<SiteKey, SiteWeights<Plan>>;

/// Reads every tensor, several at a time on the threads of the current rayon pool.
///
/// # Errors
/// Files that cannot be read; tensors with NaN or infinity, the first one of each site.
pub(crate) fn read(
    path: &Path,
    sites: PlannedSites,
    info: AdapterInfo,
    declaration: Option<Declaration>,
) -> Result<Adapter, AdapterError> {
    let read: Vec<_> = sites
        .into_par_iter()
        .map(|(key, site)| site.try_map(|plan| plan.read()).map(|site| (key, site)))
        .collect();
    let mut sites = BTreeMap::new();
    let mut problems = Vec::new();
    for result in read {
        match result {
            Ok((key, site)) => drop(sites.insert(key, site)),
            Err(ReadProblem::File(error)) => return Err(error),
            Err(ReadProblem::Rejected(rejection)) => problems.push(rejection),
        }
    }
    if !problems.is_empty() {
        return Err(AdapterError::Rejected {
            path: path.to_owned(),
            rejections: Rejections(problems),
        });
    }
    Ok(Adapter::new(sites, info, declaration))
}
