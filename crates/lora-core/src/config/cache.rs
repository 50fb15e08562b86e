//! Sizes and threads of the adapter cache.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{MAX_RANK, counted};
use crate::rules::{Code, Rejection};

/// Memory limits and threads of the adapter cache, with TensorRT-LLM's field names and defaults.
///
/// `max_loras` and `max_cpu_loras` of [`crate::LoraConfig`] override the sizes here, if set. Adapters occupy
/// memory for their true ranks, so TensorRT-LLM's page sizes (`optimal_adapter_size`,
/// `max_pages_per_block_*`) are accepted and have no effect.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PeftCacheConfig {
    /// If above 0: capacity of the host tier, in units of one layer, one module and rank 1.
    pub num_host_module_layer: usize,
    /// If above 0: capacity of the device tier, in the same units.
    pub num_device_module_layer: usize,
    /// The rank for which TensorRT-LLM's pages are optimised; no effect.
    pub optimal_adapter_size: usize,
    /// The largest rank that the cache must be able to hold.
    pub max_adapter_size: usize,
    /// Threads that read adapters into the host tier.
    pub num_put_workers: usize,
    /// Threads that copy adapters from the host tier to the device.
    pub num_ensure_workers: usize,
    /// Device streams for those copies.
    pub num_copy_streams: usize,
    /// Pages of one allocation of TensorRT-LLM's host tier; no effect.
    pub max_pages_per_block_host: usize,
    /// Pages of one allocation of TensorRT-LLM's device tier; no effect.
    pub max_pages_per_block_device: usize,
    /// Fraction of the device memory that is free after loading the model, above 0 and up to 1.
    pub device_cache_percent: f64,
    /// Size of the host tier in bytes.
    pub host_cache_size: u64,
    /// Not supported: adapters are not prefetched from a directory.
    pub lora_prefetch_dir: Option<PathBuf>,
}

/// Maximum number of threads or streams of one kind. More readers than this only wait for the disk.
const MAX_WORKERS: usize = 256;

impl Default for PeftCacheConfig {
    fn default() -> Self {
        Self {
            num_host_module_layer: 0,
            num_device_module_layer: 0,
            optimal_adapter_size: 8,
            max_adapter_size: 64,
            num_put_workers: 1,
            num_ensure_workers: 1,
            num_copy_streams: 1,
            max_pages_per_block_host: 24,
            max_pages_per_block_device: 8,
            device_cache_percent: 0.02,
            host_cache_size: 1 << 30,
            lora_prefetch_dir: None,
        }
    }
}

impl PeftCacheConfig {
    /// The rules that the values break, irrespective of a model; empty if they are valid.
    pub fn validate(&self) -> Vec<Rejection> {
        let counts = [
            ("optimal_adapter_size", self.optimal_adapter_size, MAX_RANK),
            ("max_adapter_size", self.max_adapter_size, MAX_RANK),
            ("num_put_workers", self.num_put_workers, MAX_WORKERS),
            ("num_ensure_workers", self.num_ensure_workers, MAX_WORKERS),
            ("num_copy_streams", self.num_copy_streams, MAX_WORKERS),
            // These have no effect, so any value is harmless.
            ("max_pages_per_block_host", self.max_pages_per_block_host, usize::MAX),
            ("max_pages_per_block_device", self.max_pages_per_block_device, usize::MAX),
        ];
        let mut problems: Vec<Rejection> =
            counts.into_iter().filter_map(|(s, count, most)| counted(s, count, most)).collect();
        let share = self.device_cache_percent;
        if !(share > 0.0 && share <= 1.0) {
            problems.push(Rejection::new(
                Code::SettingOutOfRange,
                "device_cache_percent",
                share.to_string(),
                "a share above 0 and up to 1 of the free device memory",
                "set 0.02 for two per cent",
            ));
        }
        if let Some(dir) = &self.lora_prefetch_dir {
            problems.push(Rejection::new(
                Code::UnsupportedSetting,
                "lora_prefetch_dir",
                format!("`{}`", dir.display()),
                "no value",
                "remove it and name the adapters when the server starts",
            ));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_partial_configs_keep_them() {
        assert!(PeftCacheConfig::default().validate().is_empty());
        let json = r#"{"host_cache_size": 1073741824, "device_cache_percent": 0.1}"#;
        let config: PeftCacheConfig = serde_json::from_str(json).unwrap();
        assert_eq!((config.max_adapter_size, config.device_cache_percent), (64, 0.1));
        assert!(serde_json::from_str::<PeftCacheConfig>(r#"{"pages": 1}"#).is_err());
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for share in [0.0, -0.1, 1.5, f64::NAN] {
            let config = PeftCacheConfig { device_cache_percent: share, ..Default::default() };
            assert_eq!(config.validate()[0].code, Code::SettingOutOfRange);
        }
        let config = PeftCacheConfig {
            num_put_workers: 0,
            lora_prefetch_dir: Some("x".into()),
            ..Default::default()
        };
        let codes: Vec<Code> = config.validate().iter().map(|r| r.code).collect();
        assert_eq!(codes, [Code::SettingOutOfRange, Code::UnsupportedSetting]);
        let config = PeftCacheConfig { num_put_workers: 1_000_000, ..Default::default() };
        assert!(config.validate()[0].to_string().contains("1 to 256"));
    }
}
