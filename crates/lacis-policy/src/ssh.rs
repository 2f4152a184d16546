//! Who may log in where by SSH, as whom: each node's share of the policy's `ssh`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use lacis_wire::control::NodeId;
use serde_json::{Value, json};

use crate::facts::Facts;
use crate::language::selector::Selector;
use crate::language::{Login, Ssh};
use crate::network::Network;
use crate::population::User;
use crate::program::SshSides;
use crate::state::State;

/// What happens to a session that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SshVerdict {
    /// It begins.
    Accept,
    /// Somebody must show who they are first.
    Check {
        /// For how many seconds that lasts; 0 is for this session alone, `None` was not said.
        period: Option<u64>,
    },
}

/// One rule of a node; of several the first that matches decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshRule {
    /// Addresses of the nodes that it is about.
    pub principals: Vec<IpAddr>,
    /// Local user by requested name: `*` is any name, `=` the same one, and nothing no match.
    pub users: BTreeMap<String, String>,
    /// What happens.
    pub verdict: SshVerdict,
    /// Variables of the environment that may be sent, as patterns.
    pub accept_env: Vec<String>,
}

impl SshRule {
    /// The rule as an entry of `SSHPolicy.rules`. `server_url` is where the control server answers for checks, without
    /// a slash at its end.
    pub fn to_wire(&self, server_url: &str) -> Value {
        let action = match self.verdict {
            SshVerdict::Accept => json!({
                "accept": true,
                "allowAgentForwarding": true,
                "allowLocalPortForwarding": true,
                "allowRemotePortForwarding": true,
            }),
            SshVerdict::Check { .. } => {
                let path = "/machine/ssh/action/$SRC_NODE_ID/to/$DST_NODE_ID?local_user=$LOCAL_USER";
                json!({ "holdAndDelegate": format!("{server_url}{path}") })
            }
        };
        let principals: Vec<Value> =
            self.principals.iter().map(|address| json!({ "nodeIP": address.to_string() })).collect();
        let mut rule = json!({"principals": principals, "sshUsers": self.users, "action": action});
        if !self.accept_env.is_empty() {
            rule["acceptEnv"] = self.accept_env.clone().into();
        }
        rule
    }

    /// Does it match a session from this address under this name, and would the name be let in?
    pub(crate) fn matches(&self, from: IpAddr, user: &str) -> bool {
        let name = self.users.get(user).or_else(|| self.users.get("*"));
        self.principals.contains(&from) && name.is_some_and(|name| !name.is_empty())
    }
}

impl Network {
    /// The SSH rules of a node, checks first.
    pub fn ssh_rules(&self, node: NodeId) -> Vec<SshRule> {
        match self.slot(node) {
            Some(slot) => self.0.ssh_rules(slot),
            None => Vec::new(),
        }
    }

    /// For how many seconds one check of a session from `from` to `to` as `user` lasts: of the first rule that
    /// matches, if it asks for a check.
    pub fn ssh_verdict(&self, from: NodeId, to: NodeId, user: &str) -> Option<SshVerdict> {
        let from = self.slot(from).and_then(|slot| self.0.slots[slot].as_ref())?;
        let rules = self.ssh_rules(to);
        let rule =
            rules.iter().find(|rule| from.addresses.iter().any(|address| rule.matches(*address, user)))?;
        Some(rule.verdict)
    }
}

/// The users of a rule that are the same whoever comes.
fn common_users(rule: &Ssh) -> BTreeMap<String, String> {
    let mut users = BTreeMap::from([("root".to_owned(), String::new())]);
    for login in &rule.users {
        match &login.what {
            Login::NonRoot => drop(users.insert("*".to_owned(), "=".to_owned())),
            Login::Name(name) => drop(users.insert(name.clone(), name.clone())),
            Login::LocalPart(_) => {}
        }
    }
    users
}

/// The part of a user's mail address before the domain, if it is this one.
fn local_part<'a>(user: &'a User, domain: &str) -> Option<&'a str> {
    let (name, host) = user.mail()?;
    host.eq_ignore_ascii_case(domain).then_some(name)
}

impl State {
    pub(crate) fn ssh_rules(&self, slot: usize) -> Vec<SshRule> {
        let Some(facts) = &self.slots[slot] else { return Vec::new() };
        let body = self.policy.body();
        let mut rules = Vec::new();
        for (rule, sides) in body.ssh.iter().zip(&self.policy.program().ssh) {
            let SshSides { src, posture, dst } = sides;
            let local = rule.users.iter().any(|login| matches!(login.what, Login::LocalPart(_)));
            let mut sources = BTreeSet::new();
            for id in src {
                sources.extend(self.sets[*id].nodes.iter());
            }
            if !posture.is_empty() {
                let fulfilling = self.fulfilling(posture);
                sources.retain(|source| fulfilling.has(*source));
            }
            let is_own = |other: usize| self.owned_with(facts).is_some_and(|own| own.has(other));
            let selects = |id: &usize| match &self.policy.program().selectors[*id] {
                Selector::Own => false,
                _ => self.sets[*id].nodes.has(slot),
            };
            let reaches_own = dst.iter().any(|id| self.policy.program().selectors[*id] == Selector::Own);
            if dst.iter().any(selects) {
                // All sources come here.
            } else if reaches_own || local {
                // Whoever may log in somewhere under their own name, may so at their own machines.
                sources.retain(|source| is_own(*source) || (local && *source == slot));
            } else {
                continue;
            }
            let sources: Vec<&Arc<Facts>> =
                sources.iter().filter_map(|slot| self.slots[*slot].as_ref()).collect();
            self.push_ssh(rule, &sources, local, &mut rules);
        }
        // What must be checked is not let in by a rule that does not.
        rules.sort_by_key(|rule| matches!(rule.verdict, SshVerdict::Accept));
        rules
    }

    fn push_ssh(&self, rule: &Ssh, sources: &[&Arc<Facts>], local: bool, rules: &mut Vec<SshRule>) {
        let mut push = |principals: Vec<IpAddr>, users: BTreeMap<String, String>| {
            if !principals.is_empty() {
                rules.push(SshRule {
                    principals,
                    users,
                    verdict: rule.verdict,
                    accept_env: rule.accept_env.clone(),
                });
            }
        };
        let addresses = |sources: &[&Arc<Facts>]| -> Vec<IpAddr> {
            sources.iter().flat_map(|facts| facts.addresses.iter().copied()).collect()
        };
        let users = common_users(rule);
        if !local {
            push(addresses(sources), users);
            return;
        }
        // Names that depend on who comes need a rule for each user.
        let tagged: Vec<&Arc<Facts>> = sources.iter().copied().filter(|facts| !facts.is_owned()).collect();
        push(addresses(&tagged), users.clone());
        for user in self.users.iter() {
            let own: Vec<&Arc<Facts>> = sources
                .iter()
                .copied()
                .filter(|facts| facts.is_owned() && facts.node.user == Some(user.id))
                .collect();
            push(addresses(&own), users.clone());
            for login in &rule.users {
                if let Login::LocalPart(domain) = &login.what
                    && let Some(name) = local_part(user, domain)
                {
                    push(addresses(&own), BTreeMap::from([(name.to_owned(), name.to_owned())]));
                }
            }
        }
    }
}
