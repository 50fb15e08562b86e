//! Groups the tensors of a file by site.

use std::collections::{BTreeMap, BTreeSet};

use super::experts::{self, ExpertTensors};
use super::keys::{self, Key, Kind, Place};
use crate::adapter::ModuleNaming;
use crate::formats::RawTensor;
use crate::formats::read::pair::{duplicate, float_view, several_adapters};
use crate::formats::read::view::View;
use crate::ids::LayerIdx;
use crate::modules::{ModuleMap, SiteKey, TargetModule};
use crate::rules::{Code, Rejection};

/// The tensors of one site.
#[derive(Debug)]
pub(super) struct SiteTensors {
    /// Name of the module in PEFT.
    pub module: String,
    pub tensors: BTreeMap<Kind, View>,
}

/// A file's tensors by site, and the names that it uses.
#[derive(Default, Debug)]
pub(super) struct Collected {
    pub sites: BTreeMap<SiteKey, SiteTensors>,
    pub experts: ExpertTensors,
    /// Prefix of module names: `model.` or nothing.
    pub root: &'static str,
    pub naming: BTreeMap<TargetModule, ModuleNaming>,
    /// Sites with an unusable tensor, which was reported; their other tensors are not checked.
    pub broken: BTreeSet<SiteKey>,
    pub bytes: u64,
}

/// Assigns every tensor to a site; a tensor of unknown meaning is a rejection.
pub(super) fn collect(
    tensors: BTreeMap<String, RawTensor>,
    map: &ModuleMap,
    problems: &mut Vec<Rejection>,
) -> Collected {
    let mut file = Collected::default();
    let mut adapters = BTreeSet::new();
    let mut prefixes = BTreeSet::new();
    for (name, raw) in tensors {
        file.bytes += raw.source().len();
        let tensor = float_view(&name, &raw, problems);
        if keys::is_routed_expert(&name) {
            let Some(key) = experts::parse(&name) else {
                problems.push(unknown_tensor(&name));
                continue;
            };
            prefixes.insert(key.prefix.to_owned());
            adapters.extend(key.adapter.map(str::to_owned));
            file.note_root(key.root);
            match tensor {
                Some(tensor) => file.experts.insert(&key, tensor, problems),
                None => file.experts.broken = true,
            }
            continue;
        }
        let Some(key) = keys::parse(&name) else {
            problems.push(unknown_tensor(&name));
            continue;
        };
        adapters.extend(key.adapter.map(str::to_owned));
        // `lm_head` is outside of `model.`, which the other modules share.
        if key.place != Place::Head {
            prefixes.insert(key.prefix.to_owned());
        }
        let Some(site) = file.site(&name, &key, map, problems) else { continue };
        match tensor {
            Some(tensor) => file.place(site, &key, tensor, problems),
            None => drop(file.broken.insert(site)),
        }
    }
    for (setting, names) in [("adapter names", adapters), ("prefixes of names", prefixes)] {
        if names.len() > 1 {
            problems.push(several_adapters(setting, names));
        }
    }
    file
}

impl Collected {
    fn note_root(&mut self, root: &'static str) {
        if !root.is_empty() {
            self.root = root;
        }
    }

    /// The site of a tensor's name; an unknown module is a rejection.
    fn site(
        &mut self,
        name: &str,
        key: &Key<'_>,
        map: &ModuleMap,
        problems: &mut Vec<Rejection>,
    ) -> Option<SiteKey> {
        let (index, path) = match key.place {
            Place::Embed => return Some(SiteKey::Embed),
            Place::Head => return Some(SiteKey::Head),
            Place::FinalNorm | Place::Norm { .. } if !matches!(key.kind, Kind::Full(_)) => {
                problems.push(part_of_norm(name, key.module));
                return None;
            }
            Place::FinalNorm => return Some(SiteKey::FinalNorm),
            Place::Norm { index, kind } => return Some(SiteKey::Norm(LayerIdx(index), kind)),
            Place::Layer { index, path } => (index, path),
        };
        let Some(module) = map.lookup(path) else {
            problems.push(unknown_module(name, path));
            return None;
        };
        let mapped_exactly = map.names_exactly(path);
        let naming = || ModuleNaming { path: path.to_owned(), mapped_exactly };
        let known = self.naming.entry(module).or_insert_with(naming);
        if known.path != path {
            problems.push(other_name(name, path, &known.path));
            return None;
        }
        Some(SiteKey::Layer(LayerIdx(index), module))
    }

    fn place(&mut self, site: SiteKey, key: &Key<'_>, tensor: View, problems: &mut Vec<Rejection>) {
        self.note_root(key.root);
        let module = key.module.to_owned();
        let parts = self
            .sites
            .entry(site)
            .or_insert_with(|| SiteTensors { module, tensors: BTreeMap::new() });
        match parts.tensors.get(&key.kind) {
            // PEFT writes the magnitudes of tied embeddings under both names.
            Some(other) if other.equals(&tensor) => {}
            Some(other) => problems.push(duplicate(tensor.name(), other.name())),
            None => drop(parts.tensors.insert(key.kind, tensor)),
        }
    }
}

fn unknown_tensor(name: &str) -> Rejection {
    Rejection::new(
        Code::UnknownTensor,
        name,
        "a tensor of unknown meaning",
        "names as PEFT writes them for LoRA on layers, lm_head and embed_tokens, and for whole \
         weights",
        "export the adapter with PEFT, or remove the tensor if it belongs to something else",
    )
}

fn unknown_module(name: &str, path: &str) -> Rejection {
    Rejection::new(
        Code::UnknownModule,
        name,
        format!("the module `{path}`"),
        "a module that the module map names",
        "map it with trtllm_modules_to_hf_modules",
    )
}

fn part_of_norm(name: &str, module: &str) -> Rejection {
    Rejection::new(
        Code::UnknownModule,
        name,
        format!("a part of the norm `{module}`"),
        "whole weights of norms",
        "leave norms out of target_modules; modules_to_save trains them",
    )
}

fn other_name(name: &str, path: &str, known: &str) -> Rejection {
    Rejection::new(
        Code::UnknownModule,
        name,
        format!("the module `{path}`, which other tensors call `{known}`"),
        "one name for one module",
        "export the adapter again",
    )
}
