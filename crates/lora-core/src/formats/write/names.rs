//! Module names of an adapter in a PEFT file.

use std::collections::{BTreeMap, BTreeSet};

use super::{WriteError, inexpressible};
use crate::adapter::Adapter;
use crate::modules::{SiteKey, TargetModule};

/// The part before `layers` in most models.
const ROOT: &str = "model.";

/// The fused gate and up module of routed experts.
pub(super) const GATE_UP: &str = "gate_up_proj";

/// Names of an adapter's modules: those of the file that it was read from, or else the usual names of
/// Hugging Face models.
pub(super) struct Names {
    root: String,
    dense: BTreeMap<TargetModule, String>,
    /// The path up to `experts`.
    block: String,
    experts: BTreeMap<TargetModule, String>,
    /// Whether a dense module has another name than in the file that it was read from.
    pub renamed: bool,
}

impl Names {
    /// The names for an adapter.
    ///
    /// # Errors
    /// A module without a usual name, if the adapter has no names either.
    pub fn of(adapter: &Adapter) -> Result<Self, WriteError> {
        let declared = adapter.declaration.as_ref();
        let path = |module: TargetModule| {
            declared.and_then(|d| d.naming.get(&module)).map(|naming| naming.path.as_str())
        };
        let modules = adapter.modules();
        let (routed, dense): (Vec<_>, Vec<_>) =
            modules.iter().copied().partition(|module| module.is_routed_expert());
        // Parts that were split from a fused module still have its name.
        let mut once = BTreeSet::new();
        let known = dense.iter().filter_map(|module| path(*module));
        let shared: BTreeSet<&str> = known.filter(|path| !once.insert(*path)).collect();
        let mut names = Self {
            root: declared.map_or(ROOT, |declared| &declared.root).to_owned(),
            dense: BTreeMap::new(),
            block: "mlp.experts".to_owned(),
            experts: BTreeMap::new(),
            renamed: false,
        };
        for module in dense {
            let own = path(module).filter(|path| !shared.contains(path));
            names.renamed |= own.is_none();
            let name = match own.or(usual(module)) {
                Some(name) => name.to_owned(),
                None => return Err(nameless(module)),
            };
            names.dense.insert(module, name);
        }
        for module in routed {
            names.name_expert(module, path(module));
        }
        Ok(names)
    }

    fn name_expert(&mut self, module: TargetModule, path: Option<&str>) {
        let usual = match module {
            TargetModule::MoeHTo4h => "gate_proj",
            TargetModule::MoeGate => "up_proj",
            _ => "down_proj",
        };
        let known = path.and_then(|path| path.rsplit_once('.'));
        let name = match known {
            Some((_, name)) if name != GATE_UP => name,
            _ => usual,
        };
        self.experts.insert(module, name.to_owned());
        if let Some((block, _)) = known {
            // With a pair for each expert, the path contains the expert number.
            let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
            let numberless = block.rsplit_once('.').filter(|(_, last)| digits(last));
            numberless.map_or(block, |(block, _)| block).clone_into(&mut self.block);
        }
    }

    /// The full name of a dense module or norm, which patterns of the configuration match.
    pub fn module(&self, key: SiteKey) -> String {
        let path = key.module().map(|module| self.path(module));
        key.hf_name(&self.root, path).unwrap_or_default()
    }

    /// The path of a dense module inside a layer.
    pub fn path(&self, module: TargetModule) -> &str {
        self.dense.get(&module).map_or("", String::as_str)
    }

    /// The full name for a path inside a layer.
    pub fn in_layer(&self, layer: u32, path: &str) -> String {
        format!("{}layers.{layer}.{path}", self.root)
    }

    /// The part before `layers`: `model.` or nothing.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The path of routed experts up to `experts`.
    pub fn block(&self) -> &str {
        &self.block
    }

    /// The name of a routed expert's module.
    pub fn expert(&self, module: TargetModule) -> &str {
        self.experts.get(&module).map_or("", String::as_str)
    }
}

/// The path of a module in models of the Llama, Mistral and Qwen families.
fn usual(module: TargetModule) -> Option<&'static str> {
    use TargetModule::*;
    Some(match module {
        AttnQkv => "self_attn.qkv_proj",
        AttnQ => "self_attn.q_proj",
        AttnK => "self_attn.k_proj",
        AttnV => "self_attn.v_proj",
        AttnDense => "self_attn.o_proj",
        MlpHTo4h => "mlp.gate_proj",
        MlpGate => "mlp.up_proj",
        Mlp4hToH => "mlp.down_proj",
        MlpGateUp => "mlp.gate_up_proj",
        MoeRouter => "mlp.gate",
        SharedExpertHTo4h => "mlp.shared_expert.gate_proj",
        SharedExpertGate => "mlp.shared_expert.up_proj",
        SharedExpert4hToH => "mlp.shared_expert.down_proj",
        MambaInProj => "mixer.in_proj",
        MambaOutProj => "mixer.out_proj",
        MoeLatentFc1 => "mlp.fc1_latent_proj",
        MoeLatentFc2 => "mlp.fc2_latent_proj",
        CrossAttnQkv | CrossAttnQ | CrossAttnK | CrossAttnV | CrossAttnDense | MlpRouter
        | MoeHTo4h | Moe4hToH | MoeGate => return None,
    })
}

fn nameless(module: TargetModule) -> WriteError {
    inexpressible(
        &module,
        "a module without a name in models of the Llama, Mistral and Qwen families",
        "modules that have one, or that a PEFT file named",
        "convert the PEFT adapter that the file was made from",
    )
}
