//! `trainable_token_indices`: rows of the vocabulary that were trained by themselves.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::config::{PeftConfig, Variant};
use super::full::Wrapping;
use super::keys::Kind;
use crate::adapter::TokenRows;
use crate::formats::read::fields::Fields;
use crate::formats::read::full::{FullWeight, Meaning};
use crate::formats::read::pair;
use crate::formats::read::plan::Plan;
use crate::formats::read::view::View;
use crate::modules::SiteKey;
use crate::rules::{Code, Rejection};

const FIELD: &str = "trainable_token_indices";

/// The tokens of each module, by the name that the configuration has for it.
pub(super) type TokenIndices = BTreeMap<String, Vec<u32>>;

/// Reads the field: a list means the embedding.
pub(super) fn read_indices(fields: &mut Fields<'_>) -> TokenIndices {
    let allowed = "token numbers, each once, or an object of such lists by module name";
    let read = |value: &Value| match value.as_object() {
        Some(modules) => {
            modules.iter().map(|(name, ids)| Some((name.clone(), as_ids(ids)?))).collect()
        }
        None => Some(TokenIndices::from([("embed_tokens".to_owned(), as_ids(value)?)])),
    };
    let mut indices = fields.typed(FIELD, allowed, read).unwrap_or_default();
    indices.retain(|_, ids| !ids.is_empty());
    indices
}

fn as_ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids: Vec<u32> = value.as_array()?.iter().map(id).collect::<Option<_>>()?;
    let distinct: BTreeSet<u32> = ids.iter().copied().collect();
    (distinct.len() == ids.len()).then_some(ids)
}

/// The tokens whose rows at a site the adapter trains, and the site whose tensor holds them.
fn indices<'a>(wrapping: &Wrapping<'a>, site: SiteKey) -> Option<(&'a [u32], SiteKey)> {
    let config: &'a PeftConfig = wrapping.config;
    let of = |site: SiteKey| {
        let name = site.hf_name("model.", None)?;
        let named = |(module, _): &(&String, &Vec<u32>)| name.ends_with(module.as_str());
        config.token_indices.iter().find(named).map(|(_, ids)| &ids[..])
    };
    let (embed, own) = (of(SiteKey::Embed), of(site));
    match (site, embed, own) {
        // Tied weights share the rows of the embedding, unless the configuration lists others.
        (SiteKey::Head, Some(ids), own) if wrapping.tied && own.is_none_or(|own| own == ids) => {
            Some((ids, SiteKey::Embed))
        }
        (SiteKey::Embed | SiteKey::Head, _, Some(ids)) => Some((ids, site)),
        _ => None,
    }
}

/// Whether the adapter trains rows of a site's weight.
pub(super) fn trains(wrapping: &Wrapping<'_>, site: SiteKey) -> bool {
    indices(wrapping, site).is_some()
}

/// The trained rows of a site; whatever PEFT could not load is a rejection.
pub(super) fn rows(
    wrapping: &Wrapping<'_>,
    site: SiteKey,
    problems: &mut Vec<Rejection>,
) -> Option<TokenRows<Plan>> {
    let tensor = |site: SiteKey| wrapping.file.sites.get(&site)?.tensors.get(&Kind::TokenRows);
    let Some((ids, owner)) = indices(wrapping, site) else {
        if let Some(view) = tensor(site) {
            problems.push(undeclared(view));
        }
        return None;
    };
    if let Some(found) = contradiction(wrapping, site) {
        problems.push(Rejection::new(
            Code::UnsupportedConfigField,
            FIELD,
            found,
            "rows of a weight that is not trained otherwise, as PEFT has it",
            "train the module either whole, or by LoRA, or by rows",
        ));
        return None;
    }
    let Some(view) = tensor(owner) else {
        problems.push(missing(owner));
        return None;
    };
    if view.shape().len() != 2 || view.shape()[0] != ids.len() {
        problems.push(pair::wrong_shape(view, &format!("[{}, hidden], a row a token", ids.len())));
        return None;
    }
    Some(sorted(ids, view))
}

/// What PEFT does not combine with trained rows.
fn contradiction(wrapping: &Wrapping<'_>, site: SiteKey) -> Option<String> {
    let parts = wrapping.file.sites.get(&site);
    let has_pair = parts.is_some_and(|parts| parts.tensors.contains_key(&Kind::A));
    let shared = indices(wrapping, site).is_some_and(|(_, owner)| owner != site);
    if wrapping.is_saved(site) {
        Some(format!("rows of {site}, which modules_to_save names, too"))
    } else if has_pair && !shared {
        Some(format!("rows of {site}, which has LoRA, too"))
    } else if has_pair && wrapping.config.variant == Variant::Dora {
        Some(format!("rows of {site}, which has DoRA, too"))
    } else {
        None
    }
}

/// Copies of the rows that tied weights share, which must agree.
pub(super) fn copies(wrapping: &Wrapping<'_>) -> Option<FullWeight> {
    let tensor = |site: SiteKey| wrapping.file.sites.get(&site)?.tensors.get(&Kind::TokenRows);
    let (_, owner) = indices(wrapping, SiteKey::Head)?;
    let (rows, copy) = (tensor(owner)?, tensor(SiteKey::Head).filter(|_| owner != SiteKey::Head)?);
    Some(FullWeight {
        names: [rows, copy].map(|view| view.name().to_owned()).to_vec(),
        copies: [rows, copy].map(|view| view.clone().into()).to_vec(),
        site: owner,
        meaning: Meaning::Copies,
    })
}

/// The rows in the order of their tokens.
fn sorted(ids: &[u32], view: &View) -> TokenRows<Plan> {
    if ids.is_sorted() {
        return TokenRows { ids: ids.to_vec(), values: view.clone().into() };
    }
    let order: BTreeMap<u32, usize> = ids.iter().copied().zip(0..).collect();
    let row = |place: &usize| view.clone().narrow(0, *place..*place + 1);
    let values = Plan::join(order.values().map(row).collect());
    TokenRows {
        ids: order.keys().copied().collect(),
        values: values.unwrap_or_else(|| unreachable!("rows of one tensor are alike")),
    }
}

fn undeclared(view: &View) -> Rejection {
    Rejection::new(
        Code::UndeclaredTensor,
        view.name(),
        format!("rows of tokens that {FIELD} does not name"),
        "tensors that adapter_config.json declares",
        "correct adapter_config.json, or export the adapter again",
    )
}

fn missing(site: SiteKey) -> Rejection {
    Rejection::new(
        Code::MissingTensor,
        FIELD,
        format!("no rows of {site}"),
        format!("a tensor {site}.token_adapter.trainable_tokens_delta"),
        "export the adapter again",
    )
}
