//! `lacis policy check FILE`.

use std::path::PathBuf;

use lacis_policy::Network;

use super::Answer;
use super::input::{Named, Refused, Who};
use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Check {
    /// HuJSON, or YAML when its name ends so
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    who: Who,
}

impl Check {
    pub(super) async fn run(self) -> anyhow::Result<Answer> {
        let Named { name, policy } = Named::of_file(&self.file)?;
        for warning in policy.warnings() {
            let at = warning.at.map_or_else(String::new, |at| format!("{at}:"));
            eprintln!("{name}:{at} warning: {warning}");
        }
        if !self.who.is_said() {
            output::line(format!(
                "{name}: syntax and references are fine; its tests were not run (they need --nodes FILE or --tailnet NAME)"
            ));
            return Ok(Answer::Yes);
        }
        let population = self.who.population().await?;
        let (users, nodes) = (population.users.len(), population.nodes.len());
        let network = Network::compile(&policy, population);
        network.test().map_err(|invalid| Refused::new(&invalid, &name))?;
        output::line(format!("{name}: fine, and its tests pass ({nodes} nodes, {users} users)"));
        Ok(Answer::Yes)
    }
}
