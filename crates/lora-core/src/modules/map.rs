//! Maps Hugging Face module names to target modules.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::TargetModule;
use crate::rules::{Code, Rejection, Rejections};

/// A value of `trtllm_modules_to_hf_modules`: one name, or several alternatives.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum HfNames {
    /// The only name.
    One(String),
    /// Alternatives, the usual one first.
    Many(Vec<String>),
}

impl HfNames {
    fn as_slice(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Many(names) => names,
        }
    }
}

/// Translates module names of adapter files into target modules and back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModuleMap {
    by_hf: BTreeMap<String, TargetModule>,
    by_module: BTreeMap<TargetModule, Vec<String>>,
}

const DEFAULT: [(TargetModule, &str); 24] = [
    (TargetModule::AttnQkv, "qkv_proj"),
    (TargetModule::AttnQ, "q_proj"),
    (TargetModule::AttnK, "k_proj"),
    (TargetModule::AttnV, "v_proj"),
    (TargetModule::AttnDense, "o_proj"),
    (TargetModule::MlpHTo4h, "gate_proj"),
    (TargetModule::Mlp4hToH, "down_proj"),
    (TargetModule::MlpGate, "up_proj"),
    (TargetModule::MlpGateUp, "gate_up_proj"),
    (TargetModule::MoeHTo4h, "w1"),
    (TargetModule::Moe4hToH, "w2"),
    (TargetModule::MoeGate, "w3"),
    (TargetModule::MoeRouter, "gate"),
    (TargetModule::SharedExpertHTo4h, "shared_expert.gate_proj"),
    (TargetModule::SharedExpert4hToH, "shared_expert.down_proj"),
    (TargetModule::SharedExpertGate, "shared_expert.up_proj"),
    (TargetModule::MambaInProj, "in_proj"),
    (TargetModule::MambaOutProj, "out_proj"),
    (TargetModule::MoeLatentFc1, "fc1_latent_proj"),
    (TargetModule::MoeLatentFc2, "fc2_latent_proj"),
    // Model families with several shared experts, which are one projection.
    (TargetModule::SharedExpertHTo4h, "shared_experts.gate_proj"),
    (TargetModule::SharedExpert4hToH, "shared_experts.down_proj"),
    (TargetModule::SharedExpertGate, "shared_experts.up_proj"),
    // Mixtral's router.
    (TargetModule::MoeRouter, "block_sparse_moe.gate"),
];

impl Default for ModuleMap {
    /// The names in decoder models of the Llama, Mistral and Qwen families.
    fn default() -> Self {
        let mut map = Self { by_hf: BTreeMap::new(), by_module: BTreeMap::new() };
        for (module, name) in DEFAULT {
            map.by_hf.insert(name.to_owned(), module);
            map.by_module.entry(module).or_default().push(name.to_owned());
        }
        map
    }
}

impl ModuleMap {
    /// The map of `trtllm_modules_to_hf_modules`, which replaces the default map completely; the default if
    /// `user` is empty.
    ///
    /// # Errors
    /// Unknown target modules, empty names, and names of two modules, all together.
    pub fn from_user(user: &BTreeMap<String, HfNames>) -> Result<Self, Rejections> {
        if user.is_empty() {
            return Ok(Self::default());
        }
        let mut map = Self { by_hf: BTreeMap::new(), by_module: BTreeMap::new() };
        let mut problems = Vec::new();
        for (key, names) in user {
            let Some(module) = TargetModule::from_name(key) else {
                problems.push(unknown_target("trtllm_modules_to_hf_modules", key));
                continue;
            };
            for name in names.as_slice() {
                map.insert(module, name, &mut problems);
            }
        }
        Rejections(problems).into_result().map(|()| map)
    }

    fn insert(&mut self, module: TargetModule, name: &str, problems: &mut Vec<Rejection>) {
        let conflict = |found: String| {
            Rejection::new(
                Code::ModuleMapConflict,
                "trtllm_modules_to_hf_modules",
                found,
                "a non-empty name that belongs to one module",
                "give every target module names of its own",
            )
        };
        if name.is_empty() {
            problems.push(conflict(format!("an empty name for {module}")));
            return;
        }
        match self.by_hf.insert(name.to_owned(), module) {
            Some(other) if other != module => {
                problems.push(conflict(format!("`{name}` for both {other} and {module}")));
            }
            Some(_) => {}
            None => self.by_module.entry(module).or_default().push(name.to_owned()),
        }
    }

    /// The target module of a path inside a layer, such as `self_attn.q_proj` or
    /// `mlp.experts.3.up_proj`.
    ///
    /// Tried in turn: the whole path (without expert numbers), the path without its first component, the last
    /// component. Under `experts`, the last component can only name a routed expert, never a dense MLP; that
    /// of a shared expert is not looked up.
    pub fn lookup(&self, path: &str) -> Option<TargetModule> {
        let parts: Vec<&str> = path.split('.').filter(|part| !is_number(part)).collect();
        let (last, parents) = parts.split_last()?;
        let experts = parents.contains(&"experts");
        let whole = parts.join(".");
        let tail = whole.split_once('.').map_or("", |(_, rest)| rest);
        let exact = |name: &str| self.by_hf.get(name).copied();
        // A single component in the map names a dense module, unless it is a routed expert's.
        let bare = exact(last).filter(|module| !experts || module.is_routed_expert());
        let shared = parents.iter().any(|part| part.starts_with("shared_expert"));
        let bare = bare.filter(|_| !shared);
        exact(&whole)
            .or_else(|| if tail == *last { None } else { exact(tail) })
            .or(bare)
            .or_else(|| if experts { routed_expert(last) } else { None })
    }

    /// Whether the map has exactly this path, not only its end.
    pub fn names_exactly(&self, path: &str) -> bool {
        self.by_hf.contains_key(path)
    }

    /// The names of a module, the usual one first; possibly none.
    pub fn hf_names(&self, module: TargetModule) -> &[String] {
        self.by_module.get(&module).map_or(&[], Vec::as_slice)
    }
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())
}

fn routed_expert(name: &str) -> Option<TargetModule> {
    match name {
        "gate_proj" => Some(TargetModule::MoeHTo4h),
        "up_proj" => Some(TargetModule::MoeGate),
        "down_proj" => Some(TargetModule::Moe4hToH),
        _ => None,
    }
}

/// The rejection of an unknown target module.
pub(crate) fn unknown_target(setting: &str, name: &str) -> Rejection {
    let names: Vec<&str> = TargetModule::all().map(TargetModule::name).collect();
    Rejection::new(
        Code::UnknownTargetModule,
        setting,
        format!("`{name}`"),
        format!("one of {}", names.join(", ")),
        "correct the name",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dense_modules_are_found_by_their_last_name() {
        let map = ModuleMap::default();
        assert_eq!(map.lookup("self_attn.q_proj"), Some(TargetModule::AttnQ));
        assert_eq!(map.lookup("mlp.gate_proj"), Some(TargetModule::MlpHTo4h));
        assert_eq!(map.lookup("mlp.gate"), Some(TargetModule::MoeRouter));
        assert_eq!(map.lookup("input_layernorm"), None);
        assert_eq!(map.lookup(""), None);
    }

    #[test]
    fn experts_are_never_taken_for_a_dense_mlp() {
        let map = ModuleMap::default();
        assert_eq!(map.lookup("mlp.experts.3.gate_proj"), Some(TargetModule::MoeHTo4h));
        assert_eq!(map.lookup("mlp.experts.up_proj"), Some(TargetModule::MoeGate));
        assert_eq!(map.lookup("block_sparse_moe.experts.0.w2"), Some(TargetModule::Moe4hToH));
        assert_eq!(map.lookup("mlp.shared_expert.up_proj"), Some(TargetModule::SharedExpertGate));
        assert_eq!(map.lookup("mlp.shared_experts.up_proj"), Some(TargetModule::SharedExpertGate));
        assert_eq!(map.lookup("mlp.shared_expert.w1"), None);
    }

    #[test]
    fn a_user_map_replaces_the_default() {
        let user = BTreeMap::from([
            ("attn_q".to_owned(), HfNames::Many(vec!["query".into(), "self_attn.wq".into()])),
            ("attn_k".to_owned(), HfNames::One("key".into())),
        ]);
        let map = ModuleMap::from_user(&user).unwrap();
        assert_eq!(map.lookup("self_attn.query"), Some(TargetModule::AttnQ));
        assert_eq!(map.lookup("self_attn.wq"), Some(TargetModule::AttnQ));
        assert_eq!(map.lookup("other.wq"), None);
        assert_eq!(map.lookup("self_attn.q_proj"), None);
        assert_eq!(map.hf_names(TargetModule::AttnQ), ["query", "self_attn.wq"]);
        assert!(map.names_exactly("self_attn.wq") && !map.names_exactly("self_attn.query"));
    }

    #[test]
    fn an_ambiguous_user_map_is_refused() {
        let one = |name: &str| HfNames::One(name.to_owned());
        let user = BTreeMap::from([
            ("attn_q".to_owned(), one("x")),
            ("attn_k".to_owned(), one("x")),
            ("attn_v".to_owned(), one("")),
            ("nonsense".to_owned(), one("y")),
        ]);
        let problems = ModuleMap::from_user(&user).unwrap_err();
        assert_eq!(problems.0.len(), 3);
        assert!(problems.has(Code::ModuleMapConflict) && problems.has(Code::UnknownTargetModule));
    }
}
