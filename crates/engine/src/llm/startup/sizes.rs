//! Sizes of an engine's buffers, KV cache and adapter tiers.

use lora_core::{DType, LoraConfig, ModelGeometry, PeftCacheConfig};

use super::memory::FreeMemory;
use super::settings::{BatchLimits, CudaGraphConfig, KvCacheConfig, SchedulerConfig};
use crate::adapters::{TierSize, TierSizes};
use crate::executor::padded_rows;
use crate::kv::KvPlan;
use crate::llm::LlmError;
use crate::model::{Extents, ModelConfig, block_bytes};
use crate::scheduler::Limits;

/// Most bytes of the KV cache in host memory, unless `free_gpu_memory_fraction` is set.
const DEFAULT_HOST_KV_BYTES: usize = 2 << 30;

/// Divisor of the free host memory that limits the KV cache as well: other programs, and adapters loaded
/// later, need the rest.
const DEFAULT_HOST_KV_DIVISOR: usize = 2;

/// Upper bound, over all backends, of the bytes of an empty slot for each module of a layer.
const SLOT_BYTES: usize = 512;

/// Divisor of the free memory that empty slots may take.
const SLOTS_DIVISOR: usize = 4;

/// Default share of a device's free memory for the KV cache.
const DEFAULT_KV_SHARE: f64 = 0.9;

/// Number of adapter slots if `max_loras` is not set. How many are used is then limited by bytes.
const DEFAULT_SLOTS: usize = 64;

/// Fails if a setting is out of range, independently of the device.
///
/// # Errors
/// [`LlmError::Setting`].
pub(in crate::llm) fn check(
    batch: &BatchLimits,
    kv: &KvCacheConfig,
    config: &ModelConfig,
) -> Result<(), LlmError> {
    for (setting, value, limit) in [
        ("max_batch_size", Some(batch.max_batch_size), 1 << 16),
        ("max_num_tokens", Some(batch.max_num_tokens), 1 << 20),
        ("max_seq_len", batch.max_seq_len, config.max_positions),
        ("tokens_per_block", Some(kv.tokens_per_block), 1 << 16),
        // Rows of the cache are indexed by i32.
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

/// Checks the sizes of CUDA graphs: those that no step can have are errors.
///
/// # Errors
/// [`LlmError::Setting`].
pub(in crate::llm) fn check_graphs(graphs: Option<&CudaGraphConfig>) -> Result<(), LlmError> {
    let Some(CudaGraphConfig { batch_sizes, max_batch_size, .. }) = graphs else { return Ok(()) };
    let allowed = "1 or more; cuda_graph_config: null switches graphs off";
    if *max_batch_size == Some(0) {
        return Err(LlmError::setting("cuda_graph_config.max_batch_size", 0, allowed));
    }
    let sizes = batch_sizes.as_deref().filter(|sizes| sizes.is_empty() || sizes.contains(&0));
    match sizes {
        Some(sizes) => {
            let found = format!("{sizes:?}");
            let allowed = format!("sizes of {allowed}");
            Err(LlmError::setting("cuda_graph_config.batch_sizes", found, allowed))
        }
        None => Ok(()),
    }
}

/// Maximum sequence length by the settings, whether or not it fits the KV cache.
pub(in crate::llm) fn longest(batch: &BatchLimits, config: &ModelConfig) -> usize {
    batch.max_seq_len.unwrap_or(config.max_positions)
}

/// Limits of the scheduler.
pub(in crate::llm) fn limits(
    batch: &BatchLimits,
    scheduler: SchedulerConfig,
    lora: Option<&LoraConfig>,
) -> Limits {
    let BatchLimits { max_batch_size, max_num_tokens, .. } = *batch;
    Limits {
        max_batch_size,
        max_num_tokens: max_num_tokens.max(max_batch_size),
        max_logit_rows: max_batch_size.max(256),
        policy: scheduler.capacity_scheduler_policy,
        fairness_window: lora.map_or(0, |lora| lora.adapter_fairness_window),
    }
}

/// Plans the KV cache within `free` memory. Also returns the maximum sequence length that fits it.
///
/// # Errors
/// [`LlmError::NoRoomForKv`] if no block fits, [`LlmError::Setting`] if `max_seq_len` tokens do not fit.
pub(in crate::llm) fn kv_plan(
    batch: &BatchLimits,
    kv: &KvCacheConfig,
    config: &ModelConfig,
    dtype: DType,
    free: FreeMemory,
) -> Result<(KvPlan, usize), LlmError> {
    let tokens_per_block = kv.tokens_per_block;
    let of_block = block_bytes(config, dtype, tokens_per_block);
    let longest = longest(batch, config);
    let needed = batch.max_batch_size.saturating_mul(longest.div_ceil(tokens_per_block));
    let share = kv.free_gpu_memory_fraction.or((!free.shared).then_some(DEFAULT_KV_SHARE));
    let of_memory = match (share, free.bytes) {
        (Some(share), Some(free)) => {
            let fits = (free as f64 * share) as usize / of_block;
            if fits == 0 {
                return Err(LlmError::NoRoomForKv { share, free, block: of_block });
            }
            Some(fits)
        }
        _ => None,
    };
    let blocks = match (kv.max_tokens.map(|tokens| tokens.div_ceil(tokens_per_block)), of_memory) {
        (Some(asked), Some(fits)) => asked.min(fits),
        (Some(asked), None) => requested_host_blocks(asked, kv, of_block, free)?,
        (None, Some(fits)) => needed.min(fits),
        (None, None) => needed.min(default_host_blocks(of_block, free)?),
    };
    let held = blocks * tokens_per_block;
    if batch.max_seq_len.is_some_and(|asked| asked > held) {
        let knobs = match share {
            Some(_) => "kv_cache_config.max_tokens or free_gpu_memory_fraction",
            None => "kv_cache_config.max_tokens",
        };
        let allowed = format!("up to {held}, the tokens that fit the KV cache; raise {knobs}");
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

/// The number of blocks that `max_tokens` asks for. Fails if they exceed the host's free memory.
fn requested_host_blocks(
    asked: usize,
    kv: &KvCacheConfig,
    of_block: usize,
    free: FreeMemory,
) -> Result<usize, LlmError> {
    let fits = free.bytes.map_or(usize::MAX, |free| free / of_block);
    if asked <= fits {
        return Ok(asked);
    }
    let (found, free) = (kv.max_tokens.unwrap_or_default(), free.bytes.unwrap_or_default());
    let allowed = format!(
        "up to {}, the tokens that fit the {free} bytes of memory that are free",
        fits * kv.tokens_per_block
    );
    Err(LlmError::setting("kv_cache_config.max_tokens", found, allowed))
}

/// The default number of blocks in host memory.
fn default_host_blocks(of_block: usize, free: FreeMemory) -> Result<usize, LlmError> {
    let half = free.bytes.map_or(usize::MAX, |free| free / DEFAULT_HOST_KV_DIVISOR);
    match (half.min(DEFAULT_HOST_KV_BYTES.max(of_block)) / of_block, free.bytes) {
        (0, Some(free)) => Err(LlmError::NoHostRoomForKv { free, block: of_block }),
        (blocks, _) => Ok(blocks),
    }
}

/// Fails if empty slots alone would take a large part of the memory that is free before the model is loaded.
///
/// # Errors
/// [`LlmError::Setting`] naming `max_loras` and how many fit.
pub(in crate::llm) fn check_slots(
    lora: Option<&LoraConfig>,
    model: &ModelGeometry,
    free: FreeMemory,
) -> Result<(), LlmError> {
    let asked = lora.and_then(|lora| lora.max_loras);
    let (Some(asked), Some(bytes), true) = (asked, free.bytes, free.shared) else {
        return Ok(());
    };
    let of_slot = SLOT_BYTES * (model.layers * model.modules().len()).max(1);
    let fits = (bytes / SLOTS_DIVISOR / of_slot).max(1);
    if asked <= fits {
        return Ok(());
    }
    let allowed = format!(
        "1 to {fits}: {of_slot} bytes of each slot are taken at once, and {bytes} bytes of memory are \
         free"
    );
    Err(LlmError::setting("max_loras", asked, allowed))
}

/// Extents of the largest step, padded as for CUDA graphs.
pub(in crate::llm) fn step_extents(
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
pub(in crate::llm) fn slots(lora: Option<&LoraConfig>) -> usize {
    lora.map_or(0, |lora| lora.max_loras.unwrap_or(DEFAULT_SLOTS))
}

/// Sizes of the host tier and the device tier. `max_cpu_loras` and `max_loras` limit the number of adapters,
/// whatever their size. Without them, the tiers are limited in bytes.
pub(in crate::llm) fn tiers(
    lora: Option<&LoraConfig>,
    cache: &PeftCacheConfig,
    model: &ModelGeometry,
    free: FreeMemory,
) -> TierSizes {
    let unit = unit_bytes(lora, model);
    let units = |count: usize| (count > 0).then(|| (count as u64).saturating_mul(unit));
    let of_bytes = |adapters, bytes| TierSize { adapters, bytes };
    let host = match lora.and_then(|lora| lora.max_cpu_loras) {
        Some(count) => TierSize::of_adapters(count),
        None => {
            let bytes = units(cache.num_host_module_layer).unwrap_or(cache.host_cache_size);
            of_bytes(None, Some(bytes))
        }
    };
    let device = match lora.and_then(|lora| lora.max_loras) {
        Some(count) => TierSize::of_adapters(count),
        None => {
            let share = |free: usize| (free as f64 * cache.device_cache_percent) as u64;
            let bytes = units(cache.num_device_module_layer).or_else(|| free.bytes.map(share));
            of_bytes(Some(slots(lora)), bytes)
        }
    };
    TierSizes { host, device }
}

/// Bytes to reserve for the device tier: its size in bytes or, if it is limited by a number of adapters, that
/// many adapters of `max_lora_rank` on every target module, in 16 bits. In the latter case at most half of
/// the free memory, as few adapters are as large as the settings allow.
pub(in crate::llm) fn adapter_bytes(
    lora: Option<&LoraConfig>,
    model: &ModelGeometry,
    device: TierSize,
    free: FreeMemory,
) -> u64 {
    let Some(lora) = lora else { return 0 };
    let rank_one = (model.layers * lora.rank_one_widths(model).sum::<usize>()) as u64;
    let largest = rank_one.saturating_mul(2 * lora.max_lora_rank as u64);
    let count = device.adapters.map_or(u64::MAX, |count| count as u64);
    let all = largest.saturating_mul(count).min(device.bytes.unwrap_or(u64::MAX));
    let counted = device.bytes.is_none();
    match free.bytes.filter(|_| counted) {
        Some(free) => all.min(free as u64 / 2),
        None => all,
    }
}

/// The unit of `num_*_module_layer`: bytes of one layer's widest module at rank 1, in 16 bits.
fn unit_bytes(lora: Option<&LoraConfig>, model: &ModelGeometry) -> u64 {
    let widest = lora.and_then(|lora| lora.rank_one_widths(model).max());
    2 * widest.unwrap_or(0) as u64
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::llm::geometry;

    /// A model with two layers, so that a KV block of 4 tokens takes 512 bytes in bf16.
    fn config() -> ModelConfig {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "hidden_act": "silu",
            "rope_theta": 10000.0, "tie_word_embeddings": false,
        });
        ModelConfig::from_json(Path::new("config.json"), json.to_string().as_bytes()).unwrap()
    }

    fn own(bytes: usize) -> FreeMemory {
        FreeMemory { bytes: Some(bytes), shared: false }
    }

    fn plan(kv: &KvCacheConfig, free: FreeMemory) -> Result<(KvPlan, usize), LlmError> {
        let kv = KvCacheConfig { tokens_per_block: 4, ..*kv };
        let batch = BatchLimits { max_batch_size: 2, max_num_tokens: 1024, max_seq_len: None };
        kv_plan(&batch, &kv, &config(), DType::Bf16, free)
    }

    #[test]
    fn the_kv_cache_takes_its_share_and_no_more_than_needed() {
        let blocks = |kv: &KvCacheConfig, free| plan(kv, free).map(|(kv, _)| kv.blocks);
        let none = KvCacheConfig::default();
        assert_eq!(blocks(&none, own(5120)).unwrap(), 9);
        assert_eq!(blocks(&none, own(1 << 30)).unwrap(), 2 * 64 / 4);
        let half = KvCacheConfig { free_gpu_memory_fraction: Some(0.5), ..none };
        assert_eq!(blocks(&half, own(5120)).unwrap(), 5);
        assert_eq!(blocks(&half, FreeMemory { shared: true, ..own(5120) }).unwrap(), 5);
        let few = KvCacheConfig { max_tokens: Some(9), ..none };
        assert_eq!(blocks(&few, own(1 << 30)).unwrap(), 3);
        // At most half of the host's memory is used, unless a share is set.
        let host = |bytes| FreeMemory { bytes, shared: true };
        assert_eq!(blocks(&none, host(None)).unwrap(), 2 * 64 / 4);
        assert_eq!(blocks(&none, host(Some(1 << 30))).unwrap(), 2 * 64 / 4);
        assert_eq!(blocks(&none, host(Some(5120))).unwrap(), 5);
    }

    #[test]
    fn a_kv_cache_without_room_is_an_error_that_names_the_settings() {
        let error = plan(&KvCacheConfig::default(), own(512)).unwrap_err();
        assert!(matches!(error, LlmError::NoRoomForKv { free: 512, block: 512, .. }), "{error}");
        let text = error.to_string();
        for part in ["free_gpu_memory_fraction", "0.9", "512 bytes", "max_loras"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn errors_of_host_memory_name_the_setting_that_was_given() {
        let host = FreeMemory { bytes: Some(5000), shared: true };
        let none = KvCacheConfig::default();
        let fits = KvCacheConfig { max_tokens: Some(36), ..none };
        assert_eq!(plan(&fits, host).unwrap().0.blocks, 9);
        let asked = KvCacheConfig { max_tokens: Some(37), ..none };
        let few = FreeMemory { bytes: Some(1000), ..host };
        let errors = [
            (plan(&asked, host), &["kv_cache_config.max_tokens is 37", "up to 36", "5000 bytes"]),
            (plan(&none, few), &["1000 bytes", "one KV block of 512", "end other programs"]),
        ];
        for (error, parts) in errors {
            let text = error.unwrap_err().to_string();
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
            assert!(!text.to_lowercase().contains("gpu"), "{text}");
        }
    }

    #[test]
    fn too_many_slots_are_refused_with_the_number_that_fits() {
        let model = geometry(&config());
        let check = |slots, free| {
            let lora = LoraConfig { max_loras: Some(slots), ..LoraConfig::default() };
            check_slots(Some(&lora), &model, free).map_err(|error| error.to_string())
        };
        let of_slot = SLOT_BYTES * 2 * model.modules().len();
        let host = FreeMemory { bytes: Some(4 * 10 * of_slot), shared: true };
        assert_eq!(check(10, host), Ok(()));
        let text = check(11, host).unwrap_err();
        assert!(text.contains("max_loras is 11") && text.contains("1 to 10"), "{text}");
        assert_eq!(check(11, FreeMemory { bytes: None, ..host }), Ok(()));
    }

    #[test]
    fn adapters_reserve_the_tier_in_bytes_or_its_number_of_largest_ones() {
        let model = geometry(&config());
        let lora = LoraConfig { max_loras: Some(3), max_lora_rank: 8, ..LoraConfig::default() };
        let cache = PeftCacheConfig::default();
        let bytes = |lora: Option<&LoraConfig>, free| {
            let TierSizes { device, .. } = tiers(lora, &cache, &model, free);
            adapter_bytes(lora, &model, device, free)
        };
        // q, k, v, o, gate, up and down, in 16 bits.
        let widths = 64 + 48 + 48 + 64 + 96 + 96 + 96;
        assert_eq!(bytes(Some(&lora), own(1 << 30)), 3 * 2 * 8 * 2 * widths);
        assert_eq!(bytes(Some(&lora), own(1000)), 500);
        let by_bytes = LoraConfig { max_loras: None, ..lora };
        assert_eq!(bytes(Some(&by_bytes), own(1000)), 20);
        assert_eq!(bytes(None, own(1000)), 0);
    }
}
