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
    /// Target modules of the names in the file.
    pub modules: ModuleMap,
    /// Tolerate, with a warning, configuration fields that are not known.
    pub allow_unknown_fields: bool,
    /// Give experts without weights a change of zero.
    pub allow_missing_experts: bool,
    /// The layout of routed-expert weights; `None`: the one that the file shows.
    pub moe_layout: Option<ExpertLayout>,
    /// Order of fused query, key and value rows in NeMo archives.
    pub nemo_qkv_layout: NemoQkvLayout,
    /// Order of the rows of `gate_up_proj`: gate first, or up first.
    pub gate_first: bool,
    /// The model that the adapter is read for, where there is one. It settles what a file leaves
    /// open: fused modules are cut into the parts that the model has, and layouts are told apart
    /// that only the model's dimensions can tell apart.
    pub model: Option<ModelGeometry>,
    /// The model's weights, against which full weights in the files are held. Without them, each counts
    /// as another weight than the model's.
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
    /// The options that an engine's configuration asks for.
    ///
    /// # Errors
    /// A `trtllm_modules_to_hf_modules` that is no map.
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

    /// The same options with the weights of the model.
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
