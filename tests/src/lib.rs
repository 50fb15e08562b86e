//! The provider suite for backends ([`suite`]), and what the other tests share: fixtures and engines over
//! them.
#![warn(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod adapter_files;
mod compare;
mod demo;
pub mod faults;
mod field;
mod fixture_class;
mod fixtures;
pub mod settle;
mod sources;
pub mod suite;

pub use adapter_files::{AdapterFiles, FileTensor};
pub use compare::{assert_greedy, relative_error};
pub use demo::{DemoCase, demo_adapters};
pub use field::{FieldAnswers, FieldCase, dense_field_cases, field_cases, field_dir, field_model};
pub use fixture_class::{Class, context_logits};
pub use fixtures::{
    Case, Fixtures, adapter_path, builder, ckpt_source, engine, fixtures_dir, geometry, model_path,
    run,
};
pub use sources::{sources, workspace};

/// Compiles the README's example.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

/// Compiles the example of the library's page.
#[cfg(doctest)]
#[doc = include_str!("../../docs/library.md")]
struct Library;
