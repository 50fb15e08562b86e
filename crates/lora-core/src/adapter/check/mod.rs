//! Checks an adapter against a model and the limits of an engine.

use self::shapes::SiteDims;
use self::targets::Differences;
use super::{Adapter, Declaration, LowRank, SiteWeights};
use crate::config::LoraConfig;
use crate::device::HostTensor;
use crate::geometry::ModelGeometry;
use crate::ids::LayerIdx;
use crate::modules::{SiteKey, TargetModule};
use crate::rules::{Code, Rejection, listed};

mod experts;
mod shapes;
mod targets;
pub(crate) mod vocabulary;

impl Adapter {
    /// Every rule that the adapter breaks on this model under these limits; empty if it may be served.
    /// Needs no device.
    pub fn check(&self, model: &ModelGeometry, config: &LoraConfig) -> Vec<Rejection> {
        let mut problems = Vec::new();
        self.check_modules(model, config, &mut problems);
        let resized = vocabulary::check(self, model, &mut problems);
        for (key, site) in &self.sites {
            match (key.module(), SiteDims::of(*key, model)) {
                _ if resized.contains(key) => {}
                (_, None) => shapes::check_norm(*key, site, model, &mut problems),
                (Some(module), Some(dims)) if module.is_routed_expert() => {
                    experts::check(*key, site, model.num_experts, dims, &mut problems);
                }
                (_, Some(dims)) => shapes::check_site(*key, site, dims, &mut problems),
            }
        }
        self.check_biases(model, &mut problems);
        if let Some(declaration) = &self.declaration {
            match Differences::find(self, declaration, model) {
                Ok(differences) => problems.extend(differences.rejection()),
                Err(broken) => problems.extend(broken),
            }
            self.check_tying(declaration, model, &mut problems);
        }
        problems.extend(self.check_limits(config));
        problems
    }

    /// Warnings about the adapter on this model, beside
    /// [`AdapterInfo::warnings`](super::AdapterInfo::warnings): harmless differences between its
    /// configuration and its weights.
    pub fn warnings(&self, model: &ModelGeometry) -> Vec<String> {
        let differences = self.declaration.as_ref().map(|d| Differences::find(self, d, model));
        differences.and_then(Result::ok).map_or_else(Vec::new, |found| found.warnings(model.layers))
    }

    /// The part of [`Adapter::check`] that needs no model: ranks, and whether the adapter has any effect.
    pub fn check_limits(&self, config: &LoraConfig) -> Vec<Rejection> {
        let mut problems = Vec::new();
        self.check_ranks(config, &mut problems);
        if !config.allow_noop_adapter && self.sites.values().all(changes_nothing) {
            problems.push(self.noop());
        }
        problems
    }

    fn noop(&self) -> Rejection {
        let mut scales = self.low_ranks().map(|(_, low)| low.scale).peekable();
        let scaled_away = scales.peek().is_some() && scales.all(|scale| scale == 0.0);
        let (setting, found, remedy) = match (scaled_away, self.source.alpha) {
            (true, Some(0.0)) => (
                "lora_alpha",
                "0, so that every scale is zero and the adapter changes nothing",
                "correct the alpha of its configuration",
            ),
            (true, _) => (
                "lora_alpha",
                "0 for every module by alpha_pattern, so that every scale is zero and the adapter \
                 changes nothing",
                "correct alpha_pattern in its configuration",
            ),
            (false, _) => (
                "allow_noop_adapter",
                "an adapter that changes nothing: no weights, or every lora_A or lora_B is zero",
                "train it",
            ),
        };
        Rejection::new(
            Code::NoopAdapter,
            setting,
            found,
            "an adapter that was trained",
            format!("{remedy}, or set allow_noop_adapter: true to serve it all the same"),
        )
    }

    fn check_modules(
        &self,
        model: &ModelGeometry,
        config: &LoraConfig,
        problems: &mut Vec<Rejection>,
    ) {
        let too_high = |layer: LayerIdx| layer.0 as usize >= model.layers;
        let beyond: Vec<&SiteKey> =
            self.sites.keys().filter(|key| key.layer().is_some_and(too_high)).collect();
        if !beyond.is_empty() {
            problems.push(Rejection::new(
                Code::LayerOutOfRange,
                "layers",
                listed(&beyond),
                format!("layers 0 to {}", model.layers.saturating_sub(1)),
                "load the adapter on the model that it was trained for",
            ));
        }
        let modules = self.modules();
        let absent = modules.iter().filter(|m| !self.model_has(**m, model)).copied();
        let absent: Vec<TargetModule> = absent.collect();
        if !absent.is_empty() {
            problems.push(Rejection::new(
                Code::ModuleNotInModel,
                "modules",
                self.named(&absent),
                listed(&model.hf_modules),
                "load the adapter on the model that it was trained for, or map its names with \
                 trtllm_modules_to_hf_modules",
            ));
        }
        let served = config.effective_targets(model);
        let refused: Vec<&TargetModule> = modules.difference(&served).collect();
        if !refused.is_empty() && !config.lora_target_modules.is_empty() {
            problems.push(Rejection::new(
                Code::ModuleNotServed,
                "lora_target_modules",
                format!("an adapter that changes {}", listed(&refused)),
                listed(&served.iter().collect::<Vec<_>>()),
                "add the modules to lora_target_modules, or leave the setting out",
            ));
        }
    }

    /// Whether the model has the module under the file's name for it. It is not enough that the last
    /// component maps to a module of the model, as weights could then be applied to the wrong one.
    fn model_has(&self, module: TargetModule, model: &ModelGeometry) -> bool {
        let naming = self.declaration.as_ref().and_then(|d| d.naming.get(&module));
        model.dims(module).is_some()
            && naming.is_none_or(|naming| {
                module.is_routed_expert()
                    || naming.mapped_exactly
                    || model.hf_modules.iter().any(|path| same_path(path, &naming.path))
            })
    }

    fn named(&self, modules: &[TargetModule]) -> String {
        let naming = self.declaration.as_ref().map(|d| &d.naming);
        let name = |module: &TargetModule| match naming.and_then(|n| n.get(module)) {
            Some(naming) => format!("{module} ({})", naming.path),
            None => module.to_string(),
        };
        listed(&modules.iter().map(name).collect::<Vec<_>>())
    }

    fn check_ranks(&self, config: &LoraConfig, problems: &mut Vec<Rejection>) {
        let over = self.low_ranks().filter(|(_, low)| low.rank > config.max_lora_rank);
        let over: Vec<String> =
            over.map(|(key, low)| format!("rank {} at {key}", low.rank)).collect();
        if !over.is_empty() {
            problems.push(Rejection::new(
                Code::RankOverLimit,
                "max_lora_rank",
                listed(&over),
                format!("ranks up to {}", config.max_lora_rank),
                format!("set max_lora_rank to {} or more", self.max_rank()),
            ));
        }
    }

    /// A replaced bias must exist in the model.
    fn check_biases(&self, model: &ModelGeometry, problems: &mut Vec<Rejection>) {
        let biased = |key: &SiteKey| {
            key.module().is_some_and(|module| model.biased_modules.contains(&module))
        };
        let replaced = self.sites.iter().filter(|(_, site)| site.base_bias.is_some());
        let strange: Vec<&SiteKey> =
            replaced.map(|(key, _)| key).filter(|key| !biased(key)).collect();
        if !strange.is_empty() {
            problems.push(Rejection::new(
                Code::BiasNotInModel,
                "bias",
                format!("a bias for {}", listed(&strange)),
                "biases of layers that have one in this model",
                "load the adapter on the model that it was trained for",
            ));
        }
    }

    /// If PEFT keeps tied embeddings tied, it saves the pairs of both, which must agree.
    fn check_tying(
        &self,
        declaration: &Declaration,
        model: &ModelGeometry,
        problems: &mut Vec<Rejection>,
    ) {
        if !model.tied_embeddings || !declaration.ensure_weight_tying {
            return;
        }
        let pair = |key: SiteKey| self.sites.get(&key).and_then(|site| site.low_rank.as_ref());
        let found = match (pair(SiteKey::Embed), pair(SiteKey::Head)) {
            (None, None) => return,
            (Some(embed), Some(head)) if is_transpose(embed, head) => return,
            (Some(_), Some(_)) => "updates of embed_tokens and lm_head that are not the same",
            (Some(_), None) => "an update of embed_tokens without that of lm_head",
            (None, Some(_)) => "an update of lm_head without that of embed_tokens",
        };
        problems.push(Rejection::new(
            Code::TiedEmbeddings,
            "ensure_weight_tying",
            found,
            "one update of both, which are tied in this model",
            "export the adapter again",
        ));
    }
}

/// Whether the update of `lm_head` is the transpose of the embedding's.
fn is_transpose(embed: &LowRank, head: &LowRank) -> bool {
    let same = |one: &HostTensor, other: &HostTensor| {
        let (&[rows, cols], &[other_rows, other_cols]) = (one.shape(), other.shape()) else {
            return false;
        };
        let equal = |r: usize, c: usize| {
            one.get_f32(r * cols + c).to_bits() == other.get_f32(c * rows + r).to_bits()
        };
        (rows, cols) == (other_cols, other_rows)
            && (0..rows).all(|r| (0..cols).all(|c| equal(r, c)))
    };
    same(&embed.a, &head.b) && same(&embed.b, &head.a)
}

/// Whether two paths mean the same module in different releases of transformers.
fn same_path(model: &str, file: &str) -> bool {
    let block = |path: &str| path.replace("block_sparse_moe.", "mlp.");
    block(model) == block(file)
}

/// Whether a site has no effect. A replacement, a bias or a DoRA magnitude counts as an effect, since only a
/// comparison with the model could show otherwise.
fn changes_nothing(site: &SiteWeights) -> bool {
    let idle = |low: &LowRank| {
        let no_bias = low.b_bias.as_ref().is_none_or(HostTensor::is_zero);
        let no_product = low.b.is_zero() || low.a.is_zero();
        low.magnitude.is_none() && (low.scale == 0.0 || (no_product && no_bias))
    };
    site.base_bias.is_none()
        && site.replacement.is_none()
        && site.rows.is_none()
        && site.low_rank.as_ref().is_none_or(idle)
}
