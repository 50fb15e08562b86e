//! Resolving the LoRA settings for a model.

use lora_core::{LoraConfig, ModelGeometry, formats};

use crate::adapters::RegistryError;
use crate::llm::LlmError;

/// Resolves which modules adapters may change: those of `lora_target_modules`, else those of the adapter in
/// `lora_dir`, else all modules of the model. The last case is logged with its memory cost.
///
/// # Errors
/// [`LlmError::Adapter`] if the adapter in `lora_dir` cannot be read.
pub(in crate::llm) fn resolve(
    config: LoraConfig,
    model: &ModelGeometry,
) -> Result<LoraConfig, LlmError> {
    let config = formats::resolve_targets(config, Some(model))
        .map_err(|cause| RegistryError::Load { name: "lora_dir".to_owned(), cause })?;
    if config.lora_target_modules.is_empty() {
        let bytes = largest_adapter(&config, model);
        tracing::info!(
            "neither lora_target_modules nor lora_dir is set: adapters may change every linear \
             module, {bytes} bytes for one of rank {}",
            config.max_lora_rank
        );
    }
    Ok(config)
}

/// Bytes of an adapter with `max_lora_rank` on every module, in 16 bits.
fn largest_adapter(config: &LoraConfig, model: &ModelGeometry) -> usize {
    let rank_one = 2 * model.layers * config.rank_one_widths(model).sum::<usize>();
    rank_one.saturating_mul(config.max_lora_rank)
}
