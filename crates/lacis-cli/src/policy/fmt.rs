//! `lacis policy fmt FILE`.

use std::path::PathBuf;

use super::Answer;
use super::input::Named;
use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Fmt {
    /// HuJSON, or YAML when its name ends so
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Print YAML
    #[arg(long)]
    yaml: bool,
}

impl Fmt {
    pub(super) fn run(self) -> anyhow::Result<Answer> {
        let json = Named::of_file(&self.file)?.policy.to_json();
        if self.yaml {
            output::line(serde_yaml::to_string(&json)?.trim_end());
        } else {
            output::json(&json)?;
        }
        Ok(Answer::Yes)
    }
}
