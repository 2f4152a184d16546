//! `lacis version`.

use serde_json::json;

use super::Daemon;
use crate::{Failure, output};

const VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Debug, clap::Args)]
pub(crate) struct Version {
    /// The daemon's version too
    #[arg(long)]
    daemon: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Version {
    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        let running = if self.daemon { Some(daemon.status(false).await?.version) } else { None };
        let capability = lacis_wire::CURRENT_CAPABILITY_VERSION;
        if self.json {
            let mut all = json!({ "short": VERSION, "long": VERSION, "cap": capability });
            if let Some(running) = running {
                all["daemonLong"] = running.into();
            }
            return Ok(output::json(&all)?);
        }
        match running {
            Some(running) => {
                output::line(format_args!("Client: {VERSION}"));
                output::line(format_args!("Daemon: {running}"));
            }
            None => {
                output::line(VERSION);
                output::line(format_args!("  capability version: {capability}"));
            }
        }
        Ok(())
    }
}
