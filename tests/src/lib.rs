//! What the suites share: the fixtures, and engines over them.
#![warn(missing_docs)]

mod compare;
mod fixtures;

pub use compare::{assert_greedy, relative_error};
pub use fixtures::{Case, Fixtures, adapter_path, engine, fixtures_dir, model_path, run};
