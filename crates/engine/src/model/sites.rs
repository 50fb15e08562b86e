//! The LoRA sites of a model: every projection, embedding and norm that adapters may change.

use std::iter;

use lora_core::lora::LoraSite;
use lora_core::{Backend, LayerIdx, NormKind, SiteKey, TargetModule};

use super::decoder::Decoder;
use super::layer::Layer;
use super::shard::Part;
use super::{Norm, Projection};

/// A part of the model that adapters may change.
pub enum Site<'a, B: Backend> {
    /// A base projection.
    Linear(LinearSite<'a, B>),
    /// A norm.
    Norm(SiteKey, &'a mut Norm<B>),
}

/// A base projection, or the embedding, with its adapter slots.
pub struct LinearSite<'a, B: Backend> {
    /// Keys of its slices.
    pub keys: SliceKeys,
    /// Base weight.
    pub weight: &'a B::Linear,
    /// Base bias, if it has one.
    pub bias: Option<&'a [f32]>,
    /// This rank's part of each slice.
    pub parts: &'a [Part],
    /// Adapter slots.
    pub site: &'a mut LoraSite<B>,
}

/// Keys of a site's slices, in order. A stacked projection such as qkv has a slice for each module.
#[derive(Clone, Copy, Debug)]
pub enum SliceKeys {
    /// One slice.
    One(SiteKey),
    /// One slice for each of these modules of a layer.
    OfLayer(LayerIdx, &'static [TargetModule]),
}

impl SliceKeys {
    /// The keys as a list.
    pub fn all(self) -> Vec<SiteKey> {
        match self {
            Self::One(key) => vec![key],
            Self::OfLayer(layer, modules) => {
                modules.iter().map(|module| SiteKey::Layer(layer, *module)).collect()
            }
        }
    }
}

impl<B: Backend> Decoder<B> {
    /// All sites, always in the same order, so that an index identifies a site; and the group's
    /// communicator.
    pub fn sites_mut(&mut self) -> (&B::Comm, impl Iterator<Item = Site<'_, B>>) {
        let Self { comm, embed, embed_site, layers, norm, lm_head, head_part, head_site, .. } =
            self;
        let embed = &*embed;
        let whole = |key, weight, parts, site| {
            Site::Linear(LinearSite { keys: SliceKeys::One(key), weight, bias: None, parts, site })
        };
        let head = lm_head.as_ref().unwrap_or(embed);
        let first = [
            whole(SiteKey::Embed, embed, &[Part::Whole][..], embed_site),
            whole(SiteKey::Head, head, std::slice::from_ref(head_part), head_site),
            Site::Norm(SiteKey::FinalNorm, norm),
        ];
        let of_layers = (0..).map(LayerIdx).zip(layers).flat_map(|(i, layer)| of_layer(i, layer));
        (comm, first.into_iter().chain(of_layers))
    }
}

/// The sites of a layer.
fn of_layer<B: Backend>(i: LayerIdx, layer: &mut Layer<B>) -> impl Iterator<Item = Site<'_, B>> {
    let Layer { input_norm, attention, post_norm, ffn } = layer;
    let (query, key) = attention.qk_norms.as_mut().map(|(query, key)| (query, key)).unzip();
    let norms = [
        (NormKind::Input, Some(input_norm)),
        (NormKind::PostAttention, Some(post_norm)),
        (NormKind::Query, query),
        (NormKind::Key, key),
    ];
    let norms = norms
        .into_iter()
        .filter_map(move |(kind, norm)| Some(Site::Norm(SiteKey::Norm(i, kind), norm?)));
    let projections = iter::once(&mut attention.qkv)
        .chain(iter::once(&mut attention.o))
        .chain(ffn.projections_mut());
    projections.map(move |projection| of_projection(i, projection)).chain(norms)
}

fn of_projection<B: Backend>(i: LayerIdx, projection: &mut Projection<B>) -> Site<'_, B> {
    let Projection { weight, bias, modules, parts, site, .. } = projection;
    let keys = SliceKeys::OfLayer(i, modules);
    Site::Linear(LinearSite { keys, weight, bias: bias.as_deref(), parts, site })
}
