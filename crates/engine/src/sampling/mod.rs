//! How tokens are chosen: what a request may ask for, and what the batch loop works with.

mod params;
mod plan;
mod resolve;
mod unsupported;
mod validate;

pub use params::SamplingParams;
pub use plan::SamplingPlan;
pub use validate::{MAX_LOGPROBS, SamplingError};
