//! Where a network's policy comes from, and how another takes its place: whole, for everybody at once, or not at all.
//!
//! The configuration decides: it holds the policy, or names a file with it, or leaves it to the database, that is to
//! `lacis admin policy set`. What is in the configuration's hands cannot be set by the API. A network without a policy
//! lets everybody reach everything.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use lacis_policy::{Format, Invalid, Policy, Population, Problem};
use lacis_wire::admin::{self, PolicyFormat, PolicyInfo, PolicyProblem};
use time::OffsetDateTime;

use super::admin::AdminError;
use super::tailnet::Tailnet;
use super::{Core, Error, TailnetConfig, now, rules};
use crate::store::{PolicyRow, Write};

/// How often files are looked at. One that differs is read when it has stayed the same for as long.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Nobody reaches anybody.
const NOTHING: &str = r#"{"acls": []}"#;

/// Where a network's policy is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicySource {
    Database,
    File(PathBuf),
    /// The policy itself, as JSON.
    Configuration(String),
}

/// What is known of the policy in force beside itself.
#[derive(Debug, Default)]
pub struct PolicyState {
    /// As it was given; one that cannot be used as well. `None`: nobody gave one.
    text: Option<(String, Format)>,
    since: Option<i64>,
    /// Why a newer one is not in force, or what is wrong with this one.
    trouble: Option<String>,
}

/// Why a policy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("cannot read the policy {path}: {source} (the user of the coordinator must be able to read it)")]
    Read { path: PathBuf, source: std::io::Error },
    /// A line for each problem.
    #[error("{0}")]
    Invalid(String),
}

/// Reads a policy file and checks what can be checked without knowing the network.
///
/// # Errors
/// When it cannot be read or is no policy, with line and column.
pub fn read_file(path: &Path) -> Result<Policy, PolicyError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| PolicyError::Read { path: path.to_owned(), source })?;
    Policy::parse(&text, Format::of_path(path))
        .map_err(|invalid| PolicyError::Invalid(invalid.for_file(&path.display().to_string())))
}

fn parse(text: &str, format: Format) -> Result<Policy, PolicyError> {
    Policy::parse(text, format).map_err(|invalid| PolicyError::Invalid(invalid.to_string()))
}

fn format_of(name: &str) -> Format {
    if name == "yaml" { Format::Yaml } else { Format::HuJson }
}

fn format_name(format: Format) -> &'static str {
    match format {
        Format::HuJson => "hujson",
        Format::Yaml => "yaml",
    }
}

fn wire_format(format: Format) -> PolicyFormat {
    match format {
        Format::HuJson => PolicyFormat::Hujson,
        Format::Yaml => PolicyFormat::Yaml,
    }
}

fn own_format(format: PolicyFormat) -> Format {
    match format {
        PolicyFormat::Hujson => Format::HuJson,
        PolicyFormat::Yaml => Format::Yaml,
    }
}

fn problem(problem: &Problem) -> PolicyProblem {
    PolicyProblem {
        line: problem.at.map(|at| at.line),
        column: problem.at.map(|at| at.column),
        place: problem.place.clone(),
        message: problem.message.clone(),
        help: problem.help.clone(),
    }
}

/// The policy that a network starts with.
///
/// # Errors
/// When the configuration's, or the file that it names, cannot be used. One in the database that cannot be used any
/// more (a newer version may be stricter) does not keep the program from starting, since it is mended through it; until
/// then nobody reaches anybody.
pub(super) fn at_start(
    tailnet: &TailnetConfig,
    stored: Option<&PolicyRow>,
) -> Result<(Policy, PolicyState), Error> {
    let wrong = |error| Error::Policy { tailnet: tailnet.name.clone(), error };
    if stored.is_some() && tailnet.policy != PolicySource::Database {
        tracing::warn!(
            tailnet = tailnet.name,
            "the policy in the database is not used: the configuration has or names another"
        );
    }
    let (policy, since) = match (&tailnet.policy, stored) {
        (PolicySource::Database, None) => return Ok((Policy::allow_all(), PolicyState::default())),
        (PolicySource::Database, Some(row)) => match parse(&row.text, format_of(&row.format)) {
            Ok(policy) => (policy, row.changed),
            Err(error) => {
                tracing::error!(
                    tailnet = tailnet.name, %error,
                    "the policy in the database cannot be used: nobody reaches anybody until another is set \
                     (`lacis admin policy get`, mend it, `lacis admin policy set FILE`)"
                );
                let state = PolicyState {
                    text: Some((row.text.clone(), format_of(&row.format))),
                    since: Some(row.changed),
                    trouble: Some(error.to_string()),
                };
                return Ok((parse(NOTHING, Format::HuJson).map_err(wrong)?, state));
            }
        },
        (PolicySource::File(path), _) => (read_file(path).map_err(wrong)?, now()),
        (PolicySource::Configuration(text), _) => (parse(text, Format::HuJson).map_err(wrong)?, now()),
    };
    let text = Some((policy.text().to_owned(), policy.format()));
    Ok((policy, PolicyState { text, since: Some(since), trouble: None }))
}

impl Tailnet {
    fn policy_state(&self) -> std::sync::MutexGuard<'_, PolicyState> {
        self.policy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what is known of the policy at the start, and warns of what is wrong with it: its own tests may fail
    /// because the network has changed, which must not keep it from coming back.
    pub(super) fn begin_policy(&self, mut state: PolicyState) {
        let snapshot = self.snapshot();
        warn(self, snapshot.network.policy());
        if state.trouble.is_none()
            && let Err(invalid) = snapshot.network.test()
        {
            tracing::warn!(tailnet = self.settings.name, %invalid, "the policy's own tests fail; it is in force all the same");
            state.trouble = Some(invalid.to_string());
        }
        *self.policy_state() = state;
    }

    /// The text of the policy in force.
    pub(super) fn policy_text(&self) -> String {
        self.snapshot().network.policy().text().to_owned()
    }

    /// Is there a policy, and does it not know this tag?
    pub(super) fn lacks_tag(&self, tag: &str) -> bool {
        self.policy_state().text.is_some() && !self.snapshot().network.policy().has_tag(tag)
    }

    /// Can this policy be put in force now?
    fn try_policy(&self, policy: &Policy) -> Result<(), Invalid> {
        self.snapshot().network.with_policy(policy).test()
    }

    fn put_in_force(&self, policy: &Policy, given: bool) {
        self.lock().govern(policy);
        let text = given.then(|| (policy.text().to_owned(), policy.format()));
        *self.policy_state() = PolicyState { text, since: Some(now()), trouble: None };
        tracing::info!(tailnet = self.settings.name, "another policy is in force");
        warn(self, policy);
    }

    /// Puts in force what the file or the configuration now says.
    fn adopt(&self, policy: Result<Policy, PolicyError>, name: Option<&str>) -> Result<(), PolicyError> {
        let tested = policy.and_then(|policy| {
            self.try_policy(&policy).map_err(|invalid| PolicyError::Invalid(said(&invalid, name)))?;
            Ok(policy)
        });
        match tested {
            // Positions are of the text: one that only reads otherwise is another.
            Ok(policy) if policy.text() == self.snapshot().network.policy().text() => {
                self.policy_state().trouble = None;
                Ok(())
            }
            Ok(policy) => {
                self.put_in_force(&policy, true);
                Ok(())
            }
            Err(error) => {
                for line in error.to_string().lines() {
                    tracing::error!(
                        tailnet = self.settings.name,
                        "the new policy is refused, the old one stays: {line}"
                    );
                }
                self.policy_state().trouble = Some(error.to_string());
                Err(error)
            }
        }
    }

    /// Reads the policy's file again; the answer to other sources is what they are told by others.
    async fn read_again(&self) -> Result<(), PolicyError> {
        let PolicySource::File(path) = &self.settings.policy else { return Ok(()) };
        let _turn = self.policy_turn.lock().await;
        self.adopt(read_file(path), Some(&path.display().to_string()))
    }
}

fn warn(tailnet: &Tailnet, policy: &Policy) {
    for warning in policy.warnings() {
        let at = warning.at.map(|at| format!("{at}: ")).unwrap_or_default();
        tracing::warn!(tailnet = tailnet.settings.name, "policy: {at}{warning}");
    }
}

fn said(invalid: &Invalid, name: Option<&str>) -> String {
    name.map_or_else(|| invalid.to_string(), |name| invalid.for_file(name))
}

impl Core {
    /// The policy in force and what there is to say about it.
    pub fn policy(&self, tailnet: &Tailnet) -> PolicyInfo {
        let snapshot = tailnet.snapshot();
        let policy = snapshot.network.policy();
        let state = tailnet.policy_state();
        let (source, path) = match &tailnet.settings.policy {
            PolicySource::Database => (admin::PolicySource::Database, None),
            PolicySource::File(path) => (admin::PolicySource::File, Some(path.clone())),
            PolicySource::Configuration(_) => (admin::PolicySource::Configuration, None),
        };
        PolicyInfo {
            source,
            path,
            text: state.text.as_ref().map(|(text, _)| text.clone()),
            format: wire_format(state.text.as_ref().map_or(Format::HuJson, |(_, format)| *format)),
            warnings: policy.warnings().iter().map(problem).collect(),
            trouble: state.trouble.clone(),
            since: state.since.and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok()),
        }
    }

    /// Sets the policy of a network that has it in the database.
    ///
    /// # Errors
    /// When it cannot be used, with all that is wrong; when the configuration decides; when it cannot be stored.
    pub async fn set_policy(
        &self,
        tailnet: &Tailnet,
        wish: &admin::SetPolicy,
    ) -> Result<PolicyInfo, AdminError> {
        check_source(tailnet)?;
        let _turn = tailnet.policy_turn.lock().await;
        let policy = usable(tailnet, wish)?;
        let row = PolicyRow {
            tailnet: tailnet.settings.name.clone(),
            text: policy.text().to_owned(),
            format: format_name(policy.format()).to_owned(),
            changed: now(),
        };
        self.0.store.commit(vec![Write::SetPolicy(row)]).await?;
        tailnet.put_in_force(&policy, true);
        Ok(self.policy(tailnet))
    }

    /// Takes the policy away: everybody reaches everything again.
    ///
    /// # Errors
    /// When the configuration decides, or it cannot be stored.
    pub async fn delete_policy(&self, tailnet: &Tailnet) -> Result<PolicyInfo, AdminError> {
        check_source(tailnet)?;
        let _turn = tailnet.policy_turn.lock().await;
        self.0.store.commit(vec![Write::DeletePolicy(tailnet.settings.name.clone())]).await?;
        tailnet.put_in_force(&Policy::allow_all(), false);
        Ok(self.policy(tailnet))
    }

    /// Says whether a policy could be set, and what to be warned of.
    ///
    /// # Errors
    /// When it could not.
    pub fn check_policy(
        &self,
        tailnet: &Tailnet,
        wish: &admin::SetPolicy,
    ) -> Result<Vec<PolicyProblem>, AdminError> {
        Ok(usable(tailnet, wish)?.warnings().iter().map(problem).collect())
    }

    /// Reads the policy again, from its file or from the configuration as it is now.
    ///
    /// # Errors
    /// When it cannot be used; the old one stays.
    pub async fn reload_policy(&self, tailnet: &Tailnet) -> Result<PolicyInfo, AdminError> {
        let source = self.configured_policy(tailnet).map_err(|error| refused(&error))?;
        let outcome = match (&tailnet.settings.policy, source) {
            (PolicySource::Configuration(_), Some(PolicySource::Configuration(text))) => {
                let _turn = tailnet.policy_turn.lock().await;
                tailnet.adopt(parse(&text, Format::HuJson), None)
            }
            (now, Some(other)) if *now != other => {
                tracing::warn!(
                    tailnet = tailnet.settings.name,
                    "that the policy comes from elsewhere takes effect at the next start"
                );
                tailnet.read_again().await
            }
            _ => tailnet.read_again().await,
        };
        outcome.map_err(|error| refused(&error))?;
        Ok(self.policy(tailnet))
    }

    /// Where the configuration, as it is now, has the policy of a network.
    fn configured_policy(&self, tailnet: &Tailnet) -> Result<Option<PolicySource>, PolicyError> {
        let Some(read) = self.0.configuration.get() else { return Ok(None) };
        match read() {
            Ok(configured) => {
                let own = configured.into_iter().find(|one| one.name == tailnet.settings.name);
                Ok(own.map(|own| own.policy))
            }
            Err(text) => {
                for line in text.lines() {
                    tracing::error!("the configuration cannot be read again, what is in it stays: {line}");
                }
                // A policy elsewhere does not depend on it.
                match &tailnet.settings.policy {
                    PolicySource::Configuration(_) => Err(PolicyError::Invalid(text)),
                    _ => Ok(None),
                }
            }
        }
    }

    /// Reads all policies again. What cannot be used is logged, and the old one stays.
    pub async fn reload_policies(&self) {
        for tailnet in self.tailnets() {
            // It has been logged.
            let _ = self.reload_policy(tailnet).await;
        }
    }

    /// Users and nodes as the policy knows them.
    pub fn population(&self, tailnet: &Tailnet) -> Population {
        let snapshot = tailnet.snapshot();
        rules::population(&snapshot.users, &snapshot.nodes)
    }
}

fn check_source(tailnet: &Tailnet) -> Result<(), AdminError> {
    match &tailnet.settings.policy {
        PolicySource::Database => Ok(()),
        PolicySource::File(path) => Err(AdminError::PolicyInFile { path: path.clone() }),
        PolicySource::Configuration(_) => Err(AdminError::PolicyInConfiguration),
    }
}

fn usable(tailnet: &Tailnet, wish: &admin::SetPolicy) -> Result<Policy, AdminError> {
    let wrong = |invalid: Invalid| AdminError::BadPolicy(said(&invalid, wish.name.as_deref()));
    let policy = Policy::parse(&wish.text, own_format(wish.format)).map_err(wrong)?;
    tailnet.try_policy(&policy).map_err(wrong)?;
    Ok(policy)
}

fn refused(error: &PolicyError) -> AdminError {
    AdminError::BadPolicy(error.to_string())
}

/// What a file looks like from outside. Editors replace files, and the Nix store has no times: the inode counts too.
type Look = Option<(u64, u64, u64, i64, i64)>;

fn look(path: &Path) -> Look {
    let data = std::fs::metadata(path).ok()?;
    Some((data.dev(), data.ino(), data.len(), data.mtime(), data.mtime_nsec()))
}

/// Follows the policy files: one that has changed is read when it has come to rest.
pub(super) async fn follow(core: Core) {
    let mut files: Vec<(Arc<Tailnet>, PathBuf, Look, Look)> = core
        .tailnets()
        .filter_map(|tailnet| match &tailnet.settings.policy {
            PolicySource::File(path) => {
                let seen = look(path);
                Some((Arc::clone(tailnet), path.clone(), seen, seen))
            }
            _ => None,
        })
        .collect();
    if files.is_empty() {
        return;
    }
    let mut tick = tokio::time::interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = core.0.token.cancelled() => return,
        }
        for (tailnet, path, read, last) in &mut files {
            let now = look(path);
            // One that is not there is about to be replaced.
            if now.is_some() && now != *read && now == *last {
                *read = now;
                // What is wrong with it has been logged.
                let _ = tailnet.read_again().await;
            }
            *last = now;
        }
    }
}
