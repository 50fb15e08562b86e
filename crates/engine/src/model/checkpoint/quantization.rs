//! The quantisation settings of a checkpoint.

use std::collections::BTreeSet;
use std::path::Path;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use lora_core::QuantAlgo;
use serde::Deserialize;
use serde_json::Value;

use super::json_file::{parse_json, read_file, read_optional_file};
use super::quant_method;
use crate::model::ModelError;

/// Quantisation of base weights and KV cache.
#[derive(Clone, Debug, Default)]
pub struct Quantization {
    /// Weights of linear layers in FP8 (e4m3, a scale per tensor); `None`: 16 bits.
    pub weights: Option<Fp8Weights>,
    /// Whether keys and values are in FP8.
    pub fp8_kv: bool,
}

/// Linear layers in FP8.
#[derive(Clone, Debug)]
pub struct Fp8Weights {
    /// Modules that stay in 16 bits.
    pub exclude: ModulePatterns,
    /// Whether the checkpoint is stored in FP8; otherwise weights are quantised on loading.
    pub stored: bool,
}

/// Glob patterns of module names such as `model.layers.0.mlp.up_proj`. `*` also matches dots.
#[derive(Clone, Debug)]
pub struct ModulePatterns {
    patterns: Vec<String>,
    set: GlobSet,
}

impl ModulePatterns {
    /// Compiles patterns. `setting` names them in errors.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] naming the pattern.
    pub fn new(setting: &str, mut patterns: Vec<String>) -> Result<Self, ModelError> {
        patterns.sort_unstable();
        patterns.dedup();
        let bad = |e: globset::Error| {
            let allowed = "glob patterns of module names";
            ModelError::unsupported(setting, e, allowed)
        };
        let mut set = GlobSetBuilder::new();
        for pattern in &patterns {
            set.add(GlobBuilder::new(pattern).build().map_err(bad)?);
        }
        Ok(Self { set: set.build().map_err(bad)?, patterns })
    }

    /// Whether a pattern matches a module.
    pub fn matches(&self, module: &str) -> bool {
        self.set.is_match(module)
    }

    /// The patterns that match none of `modules`.
    pub fn unused<'a>(&self, modules: impl IntoIterator<Item = &'a str>) -> Vec<&str> {
        let used: BTreeSet<usize> =
            modules.into_iter().flat_map(|module| self.set.matches(module)).collect();
        let unused = self.patterns.iter().enumerate().filter(|(i, _)| !used.contains(i));
        unused.map(|(_, pattern)| pattern.as_str()).collect()
    }

    /// The patterns, sorted.
    pub fn patterns(&self) -> &[String] {
        &self.patterns
    }
}

/// The quantisation settings of one file, as far as FP8 needs them.
#[derive(Deserialize, Default)]
struct Block {
    quant_algo: Option<String>,
    kv_cache_quant_algo: Option<String>,
    #[serde(default, alias = "ignore", alias = "modules_to_not_convert")]
    exclude_modules: Option<Vec<String>>,
    kv_cache_scheme: Option<KvScheme>,
    #[serde(default)]
    has_zero_point: bool,
    #[serde(default)]
    pre_quant_scale: bool,
}

/// `kv_cache_scheme`, the newer form of `kv_cache_quant_algo`.
#[derive(Deserialize)]
struct KvScheme {
    num_bits: u32,
    #[serde(rename = "type")]
    kind: String,
}

impl Quantization {
    /// Algorithm of the base weights; `None` where they stay in 16 bits.
    pub fn algorithm(&self) -> Option<QuantAlgo> {
        self.weights.as_ref().map(|_| QuantAlgo::Fp8)
    }

    /// Reads `hf_quant_config.json` and the `quantization_config` of `config.json`, either of which
    /// may be absent, as TensorRT-LLM does.
    ///
    /// # Errors
    /// [`ModelError`] naming the file or the field, for an algorithm other than FP8 and for two
    /// files that contradict each other.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelError> {
        let file = dir.join("hf_quant_config.json");
        let of_file = match read_optional_file(&file)? {
            Some(text) => {
                #[derive(Deserialize)]
                struct Outer {
                    quantization: Block,
                }
                Some(parse_json::<Outer>(&file, &text)?.quantization)
            }
            None => None,
        };
        #[derive(Deserialize)]
        struct Config {
            quantization_config: Option<Value>,
        }
        let path = dir.join("config.json");
        let config: Config = parse_json(&path, &read_file(&path)?)?;
        let of_config = match &config.quantization_config {
            Some(block) => Some(block_of_config(&path, block)?),
            None => quant_method::refuse_side_files(dir).map(|()| None)?,
        };
        Self::from_blocks(of_file, of_config)
    }

    fn from_blocks(file: Option<Block>, config: Option<Block>) -> Result<Self, ModelError> {
        let (file, config) = (file.unwrap_or_default(), config.unwrap_or_default());
        let weights = agreed("quant_algo", file.quant_algo, config.quant_algo)?;
        let config_kv = config.kv_cache_quant_algo.or(config.kv_cache_scheme.map(KvScheme::algo));
        let file_kv = file.kv_cache_quant_algo.or(file.kv_cache_scheme.map(KvScheme::algo));
        let kv = agreed("kv_cache_quant_algo", file_kv, config_kv)?;
        for (field, set) in [
            ("has_zero_point", file.has_zero_point || config.has_zero_point),
            ("pre_quant_scale", file.pre_quant_scale || config.pre_quant_scale),
        ] {
            if set {
                return Err(ModelError::unsupported(field, true, "false"));
            }
        }
        let exclude = file.exclude_modules.or(config.exclude_modules).unwrap_or_default();
        let weights = if is_fp8("quant_algo", weights.as_deref())? {
            let exclude = ModulePatterns::new("exclude_modules", exclude)?;
            Some(Fp8Weights { exclude, stored: true })
        } else {
            None
        };
        Ok(Self { weights, fp8_kv: is_fp8("kv_cache_quant_algo", kv.as_deref())? })
    }
}

impl KvScheme {
    fn algo(self) -> String {
        match (self.num_bits, self.kind.as_str()) {
            (8, "float") => QuantAlgo::Fp8.name().to_owned(),
            (bits, kind) => format!("{bits} bits, {kind}"),
        }
    }
}

/// Parses the `quantization_config` of `config.json`. Only ModelOpt's is supported, whose settings are at
/// its top level or in `quantization`.
fn block_of_config(path: &Path, value: &Value) -> Result<Block, ModelError> {
    let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("");
    if method != "modelopt" {
        return Err(quant_method::refused(path, value));
    }
    let block = value.get("quantization").unwrap_or(value);
    parse_json(path, block.to_string().as_bytes())
}

/// A setting that either file may have; it must be the same if both have it.
fn agreed(
    field: &str,
    file: Option<String>,
    config: Option<String>,
) -> Result<Option<String>, ModelError> {
    match (file, config) {
        (Some(file), Some(config)) if file != config => Err(ModelError::unsupported(
            field,
            format!("{file} in hf_quant_config.json and {config} in config.json"),
            "the same in both files",
        )),
        (file, config) => Ok(file.or(config)),
    }
}

/// Whether an algorithm is FP8. Fails for any other than FP8 or none.
fn is_fp8(field: &str, algo: Option<&str>) -> Result<bool, ModelError> {
    match algo {
        None => Ok(false),
        Some(name) if name == QuantAlgo::NoQuant.name() => Ok(false),
        Some(name) if name == QuantAlgo::Fp8.name() => Ok(true),
        Some(other) => Err(ModelError::unsupported(field, other, "FP8, or none")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &Value, file: Option<&Value>) -> Result<Quantization, ModelError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        if let Some(file) = file {
            std::fs::write(dir.path().join("hf_quant_config.json"), file.to_string()).unwrap();
        }
        Quantization::from_dir(dir.path())
    }

    fn modelopt(fields: &Value) -> Value {
        let mut all = serde_json::json!({"quant_method": "modelopt"});
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        serde_json::json!({"quantization_config": all})
    }

    #[test]
    fn patterns_that_match_no_module_are_found() {
        let patterns = ["lm_head", "*.mlp.*", "*.mpl.*"].map(str::to_owned).to_vec();
        let patterns = ModulePatterns::new("exclude_modules", patterns).unwrap();
        let names = crate::model::linear_names(2);
        assert_eq!(names.len(), 15);
        assert_eq!(patterns.unused(names.iter().map(String::as_str)), ["*.mpl.*"]);
        assert_eq!(patterns.unused(["x"]), patterns.patterns());
    }

    #[test]
    fn the_forms_of_modelopt_are_recognised() {
        let block = serde_json::json!({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head", "*.mlp.down*"]});
        let nested = serde_json::json!({"quantization": block});
        let scheme = serde_json::json!({"num_bits": 8, "type": "float", "dynamic": false});
        let flat = serde_json::json!({"quant_algo": "FP8", "kv_cache_scheme": scheme,
            "ignore": ["lm_head", "*.mlp.down*"]});
        let none = serde_json::json!({});
        for found in [
            read(&none, Some(&nested)),
            read(&modelopt(&nested), None),
            read(&modelopt(&flat), None),
            read(&modelopt(&flat), Some(&nested)),
            read(&modelopt(&flat), Some(&serde_json::json!({"quantization": {}}))),
        ] {
            let found = found.unwrap();
            let weights = found.weights.unwrap();
            assert!(found.fp8_kv && weights.stored);
            assert!(weights.exclude.matches("model.layers.0.mlp.down_proj"));
            assert!(!weights.exclude.matches("model.layers.0.mlp.up_proj"));
        }
        let none = read(&none, None).unwrap();
        assert!(none.weights.is_none() && !none.fp8_kv);
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let none = serde_json::json!({});
        for (config, named) in [
            (serde_json::json!({"quantization_config": {"quant_method": "gptq"}}), "gptq"),
            (serde_json::json!({"quantization_config": {"quant_method": "fp8"}}), "fp8"),
            (modelopt(&serde_json::json!({"quant_algo": "NVFP4"})), "NVFP4"),
            (modelopt(&serde_json::json!({"kv_cache_quant_algo": "INT8"})), "INT8"),
            (modelopt(&serde_json::json!({"pre_quant_scale": true})), "pre_quant_scale"),
            (modelopt(&serde_json::json!({"quant_algo": "FP8", "ignore": ["[a"]})), "[a"),
        ] {
            let error = read(&config, None).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        let fp8 = serde_json::json!({"quantization": {"quant_algo": "FP8"}});
        let other = modelopt(&serde_json::json!({"quant_algo": "NO_QUANT"}));
        let error = read(&other, Some(&fp8)).unwrap_err().to_string();
        assert!(error.contains("FP8 in hf_quant_config.json and NO_QUANT"), "{error}");
        assert!(read(&none, Some(&none)).is_err());
    }
}
