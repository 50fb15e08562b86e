//! Starting an engine: checks settings, opens the model, plans and allocates memory, and starts threads.

mod base_model;
mod buffers;
mod builder;
mod checkpoint;
mod config;
mod geometry;
mod launch;
mod lora;
mod memory;
mod quantize;
mod rank;
mod settings;
mod sizes;

pub use base_model::BaseModel;
pub use builder::LlmBuilder;
pub use config::{ConfigError, EngineConfig};
pub use geometry::geometry;
pub use launch::Progress;
pub use memory::MemoryPlan;
pub use settings::{
    CudaGraphConfig, KvCacheConfig, KvCacheDtype, LoadFormat, MoeConfig, SchedulerConfig,
};
