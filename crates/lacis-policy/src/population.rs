//! Who there is: users and nodes, as a policy is applied to them. Comes from a coordinator's state, or from a file.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use lacis_wire::control::{NodeId, UserId};
use serde::{Deserialize, Serialize};

use crate::document::{Document, Format};
use crate::problem::{Invalid, Problem};

/// What a user is in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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
    Member,
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
        let population: Self = serde_json::from_value(document.root.to_json()).map_err(|error| Problem {
            at: None,
            place: String::new(),
            message: error.to_string(),
            help: None,
        })?;
        let repeated = |ids: &mut Vec<i64>| {
            ids.sort_unstable();
            ids.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
        };
        let wrong = |message: String| Problem { at: None, place: String::new(), message, help: None };
        if let Some(id) = repeated(&mut population.users.iter().map(|user| user.id.0).collect()) {
            return Err(wrong(format!("two users have the id {id}")).into());
        }
        if let Some(id) = repeated(&mut population.nodes.iter().map(|node| node.id.0).collect()) {
            return Err(wrong(format!("two nodes have the id {id}")).into());
        }
        Ok(population)
    }

    /// The user with a number.
    pub fn user(&self, id: UserId) -> Option<&User> {
        self.users.iter().find(|user| user.id == id)
    }
}

impl Default for Role {
    fn default() -> Self {
        Self::Member
    }
}
