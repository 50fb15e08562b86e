//! Combining `quant_config` with the quantisation of the checkpoint.

use lora_core::{QuantAlgo, QuantConfig};

use super::settings::KvCacheDtype;
use crate::llm::LlmError;
use crate::model::{Fp8Weights, ModulePatterns, Quantization, linear_names};

/// Default of `exclude_modules`: errors in the logits matter most, so `lm_head` stays in 16 bits.
const DEFAULT_EXCLUDE: &str = "lm_head";

/// Resolves the quantisation of weights and KV cache. FP8 for a 16-bit checkpoint quantises it on loading. A
/// checkpoint in FP8 stays in FP8, and any other setting is refused.
///
/// # Errors
/// [`LlmError::Setting`] naming the setting and the checkpoint's value; [`LlmError::Model`] for an invalid
/// pattern.
pub(in crate::llm) fn resolve(
    asked: Option<&QuantConfig>,
    kv_dtype: KvCacheDtype,
    mut found: Quantization,
) -> Result<Quantization, LlmError> {
    found.fp8_kv |= kv_dtype == KvCacheDtype::Fp8;
    let Some(asked) = asked else { return Ok(found) };
    refuse_others(asked)?;
    found.fp8_kv |= asked.kv_cache_quant_algo.is_some();
    found.weights = match (asked.quant_algo, found.weights) {
        (None, weights) => weights,
        (Some(QuantAlgo::Fp8), None) => {
            let patterns =
                asked.exclude_modules.clone().unwrap_or_else(|| vec![DEFAULT_EXCLUDE.to_owned()]);
            let exclude = ModulePatterns::new("quant_config.exclude_modules", patterns)?;
            Some(Fp8Weights { exclude, stored: false })
        }
        (Some(QuantAlgo::Fp8), Some(stored)) => Some(same_modules(asked, stored)?),
        (_, None) => None,
        (Some(other), Some(_)) => {
            let allowed = "FP8, which the checkpoint is in; or leave it out".to_owned();
            return Err(LlmError::setting("quant_config.quant_algo", other, allowed));
        }
    };
    Ok(found)
}

/// Warns of patterns of `exclude_modules` that match no module of the model: a misspelt one quantises what it was
/// to exclude.
pub(in crate::llm) fn warn_of_unused(
    asked: Option<&QuantConfig>,
    quantization: &Quantization,
    layers: usize,
) {
    let asked = asked.is_some_and(|asked| asked.exclude_modules.is_some());
    let Some(weights) = quantization.weights.as_ref().filter(|_| asked) else { return };
    let names = linear_names(layers);
    for pattern in weights.exclude.unused(names.iter().map(String::as_str)) {
        tracing::warn!(
            "quant_config.exclude_modules: {pattern:?} matches no linear layer of the model"
        );
    }
}

/// Fails if `exclude_modules` is set and differs from the checkpoint's.
fn same_modules(asked: &QuantConfig, stored: Fp8Weights) -> Result<Fp8Weights, LlmError> {
    if let Some(patterns) = &asked.exclude_modules {
        let name = "quant_config.exclude_modules";
        let wanted = ModulePatterns::new(name, patterns.clone())?;
        if wanted.patterns() != stored.exclude.patterns() {
            let found = format!("{patterns:?}");
            let allowed = format!("{:?}, as in the checkpoint", stored.exclude.patterns());
            return Err(LlmError::setting(name, found, allowed));
        }
    }
    Ok(stored)
}

/// Fails for algorithms other than FP8, and for settings that FP8 does not use.
fn refuse_others(asked: &QuantConfig) -> Result<(), LlmError> {
    let fp8 = |algo: QuantAlgo| algo == QuantAlgo::Fp8;
    if let Some(other) = asked.weights().filter(|algo| !fp8(*algo)) {
        return Err(LlmError::setting("quant_config.quant_algo", other, "FP8, or none".to_owned()));
    }
    if let Some(other) = asked.kv_cache_quant_algo.filter(|algo| !fp8(*algo)) {
        let name = "quant_config.kv_cache_quant_algo";
        return Err(LlmError::setting(name, other, "FP8, or none".to_owned()));
    }
    let unused = "unset: FP8 with a scale for a tensor does not have it";
    for (name, set) in [
        ("quant_config.clamp_val", asked.clamp_val.is_some()),
        ("quant_config.use_meta_recipe", asked.use_meta_recipe),
        ("quant_config.has_zero_point", asked.has_zero_point),
        ("quant_config.pre_quant_scale", asked.pre_quant_scale),
    ] {
        if set {
            return Err(LlmError::setting(name, "set", unused.to_owned()));
        }
    }
    Ok(())
}
