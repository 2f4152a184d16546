//! `lacis admin`: users, keys, nodes and policies of a coordinator on this machine, over its Unix socket.

mod nodes;
mod policy;
mod users;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Subcommand;
use http::Method;
use lacis_wire::admin::{
    self, ApproveRegistration, CreateKey, CreatedKey, DecideSshCheck, KeyInfo, NodeInfo, RegistrationInfo,
    SshCheckInfo, TailnetInfo,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use time::OffsetDateTime;
use time::macros::format_description;

use crate::http::{Server, escaped};
use crate::output::quoted;
use crate::{Failure, output};

/// Where the package has it.
const CONFIG: &str = "/etc/lacis/coordinator.yaml";
const NO_EXPIRY: &str = "never";

/// Which coordinator is asked, and about which of its networks.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Where {
    /// The coordinator's configuration, by which its socket is found
    #[arg(long, value_name = "FILE", default_value = CONFIG, global = true)]
    config: PathBuf,
    /// The socket itself
    #[arg(long = "admin-socket", value_name = "PATH", global = true)]
    admin_socket: Option<PathBuf>,
    /// The network, where the coordinator has several
    #[arg(long, value_name = "NAME", global = true)]
    tailnet: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Admin {
    #[command(flatten)]
    coordinator: Where,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: AdminCommand,
}

#[derive(Debug, Subcommand)]
enum AdminCommand {
    /// People
    #[command(subcommand)]
    Users(users::Users),
    /// Pre-auth keys, by which nodes join
    #[command(subcommand)]
    Keys(Keys),
    /// Machines
    #[command(subcommand)]
    Nodes(nodes::Nodes),
    /// Who may reach whom
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Machines that wait for approval
    #[command(subcommand)]
    Registrations(Registrations),
    /// SSH sessions that wait for approval
    #[command(subcommand)]
    SshChecks(SshChecks),
    /// Networks of this coordinator
    #[command(subcommand)]
    Tailnets(Tailnets),
}

#[derive(Debug, Subcommand)]
enum Keys {
    /// Make a key and print it: it is shown this once
    Create {
        /// The user whose nodes will join with it
        #[arg(long, required_unless_present = "tags", conflicts_with = "tags")]
        user: Option<String>,
        /// Tags of the nodes that will join with it
        #[arg(long, value_delimiter = ',')]
        tags: Vec<String>,
        /// For any number of nodes
        #[arg(long)]
        reusable: bool,
        /// Its nodes are removed soon after they have left
        #[arg(long)]
        ephemeral: bool,
        /// How long it can be used, such as 24h; `never` for ever
        #[arg(long, value_name = "DURATION")]
        expiry: Option<String>,
    },
    /// Show keys, without their secrets
    List,
    /// Make a key unusable; its nodes stay
    Expire { id: String },
}

#[derive(Debug, Subcommand)]
enum Registrations {
    /// Show who waits
    List,
    /// Let one join as a user's node
    Approve {
        /// The id, or the page's URL
        id: String,
        #[arg(long)]
        user: String,
    },
}

#[derive(Debug, Subcommand)]
enum SshChecks {
    /// Show which sessions wait
    List,
    /// Let a session begin
    Approve { id: String },
    /// Refuse a session
    Deny { id: String },
}

#[derive(Debug, Subcommand)]
enum Tailnets {
    /// Show networks
    List,
}

/// The two settings that matter here.
#[derive(Debug, serde::Deserialize)]
struct Config {
    state_dir: PathBuf,
    admin_socket: Option<PathBuf>,
}

/// Where the coordinator of this configuration listens.
fn socket_of(config: &Path) -> anyhow::Result<PathBuf> {
    let text = std::fs::read_to_string(config).with_context(|| {
        format!("reading the coordinator's configuration {} (name another with --config)", config.display())
    })?;
    let config: Config = serde_yaml::from_str(&text)
        .with_context(|| format!("{} is no coordinator's configuration", config.display()))?;
    Ok(config.admin_socket.unwrap_or_else(|| admin::default_socket(&config.state_dir)))
}

pub(crate) struct Coordinator {
    server: Server,
    tailnet: Option<String>,
    json: bool,
}

impl Where {
    /// Was a coordinator asked for by name?
    pub(crate) fn is_named(&self) -> bool {
        self.tailnet.is_some() || self.admin_socket.is_some() || self.config != Path::new(CONFIG)
    }

    /// What was given of it, as flags.
    fn flags(&self) -> String {
        let config = (self.config != Path::new(CONFIG)).then(|| self.config.to_string_lossy());
        let socket = self.admin_socket.as_ref().map(|path| path.to_string_lossy());
        let tailnet = self.tailnet.as_deref().map(Into::into);
        [("config", config), ("admin-socket", socket), ("tailnet", tailnet)]
            .into_iter()
            .filter_map(|(flag, value)| Some(format!(" --{flag} {}", quoted(&value?))))
            .collect()
    }

    pub(crate) fn coordinator(self, json: bool) -> anyhow::Result<Coordinator> {
        let flags = self.flags();
        let path = match self.admin_socket {
            Some(path) => path,
            None => socket_of(&self.config)?,
        };
        let server = Server {
            path,
            what: "the coordinator",
            host: "lacis-coordinator",
            start: "is it running? try `systemctl status lacis-coordinator`",
            permission: "use root, or become a member of the group `lacis`",
            flags,
        };
        Ok(Coordinator { server, tailnet: self.tailnet, json })
    }
}

impl Admin {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let coordinator = self.coordinator.coordinator(self.json)?;
        Ok(coordinator.run(self.command).await?)
    }
}

impl Coordinator {
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        Ok(self.server.json(Method::GET, &format!("{}{path}", admin::PREFIX), Vec::new()).await?)
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.send_json(Method::POST, path, body).await
    }

    async fn send_json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        let body = lacis_wire::control::to_json(body);
        Ok(self.server.json(method, &format!("{}{path}", admin::PREFIX), body).await?)
    }

    async fn send(&self, method: Method, path: &str) -> anyhow::Result<()> {
        Ok(self.server.empty(method, &format!("{}{path}", admin::PREFIX), Vec::new()).await?)
    }

    /// The network that is meant: the one that was named, or the only one.
    async fn tailnet(&self) -> anyhow::Result<String> {
        if let Some(name) = &self.tailnet {
            return Ok(name.clone());
        }
        let all: Vec<TailnetInfo> = self.get("/tailnets").await?;
        match all.as_slice() {
            [only] => Ok(only.name.clone()),
            [] => bail!("the coordinator has no networks"),
            several => {
                let names: Vec<_> = several.iter().map(|tailnet| tailnet.name.as_str()).collect();
                bail!("which network? Choose with --tailnet: {}", names.join(", "))
            }
        }
    }

    /// A path about the network that is meant.
    pub(crate) async fn path(&self, rest: &str) -> anyhow::Result<String> {
        Ok(format!("/tailnets/{}{rest}", escaped(&self.tailnet().await?)))
    }

    async fn run(&self, command: AdminCommand) -> anyhow::Result<()> {
        match command {
            AdminCommand::Users(command) => self.users(command).await,
            AdminCommand::Keys(command) => self.keys(command).await,
            AdminCommand::Nodes(command) => self.nodes(command).await,
            AdminCommand::Policy(command) => self.policy(command).await,
            AdminCommand::Registrations(command) => self.registrations(command).await,
            AdminCommand::SshChecks(command) => self.ssh_checks(command).await,
            AdminCommand::Tailnets(Tailnets::List) => {
                let all: Vec<TailnetInfo> = self.get("/tailnets").await?;
                let row = |one: &TailnetInfo| {
                    vec![one.name.clone(), one.domain.clone(), one.nodes.to_string(), one.users.to_string()]
                };
                self.list(&["NAME", "DOMAIN", "NODES", "USERS"], &all, row)
            }
        }
    }

    async fn keys(&self, command: Keys) -> anyhow::Result<()> {
        match command {
            Keys::Create { user, tags, reusable, ephemeral, expiry } => {
                let expiry_seconds = expiry.as_deref().map(lifetime).transpose()?;
                let wish = CreateKey { user, tags, reusable, ephemeral, expiry_seconds };
                let created: CreatedKey = self.post(&self.path("/keys").await?, &wish).await?;
                self.one(&created, || created.key.clone())
            }
            Keys::List => {
                let all: Vec<KeyInfo> = self.get(&self.path("/keys").await?).await?;
                let row = |key: &KeyInfo| {
                    let flags = [
                        ("reusable", key.reusable),
                        ("ephemeral", key.ephemeral),
                        ("used", key.used),
                        ("expired", key.expired),
                    ];
                    let flags: Vec<_> =
                        flags.into_iter().filter(|(_, set)| *set).map(|(name, _)| name).collect();
                    let owner = key.user.clone().unwrap_or_else(|| key.tags.join(","));
                    let expires = key.expires.map_or_else(|| NO_EXPIRY.to_owned(), |at| moment(Some(at)));
                    vec![key.id.clone(), owner, flags.join(","), moment(Some(key.created)), expires]
                };
                self.list(&["ID", "FOR", "STATE", "CREATED", "EXPIRES"], &all, row)
            }
            Keys::Expire { id } => {
                self.send(Method::POST, &self.path(&format!("/keys/{}/expire", escaped(&id))).await?).await?;
                self.done("the key can no longer be used".to_owned())
            }
        }
    }

    async fn registrations(&self, command: Registrations) -> anyhow::Result<()> {
        match command {
            Registrations::List => {
                let all: Vec<RegistrationInfo> = self.get("/registrations").await?;
                let row = |one: &RegistrationInfo| {
                    vec![one.id.clone(), one.hostname.clone(), one.os.clone(), moment(Some(one.created))]
                };
                self.list(&["ID", "HOST", "OS", "SINCE"], &all, row)
            }
            Registrations::Approve { id, user } => {
                let id = id.rsplit('/').next().unwrap_or_default().to_owned();
                let approval = ApproveRegistration { tailnet: self.tailnet().await?, user };
                let path = format!("/registrations/{}/approve", escaped(&id));
                let node: NodeInfo = self.post(&path, &approval).await?;
                self.one(&node, || format!("{} has joined", node.name))
            }
        }
    }

    async fn ssh_checks(&self, command: SshChecks) -> anyhow::Result<()> {
        let decide = async |id: String, approve| {
            let path = format!("/ssh-checks/{}", escaped(&id));
            self.post::<()>(&path, &DecideSshCheck { approve }).await
        };
        match command {
            SshChecks::List => {
                let all: Vec<SshCheckInfo> = self.get("/ssh-checks").await?;
                let row = |one: &SshCheckInfo| {
                    let texts = [one.id.clone(), one.from.clone(), one.to.clone(), one.user.clone()];
                    [texts.to_vec(), vec![moment(Some(one.created))]].concat()
                };
                self.list(&["ID", "FROM", "TO", "AS", "SINCE"], &all, row)
            }
            SshChecks::Approve { id } => {
                decide(id, true).await?;
                self.done("the session may begin".to_owned())
            }
            SshChecks::Deny { id } => {
                decide(id, false).await?;
                self.done("the session is refused".to_owned())
            }
        }
    }

    fn list<T: Serialize>(
        &self,
        titles: &[&str],
        items: &[T],
        row: impl Fn(&T) -> Vec<String>,
    ) -> anyhow::Result<()> {
        if self.json {
            return Ok(output::json(&items)?);
        }
        output::table(titles, items.iter().map(row).collect());
        Ok(())
    }

    fn one(&self, item: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json {
            return Ok(output::json(item)?);
        }
        output::line(text());
        Ok(())
    }

    fn done(&self, text: String) -> anyhow::Result<()> {
        if self.json {
            return Ok(output::json(&serde_json::json!({}))?);
        }
        output::line(text);
        Ok(())
    }
}

/// Seconds of a lifetime; 0 is for ever.
fn lifetime(text: &str) -> anyhow::Result<u64> {
    if text == NO_EXPIRY {
        return Ok(0);
    }
    let parsed: Duration = humantime::parse_duration(text)
        .map_err(|error| anyhow!("--expiry {text}: {error} (try 24h, 7days or {NO_EXPIRY})"))?;
    if parsed.as_secs() == 0 {
        bail!("--expiry {text}: a key must live for at least a second (or `{NO_EXPIRY}` expire)");
    }
    Ok(parsed.as_secs())
}

fn moment(at: Option<OffsetDateTime>) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    at.and_then(|at| at.format(&format).ok()).unwrap_or_else(|| "-".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_where_the_configuration_says_or_in_its_state_directory() {
        let dir = std::env::temp_dir().join(format!("lacis-cli-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let config = dir.join("c.yaml");
        std::fs::write(&config, "state_dir: /x/y\nserver_url: https://z\n").unwrap();
        assert_eq!(socket_of(&config).unwrap(), Path::new("/x/y/admin.sock"));
        std::fs::write(&config, "state_dir: /x/y\nadmin_socket: /run/a.sock\n").unwrap();
        assert_eq!(socket_of(&config).unwrap(), Path::new("/run/a.sock"));
        std::fs::write(&config, "other: 1\n").unwrap();
        assert!(socket_of(&config).unwrap_err().to_string().contains("no coordinator's configuration"));
        assert!(socket_of(&dir.join("none")).unwrap_err().to_string().contains("--config"));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn hints_name_the_same_coordinator_and_network() {
        let place = |config: &str, tailnet: Option<&str>| Where {
            config: config.into(),
            admin_socket: None,
            tailnet: tailnet.map(ToOwned::to_owned),
        };
        assert_eq!(place(CONFIG, None).flags(), "");
        assert_eq!(
            place("/my files/c.yaml", Some("lab")).flags(),
            " --config '/my files/c.yaml' --tailnet lab"
        );
    }

    #[test]
    fn lifetimes_are_durations_or_for_ever() {
        assert_eq!(lifetime("24h").unwrap(), 86400);
        assert_eq!(lifetime("never").unwrap(), 0);
        assert!(lifetime("0s").is_err());
        assert!(lifetime("soon").unwrap_err().to_string().contains("24h"));
    }
}
