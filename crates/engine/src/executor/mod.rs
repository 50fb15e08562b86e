//! What runs the steps that the batch loop plans: a model in the memory of its devices, behind a trait that
//! names none of them.

mod device;
mod draws;
mod graphs;
mod group;
mod sampler;
mod slots;
mod step_array;

use lora_core::Result;

pub use crate::model::StepRows;
pub use device::{DeviceExecutor, Parts};
pub use draws::Draws;
pub use graphs::{GraphSizes, GraphStats, StepGraphs, padded_rows};
pub use group::{Group, Peer};
pub use sampler::Sampler;

use crate::adapters::{SiteWrite, WriteError};
use crate::kv::BlockCopy;
use crate::sampling::TokenLogprobs;

/// Runs steps, in the order in which they come.
///
/// A step is [`Executor::forward`], [`Executor::draw`], and once its tokens are wanted, [`Executor::tokens`].
/// Forward pass and draw are two calls, as the host decides what may be drawn while a device computes.
/// After an error, what was computed is lost: [`Executor::forget_steps`] is called before the next step.
pub trait Executor {
    /// Whether it pays to run a step before the tokens of the one before are known, which then come from the
    /// device ([`StepRows::sampled_from`]).
    fn is_asynchronous(&self) -> bool;

    /// Copies the beginnings of KV blocks, in this order, in all layers.
    ///
    /// # Errors
    /// [`lora_core::Error::Device`].
    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<()>;

    /// Runs the model on a step's rows.
    ///
    /// # Errors
    /// Those of a backend's ops.
    fn forward(&mut self, rows: StepRows) -> Result<()>;

    /// Draws a token from each row of logits of the last step.
    ///
    /// # Errors
    /// Those of a backend's ops.
    fn draw(&mut self, draws: Draws) -> Result<()>;

    /// Waits for the tokens of the earliest step whose tokens were not asked for yet, one for each row of
    /// its logits.
    ///
    /// # Errors
    /// [`lora_core::Error::Device`] if the step failed, or there is none.
    fn tokens(&mut self) -> Result<Vec<i32>>;

    /// Log-probabilities of `targets`, one for each row of logits of the last step, and of the `k` likeliest
    /// tokens of each.
    ///
    /// # Errors
    /// Those of a backend's ops.
    fn logprobs(&mut self, targets: &[i32], k: usize) -> Result<Vec<TokenLogprobs>>;

    /// The first `rows` rows of logits of the last step, each over the vocabulary.
    ///
    /// # Errors
    /// Those of a backend's ops.
    fn logits(&mut self, rows: usize) -> Result<Vec<Vec<f32>>>;

    /// Gives up the steps whose tokens were not asked for.
    fn forget_steps(&mut self);

    /// Sites of the model: the numbers below are [`SiteWrite::site`].
    fn sites(&self) -> usize;

    /// Writes an adapter's part of one site into a slot, or clears it. Returns the bytes of that part. A write
    /// that fails leaves everything else as it was.
    ///
    /// # Errors
    /// [`WriteError`] naming the site.
    fn write_site(&mut self, write: SiteWrite<'_>) -> std::result::Result<usize, WriteError>;

    /// Steps that were recorded and replayed.
    fn graphs(&self) -> GraphStats;
}
