//! How PEFT wraps the modules of a model for an adapter. It decides which parameter each tensor of a
//! file is loaded into.

use super::collect::Collected;
use super::config::PeftConfig;
use super::keys::Kind;
use crate::formats::read::view::View;
use crate::modules::SiteKey;

/// How PEFT wraps the modules of a file.
pub(super) struct Wrapping<'a> {
    pub file: &'a Collected,
    pub config: &'a PeftConfig,
    /// Whether the model's embeddings are tied; false where the model is not known.
    pub tied: bool,
}

impl<'a> Wrapping<'a> {
    /// Whether `modules_to_save` names a site's module, so that a copy of it is trained.
    pub fn is_saved(&self, site: SiteKey) -> bool {
        let named = |site: SiteKey| self.config.declaration.saves(&self.name(site));
        // If PEFT keeps them tied, `lm_head` is wrapped along with the embedding.
        named(site) || (site == SiteKey::Head && self.keeps_tied() && named(SiteKey::Embed))
    }

    /// Whether PEFT keeps the adapter's embedding and `lm_head` tied.
    pub fn keeps_tied(&self) -> bool {
        self.tied && self.config.declaration.ensure_weight_tying
    }

    fn name(&self, site: SiteKey) -> String {
        match self.file.sites.get(&site) {
            Some(parts) => parts.module.clone(),
            None => site.hf_name(self.file.root, None).unwrap_or_default(),
        }
    }

    /// Whether the file has LoRA for a site.
    pub fn has_pair(&self, site: SiteKey) -> bool {
        self.tensor(site, Kind::A).is_some()
    }

    /// A tensor of a site.
    pub fn tensor(&self, site: SiteKey, kind: Kind) -> Option<&View> {
        self.file.sites.get(&site)?.tensors.get(&kind)
    }

    /// A and B of a site, as PEFT's model has them after loading.
    pub fn pair(&self, site: SiteKey) -> [Option<View>; 2] {
        match self.tied_pair() {
            Some(pair) if site == SiteKey::Embed => pair.map(Some),
            _ => [Kind::A, Kind::B].map(|kind| self.tensor(site, kind).cloned()),
        }
    }

    /// A and B of an embedding that is kept tied to `lm_head`. The two share storage: PEFT loads the tensors
    /// of the embedding first and overwrites them with those of `lm_head`, transposed. `None` if either
    /// pair is missing, or if their shapes differ.
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

    /// A note for the user if the pairs of tied embeddings were merged.
    pub fn tying_note(&self) -> Option<String> {
        self.tied_pair().map(|_| {
            "ensure_weight_tying: the LoRA of embed_tokens is that of lm_head, transposed, as PEFT loads \
             the two"
                .to_owned()
        })
    }

    /// The rows of a site's weight that the adapter trains by themselves; `None` if it trains none.
    pub fn trained_tokens(&self, site: SiteKey) -> Option<TrainedTokens<'a>> {
        let config: &'a PeftConfig = self.config;
        let ids_of = |site: SiteKey| {
            let name = site.hf_name("model.", None)?;
            let named = |(module, _): &(&String, &Vec<u32>)| name.ends_with(module.as_str());
            config.token_indices.iter().find(named).map(|(_, ids)| &ids[..])
        };
        let (embed, own) = (ids_of(SiteKey::Embed), ids_of(site));
        match (site, embed, own) {
            // Tied weights share the rows of the embedding, unless the configuration lists others.
            (SiteKey::Head, Some(ids), own) if self.tied && own.is_none_or(|own| own == ids) => {
                Some(TrainedTokens { ids, owner: SiteKey::Embed })
            }
            (SiteKey::Embed | SiteKey::Head, _, Some(ids)) => {
                Some(TrainedTokens { ids, owner: site })
            }
            _ => None,
        }
    }
}

/// Rows of a weight that are trained by themselves (`trainable_token_indices`).
pub(super) struct TrainedTokens<'a> {
    /// Their tokens, in the order of the rows.
    pub ids: &'a [u32],
    /// The site whose tensor holds the rows: the embedding for tied weights.
    pub owner: SiteKey,
}
