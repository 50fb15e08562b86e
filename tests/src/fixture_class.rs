//! Required accuracy for the fixtures, on any backend.

use lora_core::DType;
use loramux_engine::RequestOutput;

use crate::{Case, Fixtures, relative_error};

/// The required accuracy for a dtype.
pub struct Class {
    /// Dtype of the activations.
    pub dtype: DType,
    /// Bound of the logits' relative error.
    pub logits: f32,
    /// Margin below which either token is accepted.
    pub tie: f32,
}

impl Class {
    /// Weights are exact in `f32`, and little is lost on the way.
    pub const EXACT: Self = Self { dtype: DType::F32, logits: 2e-3, tie: 0.01 };

    /// Checks logits and tokens of an answer against those of transformers and PEFT, and returns the
    /// relative error of the logits.
    ///
    /// # Panics
    /// If they are too far off.
    pub fn check(&self, fixtures: &Fixtures, case: &Case, answer: &RequestOutput) -> f32 {
        let error = relative_error(&context_logits(answer), &fixtures.logits(case));
        assert!(error < self.logits, "{} in {}: logits off by {error}", case.id, self.dtype);
        case.assert_greedy(&answer.outputs[0].token_ids, self.tie);
        error
    }
}

/// The logits of the prompt: `[prompt tokens, vocab]`.
pub fn context_logits(answer: &RequestOutput) -> Vec<f32> {
    answer.context_logits.iter().flatten().flatten().copied().collect()
}

/// Makes a test of each `name: model, class`, which calls `$meets(model, class)`.
#[macro_export]
macro_rules! fixture_models {
    ($meets:ident; $($name:ident: $model:literal, $class:expr;)*) => {
        $(#[test]
        fn $name() {
            $meets($model, &$class);
        })*
    };
}
