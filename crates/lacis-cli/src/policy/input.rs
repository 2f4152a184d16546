//! What the commands work on: a policy from a file or a coordinator, and who there is.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use lacis_policy::{Format, Invalid, Network, Policy, Population};
use lacis_wire::admin::{PolicyFormat, PolicyInfo};

use crate::admin::Where;

/// A text that cannot be used: a line for each problem.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refused(String);

impl Refused {
    pub(super) fn new(invalid: &Invalid, name: &str) -> Self {
        Self(invalid.for_file(name))
    }
}

/// Who there is.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Who {
    /// Users and nodes, in JSON or YAML; without it those of the coordinator on this machine
    #[arg(long, value_name = "FILE")]
    nodes: Option<PathBuf>,
    #[command(flatten)]
    coordinator: Where,
}

impl Who {
    /// Was it said where users and nodes come from?
    pub(super) fn is_said(&self) -> bool {
        self.nodes.is_some() || self.coordinator.is_named()
    }

    pub(super) async fn population(&self) -> anyhow::Result<Population> {
        if let Some(path) = &self.nodes {
            let text = read(path)?;
            let parsed = Population::parse(&text, Format::of_path(path));
            return parsed
                .map_err(|invalid| anyhow::anyhow!("{}", invalid.for_file(&path.display().to_string())));
        }
        let coordinator = self.coordinator.clone().coordinator(false).context(
            "users and nodes come from a file (--nodes FILE) or from a coordinator on this machine",
        )?;
        coordinator.get(&coordinator.path("/population").await?).await
    }

    /// The named file's policy, or the one in force at the coordinator.
    pub(super) async fn policy(&self, file: Option<&Path>) -> anyhow::Result<Named> {
        if let Some(path) = file {
            return Named::of_file(path);
        }
        let coordinator = self
            .coordinator
            .clone()
            .coordinator(false)
            .context("a policy comes from a file or from a coordinator on this machine")?;
        let info: PolicyInfo = coordinator.get(&coordinator.path("/policy").await?).await?;
        let Some(text) = info.text else {
            return Ok(Named { name: "(no policy)".to_owned(), policy: Policy::allow_all() });
        };
        let format = match info.format {
            PolicyFormat::Hujson => Format::HuJson,
            PolicyFormat::Yaml => Format::Yaml,
        };
        let name = info.path.map_or_else(|| "policy".to_owned(), |path| path.display().to_string());
        Named::parse(&text, format, name)
    }

    /// The policy as it comes to be for who there is. Its tests are not run.
    pub(super) async fn network(&self, file: Option<&Path>) -> anyhow::Result<(Network, String)> {
        let named = self.policy(file).await?;
        Ok((Network::compile(&named.policy, self.population().await?), named.name))
    }
}

/// A policy, and how messages call it.
#[derive(Clone, Debug)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) policy: Policy,
}

impl Named {
    /// # Errors
    /// [`Refused`] when the policy cannot be used.
    pub(super) fn of_file(path: &Path) -> anyhow::Result<Self> {
        Self::parse(&read(path)?, Format::of_path(path), path.display().to_string())
    }

    fn parse(text: &str, format: Format, name: String) -> anyhow::Result<Self> {
        let policy = Policy::parse(text, format).map_err(|invalid| Refused::new(&invalid, &name))?;
        Ok(Self { name, policy })
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    match String::from_utf8(text) {
        Ok(text) => Ok(text),
        Err(_) => bail!("{} is no text (UTF-8)", path.display()),
    }
}
