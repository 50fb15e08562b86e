//! Log events of the libraries, on standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::args::Verbosity;

/// The environment variable that overrides the flags.
const VARIABLE: &str = "RUST_LOG";

/// Installs a subscriber that writes events to standard error, filtered by `RUST_LOG` or else by `verbosity`. Only the
/// first call in a process has an effect.
///
/// # Errors
/// If `RUST_LOG` cannot be understood.
pub(crate) fn start(verbosity: Verbosity) -> anyhow::Result<()> {
    let named = std::env::var(VARIABLE).unwrap_or_default();
    let filter = if named.is_empty() {
        EnvFilter::new(level(verbosity))
    } else {
        EnvFilter::builder().parse(&named).map_err(|error| {
            anyhow::anyhow!(
                "{VARIABLE} is {named:?}: {error}; give a level such as debug, or a list such as \
                 loramux_engine=debug,warn"
            )
        })?
    };
    // Fails if the process already has a subscriber, which then stays.
    let _ = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .try_init();
    Ok(())
}

fn level(verbosity: Verbosity) -> &'static str {
    match verbosity {
        Verbosity { quiet: true, .. } => "error",
        Verbosity { verbose: 0, .. } => "warn",
        Verbosity { verbose: 1, .. } => "info",
        Verbosity { verbose: 2, .. } => "debug",
        Verbosity { .. } => "trace",
    }
}
