//! From the core's records to the policy's population, and which changes of records matter to it.

use std::collections::BTreeMap;
use std::sync::Arc;

use lacis_policy::{Node, Population, Settings, User};
use lacis_wire::control::{Hostinfo, NodeId, UserId};

use super::record::{NodeRecord, UserRecord};

/// A node as the policy knows it. Whether it is there matters only where it offers routes: of others nothing depends
/// on it, and nothing is computed when they come and go.
pub(super) fn node(record: &NodeRecord) -> Node {
    Node {
        id: record.id,
        name: record.name.clone(),
        user: record.user,
        tags: record.tags.clone(),
        v4: Some(record.v4),
        v6: Some(record.v6),
        advertised: record.hostinfo.routable_ips.clone(),
        approved: record.approved.clone(),
        posture: posture(&record.hostinfo),
        online: is_there(record),
    }
}

/// A node that is about to join, as far as the policy can know it before it has a name and addresses.
pub(super) fn newcomer(id: NodeId, user: Option<UserId>, tags: &[String], hostinfo: &Hostinfo) -> Node {
    Node { id, user, tags: tags.to_vec(), posture: posture(hostinfo), ..Node::default() }
}

/// What a node says of itself, as postures name it. Of a version the number counts, not the build.
fn posture(hostinfo: &Hostinfo) -> BTreeMap<String, String> {
    let version = hostinfo.ipn_version.split('-').next().unwrap_or_default();
    let facts = [
        ("node:os", hostinfo.os.to_ascii_lowercase()),
        ("node:osVersion", hostinfo.os_version.clone()),
        ("node:tsVersion", version.to_owned()),
    ];
    let known = facts.into_iter().filter(|(_, value)| !value.is_empty());
    known.map(|(name, value)| (name.to_owned(), value)).collect()
}

fn is_there(record: &NodeRecord) -> bool {
    record.hostinfo.routable_ips.is_empty() || (record.routing && !record.expired)
}

/// Are these two the same to the policy?
pub(super) fn same(old: &NodeRecord, new: &NodeRecord) -> bool {
    old.name == new.name
        && old.user == new.user
        && old.tags == new.tags
        && old.v4 == new.v4
        && old.v6 == new.v6
        && old.hostinfo.routable_ips == new.hostinfo.routable_ips
        && old.approved == new.approved
        && old.hostinfo.os == new.hostinfo.os
        && old.hostinfo.os_version == new.hostinfo.os_version
        && old.hostinfo.ipn_version == new.hostinfo.ipn_version
        && is_there(old) == is_there(new)
}

pub(super) fn users(records: &BTreeMap<UserId, Arc<UserRecord>>) -> Vec<User> {
    let user = |record: &Arc<UserRecord>| User {
        id: record.id,
        name: record.name.clone(),
        email: record.email.clone(),
        roles: record.roles.clone(),
        groups: Vec::new(),
    };
    records.values().map(user).collect()
}

pub(super) fn population(users: &BTreeMap<UserId, Arc<UserRecord>>, nodes: &[Arc<NodeRecord>]) -> Population {
    Population {
        users: self::users(users),
        nodes: nodes.iter().map(|record| node(record)).collect(),
        settings: Settings::default(),
    }
}
