//! Requests and their outputs.

mod batch;
mod collect;
mod input;
mod intake;
mod output;
mod pending;
mod prepare;
mod stream;

pub use batch::{Answered, Batch};
pub use input::{GenerateRequest, PerPrompt, Prompt};
pub(super) use intake::Intake;
pub use output::{
    CompletionOutput, Delta, FinishReason, Logprob, Logprobs, RequestOutput, StopReason, Update,
};
pub use stream::{Blocking, ResponseStream};
