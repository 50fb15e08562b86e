//! Checks that `modules_to_save` and the full weights of a file agree.

use std::collections::BTreeSet;

use super::keys::Kind;
use super::wrapping::Wrapping;
use crate::adapter::is_saved_by;
use crate::geometry::ModelGeometry;
use crate::modules::SiteKey;
use crate::rules::{Code, Rejection, listed};

/// The outcome of the check.
pub(super) struct Saved {
    /// Sites for which the file has a trained weight.
    pub sites: BTreeSet<SiteKey>,
    /// Entries that match no module, which PEFT ignores.
    pub warnings: Vec<String>,
}

/// Compares the entries with the file and, if it is known, with the model. A named module without a weight
/// is a rejection: PEFT would not load the file either.
pub(super) fn check(
    wrapping: &Wrapping<'_>,
    model: Option<&ModelGeometry>,
    problems: &mut Vec<Rejection>,
) -> Saved {
    let names = site_names(wrapping, model);
    let saved: BTreeSet<SiteKey> =
        names.iter().map(|(site, _)| *site).filter(|site| wrapping.is_saved(*site)).collect();
    let has_weight = |site: &SiteKey| {
        let tied = *site == SiteKey::Head && wrapping.keeps_tied();
        let parts = wrapping.file.sites.get(site);
        let full = |kind: &Kind| matches!(kind, Kind::Full(_));
        tied || parts.is_some_and(|parts| parts.tensors.keys().any(full))
    };
    let (sites, missing): (BTreeSet<SiteKey>, BTreeSet<SiteKey>) =
        saved.into_iter().partition(has_weight);
    let missing: Vec<&SiteKey> =
        missing.iter().filter(|site| !wrapping.file.broken.contains(site)).collect();
    if !missing.is_empty() {
        problems.push(Rejection::new(
            Code::MissingTensor,
            "modules_to_save",
            format!("no weight of {}", listed(&missing)),
            "a weight for every module that it names",
            "export the adapter again",
        ));
    }
    let known = |entry: &String| names.iter().any(|(_, name)| is_saved_by(entry, name));
    let strangers = wrapping.config.declaration.saved.iter().filter(|entry| !known(entry));
    let whose = if model.is_some() { "the model" } else { "the file" };
    let warning =
        |entry: &String| format!("modules_to_save: {whose} has no module `{entry}`; it is ignored");
    Saved { sites, warnings: strangers.map(warning).collect() }
}

/// The sites that may have full weights, with their module names: those of the file, the embedding and
/// `lm_head`, and all of the model if it is known.
fn site_names(wrapping: &Wrapping<'_>, model: Option<&ModelGeometry>) -> Vec<(SiteKey, String)> {
    let of_file = wrapping.file.sites.iter().map(|(site, parts)| (*site, parts.module.clone()));
    let mut names: Vec<(SiteKey, String)> = of_file.collect();
    let always = [SiteKey::Embed, SiteKey::Head].into_iter();
    let others = always.chain(model.into_iter().flat_map(ModelGeometry::full_weight_sites));
    for site in others.filter(|site| !wrapping.file.sites.contains_key(site)) {
        let path = site.module().and_then(|module| wrapping.file.naming.get(&module));
        let path = path.map(|naming| naming.path.as_str());
        let usual = || model.and_then(|model| model.hf_path(site.module()?));
        names
            .extend(site.hf_name(wrapping.file.root, path.or_else(usual)).map(|name| (site, name)));
    }
    names
}
