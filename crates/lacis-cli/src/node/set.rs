//! `lacis set` and `lacis get`: preferences, without logging in.

use anyhow::anyhow;
use serde_json::Value;

use super::Daemon;
use super::prefs::PrefFlags;
use crate::{Failure, output};

#[derive(Debug, clap::Args)]
pub(crate) struct Set {
    #[command(flatten)]
    flags: PrefFlags,
    /// Accepted for scripts
    #[arg(long, value_name = "RISK", hide = true)]
    accept_risk: Option<String>,
}

impl Set {
    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        let _ = self.accept_risk;
        if self.flags.is_empty() {
            return Err(anyhow!("nothing to set: see `lacis set --help`").into());
        }
        let status = daemon.status(true).await?;
        let prefs = daemon.prefs().await?;
        daemon.edit_prefs(&self.flags.change(&prefs, &status)?).await?;
        self.flags.warn(daemon).await;
        Ok(())
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Get {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Get {
    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        let prefs = daemon.prefs().await?;
        if self.json {
            return Ok(output::json(&prefs)?);
        }
        let Value::Object(all) = serde_json::to_value(&prefs)? else { return Ok(()) };
        let rows: Vec<_> = all
            .into_iter()
            .filter(|(name, _)| name != "Config")
            .map(|(name, value)| vec![name, value.to_string()])
            .collect();
        output::columns(&rows);
        Ok(())
    }
}
