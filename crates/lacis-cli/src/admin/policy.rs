//! `lacis admin policy`: the policy of a network whose configuration leaves it to the database; and what any
//! coordinator says about its own.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Subcommand;
use http::Method;
use lacis_wire::admin::{PolicyFormat, PolicyInfo, PolicyProblem, PolicySource, SetPolicy};

use super::Coordinator;
use crate::output;

#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// Print the policy as it was given
    Get,
    /// Put another policy in force
    Set {
        /// HuJSON, or YAML when its name ends so; `-` for standard input
        file: PathBuf,
    },
    /// Say whether a policy could be put in force, its own tests included
    Check {
        /// HuJSON, or YAML when its name ends so; `-` for standard input
        file: PathBuf,
    },
    /// Read the policy's file again
    Reload,
    /// Take the policy away: everybody reaches everything again
    Delete,
}

impl Coordinator {
    pub(super) async fn policy(&self, command: PolicyCommand) -> anyhow::Result<()> {
        let path = self.path("/policy").await?;
        match command {
            PolicyCommand::Get => {
                let info: PolicyInfo = self.get(&path).await?;
                if self.json {
                    return Ok(output::json(&info)?);
                }
                // Remarks go beside the text, which may be on its way into a file.
                for remark in remarks(&info) {
                    output::note(format_args!("lacis: {remark}"));
                }
                if let Some(text) = &info.text {
                    output::document(text.strip_suffix('\n').unwrap_or(text));
                }
                Ok(())
            }
            PolicyCommand::Set { file } => {
                let info: PolicyInfo = self.send_json(Method::PUT, &path, &read(&file)?).await?;
                warn(&info.warnings);
                self.one(&info, || "the policy is in force".to_owned())
            }
            PolicyCommand::Check { file } => {
                let warnings: Vec<PolicyProblem> = self.post(&format!("{path}/check"), &read(&file)?).await?;
                warn(&warnings);
                self.one(&warnings, || format!("{}: this policy can be put in force", file.display()))
            }
            PolicyCommand::Reload => {
                let info: PolicyInfo = self.post(&format!("{path}/reload"), &()).await?;
                warn(&info.warnings);
                self.one(&info, || match info.source {
                    PolicySource::File => "the policy's file was read again, and is in force".to_owned(),
                    _ => "the policy is in the database, and in force".to_owned(),
                })
            }
            PolicyCommand::Delete => {
                let info: PolicyInfo = self.send_json(Method::DELETE, &path, &()).await?;
                self.one(&info, || "there is no policy any more: everybody reaches everything".to_owned())
            }
        }
    }
}

fn read(file: &Path) -> anyhow::Result<SetPolicy> {
    let yaml = file.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
    let format = if yaml { PolicyFormat::Yaml } else { PolicyFormat::Hujson };
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("reading the policy from standard input")?;
        return Ok(SetPolicy { text, format, name: None });
    }
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read the policy {}", file.display()))?;
    Ok(SetPolicy { text, format, name: Some(file.display().to_string()) })
}

fn warn(warnings: &[PolicyProblem]) {
    for warning in warnings {
        output::note(format_args!("lacis: warning: {warning}"));
    }
}

fn remarks(info: &PolicyInfo) -> Vec<String> {
    let mut remarks = Vec::new();
    match (&info.text, &info.path, info.source) {
        (None, ..) => remarks.push("there is no policy: everybody reaches everything".to_owned()),
        (_, Some(path), _) => remarks.push(format!("from the file {}", path.display())),
        (_, None, PolicySource::Configuration) => {
            remarks.push("from the coordinator's configuration".to_owned());
        }
        _ => {}
    }
    remarks.extend(info.trouble.iter().flat_map(|trouble| trouble.lines().map(ToOwned::to_owned)));
    remarks.extend(info.warnings.iter().map(|warning| format!("warning: {warning}")));
    remarks
}
