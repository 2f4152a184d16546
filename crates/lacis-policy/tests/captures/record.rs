//! A record, and the population that it describes. The fields are explained in the captures' README.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use lacis_policy::{Node, Population, Role, Settings, User};
use lacis_wire::control::{CapMap, FilterRule, NodeId, UserId};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

#[derive(Debug, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: String,
    /// As it was sent.
    pub(crate) policy: Box<RawValue>,
    users: Vec<RecordedUser>,
    nodes: BTreeMap<String, RecordedNode>,
    #[serde(default)]
    tailnet: Tailnet,
    pub(crate) expect: Expect,
}

#[derive(Debug, Deserialize)]
struct RecordedUser {
    id: i64,
    name: String,
    #[serde(default)]
    email: Option<String>,
    #[serde(default)]
    roles: Vec<Role>,
}

#[derive(Debug, Deserialize)]
struct RecordedNode {
    #[serde(default, deserialize_with = "nullable")]
    tags: Vec<String>,
    user: Option<String>,
    ipv4: Option<Ipv4Addr>,
    ipv6: Option<Ipv6Addr>,
    #[serde(default, deserialize_with = "nullable")]
    routable_ips: Vec<IpNet>,
    #[serde(default, deserialize_with = "nullable")]
    approved_routes: Vec<IpNet>,
    joined: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
struct Tailnet {
    #[serde(default)]
    settings: TailnetSettings,
}

#[derive(Debug, Default, Deserialize)]
struct TailnetSettings {
    /// Absent: off, as a network has it from the beginning.
    #[serde(default)]
    devices_auto_updates_on: bool,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Expect {
    #[serde(default)]
    pub(crate) rejected: bool,
    #[serde(default)]
    pub(crate) message: String,
    #[serde(default)]
    pub(crate) nodes: BTreeMap<String, ExpectedNode>,
}

/// What a node was told; what is absent was not recorded.
#[derive(Debug, Deserialize)]
pub(crate) struct ExpectedNode {
    pub(crate) packet_filter_rules: Option<Vec<FilterRule>>,
    pub(crate) ssh_rules: Option<Vec<Value>>,
    pub(crate) peers: Option<BTreeMap<String, ExpectedPeer>>,
    pub(crate) self_cap_map: Option<CapMap>,
    pub(crate) self_addresses: Option<Vec<IpNet>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ExpectedPeer {
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) allowed_ips: Vec<IpNet>,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) primary_routes: Vec<IpNet>,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) tags: BTreeSet<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) cap_map: CapMap,
}

fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Record {
    /// Everybody was online when it was recorded.
    pub(crate) fn population(&self) -> Population {
        let users = self.users.iter().map(|user| User {
            id: UserId(user.id),
            name: user.name.clone(),
            email: user.email.clone(),
            roles: user.roles.clone(),
            ..User::default()
        });
        // Who joined when is not always known: those come last.
        let mut later = self.nodes.values().filter_map(|node| node.joined).max().unwrap_or(0);
        let nodes = self.nodes.iter().map(|(name, node)| {
            let id = node.joined.unwrap_or_else(|| {
                later += 1;
                later
            });
            Node {
                id: NodeId(id),
                name: name.clone(),
                user: node.user.as_ref().map(|name| self.user(name)),
                tags: node.tags.clone(),
                v4: node.ipv4,
                v6: node.ipv6,
                advertised: node.routable_ips.clone(),
                approved: node.approved_routes.clone(),
                online: true,
                ..Node::default()
            }
        });
        let settings = Settings { auto_update: Some(self.tailnet.settings.devices_auto_updates_on) };
        Population { users: users.collect(), nodes: nodes.collect(), settings }
    }

    fn user(&self, name: &str) -> UserId {
        let found = self.users.iter().find(|user| user.name == name);
        UserId(found.unwrap_or_else(|| panic!("{}: no user {name}", self.id)).id)
    }
}
