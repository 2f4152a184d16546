//! Routes of nodes: what they announce, what an administrator approved, and what came of it.
//!
//! Approvals by hand are stored with the node and stay, announced or not. Approvals by the policy's `autoApprovers` are
//! computed and stored nowhere: they end with the rule.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lacis_wire::admin::{Approval, NodeInfo, RouteInfo};
use lacis_wire::control::PeerChange;

use super::Core;
use super::admin::AdminError;
use super::record::NodeRecord;
use super::tailnet::{Snapshot, Tailnet, What};

/// The routes to everywhere. Clients use an exit node only with both.
fn exit_routes() -> [IpNet; 2] {
    [
        Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into(),
        Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into(),
    ]
}

/// As they are stored: without host bits, sorted, each once, exit routes as a pair.
fn normal(routes: &[IpNet]) -> Vec<IpNet> {
    let mut routes: BTreeSet<IpNet> = routes.iter().map(IpNet::trunc).collect();
    if routes.iter().any(|route| route.prefix_len() == 0) {
        routes.extend(exit_routes());
    }
    routes.into_iter().collect()
}

impl Core {
    /// Approves these routes of a node, and no others. Those that it does not announce wait until it does.
    ///
    /// # Errors
    /// When it cannot be stored, or the node is gone.
    pub async fn approve_routes(
        &self,
        tailnet: &Tailnet,
        node: &NodeRecord,
        routes: &[IpNet],
    ) -> Result<NodeInfo, AdminError> {
        let approved = normal(routes);
        let locked = self.lock_node(tailnet, node.id).await.ok_or_else(|| AdminError::no_node(&node.name))?;
        // What it means for peers, the policy says.
        let patch = PeerChange { node_id: node.id, ..PeerChange::default() };
        let approving = |of: &NodeRecord| NodeRecord { approved: approved.clone(), ..of.clone() };
        let node = locked.change(What::Patch(patch), approving).await?;
        Ok(self.node_info(tailnet, &node))
    }
}

/// All routes of a node: announced, approved, or both.
pub(super) fn list(snapshot: &Snapshot, node: &NodeRecord) -> Vec<RouteInfo> {
    let network = &snapshot.network;
    let effective = network.approved(node.id);
    let advertised = &node.hostinfo.routable_ips;
    let all: BTreeSet<IpNet> = advertised.iter().chain(&node.approved).copied().collect();
    let info = |route: IpNet| RouteInfo {
        route,
        advertised: advertised.contains(&route),
        approved: if node.approved.contains(&route) {
            Some(Approval::Hand)
        } else {
            effective.contains(&route).then_some(Approval::Policy)
        },
        primary: effective.contains(&route) && network.primary(&route) == Some(node.id),
    };
    all.into_iter().map(info).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_exit_route_means_both_and_host_bits_mean_nothing() {
        let route = |text: &str| text.parse::<IpNet>().unwrap();
        assert_eq!(normal(&[route("::/0")]), exit_routes());
        let given = [route("10.1.0.7/16"), route("10.0.0.0/8"), route("10.1.0.0/16")];
        assert_eq!(normal(&given), [route("10.0.0.0/8"), route("10.1.0.0/16")]);
        assert!(normal(&[]).is_empty());
    }
}
