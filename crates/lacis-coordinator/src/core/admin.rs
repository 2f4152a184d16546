//! What an administrator does: auth keys, and nodes by hand.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use lacis_wire::admin::{CreateKey, CreatedKey, KeyInfo, NodeInfo, RegistrationInfo, TailnetInfo};
use lacis_wire::control::{NodeId, display_text};
use time::OffsetDateTime;

use super::record::NodeRecord;
use super::registration::Refused;
use super::tailnet::{Tailnet, What};
use super::{Core, auth_key, names, now, routes};
use crate::store::{self, AuthKeyRow, Write};

/// How long a key can be used when nothing is said.
const KEY_LIFETIME_SECONDS: u64 = 24 * 3600;
/// A hundred years: dates stay dates that can be written.
const MAX_LIFETIME_SECONDS: u64 = 100 * 365 * 24 * 3600;

/// Why an administrator's wish is refused, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("there is no {what} {name:?}")]
    NotFound { what: &'static str, name: String },
    #[error("no node has the id {number}; there is a node of this name, {fqdn}, with the id {id}")]
    NumberNotId { number: String, id: NodeId, fqdn: String },
    #[error("the {what} {name:?} exists already")]
    Exists { what: &'static str, name: String },
    #[error("the user {name:?} still has {nodes} nodes")]
    HasNodes { name: String, nodes: usize },
    #[error("{0}")]
    BadName(#[from] names::BadName),
    #[error("{name:?} is no user name: use letters, digits and . _ - + @, at most {longest} characters")]
    BadUserName { name: String, longest: usize },
    #[error("{0:?} is no email address such as ada@example.org, of letters, digits and . _ - +")]
    BadEmail(String),
    #[error("{email:?} means the user {owner:?} already")]
    EmailTaken { email: String, owner: String },
    #[error("{name:?} is no role; there are {known}")]
    BadRole { name: String, known: String },
    #[error("{0:?} is no tag: tags look like tag:web, with letters, digits and hyphens after a first letter")]
    BadTag(String),
    #[error("a key is for a user or for tags, and not for both")]
    UserOrTags,
    #[error("the policy does not know {0:?}")]
    UnknownTag(String),
    #[error("a node needs at least one tag, or an owner")]
    NoTags,
    /// A line for each problem.
    #[error("{0}")]
    BadPolicy(String),
    #[error("the policy of this network is the file {path}")]
    PolicyInFile { path: PathBuf },
    #[error("the policy of this network is in the coordinator's configuration")]
    PolicyInConfiguration,
    #[error(transparent)]
    Refused(Refused),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("the system has no randomness: {0}")]
    Random(#[from] getrandom::Error),
}

impl From<Refused> for AdminError {
    /// A fault of ours is none of the node's: an administrator is sent the cause.
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Store(error) => Self::Store(error),
            Refused::Random(error) => Self::Random(error),
            refused => Self::Refused(refused),
        }
    }
}

pub(super) fn moment(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

impl AdminError {
    pub(super) fn no_node(name: &str) -> Self {
        not_found("node", name)
    }
}

impl Core {
    pub fn list_tailnets(&self) -> Vec<TailnetInfo> {
        let info = |tailnet: &Arc<Tailnet>| {
            let snapshot = tailnet.snapshot();
            TailnetInfo {
                name: tailnet.settings.name.clone(),
                domain: tailnet.settings.domain.clone(),
                nodes: snapshot.nodes.len(),
                users: snapshot.users.len(),
            }
        };
        self.tailnets().map(info).collect()
    }

    /// Makes an auth key. Only this answer has it.
    ///
    /// # Errors
    /// When it is for nobody or for both a user and tags, a tag could not be given to a node either, or it cannot be
    /// stored.
    pub async fn create_key(&self, tailnet: &Tailnet, wish: &CreateKey) -> Result<CreatedKey, AdminError> {
        // A user who is deleted at the same time has the key deleted with them.
        let _users = tailnet.users_turn.lock().await;
        let user = match (&wish.user, wish.tags.as_slice()) {
            (Some(name), []) => {
                Some(tailnet.snapshot().user_named(name).ok_or_else(|| not_found("user", name))?.id.0)
            }
            (None, [_, ..]) => None,
            (Some(_), [_, ..]) | (None, []) => return Err(AdminError::UserOrTags),
        };
        let tags = tailnet.known_tags(&wish.tags)?;
        let key = auth_key::generate()?;
        let created = now();
        let lifetime = wish.expiry_seconds.unwrap_or(KEY_LIFETIME_SECONDS).min(MAX_LIFETIME_SECONDS);
        let row = AuthKeyRow {
            id: key.id,
            tailnet: tailnet.settings.name.clone(),
            hash: key.hash,
            user,
            tags,
            reusable: wish.reusable,
            ephemeral: wish.ephemeral,
            used: false,
            revoked: false,
            created,
            expires: (lifetime != 0).then(|| created.saturating_add_unsigned(lifetime)),
        };
        self.0.store.commit(vec![Write::InsertKey(row.clone())]).await?;
        let info = key_info(tailnet, &row);
        self.auth_keys().insert(row.id.clone(), row);
        Ok(CreatedKey { key: key.text.to_string(), info })
    }

    pub fn list_keys(&self, tailnet: &Tailnet) -> Vec<KeyInfo> {
        let keys = self.auth_keys();
        let mut list: Vec<_> = keys.values().filter(|key| key.tailnet == tailnet.settings.name).collect();
        list.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        list.into_iter().map(|key| key_info(tailnet, key)).collect()
    }

    /// Makes a key unusable. Nodes that joined with it stay.
    ///
    /// # Errors
    /// When there is no such key.
    pub async fn expire_key(&self, tailnet: &Tailnet, id: &str) -> Result<(), AdminError> {
        // A whole key is taken for its id: that is what people have at hand.
        let id = auth_key::parse(id).map_or(id, |(id, _)| id);
        let known = self.auth_keys().get(id).is_some_and(|key| key.tailnet == tailnet.settings.name);
        if !known {
            return Err(not_found("key", id));
        }
        self.0.store.commit(vec![Write::RevokeKey(id.to_owned())]).await?;
        if let Some(key) = self.auth_keys().get_mut(id) {
            key.revoked = true;
        }
        Ok(())
    }

    pub fn list_nodes(&self, tailnet: &Tailnet) -> Vec<NodeInfo> {
        let snapshot = tailnet.snapshot();
        snapshot.nodes.iter().map(|node| node_info(tailnet, node)).collect()
    }

    /// The node of an id, a name or an address. A number is always an id: an administrator who repeats a command about
    /// a node that is gone by then must not hit another whose host is called so.
    ///
    /// # Errors
    /// When there is none; when a number is no node's id and a node's name.
    pub fn node_meant(&self, tailnet: &Tailnet, meant: &str) -> Result<Arc<NodeRecord>, AdminError> {
        let snapshot = tailnet.snapshot();
        let name = meant.trim_end_matches('.').to_ascii_lowercase();
        let label = name.strip_suffix(&format!(".{}", tailnet.settings.domain)).unwrap_or(&name);
        let found = if let Ok(address) = meant.parse::<IpAddr>() {
            snapshot.nodes.iter().find(|node| node.addresses().contains(&address))
        } else {
            let named = snapshot.nodes.iter().find(|node| node.name == label);
            match (label == name).then(|| number(&name)).flatten() {
                Some(id) => match (snapshot.node(id), named) {
                    (None, Some(named)) => {
                        let fqdn = format!("{}.{}", named.name, tailnet.settings.domain);
                        return Err(AdminError::NumberNotId { number: name, id: named.id, fqdn });
                    }
                    (by_id, _) => by_id,
                },
                None => named,
            }
        };
        found.cloned().ok_or_else(|| not_found("node", meant))
    }

    /// Gives a node a name, which it then keeps.
    ///
    /// # Errors
    /// When the name is bad or taken.
    pub async fn rename_node(
        &self,
        tailnet: &Tailnet,
        node: &NodeRecord,
        name: &str,
    ) -> Result<NodeInfo, AdminError> {
        let name = tailnet.lock().state.names.check(name, &tailnet.settings.domain)?;
        let node = self.lock_node(tailnet, node.id).await.ok_or_else(|| AdminError::no_node(&node.name))?;
        let id = node.record().id;
        {
            let mut locked = tailnet.lock();
            if locked.state.names.holder(&name).is_some_and(|holder| holder != id) {
                return Err(AdminError::Exists { what: "node", name });
            }
            locked.state.names.take(name.clone(), id);
        }
        let renamed = |of: &NodeRecord| NodeRecord { name: name.clone(), name_is_given: true, ..of.clone() };
        let written = node.write(Vec::new(), renamed).await;
        let mut locked = tailnet.lock();
        // It may have followed its host's name meanwhile.
        let current = node.record();
        let unused = if written.is_ok() { &current.name } else { &name };
        if current.name != name {
            locked.state.names.give_back(unused);
        }
        written?;
        Ok(node_info(tailnet, &locked.put(renamed(&current), What::Whole)))
    }

    pub fn node_info(&self, tailnet: &Tailnet, node: &NodeRecord) -> NodeInfo {
        node_info(tailnet, node)
    }

    pub fn list_registrations(&self) -> Vec<RegistrationInfo> {
        let info = |one: super::pending::Waiting| RegistrationInfo {
            id: one.id,
            hostname: display_text(&one.hostinfo.hostname),
            os: display_text(&one.hostinfo.os),
            machine_key: one.machine,
            created: moment(one.created),
        };
        self.0.pending.list().into_iter().map(info).collect()
    }

    /// Lets a waiting node join as a user's.
    ///
    /// # Errors
    /// When there is no such registration or user.
    pub async fn approve_registration(
        &self,
        id: &str,
        tailnet: &Arc<Tailnet>,
        user: &str,
    ) -> Result<NodeInfo, AdminError> {
        // The page's whole URL is taken for the id at its end.
        let id = id.rsplit('/').next().unwrap_or(id);
        let user = tailnet.snapshot().user_named(user).ok_or_else(|| not_found("user", user))?.id;
        let (tailnet, node) =
            self.approve(id, tailnet, user).await?.ok_or_else(|| not_found("registration", id))?;
        Ok(node_info(&tailnet, &node))
    }
}

/// The id that this is, in the one way that ids are written.
fn number(text: &str) -> Option<NodeId> {
    text.parse().ok().filter(|id: &i64| id.to_string() == text).map(NodeId)
}

pub(super) fn not_found(what: &'static str, name: &str) -> AdminError {
    AdminError::NotFound { what, name: display_text(name) }
}

fn key_info(tailnet: &Tailnet, key: &AuthKeyRow) -> KeyInfo {
    let snapshot = tailnet.snapshot();
    let user = key.user.and_then(|id| snapshot.users.get(&lacis_wire::control::UserId(id)));
    KeyInfo {
        id: key.id.clone(),
        user: user.map(|user| user.name.clone()),
        tags: key.tags.clone(),
        reusable: key.reusable,
        ephemeral: key.ephemeral,
        used: key.used,
        expired: key.revoked || key.expires.is_some_and(|at| at <= now()),
        created: moment(key.created),
        expires: key.expires.map(moment),
    }
}

fn node_info(tailnet: &Tailnet, node: &NodeRecord) -> NodeInfo {
    let snapshot = tailnet.snapshot();
    let user = node.user.and_then(|id| snapshot.users.get(&id));
    NodeInfo {
        id: node.id,
        name: node.name.clone(),
        fqdn: format!("{}.{}", node.name, tailnet.settings.domain),
        hostname: node.hostinfo.hostname.clone(),
        addresses: node.addresses().to_vec(),
        user: user.map(|user| user.name.clone()),
        tags: node.tags.clone(),
        os: node.hostinfo.os.clone(),
        version: node.hostinfo.ipn_version.clone(),
        online: node.online,
        expired: node.expired,
        copies: node.copies.clone(),
        ephemeral: node.ephemeral,
        home_derp: node.home_derp(),
        endpoints: node.endpoints.clone(),
        node_key: node.node_key,
        machine_key: node.machine_key,
        created: moment(node.created),
        last_seen: if node.online { Some(moment(now())) } else { node.last_seen.map(moment) },
        key_expiry: node.key_expiry.map(moment),
        routes: routes::list(&snapshot, node),
    }
}
