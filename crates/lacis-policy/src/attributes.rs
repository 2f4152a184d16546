//! What each node is told of itself: capabilities that it has anyway, and those of the policy's `nodeAttrs`.

use ipnet::IpNet;
use lacis_wire::control::{CapMap, NodeId, RawJson};

use crate::facts::{Facts, means_node};
use crate::network::Network;
use crate::population::{Node, Role};
use crate::state::State;

/// What every node may do.
const EVERYBODY: [&str; 2] = ["https://tailscale.com/cap/file-sharing", "https://tailscale.com/cap/ssh"];

/// What nodes of administrators hold.
const ADMINISTRATOR: &str = "https://tailscale.com/cap/is-admin";

/// What comes with `funnel`: the ports it may use, and that there are no certificates for it.
const WITH_FUNNEL: [&str; 2] = [
    "https://tailscale.com/cap/funnel-ports?ports=443,8443,10000",
    "https://tailscale.com/cap/warn-funnel-no-https",
];

impl Network {
    /// Everything that a node is told it may do or should: its own `CapMap`.
    pub fn attributes(&self, node: NodeId) -> CapMap {
        match self.slot(node) {
            Some(slot) => self.0.attributes(slot),
            None => CapMap::new(),
        }
    }

    /// The pools that a node's IPv4 address is to come from; none: any address will do.
    pub fn pools(&self, node: NodeId) -> Vec<IpNet> {
        let node = self.slot(node).and_then(|slot| self.0.slots[slot].as_ref());
        node.map_or_else(Vec::new, |facts| self.pools_for(&facts.node))
    }

    /// The same for a node that is about to join.
    pub fn pools_for(&self, node: &Node) -> Vec<IpNet> {
        let body = self.policy().body();
        let user = self.0.user_of(node);
        let entries = body.node_attrs.iter().filter(|attrs| {
            !attrs.ip_pool.is_empty()
                && attrs.target.iter().any(|target| means_node(body, &target.what, node, user))
        });
        entries.flat_map(|attrs| attrs.ip_pool.iter().map(|pool| pool.what)).collect()
    }
}

impl State {
    fn is_target(&self, entry: usize, slot: usize) -> bool {
        self.policy.program().attribute_targets[entry].iter().any(|id| self.sets[*id].nodes.has(slot))
    }

    fn is_administrator(&self, facts: &Facts) -> bool {
        let admin = |roles: &[Role]| roles.iter().any(|role| matches!(role, Role::Owner | Role::Admin));
        // Where nobody has a role, everybody is trusted alike.
        let any = self.users.iter().any(|user| !user.roles.is_empty());
        facts.is_owned()
            && (!any || self.users.iter().any(|user| Some(user.id) == facts.node.user && admin(&user.roles)))
    }

    fn attributes(&self, slot: usize) -> CapMap {
        let Some(facts) = &self.slots[slot] else { return CapMap::new() };
        let body = self.policy.body();
        let mut caps: CapMap = EVERYBODY.iter().map(|name| ((*name).to_owned(), None)).collect();
        if self.is_administrator(facts) {
            caps.insert(ADMINISTRATOR.to_owned(), None);
        }
        let update = self.settings.auto_update.unwrap_or(false);
        caps.insert("default-auto-update".to_owned(), Some(vec![RawJson::from(&update.into())]));
        if body.randomize_client_port {
            caps.insert("randomize-client-port".to_owned(), None);
        }
        for (entry, attrs) in body.node_attrs.iter().enumerate() {
            if !self.is_target(entry, slot) {
                continue;
            }
            for attr in &attrs.attrs {
                caps.insert(attr.what.clone(), None);
                if attr.what == "funnel" {
                    caps.extend(WITH_FUNNEL.iter().map(|name| ((*name).to_owned(), None)));
                }
            }
            for (name, values) in &attrs.app {
                let all = caps.entry(name.clone()).or_default().get_or_insert_default();
                all.extend(values.what.iter().map(RawJson::from));
            }
        }
        caps
    }
}
