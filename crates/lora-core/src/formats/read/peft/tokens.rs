//! Trained rows of the vocabulary (`trainable_token_indices`).

use std::collections::BTreeMap;

use super::config::{TOKEN_INDICES, Variant};
use super::keys::Kind;
use super::wrapping::{TrainedTokens, Wrapping};
use crate::adapter::TokenRows;
use crate::formats::read::full::{FullWeight, Meaning};
use crate::formats::read::pair;
use crate::formats::read::plan::TensorPlan;
use crate::formats::read::view::View;
use crate::modules::SiteKey;
use crate::rules::{Code, Rejection};

/// The trained rows of a site. What PEFT could not load is a rejection.
pub(super) fn rows(
    wrapping: &Wrapping<'_>,
    site: SiteKey,
    problems: &mut Vec<Rejection>,
) -> Option<TokenRows<TensorPlan>> {
    let tensor = |site: SiteKey| wrapping.tensor(site, Kind::TokenRows);
    let Some(TrainedTokens { ids, owner }) = wrapping.trained_tokens(site) else {
        if let Some(view) = tensor(site) {
            problems.push(undeclared(view));
        }
        return None;
    };
    if let Some(found) = contradiction(wrapping, site) {
        problems.push(Rejection::new(
            Code::UnsupportedConfigField,
            TOKEN_INDICES,
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

/// Why a site cannot have trained rows: PEFT does not combine them with other training of the module.
fn contradiction(wrapping: &Wrapping<'_>, site: SiteKey) -> Option<String> {
    let has_pair = wrapping.has_pair(site);
    let shared = wrapping.trained_tokens(site).is_some_and(|tokens| tokens.owner != site);
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

/// The copies of trained rows that tied weights have under both names; they must agree.
pub(super) fn copies(wrapping: &Wrapping<'_>) -> Option<FullWeight> {
    let tensor = |site: SiteKey| wrapping.tensor(site, Kind::TokenRows);
    let TrainedTokens { owner, .. } = wrapping.trained_tokens(SiteKey::Head)?;
    let (rows, copy) = (tensor(owner)?, tensor(SiteKey::Head).filter(|_| owner != SiteKey::Head)?);
    Some(FullWeight {
        names: [rows, copy].map(|view| view.name().to_owned()).to_vec(),
        copies: [rows, copy].map(|view| view.clone().into()).to_vec(),
        site: owner,
        meaning: Meaning::Copies,
    })
}

/// The rows, sorted by token.
fn sorted(ids: &[u32], view: &View) -> TokenRows<TensorPlan> {
    if ids.is_sorted() {
        return TokenRows { ids: ids.to_vec(), values: view.clone().into() };
    }
    let order: BTreeMap<u32, usize> = ids.iter().copied().zip(0..).collect();
    let row = |place: &usize| view.clone().narrow(0, *place..*place + 1);
    let values = TensorPlan::join(order.values().map(row).collect());
    TokenRows {
        ids: order.keys().copied().collect(),
        values: values.unwrap_or_else(|| unreachable!("rows of one tensor are alike")),
    }
}

fn undeclared(view: &View) -> Rejection {
    Rejection::new(
        Code::UndeclaredTensor,
        view.name(),
        format!("rows of tokens that {TOKEN_INDICES} does not name"),
        "tensors that adapter_config.json declares",
        "correct adapter_config.json, or export the adapter again",
    )
}

fn missing(site: SiteKey) -> Rejection {
    Rejection::new(
        Code::MissingTensor,
        TOKEN_INDICES,
        format!("no rows of {site}"),
        format!("a tensor {site}.token_adapter.trainable_tokens_delta"),
        "export the adapter again",
    )
}
