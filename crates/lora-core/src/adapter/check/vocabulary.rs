//! Adapters whose vocabulary size is not the model's.

use std::collections::{BTreeMap, BTreeSet};

use super::shapes::{SiteDims, check_site};
use crate::adapter::{Adapter, SiteWeights};
use crate::device::HostTensor;
use crate::geometry::ModelGeometry;
use crate::modules::SiteKey;
use crate::rules::{Code, Rejection, listed};

/// Rejects an adapter whose embedding or `lm_head` fits the model except for the size of the vocabulary.
/// Returns these sites, which need no further checks.
pub(super) fn check(
    adapter: &Adapter,
    model: &ModelGeometry,
    problems: &mut Vec<Rejection>,
) -> BTreeSet<SiteKey> {
    let mut sites: BTreeMap<usize, BTreeSet<SiteKey>> = BTreeMap::new();
    for (key, site) in &adapter.sites {
        if let Some(vocabulary) = other_vocabulary(*key, site, model) {
            sites.entry(vocabulary).or_default().insert(*key);
        }
    }
    for (vocabulary, sites) in &sites {
        let names = listed(&sites.iter().collect::<Vec<_>>());
        problems.push(rejection(*vocabulary, model.vocab, &names));
    }
    sites.into_values().flatten().collect()
}

/// The rejection of weights `what` for a vocabulary of `found` tokens on a model with `model` tokens.
pub(crate) fn rejection(found: usize, model: usize, what: &str) -> Rejection {
    let remedy = if found > model {
        format!(
            "serve the adapter on a base model whose embeddings were resized to {found} tokens, as \
             resize_token_embeddings of transformers does; or train and save only the rows of its \
             new tokens, by trainable_token_indices"
        )
    } else {
        format!(
            "serve the adapter on the model of {found} tokens that it was trained on; this one was \
             resized, or is another"
        )
    };
    let found = format!("a vocabulary of {found} tokens, in the weights of {what}");
    let allowed = format!("{model} tokens, which this model has");
    Rejection::new(Code::VocabularyMismatch, "vocab_size", found, allowed, remedy)
}

/// The vocabulary size of a site, if that is the only reason why it does not fit the model.
fn other_vocabulary(key: SiteKey, site: &SiteWeights, model: &ModelGeometry) -> Option<usize> {
    let extent = |tensor: &HostTensor, axis: usize| tensor.shape().get(axis).copied();
    let low_rank = site.low_rank.as_ref();
    let trained = match key {
        SiteKey::Embed => low_rank.and_then(|low| extent(&low.a, 1)),
        SiteKey::Head => low_rank.and_then(|low| extent(&low.b, 0)),
        _ => return None,
    };
    let saved = site.replacement.as_ref().and_then(|weight| extent(weight, 0));
    let vocab = trained.or(saved).filter(|vocab| *vocab != model.vocab)?;
    let mut others = Vec::new();
    let resized = ModelGeometry { vocab, ..model.clone() };
    check_site(key, site, SiteDims::of(key, &resized)?, &mut others);
    others.is_empty().then_some(vocab)
}
