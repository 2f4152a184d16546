//! `lacis-lab load`: simulated clients against a coordinator.

use std::process::ExitCode;

/// What the command line says.
#[derive(Debug, clap::Args)]
pub struct Arguments {}

/// Runs it.
pub fn run(_arguments: &Arguments) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not written yet")
}
