//! Helpers for all layouts of routed experts: module names, ranks, scales, and rejections.

use std::collections::BTreeMap;

use super::super::config::PeftConfig;
use crate::adapter::{LowRank, ModuleNaming, RowOrder};
use crate::config::ExpertLayout;
use crate::formats::ReadOptions;
use crate::formats::read::plan::{PlannedSites, TensorPlan};
use crate::ids::LayerIdx;
use crate::modules::{SiteKey, TargetModule};
use crate::rules::{Code, Rejection, listed};

/// Collects the sites of a file's routed experts.
pub(super) struct Planner<'a> {
    pub root: &'a str,
    pub config: &'a PeftConfig,
    pub options: &'a ReadOptions,
    pub problems: &'a mut Vec<Rejection>,
    pub sites: PlannedSites,
    pub naming: BTreeMap<TargetModule, ModuleNaming>,
    pub names: Vec<String>,
}

/// Rank and scale of a low-rank update.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct ExpertUpdate {
    pub rank: usize,
    pub scale: f32,
}

impl Planner<'_> {
    /// The layout: the first of `possible`, which was detected, or the one that `moe_layout` chooses among
    /// them.
    pub fn choose(&mut self, possible: &[ExpertLayout]) -> Option<ExpertLayout> {
        let found = *possible.first()?;
        let Some(asked) = self.options.moe_layout else {
            return Some(found);
        };
        if !possible.contains(&asked) {
            self.problems.push(Rejection::new(
                Code::RoutedExpertLayout,
                "moe_layout",
                format!("{asked}, for tensors that are {found}"),
                listed(possible),
                "leave moe_layout out to have the layout detected, or correct it",
            ));
            return None;
        }
        Some(asked)
    }

    /// gpt-oss interleaves gate and up rows, which the tensors of a file do not show.
    pub fn refuse_unmarked_interleaving(
        &mut self,
        interleaved: ExpertLayout,
        halves: ExpertLayout,
    ) {
        let base = self.config.base_model_name.as_deref().unwrap_or_default().to_lowercase();
        let alternating = base.contains("gpt-oss") || base.contains("gpt_oss");
        if alternating && self.options.moe_layout.is_none() {
            self.problems.push(Rejection::new(
                Code::AmbiguousExpertLayout,
                "base_model_name_or_path",
                format!("{base:?}, whose gate and up rows alternate in gate_up_proj"),
                "moe_layout, to say how this adapter's rows lie",
                format!("set moe_layout to {interleaved} or {halves}"),
            ));
        }
    }

    /// Notes the file's name of a module; different names in different layers are a rejection.
    pub fn name(&mut self, module: TargetModule, path: &str) {
        let naming = ModuleNaming { path: path.to_owned(), mapped_exactly: false };
        let known = self.naming.entry(module).or_insert(naming);
        if known.path != path {
            self.problems.push(Rejection::new(
                Code::UnknownModule,
                "routed experts",
                format!("the module `{path}`, which other layers call `{}`", known.path),
                "one name for one module",
                "export the adapter again",
            ));
        }
    }

    /// The target module of a name under `experts`; an unknown name is a rejection.
    pub fn module(&mut self, block: &str, name: &str) -> Option<TargetModule> {
        let path = format!("{block}.{name}");
        let module = self.options.modules.lookup(&path).filter(|m| m.is_routed_expert());
        if module.is_none() {
            self.problems.push(Rejection::new(
                Code::UnknownModule,
                path,
                "a module of routed experts that the module map does not name",
                "a name of moe_h_to_4h, moe_gate or moe_4h_to_h",
                "map it with trtllm_modules_to_hf_modules",
            ));
        }
        module
    }

    /// Adds a site; two tensors for one module are a rejection.
    pub fn insert(
        &mut self,
        layer: u32,
        module: TargetModule,
        update: ExpertUpdate,
        [a, b]: [TensorPlan; 2],
    ) {
        let ExpertUpdate { rank, scale } = update;
        let (magnitude, b_bias, rows) = (None, None, RowOrder::ByPart);
        let low = LowRank { rank, scale, a, b, magnitude, b_bias, rows };
        let key = SiteKey::Layer(LayerIdx(layer), module);
        if self.sites.insert(key, low.into()).is_some() {
            self.problems.push(Rejection::new(
                Code::DuplicateTensor,
                key.to_string(),
                "two names for one module",
                "one update of a module",
                "export the adapter again",
            ));
        }
    }

    /// Rank and scale of a module by the configuration; a rejection if the rank is not the one `found` in
    /// the tensors.
    pub fn update(&mut self, module: &str, tensor: &str, found: usize) -> Option<ExpertUpdate> {
        self.names.push(module.to_owned());
        let stated = self.note_err(self.config.ranks.of(module))?;
        if found != stated {
            self.problems.push(Rejection::new(
                Code::RankMismatch,
                tensor,
                format!("rank {found}"),
                format!("rank {stated}, by r and rank_pattern"),
                "correct r or rank_pattern in adapter_config.json",
            ));
            return None;
        }
        let alpha = self.note_err(self.config.alphas.of(module))?;
        let scale = self.config.scaling.scale(alpha, found);
        if !scale.is_finite() {
            self.problems.push(Rejection::new(
                Code::InvalidConfigField,
                "lora_alpha",
                format!("alpha {alpha} for {module}"),
                "an alpha whose scale is a finite float32",
                "correct lora_alpha or alpha_pattern in adapter_config.json",
            ));
            return None;
        }
        Some(ExpertUpdate { rank: found, scale })
    }

    pub fn note_err<T>(&mut self, result: Result<T, Rejection>) -> Option<T> {
        result.map_err(|problem| self.problems.push(problem)).ok()
    }

    pub fn wrong_shape(&mut self, name: &str, found: &[usize], allowed: impl Into<String>) {
        self.problems.push(Rejection::new(
            Code::TensorShape,
            name,
            format!("shape {found:?}"),
            allowed,
            "export it again",
        ));
    }
}
