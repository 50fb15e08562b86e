//! The provider suite: properties that every [`Backend`] must have, as tests for authors of backends.
//!
//! To test a backend, depend on this crate in `dev-dependencies` and call
//! [`backend_suite!`](crate::backend_suite) in an integration test, once for each combination of dtypes
//! that the backend supports. Each call makes a module with one `#[test]` for every property:
//!
//! ```
//! use lora_cpu_ref::CpuRef; // Your backend.
//! use loramux_tests::backend_suite;
//! use loramux_tests::suite::Types;
//!
//! backend_suite!(cpu_f32, CpuRef::new(), Types::F32);
//! backend_suite!(cpu_bf16, CpuRef::new(), Types::BF16);
//! backend_suite!(cpu_fp8_kv, CpuRef::new(), Types::FP8_KV);
//! # fn main() {}
//! ```
//!
//! The second argument is an expression that creates the backend; it is evaluated in every test. The backend
//! must check indices (tokens, positions, slots) in its operands, at least in a mode for tests, since some
//! properties require that indices out of range are errors. `cargo test --test NAME cpu_bf16::attention` runs
//! the properties of attention in bf16.
//!
//! A property generates cases with unusual shapes, the same ones on every run. It computes the expected
//! result by the formulas of [`mod@reference`] in `f64`, and allows the rounding that the op's contract
//! allows ([`compare`]); copies and rows without adapters must be bitwise equal. Operands are in the middle
//! of larger buffers that are otherwise NaN, so that reads outside of an operand give NaN and writes are
//! detected. A failure is reported with the smallest case that was found. With the environment variable
//! [`errors::REPORT_VARIABLE`], the largest errors of a run are written to a file.

pub mod attention;
pub mod compare;
pub mod draw;
pub mod errors;
pub mod fp8;
pub mod graphs;
pub mod linear;
pub mod logprobs;
pub mod lora;
pub mod lora_case;
pub mod misuse;
pub mod norm;
pub mod num;
pub mod own_norms;
pub mod reference;
pub mod rig;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod sample_reference;
pub mod slots;

use std::cell::RefCell;
use std::fmt::Debug;

use lora_core::{Backend, DType};
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, TestCaseResult, TestRng, TestRunner};

use rig::Rig;

/// Dtypes that a property runs in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Types {
    /// Activations, the inputs of linear layers.
    pub x: DType,
    /// Weights and LoRA factors.
    pub w: DType,
    /// The KV cache.
    pub kv: DType,
    /// Outputs of linear layers, and the residual stream.
    pub out: DType,
}

impl Types {
    /// All `f32`.
    pub const F32: Self = Self { x: DType::F32, w: DType::F32, kv: DType::F32, out: DType::F32 };
    /// All bf16.
    pub const BF16: Self =
        Self { x: DType::Bf16, w: DType::Bf16, kv: DType::Bf16, out: DType::Bf16 };
    /// All f16.
    pub const F16: Self = Self { x: DType::F16, w: DType::F16, kv: DType::F16, out: DType::F16 };
    /// bf16 with outputs of linear layers in f32, as with [`lora_core::Caps::wide_activations`].
    pub const WIDE: Self =
        Self { x: DType::Bf16, w: DType::Bf16, kv: DType::Bf16, out: DType::F32 };
    /// Different dtypes, with the lowest precision for outputs.
    pub const MIXED: Self = Self { x: DType::F32, w: DType::F16, kv: DType::F16, out: DType::Bf16 };
    /// bf16 with a KV cache in e4m3.
    pub const FP8_KV: Self = Self { kv: DType::F8E4m3, ..Self::BF16 };
}

/// Runs `property` on `cases` generated cases, the same ones on every run and for every backend.
///
/// # Panics
/// If the property fails, with the smallest failing case.
pub fn for_all<B: Backend, S: Strategy>(
    make: &dyn Fn() -> B,
    cases: u32,
    strategy: S,
    property: impl Fn(&mut Rig<B>, &S::Value) -> TestCaseResult,
) where
    S::Value: Debug,
{
    let rig = RefCell::new(Rig::new(make()));
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(config.rng_algorithm);
    let outcome = TestRunner::new_with_rng(config, rng)
        .run(&strategy, |case| property(&mut rig.borrow_mut(), &case));
    errors::write_report();
    if let Err(failure) = outcome {
        panic!("{} backend: {failure}", B::NAME);
    }
}

/// Makes a module `$module` with a test for every property of the suite. `$make` is an expression that
/// creates the backend, `$types` the [`Types`](crate::suite::Types) to test it with; see
/// [`suite`](crate::suite).
#[macro_export]
macro_rules! backend_suite {
    ($module:ident, $make:expr, $types:expr) => {
        mod $module {
            use super::*;
            $crate::backend_suite!(@tests $make, $types;
                rows: [embedding_looks_rows_up, gathering_copies_rows,
                    gathering_moves_integers_as_they_are, the_gate_is_silu_times_up,
                    what_is_uploaded_comes_back, rows_are_copied_within_a_matrix,
                    row_ops_refuse_misfits, copies_outside_or_onto_themselves_are_refused,
                    row_ops_refuse_ids_out_of_range],
                norm: [the_norm_is_its_formula, the_norm_after_an_addition_reads_the_rounded_sum,
                    a_row_is_normalised_as_if_it_were_alone, norms_refuse_misfits],
                own_norms: [a_row_is_scaled_by_its_own_weight, own_norms_refuse_misfits],
                linear: [a_product_is_its_formula, a_row_is_multiplied_as_if_it_were_alone,
                    row_norms_are_those_of_the_sum, products_refuse_misfits],
                fp8: [an_fp8_product_is_its_formula, an_fp8_row_is_multiplied_as_if_it_were_alone,
                    row_norms_count_the_scales, fp8_products_refuse_misfits],
                rope: [heads_are_normalised_rotated_and_stored,
                    heads_are_normalised_by_the_norms_of_their_row, rotation_refuses_misfits,
                    rotation_refuses_ids_out_of_range],
                attention: [attention_is_its_formula, planned_attention_is_its_formula,
                    a_row_attends_as_if_it_were_alone,
                    attention_refuses_misfits, attention_refuses_ids_out_of_range],
                sample: [a_draw_follows_its_parameters, a_draw_does_not_depend_on_the_batch,
                    sampling_refuses_misfits, sampling_refuses_ids_out_of_range],
                logprobs: [logprobs_are_the_log_softmax, logprobs_refuse_misfits,
                    logprobs_refuse_ids_out_of_range],
                lora: [an_adapter_does_what_its_formula_says, long_prompts_get_their_adapters,
                    a_product_then_its_adapter,
                    products_in_tiles_get_their_adapters,
                    products_of_many_rows_get_their_adapters,
                    long_inputs_get_their_adapters, a_gated_product_is_its_parts,
                    gated_products_of_many_rows_are_their_parts, wide_gated_products_are_their_parts,
                    gated_fp8_products_of_many_rows_are_their_parts,
                    an_embedding_adapter_does_what_its_formula_says,
                    a_row_gets_its_adapter_as_if_it_were_alone, rows_without_an_adapter_keep_bits,
                    adapters_refuse_misfits, adapters_refuse_ids_out_of_range],
                graphs: [a_replay_is_what_would_have_been_run,
                    products_one_after_another_read_what_came_before],
                slots: [a_slot_holds_what_was_written_last, a_refused_write_leaves_the_slot,
                    rows_of_tokens_refuse_misfits],
            );
        }
    };
    (@tests $make:expr, $types:expr; $($file:ident: [$($property:ident),+ $(,)?]),+ $(,)?) => {
        $($(
            #[test]
            fn $property() {
                $crate::suite::$file::$property(&|| $make, $types);
            }
        )+)+
    };
}
