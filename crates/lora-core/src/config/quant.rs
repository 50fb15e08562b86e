//! Quantisation of base weights and the KV cache, with TensorRT-LLM's names.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::rules::{Code, Rejection};

/// A quantisation algorithm, with TensorRT-LLM's name.
///
/// Names state the bits of weights (`W`) and activations (`A`). Some algorithms are only for weights, others
/// only for the KV cache; see [`QuantConfig::validate`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum QuantAlgo {
    /// 8-bit integer weights.
    W8A16,
    /// 4-bit integer weights.
    W4A16,
    /// 4-bit weights by AWQ.
    W4A16Awq,
    /// 4-bit weights by AWQ, 8-bit activations.
    W4A8Awq,
    /// 8-bit weights by GPTQ.
    W8A16Gptq,
    /// 4-bit weights by GPTQ.
    W4A16Gptq,
    /// SmoothQuant, scales per channel.
    W8A8SqPerChannel,
    /// SmoothQuant, scales per tensor.
    W8A8SqPerTensorPlugin,
    /// SmoothQuant, weights per channel and activations per token.
    W8A8SqPerChannelPerTokenPlugin,
    /// SmoothQuant, weights per channel and activations per tensor.
    W8A8SqPerChannelPerTensorPlugin,
    /// SmoothQuant, weights per tensor and activations per token.
    W8A8SqPerTensorPerTokenPlugin,
    /// QServe, scales per group.
    W4A8QservePerGroup,
    /// QServe, scales per channel.
    W4A8QservePerChannel,
    /// 8-bit floats (e4m3), one scale for a tensor.
    Fp8,
    /// 8-bit floats, weights per channel and activations per token.
    Fp8PerChannelPerToken,
    /// 8-bit floats, one scale for a block of 128 by 128 weights.
    Fp8BlockScales,
    /// 8-bit integers; for the KV cache only.
    Int8,
    /// Different algorithms for different layers.
    MixedPrecision,
    /// 4-bit floats in groups of 16.
    Nvfp4,
    /// 4-bit floats with AWQ.
    Nvfp4Awq,
    /// 4-bit floats in groups of 16, 8-bit activations.
    W4A8Nvfp4Fp8,
    /// 4-bit floats in groups of 16, 16-bit activations.
    W4A16Nvfp4,
    /// 4-bit floats of the MX formats, 8-bit activations.
    W4A8Mxfp4Fp8,
    /// 4-bit floats and 8-bit activations of the MX formats.
    W4A8Mxfp4Mxfp8,
    /// 4-bit floats of the MX formats, 16-bit activations.
    W4A16Mxfp4,
    /// 8-bit floats of the MX formats.
    Mxfp8,
    /// No quantisation.
    NoQuant,
}

/// One row per algorithm, in the order of the enum.
const TABLE: [(QuantAlgo, &str); 27] = [
    (QuantAlgo::W8A16, "W8A16"),
    (QuantAlgo::W4A16, "W4A16"),
    (QuantAlgo::W4A16Awq, "W4A16_AWQ"),
    (QuantAlgo::W4A8Awq, "W4A8_AWQ"),
    (QuantAlgo::W8A16Gptq, "W8A16_GPTQ"),
    (QuantAlgo::W4A16Gptq, "W4A16_GPTQ"),
    (QuantAlgo::W8A8SqPerChannel, "W8A8_SQ_PER_CHANNEL"),
    (QuantAlgo::W8A8SqPerTensorPlugin, "W8A8_SQ_PER_TENSOR_PLUGIN"),
    (QuantAlgo::W8A8SqPerChannelPerTokenPlugin, "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"),
    (QuantAlgo::W8A8SqPerChannelPerTensorPlugin, "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN"),
    (QuantAlgo::W8A8SqPerTensorPerTokenPlugin, "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN"),
    (QuantAlgo::W4A8QservePerGroup, "W4A8_QSERVE_PER_GROUP"),
    (QuantAlgo::W4A8QservePerChannel, "W4A8_QSERVE_PER_CHANNEL"),
    (QuantAlgo::Fp8, "FP8"),
    (QuantAlgo::Fp8PerChannelPerToken, "FP8_PER_CHANNEL_PER_TOKEN"),
    (QuantAlgo::Fp8BlockScales, "FP8_BLOCK_SCALES"),
    (QuantAlgo::Int8, "INT8"),
    (QuantAlgo::MixedPrecision, "MIXED_PRECISION"),
    (QuantAlgo::Nvfp4, "NVFP4"),
    (QuantAlgo::Nvfp4Awq, "NVFP4_AWQ"),
    (QuantAlgo::W4A8Nvfp4Fp8, "W4A8_NVFP4_FP8"),
    (QuantAlgo::W4A16Nvfp4, "W4A16_NVFP4"),
    (QuantAlgo::W4A8Mxfp4Fp8, "W4A8_MXFP4_FP8"),
    (QuantAlgo::W4A8Mxfp4Mxfp8, "W4A8_MXFP4_MXFP8"),
    (QuantAlgo::W4A16Mxfp4, "W4A16_MXFP4"),
    (QuantAlgo::Mxfp8, "MXFP8"),
    (QuantAlgo::NoQuant, "NO_QUANT"),
];

/// Algorithms for the KV cache.
const FOR_KV_CACHE: [QuantAlgo; 3] = [QuantAlgo::Fp8, QuantAlgo::Int8, QuantAlgo::Nvfp4];

impl QuantAlgo {
    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        // The table has one row per variant, in order: see the test below.
        TABLE[self as usize].1
    }

    /// The algorithm of a name; `None` if the name is unknown.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// Every algorithm.
    pub fn all() -> impl ExactSizeIterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }
}

impl fmt::Display for QuantAlgo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for QuantAlgo {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for QuantAlgo {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::from_name(&name).ok_or_else(|| {
            let known = listed(Self::all());
            de::Error::custom(format!("unknown algorithm `{name}`, expected one of {known}"))
        })
    }
}

/// Quantisation of base weights and the KV cache, with TensorRT-LLM's field names and defaults. Adapters are
/// never quantised. Unknown fields are refused.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuantConfig {
    /// Algorithm of the base weights; see [`QuantConfig::weights`].
    pub quant_algo: Option<QuantAlgo>,
    /// Algorithm of the KV cache: FP8, INT8 or NVFP4; the model's dtype if `None`.
    pub kv_cache_quant_algo: Option<QuantAlgo>,
    /// Weights that share a scale, for algorithms with groups.
    pub group_size: usize,
    /// SmoothQuant's alpha, from 0 to 1: how much of the activations' range moves to the weights.
    pub smoothquant_val: f64,
    /// Bounds of activations in FP8 with a scale for each row.
    pub clamp_val: Option<Vec<f64>>,
    /// Whether FP8 leaves out the layers that Meta's recipe leaves out.
    pub use_meta_recipe: bool,
    /// Whether groups have zero points.
    pub has_zero_point: bool,
    /// Whether activations are scaled before they are quantised.
    pub pre_quant_scale: bool,
    /// Glob patterns of modules that are not quantised.
    pub exclude_modules: Option<Vec<String>>,
    /// Element type of the state of Mamba layers.
    pub mamba_ssm_cache_dtype: Option<String>,
}

impl Default for QuantConfig {
    fn default() -> Self {
        Self {
            quant_algo: None,
            kv_cache_quant_algo: None,
            group_size: 128,
            smoothquant_val: 0.5,
            clamp_val: None,
            use_meta_recipe: false,
            has_zero_point: false,
            pre_quant_scale: false,
            exclude_modules: None,
            mamba_ssm_cache_dtype: None,
        }
    }
}

impl QuantConfig {
    /// The algorithm of the base weights; `None` if they stay in 16 bits, also for `NO_QUANT`.
    pub fn weights(&self) -> Option<QuantAlgo> {
        self.quant_algo.filter(|algo| *algo != QuantAlgo::NoQuant)
    }

    /// The rules that the values break, irrespective of a model; empty if they are valid.
    pub fn validate(&self) -> Vec<Rejection> {
        let mut problems = Vec::new();
        if self.quant_algo == Some(QuantAlgo::Int8) {
            problems.push(not_for("quant_algo", QuantAlgo::Int8, weight_algorithms()));
        }
        let kv = self.kv_cache_quant_algo.filter(|algo| !FOR_KV_CACHE.contains(algo));
        problems.extend(kv.map(|algo| not_for("kv_cache_quant_algo", algo, FOR_KV_CACHE)));
        problems.extend(super::counted("group_size", self.group_size, usize::MAX));
        if !(0.0..=1.0).contains(&self.smoothquant_val) {
            problems.push(Rejection::new(
                Code::SettingOutOfRange,
                "smoothquant_val",
                self.smoothquant_val.to_string(),
                "a number from 0 to 1",
                "leave it out for 0.5",
            ));
        }
        problems
    }
}

fn weight_algorithms() -> impl Iterator<Item = QuantAlgo> {
    QuantAlgo::all().filter(|algo| *algo != QuantAlgo::Int8)
}

fn not_for(
    setting: &str,
    found: QuantAlgo,
    allowed: impl IntoIterator<Item = QuantAlgo>,
) -> Rejection {
    Rejection::new(
        Code::UnsupportedSetting,
        setting,
        found.name(),
        format!("one of {}", listed(allowed)),
        "choose one of them, or leave the setting out",
    )
}

fn listed(algorithms: impl IntoIterator<Item = QuantAlgo>) -> String {
    algorithms.into_iter().map(QuantAlgo::name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_rows_agree() {
        for (i, algo) in QuantAlgo::all().enumerate() {
            assert_eq!(algo as usize, i);
            assert_eq!(QuantAlgo::from_name(algo.name()), Some(algo));
            let shown: String = algo.name().split('_').collect();
            assert_eq!(format!("{algo:?}").to_uppercase(), shown);
        }
        assert_eq!(QuantAlgo::NoQuant as usize, QuantAlgo::all().len() - 1);
    }

    #[test]
    fn configs_are_read_strictly() {
        let json = r#"{"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}"#;
        let config: QuantConfig = serde_json::from_str(json).unwrap();
        assert_eq!((config.weights(), config.group_size), (Some(QuantAlgo::Fp8), 128));
        assert_eq!(config.validate(), []);
        assert!(serde_json::from_str::<QuantConfig>(r#"{"algo": "FP8"}"#).is_err());
        let unknown = serde_json::from_str::<QuantConfig>(r#"{"quant_algo": "fp8"}"#).unwrap_err();
        assert!(unknown.to_string().contains("NO_QUANT"), "{unknown}");
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<QuantConfig>(&text).unwrap(), config);
    }

    #[test]
    fn each_side_has_algorithms_of_its_own() {
        for algo in QuantAlgo::all() {
            let kv = QuantConfig { kv_cache_quant_algo: Some(algo), ..QuantConfig::default() };
            let fits = matches!(algo, QuantAlgo::Fp8 | QuantAlgo::Int8 | QuantAlgo::Nvfp4);
            assert_eq!(kv.validate().is_empty(), fits, "{algo}");
            assert_eq!(kv.weights(), None);
            let weights = QuantConfig { quant_algo: Some(algo), ..QuantConfig::default() };
            assert_eq!(weights.validate().is_empty(), algo != QuantAlgo::Int8, "{algo}");
            assert_eq!(weights.weights().is_none(), algo == QuantAlgo::NoQuant, "{algo}");
        }
        let config = QuantConfig { group_size: 0, smoothquant_val: f64::NAN, ..Default::default() };
        let codes: Vec<Code> = config.validate().iter().map(|r| r.code).collect();
        assert_eq!(codes, [Code::SettingOutOfRange; 2]);
    }
}
