//! Random adapters, in memory and as PEFT files.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;

use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;

use crate::{
    Adapter, AdapterInfo, DType, HostTensor, LayerIdx, LowRank, ModelGeometry, ModuleMap, RowOrder,
    SiteKey,
};

/// Parameters of a synthetic adapter.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Rank of every module.
    pub rank: usize,
    /// `lora_alpha`.
    pub alpha: f64,
    /// Maximum magnitude of the elements.
    pub limit: f32,
    /// Random seed; different seeds give different tensors.
    pub seed: u64,
}

/// Writes a bf16 adapter for every linear module of every layer of `model` to `dir`, which is created.
///
/// # Errors
/// Errors of the file system.
pub fn write_peft(dir: &Path, model: &ModelGeometry, recipe: Recipe) -> io::Result<()> {
    let map = ModuleMap::default();
    let mut numbers = Numbers { state: recipe.seed, limit: recipe.limit };
    let mut tensors: Vec<(String, [usize; 2], Vec<u8>)> = Vec::new();
    for layer in 0..model.layers {
        for path in &model.hf_modules {
            let Some((input, output)) = map.lookup(path).and_then(|module| model.dims(module))
            else {
                continue;
            };
            let base = format!("base_model.model.model.layers.{layer}.{path}");
            for (side, shape) in [("A", [recipe.rank, input]), ("B", [output, recipe.rank])] {
                let name = format!("{base}.lora_{side}.weight");
                tensors.push((name, shape, numbers.take(shape[0] * shape[1])));
            }
        }
    }
    std::fs::create_dir_all(dir)?;
    let views = tensors.iter().map(|(name, shape, bytes)| {
        Ok((name, TensorView::new(Dtype::BF16, shape.to_vec(), bytes).map_err(io::Error::other)?))
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = views.collect::<io::Result<Vec<_>>>()?;
    serialize_to_file(views, Some(metadata), &dir.join("adapter_model.safetensors"))
        .map_err(io::Error::other)?;
    let targets: Vec<&str> =
        model.hf_modules.iter().filter_map(|path| path.rsplit('.').next()).collect();
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": null,
        "r": recipe.rank, "lora_alpha": recipe.alpha, "target_modules": targets,
        "bias": "none", "use_dora": false, "use_rslora": false, "inference_mode": true,
    });
    std::fs::write(dir.join("adapter_config.json"), config.to_string())
}

/// A bf16 adapter for every module of every layer of `model`, including routed experts.
pub fn random_adapter(model: &ModelGeometry, recipe: Recipe) -> Adapter {
    let mut sites = BTreeMap::new();
    let mut numbers = Numbers { state: recipe.seed, limit: recipe.limit };
    let mut tensor = |shape: Vec<usize>| {
        let bytes = numbers.take(shape.iter().product());
        HostTensor::new(DType::Bf16, shape, bytes)
    };
    for layer in (0u32..).take(model.layers) {
        for module in model.modules() {
            let Some((input, output)) = model.dims(module) else { continue };
            let stack = if module.is_routed_expert() { vec![model.num_experts] } else { vec![] };
            let mut matrix = |dims: [usize; 2]| tensor([&stack[..], &dims].concat());
            let (Some(a), Some(b)) = (matrix([recipe.rank, input]), matrix([output, recipe.rank]))
            else {
                continue;
            };
            let low = LowRank {
                rank: recipe.rank,
                scale: (recipe.alpha / recipe.rank as f64) as f32,
                a,
                b,
                magnitude: None,
                b_bias: None,
                rows: RowOrder::ByPart,
            };
            sites.insert(SiteKey::Layer(LayerIdx(layer), module), low.into());
        }
    }
    Adapter::new(sites, AdapterInfo::default(), None)
}

/// Uniform random numbers by SplitMix64 (Steele, Lea & Flood, 2014).
struct Numbers {
    state: u64,
    limit: f32,
}

impl Numbers {
    fn take(&mut self, count: usize) -> Vec<u8> {
        (0..count).flat_map(|_| bf16::from_f32(self.next()).to_le_bytes()).collect()
    }

    fn next(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        ((z >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    use crate::LoraConfig;
    use crate::formats::{self, ReadOptions};

    #[test]
    fn what_is_written_is_an_adapter_that_passes_every_rule() {
        let model = ModelGeometry {
            hidden: 8,
            intermediate: 12,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            vocab: 16,
            num_experts: 0,
            moe_intermediate: 0,
            qk_norms: false,
            tied_embeddings: true,
            hf_modules: ModelGeometry::DENSE_MODULES.map(str::to_owned).to_vec(),
            biased_modules: BTreeSet::new(),
        };
        let load = |seed| {
            let dir = tempfile::tempdir().unwrap();
            let recipe = Recipe { rank: 3, alpha: 6.0, limit: 0.1, seed };
            write_peft(dir.path(), &model, recipe).unwrap();
            formats::load(dir.path(), &ReadOptions::default()).unwrap()
        };
        let adapter = load(1);
        assert_eq!(adapter.sites.len(), 14);
        assert_eq!(adapter.check(&model, &LoraConfig::default()), []);
        assert_ne!(adapter.generation, load(2).generation);
    }
}
