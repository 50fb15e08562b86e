//! The device memory of an engine besides the model: activations, KV cache and adapter tiers.

use lora_core::{Backend, Comm, DType, LoraConfig, ModelGeometry, PeftCacheConfig};

use super::memory::{FreeMemory, MemoryPlan};
use super::settings::{BatchLimits, KvCacheConfig};
use super::sizes;
use crate::adapters::TierSizes;
use crate::executor::Sampler;
use crate::kv::KvPlan;
use crate::llm::LlmError;
use crate::model::{Decoder, KvCache, RunState, block_bytes};
use crate::scheduler::Limits;

/// What determines the sizes of the buffers.
pub(in crate::llm) struct BufferSpec<'a> {
    pub batch: BatchLimits,
    pub limits: Limits,
    pub kv: &'a KvCacheConfig,
    pub kv_dtype: DType,
    /// Dtype of GEMM inputs.
    pub activations: DType,
    pub lora: Option<&'a LoraConfig>,
    pub cache: &'a PeftCacheConfig,
    pub geometry: &'a ModelGeometry,
}

/// The allocated buffers, and their sizes.
pub(in crate::llm) struct Buffers<B: Backend> {
    pub state: RunState<B>,
    pub sampler: Sampler<B>,
    pub kv_cache: KvCache<B>,
    pub kv: KvPlan,
    /// Maximum sequence length that fits the KV cache.
    pub max_seq_len: usize,
    pub tiers: TierSizes,
    pub memory: MemoryPlan,
}

impl BufferSpec<'_> {
    /// Allocates the buffers of a step, reserves memory for adapters, and allocates the KV cache from its
    /// share of the rest. `at_start` is the memory that was free before the model was loaded.
    ///
    /// # Errors
    /// [`LlmError::OutOfMemory`], [`LlmError::NoRoomForKv`], or [`LlmError::Setting`] if
    /// `max_seq_len` tokens do not fit.
    pub fn allocate<B: Backend>(
        &self,
        be: &B,
        model: &Decoder<B>,
        at_start: FreeMemory,
    ) -> Result<Buffers<B>, LlmError> {
        let Self { batch, limits, lora, .. } = self;
        let config = &model.config;
        let tokens_per_block = self.kv.tokens_per_block;
        let loaded = FreeMemory::of(be)?;
        let most = sizes::step_extents(limits, sizes::longest(batch, config), tokens_per_block);
        let state = RunState::new(be, config, self.activations, &most)?;
        let sampler = Sampler::new(be, limits.max_logit_rows, config.vocab)?;
        let free = FreeMemory::of(be)?;
        let of_rank = free.of_rank(model.comm.world());
        let tiers = sizes::tiers(*lora, self.cache, self.geometry, of_rank);
        let for_adapters = sizes::adapter_bytes(*lora, self.geometry, tiers.device, of_rank);
        let for_kv = of_rank.beside(for_adapters);
        let (kv, max_seq_len) = sizes::kv_plan(batch, self.kv, config, self.kv_dtype, for_kv)?;
        let kv = KvPlan { blocks: min_over_ranks::<B>(&model.comm, kv.blocks)?, ..kv };
        let max_seq_len = max_seq_len.min(kv.blocks * tokens_per_block);
        let kv_cache = KvCache::new(be, config, self.kv_dtype, kv.blocks, tokens_per_block)?;
        let memory = MemoryPlan {
            free_at_start: at_start.bytes,
            weights: at_start.taken(loaded, model.matrix_bytes),
            activations: loaded.taken(free, state.bytes()),
            adapters: for_adapters,
            adapter_slots: sizes::slots(*lora),
            kv: kv.blocks * block_bytes(config, self.kv_dtype, tokens_per_block),
            kv_blocks: kv.blocks,
            kv_tokens: kv.blocks * tokens_per_block,
            left: FreeMemory::of(be)?.beside(for_adapters).bytes,
        };
        Ok(Buffers { state, sampler, kv_cache, kv, max_seq_len, tiers, memory })
    }
}

/// The smallest value over the ranks of a group, for sizes that must be equal on all of them.
fn min_over_ranks<B: Backend>(comm: &B::Comm, own: usize) -> Result<usize, LlmError> {
    if comm.world() == 1 {
        return Ok(own);
    }
    // A sum in which each rank has an entry of its own gathers the values. Floats have all integers up to this.
    const MAX_EXACT: usize = 1 << f32::MANTISSA_DIGITS;
    let mut of_ranks = vec![0.0; comm.world()];
    of_ranks[comm.rank()] = own.min(MAX_EXACT) as f32;
    let of_ranks = comm.sum_on_host(of_ranks)?;
    Ok(of_ranks.into_iter().map(|of_rank| of_rank as usize).min().unwrap_or(own))
}
