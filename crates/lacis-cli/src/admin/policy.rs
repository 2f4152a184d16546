//! `lacis admin policy`: the policy of a network whose configuration leaves it to the database; and what any
//! coordinator says about its own.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use clap::Subcommand;
use http::Method;
use lacis_wire::admin::{PolicyFormat, PolicyInfo, PolicyProblem, PolicySource, SetPolicy, TailnetInfo};

use super::Coordinator;
use crate::http::escaped;
use crate::{one_line, output};

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
    /// Read the policy's file, or the configuration that has it, again; of all networks unless one is named
    Reload,
    /// Take the policy away: everybody reaches everything again
    Delete,
}

impl Coordinator {
    pub(super) async fn policy(&self, command: PolicyCommand) -> anyhow::Result<()> {
        let path = async || self.path("/policy").await;
        match command {
            PolicyCommand::Get => {
                let info: PolicyInfo = self.get(&path().await?).await?;
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
                let info: PolicyInfo = self.send_json(Method::PUT, &path().await?, &read(&file)?).await?;
                warn(&info.warnings);
                self.one(&info, || "the policy is in force".to_owned())
            }
            PolicyCommand::Check { file } => {
                let path = format!("{}/check", path().await?);
                let warnings: Vec<PolicyProblem> = self.post(&path, &read(&file)?).await?;
                warn(&warnings);
                self.one(&warnings, || format!("{}: this policy can be put in force", file.display()))
            }
            PolicyCommand::Reload => self.reload_policies().await,
            PolicyCommand::Delete => {
                let info: PolicyInfo = self.send_json(Method::DELETE, &path().await?, &()).await?;
                self.one(&info, || "there is no policy any more: everybody reaches everything".to_owned())
            }
        }
    }

    /// Reads policies again; one that is refused does not keep the others from it.
    async fn reload_policies(&self) -> anyhow::Result<()> {
        let names = match &self.tailnet {
            Some(name) => vec![name.clone()],
            None => {
                let all: Vec<TailnetInfo> = self.get("/tailnets").await?;
                all.into_iter().map(|one| one.name).collect()
            }
        };
        let several = names.len() > 1;
        let (mut infos, mut refused) = (Vec::new(), Vec::new());
        for name in names {
            let of = if several { format!("{name}: ") } else { String::new() };
            let path = format!("/tailnets/{}/policy/reload", escaped(&name));
            match self.post::<PolicyInfo>(&path, &()).await {
                Ok(info) => {
                    warn(&info.warnings);
                    if !self.json {
                        output::line(format!("{of}{}", reloaded(info.source)));
                    }
                    infos.push(info);
                }
                Err(error) => refused.push(format!("{of}{}", one_line(&error))),
            }
        }
        if self.json {
            match infos.as_slice() {
                [only] if !several => output::json(only)?,
                _ if several => output::json(&infos)?,
                _ => {}
            }
        }
        if refused.is_empty() { Ok(()) } else { Err(anyhow!(refused.join("\n"))) }
    }
}

fn reloaded(source: PolicySource) -> &'static str {
    match source {
        PolicySource::File => "the policy's file was read again, and is in force",
        PolicySource::Configuration => "the policy in the configuration was read again, and is in force",
        PolicySource::Database => "the policy is in the database, and in force",
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
