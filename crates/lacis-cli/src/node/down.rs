//! `lacis down`.

use lacis_wire::local::MaskedPrefs;

use super::Daemon;
use crate::{Failure, output};

#[derive(Debug, clap::Args)]
pub(crate) struct Down {
    /// Accepted for scripts; there is nothing to accept
    #[arg(long, value_name = "RISK", hide = true)]
    accept_risk: Option<String>,
}

impl Down {
    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        let _ = self.accept_risk;
        if daemon.status(false).await?.backend_state == "Stopped" {
            output::note("Lacis was already stopped.");
            return Ok(());
        }
        daemon.edit_prefs(&MaskedPrefs::default().set("WantRunning", false)).await?;
        Ok(())
    }
}
