//! The modules that LoRA may target: ids, names, tensor-parallel split, and the sites of a model.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

mod map;
mod site;

pub(crate) use map::unknown_target;
pub use map::{HfNames, ModuleMap};
pub use site::{NormKind, SiteKey};

/// How tensor parallelism splits a module's weights.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Split {
    /// Column parallel: output features are split. B `[out, r]` is split along `out`, A is replicated.
    Column,
    /// Row parallel: input features are split. A `[r, in]` is split along `in`, B is replicated.
    Row,
    /// Every rank holds the whole module.
    None,
}

/// A kind of module that LoRA may target, with TensorRT-LLM's name and id.
///
/// The discriminant is the id. `mlp_h_to_4h` and `moe_h_to_4h` are the SiLU (gate) side of a gated
/// MLP; `mlp_gate` and `moe_gate` are its linear (up) side.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum TargetModule {
    /// Query, key and value in one projection.
    AttnQkv,
    /// Query projection.
    AttnQ,
    /// Key projection.
    AttnK,
    /// Value projection.
    AttnV,
    /// Attention output projection.
    AttnDense,
    /// Gate (SiLU) side of a gated MLP.
    MlpHTo4h,
    /// Down projection of an MLP.
    Mlp4hToH,
    /// Up (linear) side of a gated MLP.
    MlpGate,
    /// Cross attention: query, key and value in one projection.
    CrossAttnQkv,
    /// Cross attention: query.
    CrossAttnQ,
    /// Cross attention: key.
    CrossAttnK,
    /// Cross attention: value.
    CrossAttnV,
    /// Cross attention: output projection.
    CrossAttnDense,
    /// Gate (SiLU) side of the routed experts (w1).
    MoeHTo4h,
    /// Down projection of the routed experts (w2).
    Moe4hToH,
    /// Up (linear) side of the routed experts (w3).
    MoeGate,
    /// Router over the experts.
    MoeRouter,
    /// Router over one MLP.
    MlpRouter,
    /// Gate and up side of a gated MLP in one projection, gate rows first.
    MlpGateUp,
    /// Gate (SiLU) side of a shared expert.
    SharedExpertHTo4h,
    /// Down projection of a shared expert.
    SharedExpert4hToH,
    /// Up (linear) side of a shared expert.
    SharedExpertGate,
    /// Input projection of a Mamba mixer.
    MambaInProj,
    /// Output projection of a Mamba mixer.
    MambaOutProj,
    /// Projection into the latent space of a latent mixture of experts.
    MoeLatentFc1,
    /// Projection back from that space.
    MoeLatentFc2,
}

struct Row(TargetModule, &'static str, Split);

/// Fused modules, and their parts in a model that does not fuse them.
pub(crate) const FUSED: [(TargetModule, &[TargetModule]); 2] = [
    (TargetModule::AttnQkv, &[TargetModule::AttnQ, TargetModule::AttnK, TargetModule::AttnV]),
    (TargetModule::MlpGateUp, &[TargetModule::MlpHTo4h, TargetModule::MlpGate]),
];

/// One row per module, in the order of ids.
const TABLE: [Row; 26] = [
    Row(TargetModule::AttnQkv, "attn_qkv", Split::Column),
    Row(TargetModule::AttnQ, "attn_q", Split::Column),
    Row(TargetModule::AttnK, "attn_k", Split::Column),
    Row(TargetModule::AttnV, "attn_v", Split::Column),
    Row(TargetModule::AttnDense, "attn_dense", Split::Row),
    Row(TargetModule::MlpHTo4h, "mlp_h_to_4h", Split::Column),
    Row(TargetModule::Mlp4hToH, "mlp_4h_to_h", Split::Row),
    Row(TargetModule::MlpGate, "mlp_gate", Split::Column),
    Row(TargetModule::CrossAttnQkv, "cross_attn_qkv", Split::Column),
    Row(TargetModule::CrossAttnQ, "cross_attn_q", Split::Column),
    Row(TargetModule::CrossAttnK, "cross_attn_k", Split::Column),
    Row(TargetModule::CrossAttnV, "cross_attn_v", Split::Column),
    Row(TargetModule::CrossAttnDense, "cross_attn_dense", Split::Row),
    Row(TargetModule::MoeHTo4h, "moe_h_to_4h", Split::Column),
    Row(TargetModule::Moe4hToH, "moe_4h_to_h", Split::Row),
    Row(TargetModule::MoeGate, "moe_gate", Split::Column),
    Row(TargetModule::MoeRouter, "moe_router", Split::None),
    Row(TargetModule::MlpRouter, "mlp_router", Split::None),
    Row(TargetModule::MlpGateUp, "mlp_gate_up", Split::Column),
    Row(TargetModule::SharedExpertHTo4h, "shared_expert_h_to_4h", Split::Column),
    Row(TargetModule::SharedExpert4hToH, "shared_expert_4h_to_h", Split::Row),
    Row(TargetModule::SharedExpertGate, "shared_expert_gate", Split::Column),
    Row(TargetModule::MambaInProj, "mamba_in_proj", Split::Column),
    Row(TargetModule::MambaOutProj, "mamba_out_proj", Split::Row),
    Row(TargetModule::MoeLatentFc1, "moe_latent_fc1", Split::None),
    Row(TargetModule::MoeLatentFc2, "moe_latent_fc2", Split::None),
];

impl TargetModule {
    fn row(self) -> &'static Row {
        // The table has one row per variant, in order: see the test below.
        &TABLE[self as usize]
    }

    /// The numeric id.
    pub const fn id(self) -> u8 {
        self as u8
    }

    /// Its name in `lora_target_modules`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// How tensor parallelism splits the module.
    pub fn split(self) -> Split {
        self.row().2
    }

    /// The module of a name; `None` for a name that is not in the table.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The module of an id; `None` above 25.
    pub fn from_id(id: u8) -> Option<Self> {
        TABLE.get(usize::from(id)).map(|row| row.0)
    }

    /// Every module, in the order of ids.
    pub fn all() -> impl ExactSizeIterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// Whether the module is a stack of routed experts.
    pub const fn is_routed_expert(self) -> bool {
        matches!(self, Self::MoeHTo4h | Self::Moe4hToH | Self::MoeGate)
    }
}

impl fmt::Display for TargetModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for TargetModule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for TargetModule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::from_name(&name)
            .ok_or_else(|| de::Error::custom(format!("unknown target module `{name}`")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_names_and_rows_agree() {
        assert_eq!(TargetModule::all().len(), 26);
        for (i, module) in TargetModule::all().enumerate() {
            assert_eq!(usize::from(module.id()), i);
            assert_eq!(TargetModule::from_id(module.id()), Some(module));
            assert_eq!(TargetModule::from_name(module.name()), Some(module));
        }
        assert_eq!(TargetModule::from_id(26), None);
        assert_eq!(TargetModule::MoeLatentFc2.id(), 25);
        assert_eq!(TargetModule::MlpGateUp.id(), 18);
    }

    #[test]
    fn modules_are_named_in_json() {
        let json = serde_json::to_string(&TargetModule::Moe4hToH).unwrap();
        assert_eq!(json, "\"moe_4h_to_h\"");
        assert_eq!(serde_json::from_str::<TargetModule>(&json).unwrap(), TargetModule::Moe4hToH);
        assert!(serde_json::from_str::<TargetModule>("\"attn_x\"").is_err());
    }
}
