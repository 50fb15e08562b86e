//! `loramux` as a process: signals, pipes, full disks, exit codes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adapters;
mod exit_codes;
mod flags;
mod full_disk;
mod output;
mod pipes;
mod program;
mod signals;
