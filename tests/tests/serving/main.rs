//! The engine under many concurrent requests, adapters and limits.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod bad_input;
mod batches;
mod lifecycle;
mod memory;
mod mixes;
mod overlap;
mod prefixes;
mod soak;
mod streams;
