//! Sampling: the parameters of requests, and the plans that the batch loop derives from them.

mod guided;
mod logprobs;
mod object;
mod params;
mod plan;
mod resolve;
mod unsupported;
mod validate;

pub use guided::{Guide, GuidedDecodingParams, MAX_GUIDE_BYTES};
pub use logprobs::{TokenLogprob, TokenLogprobs};
pub use object::Object;
pub use params::SamplingParams;
pub use plan::SamplingPlan;
pub use validate::{MAX_LOGPROBS, SamplingError};
