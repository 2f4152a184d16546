//! The administration API: what `lacis admin` and the coordinator say to each other over a Unix socket.
//!
//! JSON over HTTP/1.1. Every path begins with [`PREFIX`]; `{tailnet}` is a name from the configuration. Errors are
//! [`ApiError`] with a status of 400 or more. Times are RFC 3339.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::control::{NodeId, UserId};

/// All paths begin with this.
pub const PREFIX: &str = "/admin/v1";

/// Where the configuration puts the state when nothing else is said, and the socket that goes with it.
const PACKAGED_STATE_DIR: &str = "/var/lib/lacis-coordinator";
const PACKAGED_SOCKET: &str = "/run/lacis-coordinator/admin.sock";

/// Where the socket is when the configuration does not say: the runtime folder of the packaged service, else in the
/// state folder.
pub fn default_socket(state_dir: &Path) -> PathBuf {
    if state_dir == Path::new(PACKAGED_STATE_DIR) {
        PathBuf::from(PACKAGED_SOCKET)
    } else {
        state_dir.join("admin.sock")
    }
}

/// A network of this coordinator. `GET /tailnets` lists them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TailnetInfo {
    pub name: String,
    pub domain: String,
    pub nodes: usize,
    pub users: usize,
}

/// `GET /tailnets/{tailnet}/users`, `POST` with [`CreateUser`]; `PATCH …/users/{name}` with [`ChangeUser`]; `DELETE
/// …/users/{name}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserInfo {
    pub id: UserId,
    pub name: String,
    pub display_name: String,
    /// By which policies may call them as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
    /// What they are in the network: those of `owner`, `admin`, `network-admin`, `it-admin`, `billing-admin` and
    /// `auditor` that they have, in this order.
    #[serde(default)]
    pub roles: Vec<String>,
    pub nodes: usize,
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateUser {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
    /// As in [`UserInfo`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<String>,
}

/// What is to be otherwise about a user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ChangeUser {
    /// Empty: none any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
    /// These and no others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roles: Option<Vec<String>>,
}

/// `POST /tailnets/{tailnet}/keys`: a key for one user, or for tagged nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CreateKey {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    pub reusable: bool,
    pub ephemeral: bool,
    /// Seconds until it expires; `None` is the server's default, 0 is never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expiry_seconds: Option<u64>,
}

/// `GET /tailnets/{tailnet}/keys`; `POST …/keys/{id}/expire`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyInfo {
    /// The part of the key that may be shown.
    pub id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    pub tags: Vec<String>,
    pub reusable: bool,
    pub ephemeral: bool,
    pub used: bool,
    pub expired: bool,
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires: Option<OffsetDateTime>,
}

/// The answer to [`CreateKey`]: the only time that the key is told.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreatedKey {
    pub key: String,
    #[serde(flatten)]
    pub info: KeyInfo,
}

impl std::fmt::Debug for CreatedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedKey").field("key", &"[redacted]").field("info", &self.info).finish()
    }
}

/// `GET /tailnets/{tailnet}/nodes`; `POST …/nodes/{node}/rename` with [`RenameNode`]; `POST …/nodes/{node}/expire`;
/// `POST …/nodes/{node}/approve-routes` with [`ApproveRoutes`]; `POST …/nodes/{node}/tags` with [`SetTags`];
/// `DELETE …/nodes/{node}`. `{node}` is an id, a name or an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    pub id: NodeId,
    pub name: String,
    pub fqdn: String,
    pub hostname: String,
    pub addresses: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    pub tags: Vec<String>,
    pub os: String,
    pub version: String,
    pub online: bool,
    pub expired: bool,
    /// Where two or more machines use its keys at once, which a copied state directory makes: their addresses, one
    /// where they share it. Empty: one machine does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies: Vec<IpAddr>,
    pub ephemeral: bool,
    pub home_derp: u16,
    pub endpoints: Vec<std::net::SocketAddr>,
    pub node_key: crate::key::NodeKey,
    pub machine_key: crate::key::MachineKey,
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_seen: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub key_expiry: Option<OffsetDateTime>,
    /// Announced or approved, sorted.
    #[serde(default)]
    pub routes: Vec<RouteInfo>,
}

/// A route of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteInfo {
    pub route: IpNet,
    /// The node announces it now.
    pub advertised: bool,
    /// Who approved it. Others use it when it is announced and approved.
    pub approved: Option<Approval>,
    /// Of the routers of this network it is the one that others use. Exit routes have none.
    pub primary: bool,
}

/// Who approved a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Approval {
    /// An administrator.
    Hand,
    /// The policy's `autoApprovers`.
    Policy,
}

/// The routes of a node that are approved by hand: these and no others. Either exit route stands for both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApproveRoutes {
    pub routes: Vec<IpNet>,
}

/// The tags that a node is to have, in place of its owner or of others; at least one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetTags {
    pub tags: Vec<String>,
}

/// Where a network's policy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicySource {
    /// Set by [`SetPolicy`].
    Database,
    /// In a file that the configuration names.
    File,
    /// In the configuration itself.
    Configuration,
}

/// How a policy is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyFormat {
    /// JSON, with comments and trailing commas if need be.
    #[default]
    Hujson,
    Yaml,
}

/// `GET /tailnets/{tailnet}/policy`; `PUT` with [`SetPolicy`]; `DELETE`: everybody reaches everything again;
/// `POST …/policy/check` with [`SetPolicy`], answered by a list of [`PolicyProblem`]s to be warned of;
/// `POST …/policy/reload`: the file is read again. A policy that cannot be used is refused with status 422, a line for
/// each problem. `GET …/population` has users and nodes as `lacis policy --nodes` reads them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyInfo {
    pub source: PolicySource,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// As it was given. `None`: there is no policy, and everybody reaches everything.
    pub text: Option<String>,
    pub format: PolicyFormat,
    /// What of it is not honoured.
    pub warnings: Vec<PolicyProblem>,
    /// What is wrong with it, or why a newer version of it is not in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub since: Option<OffsetDateTime>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetPolicy {
    pub text: String,
    #[serde(default)]
    pub format: PolicyFormat,
    /// What messages call it: the file that it was read from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Something about a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyProblem {
    /// Line and column from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<usize>,
    /// Where in the document, such as `acls[0].dst[1]`.
    pub place: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl std::fmt::Display for PolicyProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, "{line}:{column}: ")?;
        }
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, " ({help})"),
            None => Ok(()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenameNode {
    pub name: String,
}

/// A node that waits for an administrator: `GET /registrations`, `POST /registrations/{id}/approve` with
/// [`ApproveRegistration`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistrationInfo {
    pub id: String,
    pub hostname: String,
    pub os: String,
    pub machine_key: crate::key::MachineKey,
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApproveRegistration {
    pub tailnet: String,
    pub user: String,
}

/// An SSH session that waits for an administrator: `GET /ssh-checks`, `POST /ssh-checks/{id}` with
/// [`DecideSshCheck`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshCheckInfo {
    pub id: String,
    /// Names of nodes.
    pub from: String,
    pub to: String,
    /// As whom, on the node that it goes to.
    pub user: String,
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecideSshCheck {
    pub approve: bool,
}

/// Why a request failed, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    pub error: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}
