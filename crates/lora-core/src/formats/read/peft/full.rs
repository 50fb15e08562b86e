//! Assigns each full weight of a file to the parameter that PEFT would load it into.
//!
//! PEFT writes full weights under five names, declared or not: after the vocabulary was resized, beside
//! LoRA on an embedding, and for `modules_to_save`. The meaning of a name depends on how PEFT wraps the
//! module. Tied embeddings share one parameter.

use std::collections::BTreeMap;

use super::keys::{FullName, Kind};
use super::wrapping::Wrapping;
use crate::formats::read::full::{FullWeight, Meaning};
use crate::formats::read::view::View;
use crate::modules::SiteKey;

/// A parameter of the model that PEFT builds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Parameter {
    /// The weight of the base layer.
    Base(SiteKey),
    /// The copy trained by `modules_to_save`.
    Trained(SiteKey),
    /// None: the wrapped module has no parameter of that name.
    Dropped(SiteKey),
}

impl Wrapping<'_> {
    fn base(&self, site: SiteKey) -> Parameter {
        Parameter::Base(if self.tied && site == SiteKey::Head { SiteKey::Embed } else { site })
    }

    fn trained(&self, site: SiteKey) -> Parameter {
        let tied = self.keeps_tied() && site == SiteKey::Head;
        Parameter::Trained(if tied { SiteKey::Embed } else { site })
    }

    /// The parameter that PEFT loads a full weight into.
    fn parameter(&self, site: SiteKey, name: FullName) -> Parameter {
        let saved = self.is_saved(site);
        let tokens = self.trained_tokens(site).is_some();
        match name {
            FullName::Plain | FullName::ModulesToSave if saved => self.trained(site),
            FullName::Plain if !self.has_pair(site) && !tokens => self.base(site),
            FullName::OriginalModule if saved => self.base(site),
            FullName::BaseLayer if self.has_pair(site) => self.base(site),
            FullName::TokenBaseLayer if tokens => self.base(site),
            _ => Parameter::Dropped(site),
        }
    }

    /// The sites that compute with a parameter.
    fn users(&self, parameter: Parameter) -> Vec<SiteKey> {
        let (Parameter::Base(site) | Parameter::Trained(site) | Parameter::Dropped(site)) =
            parameter;
        let both = site == SiteKey::Embed && self.tied;
        let candidates = if both { vec![SiteKey::Embed, SiteKey::Head] } else { vec![site] };
        let used = |site: &SiteKey| {
            let own = if self.is_saved(*site) { self.trained(*site) } else { self.base(*site) };
            own == parameter
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
