//! A policy's structure, as types that keep their places in the text; read by [`read`], printed by [`print`].

pub(crate) mod posture;
pub(crate) mod print;
pub(crate) mod read;
pub(crate) mod selector;
mod values;

use std::collections::BTreeMap;

use ipnet::IpNet;
use lacis_wire::control::PortRange;
use serde_json::Value;

use crate::problem::{Position, Problem};
use crate::ssh::SshVerdict;
use posture::Condition;
use selector::Selector;

/// Where something was said. All marks are equal: what is said matters, not where.
#[derive(Clone, Debug)]
pub(crate) struct Mark {
    pub(crate) at: Position,
    pub(crate) place: String,
}

impl PartialEq for Mark {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Mark {
    pub(crate) fn problem(&self, message: impl Into<String>, help: Option<String>) -> Problem {
        Problem { at: Some(self.at), place: self.place.clone(), message: message.into(), help }
    }
}

/// Something, and where it was said.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Said<T> {
    pub(crate) what: T,
    pub(crate) mark: Mark,
}

/// The whole of a policy.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Body {
    /// Without these and `grants`, everybody reaches everything.
    pub(crate) acls: Option<Vec<Acl>>,
    pub(crate) grants: Option<Vec<Grant>>,
    /// Members by group (`group:NAME`).
    pub(crate) groups: BTreeMap<String, Said<Vec<Said<String>>>>,
    pub(crate) hosts: BTreeMap<String, Said<IpNet>>,
    /// Owners by tag (`tag:NAME`).
    pub(crate) tag_owners: BTreeMap<String, Said<Vec<Said<Selector>>>>,
    /// Conditions by posture (`posture:NAME`).
    pub(crate) postures: BTreeMap<String, Said<Vec<Said<Condition>>>>,
    /// For rules that name no posture themselves.
    pub(crate) default_posture: Vec<Said<String>>,
    pub(crate) auto_routes: Vec<(Said<IpNet>, Vec<Said<Selector>>)>,
    pub(crate) auto_exit: Vec<Said<Selector>>,
    pub(crate) ssh: Vec<Ssh>,
    pub(crate) node_attrs: Vec<NodeAttrs>,
    pub(crate) tests: Vec<Test>,
    pub(crate) ssh_tests: Vec<SshTest>,
    pub(crate) never: Vec<Said<Property>>,
    pub(crate) always: Vec<Said<Property>>,
    /// Every node takes another UDP port each time it starts.
    pub(crate) randomize_client_port: bool,
}

/// An entry of `acls`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Acl {
    pub(crate) mark: Mark,
    pub(crate) protocol: Option<u8>,
    pub(crate) src: Vec<Said<Selector>>,
    /// Sources fulfil one of these, where there are any.
    pub(crate) posture: Vec<Said<String>>,
    pub(crate) dst: Vec<Said<Target>>,
}

/// A destination with ports.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    pub(crate) to: Selector,
    pub(crate) ports: Vec<PortRange>,
}

/// An entry of `grants`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Grant {
    pub(crate) mark: Mark,
    pub(crate) src: Vec<Said<Selector>>,
    /// Sources fulfil one of these, where there are any.
    pub(crate) posture: Vec<Said<String>>,
    pub(crate) dst: Vec<Said<Selector>>,
    /// Protocol (`None`: the usual ones) and ports.
    pub(crate) ip: Vec<Said<(Option<u8>, Vec<PortRange>)>>,
    /// Values by capability.
    pub(crate) app: BTreeMap<String, Said<Vec<Value>>>,
    /// Tags of the routers to take.
    pub(crate) via: Vec<Said<String>>,
}

/// An entry of `ssh`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ssh {
    pub(crate) mark: Mark,
    pub(crate) verdict: SshVerdict,
    pub(crate) src: Vec<Said<Selector>>,
    /// Sources fulfil one of these, where there are any.
    pub(crate) posture: Vec<Said<String>>,
    pub(crate) dst: Vec<Said<Selector>>,
    pub(crate) users: Vec<Said<Login>>,
    pub(crate) accept_env: Vec<String>,
}

/// As whom somebody may log in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Login {
    /// `autogroup:nonroot`: as anybody but root.
    NonRoot,
    /// `localpart:*@DOMAIN`: under the own mail name.
    LocalPart(String),
    Name(String),
}

/// An entry of `nodeAttrs`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NodeAttrs {
    pub(crate) mark: Mark,
    pub(crate) target: Vec<Said<Selector>>,
    pub(crate) attrs: Vec<Said<String>>,
    pub(crate) app: BTreeMap<String, Said<Vec<Value>>>,
    pub(crate) ip_pool: Vec<Said<IpNet>>,
}

/// An entry of `tests`. Texts are kept as they are: one that means nothing fails the test.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Test {
    pub(crate) mark: Mark,
    pub(crate) src: String,
    pub(crate) protocol: Option<Said<String>>,
    pub(crate) accept: Vec<Said<String>>,
    pub(crate) deny: Vec<Said<String>>,
}

/// An entry of `sshTests`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SshTest {
    pub(crate) mark: Mark,
    pub(crate) src: String,
    pub(crate) dst: Vec<Said<String>>,
    pub(crate) accept: Vec<String>,
    pub(crate) deny: Vec<String>,
    pub(crate) check: Vec<String>,
}

/// Something that must hold, or must not, for the whole population.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Property {
    pub(crate) from: Selector,
    pub(crate) protocol: Option<u8>,
    pub(crate) to: Target,
}
