//! Which weight of the model each full weight of a file is, as PEFT loads it.
//!
//! PEFT writes full weights under five names, declared or not: after a vocabulary was resized, beside
//! LoRA on an embedding, and for `modules_to_save`. What a name means depends on how PEFT wraps the
//! module, so each is assigned to the parameter that PEFT would load it into; equal parameters of tied
//! embeddings are one.

use std::collections::BTreeMap;

use super::collect::Collected;
use super::config::PeftConfig;
use super::keys::{FullName, Kind};
use super::tokens;
use crate::formats::read::full::{FullWeight, Meaning};
use crate::formats::read::view::View;
use crate::modules::SiteKey;

/// A parameter of the model that PEFT builds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Parameter {
    /// The base layer's.
    Base(SiteKey),
    /// The copy that `modules_to_save` trains.
    Trained(SiteKey),
    /// None: the name fits no parameter of the wrapped module.
    Dropped(SiteKey),
}

/// How PEFT wraps the modules of a file.
pub(super) struct Wrapping<'a> {
    pub file: &'a Collected,
    pub config: &'a PeftConfig,
    /// Whether the model's embeddings are tied; false where the model is not known.
    pub tied: bool,
}

impl Wrapping<'_> {
    /// Whether `modules_to_save` trains a copy of a site's module.
    pub fn is_saved(&self, site: SiteKey) -> bool {
        let named = |site: SiteKey| self.config.declaration.saves(&self.name(site));
        // Kept tied, the output projection is wrapped along with the embedding.
        named(site) || (site == SiteKey::Head && self.keeps_tied() && named(SiteKey::Embed))
    }

    /// Whether PEFT keeps the embeddings of the adapter tied.
    pub fn keeps_tied(&self) -> bool {
        self.tied && self.config.declaration.ensure_weight_tying
    }

    fn name(&self, site: SiteKey) -> String {
        match self.file.sites.get(&site) {
            Some(parts) => parts.module.clone(),
            None => site.hf_name(self.file.root, None).unwrap_or_default(),
        }
    }

    fn has_pair(&self, site: SiteKey) -> bool {
        self.tensor(site, Kind::A).is_some()
    }

    fn tensor(&self, site: SiteKey, kind: Kind) -> Option<&View> {
        self.file.sites.get(&site)?.tensors.get(&kind)
    }

    /// A and B of a site, as they are in PEFT's model.
    pub fn pair(&self, site: SiteKey) -> [Option<View>; 2] {
        match self.tied_pair() {
            Some(pair) if site == SiteKey::Embed => pair.map(Some),
            _ => [Kind::A, Kind::B].map(|kind| self.tensor(site, kind).cloned()),
        }
    }

    /// A and B of an embedding that is kept tied to the output projection. Both share one storage, into
    /// which PEFT loads the embedding's first, then the output projection's, which stay. `None` where
    /// one pair is missing, or fits no storage of the other.
    fn tied_pair(&self) -> Option<[View; 2]> {
        if !self.keeps_tied() {
            return None;
        }
        let own = |kind| self.tensor(SiteKey::Embed, kind);
        let tied = |kind| {
            let view = self.tensor(SiteKey::Head, kind)?.clone();
            (view.shape().len() == 2).then(|| view.permute([1, 0]))
        };
        let pair = [tied(Kind::B)?, tied(Kind::A)?];
        let fits =
            [own(Kind::A)?.shape(), own(Kind::B)?.shape()] == [pair[0].shape(), pair[1].shape()];
        fits.then_some(pair)
    }

    /// What a person should know of pairs that are kept tied.
    pub fn tying_note(&self) -> Option<String> {
        self.tied_pair().map(|_| {
            "ensure_weight_tying: the LoRA of embed_tokens is that of lm_head, transposed, as PEFT loads \
             the two"
                .to_owned()
        })
    }

    fn base(&self, site: SiteKey) -> Parameter {
        Parameter::Base(if self.tied && site == SiteKey::Head { SiteKey::Embed } else { site })
    }

    fn trained(&self, site: SiteKey) -> Parameter {
        let tied = self.keeps_tied() && site == SiteKey::Head;
        Parameter::Trained(if tied { SiteKey::Embed } else { site })
    }

    /// The parameter that a full weight is loaded into.
    fn parameter(&self, site: SiteKey, name: FullName) -> Parameter {
        let saved = self.is_saved(site);
        let tokens = tokens::trains(self, site);
        match name {
            FullName::Plain | FullName::ModulesToSave if saved => self.trained(site),
            FullName::Plain if !self.has_pair(site) && !tokens => self.base(site),
            FullName::OriginalModule if saved => self.base(site),
            FullName::BaseLayer if self.has_pair(site) => self.base(site),
            FullName::TokenBaseLayer if tokens => self.base(site),
            _ => Parameter::Dropped(site),
        }
    }

    /// The sites whose module computes with a parameter.
    fn users(&self, parameter: Parameter) -> Vec<SiteKey> {
        let (Parameter::Base(site) | Parameter::Trained(site) | Parameter::Dropped(site)) =
            parameter;
        let both = site == SiteKey::Embed && self.tied;
        let candidates = if both { vec![SiteKey::Embed, SiteKey::Head] } else { vec![site] };
        let used = |site: &SiteKey| match self.is_saved(*site) {
            true => self.trained(*site) == parameter,
            false => self.base(*site) == parameter,
        };
        candidates.into_iter().filter(used).collect()
    }

    /// The full weights of the file.
    pub fn full_weights(&self) -> Vec<FullWeight> {
        let mut by_parameter: BTreeMap<Parameter, Vec<View>> = BTreeMap::new();
        for (site, parts) in
            self.file.sites.iter().filter(|(site, _)| !self.file.broken.contains(site))
        {
            for (kind, view) in &parts.tensors {
                if let Kind::Full(name) = kind {
                    let parameter = self.parameter(*site, *name);
                    by_parameter.entry(parameter).or_default().push(view.clone());
                }
            }
        }
        by_parameter.into_iter().map(|(parameter, views)| self.weight(parameter, views)).collect()
    }

    fn weight(&self, parameter: Parameter, views: Vec<View>) -> FullWeight {
        let (Parameter::Base(site) | Parameter::Trained(site) | Parameter::Dropped(site)) =
            parameter;
        let meaning = match (parameter, self.users(parameter)) {
            (Parameter::Dropped(_), _) => Meaning::Dropped,
            (_, sites) if sites.is_empty() => Meaning::Unused,
            (_, sites) => Meaning::Replaces(sites),
        };
        FullWeight {
            names: views.iter().map(|view| view.name().to_owned()).collect(),
            copies: views.into_iter().map(Into::into).collect(),
            site,
            meaning,
        }
    }
}
