//! Who there is: users and nodes, as a policy is applied to them. Comes from a coordinator's state, or from a file.

use std::collections::{BTreeMap, HashSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use lacis_wire::control::{NodeId, UserId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::document::{Data, Document, Format, Item, entry};
use crate::problem::{Invalid, Position, Problem};

/// What a user is in the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Owns the network.
    Owner,
    /// Administers all of it.
    Admin,
    /// Administers policy and network settings.
    NetworkAdmin,
    /// Administers users and nodes.
    ItAdmin,
    /// Sees bills.
    BillingAdmin,
    /// Sees everything.
    Auditor,
    /// Uses it.
    #[default]
    Member,
}

impl Role {
    /// Every role that a user can be given, by the name that `autogroup:NAME` has for its users.
    pub const NAMES: [(&'static str, Self); 6] = [
        ("owner", Self::Owner),
        ("admin", Self::Admin),
        ("network-admin", Self::NetworkAdmin),
        ("it-admin", Self::ItAdmin),
        ("billing-admin", Self::BillingAdmin),
        ("auditor", Self::Auditor),
    ];

    /// The role of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, role)| *role)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, role)| *role == self).map_or("member", |(name, _)| name)
    }
}

/// Somebody.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Their number.
    pub id: UserId,
    /// Login name; often an email address.
    pub name: String,
    /// Email address, where it is another than the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
    /// Roles besides that of a member.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<Role>,
    /// Groups (`group:NAME`) from signing in, besides those that the policy declares.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
}

impl User {
    /// The mail address in its two parts: what stands before the `@`, and the domain. `None`: there is none.
    pub(crate) fn mail(&self) -> Option<(&str, &str)> {
        self.email.as_deref().unwrap_or(&self.name).rsplit_once('@')
    }
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its number; grows in the order of joining.
    pub id: NodeId,
    /// Its name in the network.
    pub name: String,
    /// Whose it is; nobody's when it has tags.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserId>,
    /// What it is (`tag:NAME`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<Ipv6Addr>,
    /// Networks that it offers a way to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub advertised: Vec<IpNet>,
    /// Networks that it may offer a way to, by hand.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approved: Vec<IpNet>,
    /// What it says of itself, for postures: `node:os`, `node:osVersion`, `node:tsVersion`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub posture: BTreeMap<String, String>,
    /// Is it there? Matters for routers only.
    #[serde(default = "yes")]
    pub online: bool,
}

fn yes() -> bool {
    true
}

/// Settings of the whole network that attributes of nodes follow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether clients update themselves unless they are told otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_update: Option<bool>,
}

/// Users and nodes of one network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Population {
    /// Everybody.
    pub users: Vec<User>,
    /// Every machine.
    pub nodes: Vec<Node>,
    /// What holds for all.
    pub settings: Settings,
}

impl Population {
    /// Reads a population from a file's text.
    ///
    /// # Errors
    /// When it is not one, with the place; two users or two nodes with one number are refused too.
    pub fn parse(text: &str, format: Format) -> Result<Self, Invalid> {
        let document = Document::parse(text, format)?;
        let Data::Map(entries) = &document.root.data else {
            let message =
                format!("a population is an object with users and nodes, not {}", document.root.kind());
            return Err(problem(document.root.at, "", message).into());
        };
        let mut population = Self::default();
        for (key, item) in entries {
            match key.name.as_str() {
                "users" => population.users = list(item, "users", |user: &User| user.id.0)?,
                "nodes" => population.nodes = list(item, "nodes", |node: &Node| node.id.0)?,
                "settings" => population.settings = one(item, "settings")?,
                other => {
                    let message = format!("unknown field {other:?}: there are users, nodes and settings");
                    return Err(problem(key.at, other, message).into());
                }
            }
        }
        Ok(population)
    }

    /// The user with a number.
    pub fn user(&self, id: UserId) -> Option<&User> {
        self.users.iter().find(|user| user.id == id)
    }
}

fn problem(at: Position, place: &str, message: String) -> Problem {
    Problem { at: Some(at), place: place.to_owned(), message, help: None }
}

fn one<T: DeserializeOwned>(item: &Item, place: &str) -> Result<T, Problem> {
    serde_json::from_value(item.to_json()).map_err(|error| problem(item.at, place, error.to_string()))
}

/// A list of things with numbers, each number once.
fn list<T: DeserializeOwned>(item: &Item, place: &str, id: impl Fn(&T) -> i64) -> Result<Vec<T>, Problem> {
    let Data::List(items) = &item.data else {
        return Err(problem(item.at, place, format!("a list is expected here, not {}", item.kind())));
    };
    let mut seen = HashSet::new();
    let mut all = Vec::with_capacity(items.len());
    for (at, item) in items.iter().enumerate() {
        let place = entry(place, at);
        let read: T = one(item, &place)?;
        if !seen.insert(id(&read)) {
            return Err(problem(item.at, &place, format!("the id {} is given twice", id(&read))));
        }
        all.push(read);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_population_is_read_with_places() {
        let text = "users:\n- {id: 1, name: alice}\nnodes:\n- {id: 7, name: a, user: 1, v4: 100.64.0.1}\n";
        let population = Population::parse(text, Format::Yaml).unwrap();
        assert!(population.nodes[0].online);
        let again = serde_json::to_string(&population).unwrap();
        assert_eq!(Population::parse(&again, Format::HuJson).unwrap(), population);
        let error = |text: &str| Population::parse(text, Format::Yaml).unwrap_err().to_string();
        assert!(
            error("nodes:\n- {id: 7, name: a}\n- {id: 7, name: b}\n").starts_with("3:3: nodes[1]: the id 7")
        );
        assert!(error("nodes:\n- {id: 7, name: a, tag: x}\n").contains("unknown field `tag`"));
        assert!(error("node: []\n").contains("unknown field \"node\""));
    }
}
