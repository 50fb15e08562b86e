//! Runs the steps that the batch loop plans.
//!
//! The batch loop sees only the [`Executor`] trait, so it is tested without a model. Its implementations
//! hold the model, the KV cache and the activations: [`DeviceExecutor`] on one device, [`Group`] on the
//! ranks of a tensor-parallel group.

mod device;
mod graphs;
mod group;
mod sample_inputs;
mod sampler;
mod slots;
mod step_array;

use lora_core::Result;

pub use crate::model::StepRows;
pub use device::{DeviceExecutor, ExecutorParts};
pub use graphs::{GraphSizes, GraphStats, StepGraphs, padded_rows};
pub use group::{Group, Peer};
pub use sample_inputs::SampleInputs;
pub use sampler::Sampler;

use crate::adapters::{SiteWrite, WriteError};
use crate::kv::BlockCopy;
use crate::sampling::TokenLogprobs;

/// Runs steps in order.
///
/// A step is [`Executor::forward`], [`Executor::sample`] and, once the host needs its tokens,
/// [`Executor::tokens`]. Forward pass and sampling are separate calls so that the host can compute the
/// masks of guided sequences while the device computes the logits. After an error the results of all
/// unfinished steps are lost, and [`Executor::forget_steps`] must be called before the next step.
pub trait Executor {
    /// Whether the device computes asynchronously, so that overlap scheduling pays: a step is launched
    /// before the host has read the previous step's tokens, which are gathered on the device
    /// ([`StepRows::sampled_from`]).
    fn is_asynchronous(&self) -> bool;

    /// Copies the first tokens of KV blocks to other blocks in all layers, in the order given.
    ///
    /// # Errors
    /// [`lora_core::Error::Device`].
    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<()>;

    /// Runs the model on a step's rows.
    ///
    /// # Errors
    /// Errors of the backend's ops.
    fn forward(&mut self, rows: StepRows) -> Result<()>;

    /// Samples a token from each row of logits of the last step.
    ///
    /// # Errors
    /// Errors of the backend's ops.
    fn sample(&mut self, inputs: SampleInputs) -> Result<()>;

    /// Waits for the sampled tokens of the oldest step whose tokens were not read yet, one for each of its
    /// rows of logits.
    ///
    /// # Errors
    /// [`lora_core::Error::Device`] if the step failed, or no step was sampled.
    fn tokens(&mut self) -> Result<Vec<i32>>;

    /// Log-probabilities of `targets`, one for each row of logits of the last step, and of the `k` most
    /// probable tokens of each.
    ///
    /// # Errors
    /// Errors of the backend's ops.
    fn logprobs(&mut self, targets: &[i32], k: usize) -> Result<Vec<TokenLogprobs>>;

    /// The first `rows` rows of logits of the last step, each over the vocabulary.
    ///
    /// # Errors
    /// Errors of the backend's ops.
    fn logits(&mut self, rows: usize) -> Result<Vec<Vec<f32>>>;

    /// Discards the steps whose tokens were not read.
    fn forget_steps(&mut self);

    /// Number of LoRA sites of the model; [`SiteWrite::site`] is below it.
    fn sites(&self) -> usize;

    /// Writes an adapter's weights for one site into a slot, or clears the slot there. Returns the bytes
    /// written. A failed write leaves all other slots and sites as they were.
    ///
    /// # Errors
    /// [`WriteError`] naming the site.
    fn write_site(&mut self, write: SiteWrite<'_>) -> std::result::Result<usize, WriteError>;

    /// Counts of steps recorded as CUDA graphs and replayed.
    fn graphs(&self) -> GraphStats;
}
