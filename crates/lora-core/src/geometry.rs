//! The dimensions of a base model that matter for adapters.

use std::collections::BTreeSet;

use crate::ids::LayerIdx;
use crate::modules::{ModuleMap, NormKind, SiteKey, TargetModule};

/// Dimensions of a decoder model, and the modules of its layers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModelGeometry {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Inner width of the dense MLP.
    pub intermediate: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head; `heads * head_dim` need not equal `hidden`.
    pub head_dim: usize,
    /// Rows of the embedding and of the output projection.
    pub vocab: usize,
    /// Routed experts of a layer; 0 for a dense model.
    pub num_experts: usize,
    /// Inner width of one routed expert; 0 for a dense model.
    pub moe_intermediate: usize,
    /// Whether heads of queries and keys are normalised (QK norms).
    pub qk_norms: bool,
    /// Whether the output projection shares the embedding's weights.
    pub tied_embeddings: bool,
    /// Paths of the linear modules inside a layer, by their usual Hugging Face names:
    /// `self_attn.q_proj`, …, `mlp.down_proj`.
    pub hf_modules: Vec<String>,
    /// Linear modules with a bias, which an adapter may replace.
    pub biased_modules: BTreeSet<TargetModule>,
}

impl ModelGeometry {
    /// [`ModelGeometry::hf_modules`] of a dense layer with a gated MLP.
    pub const DENSE_MODULES: [&str; 7] = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];

    /// The target modules that this model has.
    pub fn modules(&self) -> BTreeSet<TargetModule> {
        let map = ModuleMap::default();
        let mut modules: BTreeSet<_> =
            self.hf_modules.iter().filter_map(|path| map.lookup(path)).collect();
        if self.num_experts > 0 {
            modules.extend(TargetModule::all().filter(|module| module.is_routed_expert()));
        }
        modules
    }

    /// The path of a dense linear module inside a layer.
    pub fn hf_path(&self, module: TargetModule) -> Option<&str> {
        let map = ModuleMap::default();
        let paths = self.hf_modules.iter().map(String::as_str);
        paths
            .into_iter()
            .find(|path| map.lookup(path) == Some(module) && !module.is_routed_expert())
    }

    /// Width of a norm's weight; `None` if the site is not a norm of this model.
    pub fn norm_width(&self, site: SiteKey) -> Option<usize> {
        match site {
            SiteKey::Norm(_, kind) if kind.is_of_heads() => self.qk_norms.then_some(self.head_dim),
            SiteKey::Norm(..) | SiteKey::FinalNorm => Some(self.hidden),
            SiteKey::Embed | SiteKey::Layer(..) | SiteKey::Head => None,
        }
    }

    /// Every site for which an adapter may have a full weight.
    pub fn full_weight_sites(&self) -> Vec<SiteKey> {
        let modules: Vec<TargetModule> =
            self.modules().into_iter().filter(|module| !module.is_routed_expert()).collect();
        let mut sites = vec![SiteKey::Embed, SiteKey::FinalNorm, SiteKey::Head];
        for layer in (0u32..).take(self.layers).map(LayerIdx) {
            let norms = NormKind::ALL.map(|kind| SiteKey::Norm(layer, kind));
            sites.extend(norms.into_iter().filter(|site| self.norm_width(*site).is_some()));
            sites.extend(modules.iter().map(|module| SiteKey::Layer(layer, *module)));
        }
        sites
    }

    /// Input and output features of a module (of one expert, for routed experts); `None` if the model has no
    /// such module, or if its size is not known here.
    pub fn dims(&self, module: TargetModule) -> Option<(usize, usize)> {
        use TargetModule::*;
        if !self.modules().contains(&module) {
            return None;
        }
        let (hidden, q, kv) =
            (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match module {
            AttnQkv => Some((hidden, q + 2 * kv)),
            AttnQ => Some((hidden, q)),
            AttnK | AttnV => Some((hidden, kv)),
            AttnDense => Some((q, hidden)),
            MlpHTo4h | MlpGate => Some((hidden, self.intermediate)),
            MlpGateUp => Some((hidden, 2 * self.intermediate)),
            Mlp4hToH => Some((self.intermediate, hidden)),
            MoeHTo4h | MoeGate => Some((hidden, self.moe_intermediate)),
            Moe4hToH => Some((self.moe_intermediate, hidden)),
            MoeRouter => Some((hidden, self.num_experts)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qwen3() -> ModelGeometry {
        ModelGeometry {
            hidden: 64,
            intermediate: 176,
            layers: 3,
            heads: 4,
            kv_heads: 2,
            head_dim: 32,
            vocab: 512,
            num_experts: 0,
            moe_intermediate: 0,
            tied_embeddings: false,
            qk_norms: true,
            hf_modules: ModelGeometry::DENSE_MODULES.map(str::to_owned).to_vec(),
            biased_modules: BTreeSet::new(),
        }
    }

    #[test]
    fn attention_widths_come_from_the_heads() {
        let model = qwen3();
        assert_eq!(model.dims(TargetModule::AttnQ), Some((64, 128)));
        assert_eq!(model.dims(TargetModule::AttnV), Some((64, 64)));
        assert_eq!(model.dims(TargetModule::AttnDense), Some((128, 64)));
        assert_eq!(model.dims(TargetModule::Mlp4hToH), Some((176, 64)));
    }

    #[test]
    fn modules_that_the_model_lacks_have_no_dimensions() {
        let model = qwen3();
        assert_eq!(model.modules().len(), 7);
        assert_eq!(model.dims(TargetModule::AttnQkv), None);
        assert_eq!(model.dims(TargetModule::MoeGate), None);
        let moe = ModelGeometry { num_experts: 8, moe_intermediate: 48, ..model };
        assert_eq!(moe.dims(TargetModule::Moe4hToH), Some((48, 64)));
    }
}
