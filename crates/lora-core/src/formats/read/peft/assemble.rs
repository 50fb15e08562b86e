//! Builds the sites of an adapter from the tensors of a file and its configuration.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::collect::{Collected, SiteTensors};
use super::config::{Biases, PeftConfig, Variant};
use super::keys::Kind;
use super::tokens;
use super::wrapping::Wrapping;
use crate::adapter::{LowRank, RowOrder, SiteWeights};
use crate::formats::read::pair;
use crate::formats::read::plan::{PlannedSites, TensorPlan};
use crate::formats::read::view::View;
use crate::modules::{SiteKey, TargetModule};
use crate::rules::{Code, Rejection};

/// Builds every site; missing, undeclared and contradictory tensors are rejections. Full weights are left
/// to [`Wrapping::full_weights`], since their effect depends on their content.
pub(super) fn assemble(wrapping: &Wrapping<'_>, problems: &mut Vec<Rejection>) -> PlannedSites {
    let (file, config) = (wrapping.file, wrapping.config);
    let mut sites = PlannedSites::new();
    for (key, parts) in file.sites.iter().filter(|(key, _)| !file.broken.contains(key)) {
        let saved = wrapping.is_saved(*key);
        let pair = wrapping.pair(*key);
        let mut site = Site { key: *key, parts, pair, config, saved, problems };
        let (low_rank, base_bias) = (site.low_rank(), site.base_bias());
        if low_rank.is_some() || base_bias.is_some() {
            sites.insert(*key, SiteWeights { low_rank, base_bias, ..SiteWeights::default() });
        }
    }
    for key in [SiteKey::Embed, SiteKey::Head] {
        if let Some(rows) = tokens::rows(wrapping, key, problems) {
            sites.entry(key).or_default().rows = Some(rows);
        }
    }
    require_biases(&sites, file, config, problems);
    sites
}

struct Site<'a> {
    key: SiteKey,
    parts: &'a SiteTensors,
    /// A and B.
    pair: [Option<View>; 2],
    config: &'a PeftConfig,
    /// Whether `modules_to_save` names the module.
    saved: bool,
    problems: &'a mut Vec<Rejection>,
}

impl<'a> Site<'a> {
    fn get(&self, kind: Kind) -> Option<&'a View> {
        self.parts.tensors.get(&kind)
    }

    fn reject(&mut self, code: Code, setting: &str, phrases: [&str; 3]) {
        let [found, allowed, remedy] = phrases;
        self.problems.push(Rejection::new(code, setting, found, allowed, remedy));
    }

    fn low_rank(&mut self) -> Option<LowRank<TensorPlan>> {
        let [a, b] = self.pair.clone();
        if let Some(a) = a.as_ref().filter(|_| self.has_biased_embedding()) {
            let found = "lora_bias on embed_tokens";
            let remedy = "leave embed_tokens out of target_modules";
            let allowed = "LoRA on embed_tokens without lora_bias";
            self.reject(Code::LoraBiasOnEmbedding, a.name(), [found, allowed, remedy]);
            return None;
        }
        let magnitude = self.extra(Kind::Magnitude, Variant::Dora, a.is_some());
        let b_bias = self.extra(Kind::BBias, Variant::OutputBias, a.is_some());
        let (a, b) = match (a, b) {
            (Some(a), Some(b)) => (a, b),
            (None, None) => return None,
            (Some(only), None) | (None, Some(only)) => {
                self.problems.push(pair::incomplete(&only, "lora_A together with lora_B"));
                return None;
            }
        };
        let rank = self.rank(&a, &b)?;
        let alpha = self.note_err(self.config.alphas.of(&self.trained()))?;
        let scale = self.config.scaling.scale(alpha, rank);
        if !scale.is_finite() {
            let found = format!("alpha {alpha} for {}", self.parts.module);
            let allowed = "an alpha whose scale is a finite float32";
            let remedy = "correct lora_alpha or alpha_pattern in adapter_config.json";
            self.reject(Code::InvalidConfigField, "lora_alpha", [&found, allowed, remedy]);
        }
        let (a, b) = (a.into(), b.into());
        Some(LowRank { rank, scale, a, b, magnitude, b_bias, rows: RowOrder::ByPart })
    }

    /// PEFT's name of the module, or of the parameter if that is the target. Patterns match this name.
    fn trained(&self) -> Cow<'a, str> {
        self.config.declaration.trained(&self.parts.module)
    }

    fn note_err<T>(&mut self, result: Result<T, Rejection>) -> Option<T> {
        result.map_err(|problem| self.problems.push(problem)).ok()
    }

    /// Whether `lora_bias` applies to the embedding, for which PEFT saves no bias.
    fn has_biased_embedding(&self) -> bool {
        self.key == SiteKey::Embed && self.config.variant == Variant::OutputBias
    }

    /// The rank that A, B and the configuration agree on.
    fn rank(&mut self, a: &View, b: &View) -> Option<usize> {
        let rank = pair::rank_of(a, b, self.problems)?;
        let stated = self.note_err(self.config.ranks.of(&self.trained()))?;
        if rank != stated {
            let correct = "r or rank_pattern in adapter_config.json";
            self.problems.push(pair::other_rank(a, stated, "r and rank_pattern", correct));
        }
        Some(rank)
    }

    /// A magnitude or a bias of B, which must be present exactly if the variant has it.
    fn extra(&mut self, kind: Kind, variant: Variant, has_pair: bool) -> Option<TensorPlan> {
        let (field, tensor) = match kind {
            Kind::Magnitude => ("use_dora", "lora_magnitude_vector"),
            _ => ("lora_bias", "lora_B.bias"),
        };
        let declared = self.config.variant == variant;
        match self.get(kind) {
            Some(named) if !declared => {
                let found = format!("a tensor that needs {field}: true");
                self.undeclared(named.name(), &found);
                None
            }
            Some(named) if !has_pair => {
                let found = "a magnitude or bias without lora_A and lora_B";
                self.undeclared(named.name(), found);
                None
            }
            Some(named) => self.vector(named),
            None if declared && has_pair => {
                let found = format!("no {tensor} for {}", self.parts.module);
                let allowed = format!("one for every module, by {field}: true");
                let remedy = "export the adapter again";
                self.reject(Code::MissingTensor, field, [&found, &allowed, remedy]);
                None
            }
            None => None,
        }
    }

    fn base_bias(&mut self) -> Option<TensorPlan> {
        if let Some(original) = self.get(Kind::OriginalBias).filter(|_| !self.saved) {
            self.undeclared(
                original.name(),
                "an original_module that modules_to_save does not name",
            );
        }
        let named = self.get(Kind::BaseBias)?;
        let paired = self.get(Kind::A).is_some();
        match self.config.biases {
            _ if self.saved => self.vector(named),
            Biases::All => self.vector(named),
            Biases::LoraOnly if paired => self.vector(named),
            Biases::LoraOnly => {
                self.undeclared(named.name(), "the bias of a module without LoRA");
                None
            }
            Biases::None => {
                self.undeclared(named.name(), "a bias, with bias: \"none\"");
                None
            }
        }
    }

    fn vector(&mut self, named: &View) -> Option<TensorPlan> {
        if named.shape().len() != 1 {
            self.wrong_shape(named, "one dimension, [out]");
        }
        Some(named.clone().into())
    }

    fn wrong_shape(&mut self, named: &View, allowed: &str) {
        self.problems.push(pair::wrong_shape(named, allowed));
    }

    fn undeclared(&mut self, name: &str, found: &str) {
        let allowed = "tensors that adapter_config.json declares";
        let remedy = "correct adapter_config.json, or export the adapter again";
        self.reject(Code::UndeclaredTensor, name, [found, allowed, remedy]);
    }
}

/// Rejects a file with a base bias of a module in some layers only: either all layers of a model have
/// that bias or none has it, so the others were lost.
fn require_biases(
    sites: &PlannedSites,
    file: &Collected,
    config: &PeftConfig,
    problems: &mut Vec<Rejection>,
) {
    if config.biases == Biases::None {
        return;
    }
    let biased: BTreeSet<TargetModule> = sites
        .iter()
        .filter(|(_, site)| site.base_bias.is_some())
        .filter_map(|(key, _)| key.module())
        .collect();
    let incomplete = sites.iter().filter(|(key, site)| {
        site.base_bias.is_none() && key.module().is_some_and(|module| biased.contains(&module))
    });
    for (key, _) in incomplete {
        let module =
            file.sites.get(key).map_or_else(|| key.to_string(), |parts| parts.module.clone());
        problems.push(Rejection::new(
            Code::MissingTensor,
            "bias",
            format!("no bias of {module}, though other layers have one"),
            "a bias in every layer or in none",
            "export the adapter again",
        ));
    }
}
