//! How much memory an engine takes for what.

use lora_core::{DType, LoraConfig, ModelGeometry, PeftCacheConfig};

use super::LlmError;
use super::settings::{BatchLimits, KvCacheConfig};
use crate::adapters::TierSize;
use crate::kv::KvPlan;
use crate::model::{Extents, ModelConfig, block_bytes, padded_rows};
use crate::scheduler::Limits;

/// Bytes of keys and values where memory is the host's and no share of it is given.
const DEFAULT_KV_BYTES: usize = 2 << 30;

/// Share of a device's own memory for keys and values.
const DEFAULT_KV_SHARE: f64 = 0.9;

/// Slots for adapters where `max_loras` is not set; bytes then bound how many are resident.
const DEFAULT_SLOTS: usize = 64;

/// Memory that is free once the model is loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct FreeMemory {
    /// Bytes, where they are known.
    pub bytes: Option<usize>,
    /// Whether it is the host's.
    pub shared: bool,
}

/// Fails if a number is out of range, whatever the device.
///
/// # Errors
/// [`LlmError::Setting`].
pub(super) fn check(
    batch: &BatchLimits,
    kv: &KvCacheConfig,
    config: &ModelConfig,
) -> Result<(), LlmError> {
    for (setting, value, limit) in [
        ("max_batch_size", Some(batch.max_batch_size), 1 << 16),
        ("max_num_tokens", Some(batch.max_num_tokens), 1 << 20),
        ("max_seq_len", batch.max_seq_len, config.max_positions),
        ("tokens_per_block", Some(kv.tokens_per_block), 1 << 16),
        // Rows of the cache are numbered in 32 bits.
        ("kv_cache_config.max_tokens", kv.max_tokens, 1 << 30),
    ] {
        if let Some(value) = value.filter(|value| !(1..=limit).contains(value)) {
            return Err(LlmError::setting(setting, value, format!("1 to {limit}")));
        }
    }
    if let Some(share) = kv.free_gpu_memory_fraction.filter(|s| !(*s > 0.0 && *s < 1.0)) {
        let allowed = "a share above 0 and below 1".to_owned();
        return Err(LlmError::setting("free_gpu_memory_fraction", share, allowed));
    }
    if !kv.copy_on_partial_reuse {
        let allowed = "true; set enable_partial_reuse to false to reuse whole blocks only";
        return Err(LlmError::setting("copy_on_partial_reuse", false, allowed.to_owned()));
    }
    Ok(())
}

/// The KV cache and the longest sequence that fits it.
///
/// # Errors
/// [`LlmError::Setting`] if `max_seq_len` tokens do not fit.
pub(super) fn kv_plan(
    batch: &BatchLimits,
    kv: &KvCacheConfig,
    config: &ModelConfig,
    dtype: DType,
    free: FreeMemory,
) -> Result<(KvPlan, usize), LlmError> {
    let tokens_per_block = kv.tokens_per_block;
    let of_block = block_bytes(config, dtype, tokens_per_block);
    let longest = batch.max_seq_len.unwrap_or(config.max_positions);
    let needed = batch.max_batch_size.saturating_mul(longest.div_ceil(tokens_per_block));
    let share = kv.free_gpu_memory_fraction.or((!free.shared).then_some(DEFAULT_KV_SHARE));
    let bytes = match (share, free.bytes) {
        (Some(share), Some(free)) => Some((free as f64 * share) as usize),
        _ => None,
    };
    let of_memory = bytes.map(|bytes| (bytes / of_block).max(1));
    let blocks = match (kv.max_tokens.map(|tokens| tokens.div_ceil(tokens_per_block)), of_memory) {
        (Some(asked), Some(fits)) => asked.min(fits),
        (Some(asked), None) => asked,
        (None, Some(fits)) => needed.min(fits),
        (None, None) => needed.min((DEFAULT_KV_BYTES / of_block).max(1)),
    };
    let held = blocks * tokens_per_block;
    if batch.max_seq_len.is_some_and(|asked| asked > held) {
        let allowed = format!(
            "up to {held}, the tokens that fit the KV cache; raise kv_cache_config.max_tokens or \
             free_gpu_memory_fraction"
        );
        return Err(LlmError::setting("max_seq_len", longest, allowed));
    }
    let plan = KvPlan {
        blocks,
        tokens_per_block,
        reuse: kv.enable_block_reuse,
        partial_reuse: kv.enable_partial_reuse,
    };
    Ok((plan, longest.min(held)))
}

/// The largest step, padded as recorded steps are.
pub(super) fn step_extents(
    limits: &Limits,
    max_seq_len: usize,
    tokens_per_block: usize,
) -> Extents {
    let sequences = padded_rows(limits.max_batch_size);
    Extents {
        rows: limits.max_num_tokens.max(sequences),
        logit_rows: limits.max_logit_rows.max(sequences),
        sequences,
        max_blocks: max_seq_len.div_ceil(tokens_per_block).next_power_of_two(),
    }
}

/// Slots of the device tier.
pub(super) fn slots(lora: Option<&LoraConfig>) -> usize {
    lora.map_or(0, |lora| lora.max_loras.unwrap_or(DEFAULT_SLOTS))
}

/// The host tier and the device tier. `max_cpu_loras` and `max_loras` count adapters, whatever their
/// size; without them bytes are counted.
pub(super) fn tiers(
    lora: Option<&LoraConfig>,
    cache: &PeftCacheConfig,
    model: &ModelGeometry,
    free: FreeMemory,
) -> (TierSize, TierSize) {
    let unit = unit_bytes(lora, model);
    let units = |count: usize| (count > 0).then(|| count as u64 * unit);
    let of_bytes = |adapters, bytes| TierSize { adapters, bytes };
    let host = match lora.and_then(|lora| lora.max_cpu_loras) {
        Some(count) => TierSize::of_adapters(count),
        None => {
            let bytes = units(cache.num_host_module_layer).unwrap_or(cache.host_cache_size);
            of_bytes(usize::MAX, bytes)
        }
    };
    let device = match lora.and_then(|lora| lora.max_loras) {
        Some(count) => TierSize::of_adapters(count),
        None => {
            let share = |free: usize| (free as f64 * cache.device_cache_percent) as u64;
            let bytes = units(cache.num_device_module_layer)
                .unwrap_or_else(|| free.bytes.map_or(u64::MAX, share));
            of_bytes(slots(lora), bytes)
        }
    };
    (host, device)
}

/// Bytes of one layer's widest module at rank 1, in 16 bits: the unit of `num_*_module_layer`.
fn unit_bytes(lora: Option<&LoraConfig>, model: &ModelGeometry) -> u64 {
    let modules = lora.map(|lora| lora.effective_targets(model)).unwrap_or_default();
    let widths = modules.iter().filter_map(|module| model.dims(*module)).map(|(i, o)| i + o);
    2 * widths.max().unwrap_or(0) as u64
}
