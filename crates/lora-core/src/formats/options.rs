//! How adapter files are read.

use super::base::BaseWeights;
use crate::config::{CkptSource, ExpertLayout, LoraConfig, NemoQkvLayout};
use crate::geometry::ModelGeometry;
use crate::modules::ModuleMap;
use crate::rules::Rejections;

/// How adapter files are read.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Which file format the path holds.
    pub source: CkptSource,
    /// Maps module names of the file to target modules.
    pub modules: ModuleMap,
    /// Ignore unknown configuration fields with a warning instead of refusing them.
    pub allow_unknown_fields: bool,
    /// Treat experts without weights as unchanged instead of refusing the adapter.
    pub allow_missing_experts: bool,
    /// The layout of routed-expert weights; detected from the file if `None`.
    pub moe_layout: Option<ExpertLayout>,
    /// Order of fused query, key and value rows in NeMo archives.
    pub nemo_qkv_layout: NemoQkvLayout,
    /// Whether the gate rows of a fused `gate_up_proj` come before its up rows.
    pub gate_first: bool,
    /// The model that the adapter is read for, if it is known. Fused modules are then split into the
    /// modules that the model has, and layouts that differ only in dimensions can be distinguished.
    pub model: Option<ModelGeometry>,
    /// The model's weights, with which full weights in the files are compared. Without them, every full
    /// weight is assumed to differ from the model's.
    pub base: Option<BaseWeights>,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            source: CkptSource::Hf,
            modules: ModuleMap::default(),
            allow_unknown_fields: false,
            allow_missing_experts: false,
            moe_layout: None,
            nemo_qkv_layout: NemoQkvLayout::default(),
            gate_first: true,
            model: None,
            base: None,
        }
    }
}

impl ReadOptions {
    /// The options that follow from an engine's configuration.
    ///
    /// # Errors
    /// A `trtllm_modules_to_hf_modules` that is not a valid map.
    pub fn from_config(config: &LoraConfig) -> Result<Self, Rejections> {
        Ok(Self {
            source: config.lora_ckpt_source,
            modules: ModuleMap::from_user(&config.trtllm_modules_to_hf_modules)?,
            allow_unknown_fields: config.allow_unknown_fields,
            allow_missing_experts: config.allow_missing_experts,
            moe_layout: config.moe_layout,
            nemo_qkv_layout: config.nemo_qkv_layout,
            gate_first: config.swap_gate_up_proj_lora_b_weight,
            model: None,
            base: None,
        })
    }

    /// The same options for an adapter that will be served on `model`.
    #[must_use]
    pub fn for_model(mut self, model: ModelGeometry) -> Self {
        self.model = Some(model);
        self
    }

    /// The same options with the model's weights.
    #[must_use]
    pub fn with_base(mut self, base: BaseWeights) -> Self {
        self.base = Some(base);
        self
    }

    /// The same options for a file of another format.
    #[must_use]
    pub fn with_source(mut self, source: CkptSource) -> Self {
        self.source = source;
        self
    }
}
