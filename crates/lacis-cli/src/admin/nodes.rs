//! `lacis admin nodes`: machines, their names, tags and routes.

use clap::Subcommand;
use http::Method;
use ipnet::IpNet;
use lacis_wire::admin::{Approval, ApproveRoutes, NodeInfo, RenameNode, RouteInfo, SetTags};

use super::{Coordinator, moment};
use crate::http::escaped;
use crate::output;

#[derive(Debug, Subcommand)]
pub(super) enum Nodes {
    /// Show nodes
    List,
    /// Show one node: id, name or address
    Show { node: String },
    /// Give a node another name
    Rename { node: String, name: String },
    /// Show routes: announced, approved, in use
    Routes {
        /// Of this node only
        node: Option<String>,
    },
    /// Approve these routes of a node, and no others
    ApproveRoutes {
        node: String,
        /// Prefixes, separated by commas; '' for none. Either of 0.0.0.0/0 and ::/0 stands for both
        #[arg(long, value_name = "LIST")]
        routes: String,
    },
    /// Give a node tags, in place of its owner or of other tags
    Tag {
        node: String,
        #[arg(long, value_name = "LIST", value_delimiter = ',', required = true)]
        tags: Vec<String>,
    },
    /// End a node's key: it must sign in again
    Expire { node: String },
    /// Remove a node
    Delete { node: String },
}

impl Coordinator {
    pub(super) async fn nodes(&self, command: Nodes) -> anyhow::Result<()> {
        let of = |node: &str, rest: &str| format!("/nodes/{}{rest}", escaped(node));
        match command {
            Nodes::List => {
                let all: Vec<NodeInfo> = self.get(&self.path("/nodes").await?).await?;
                self.list(
                    &["ID", "NAME", "OWNER", "ADDRESSES", "STATE", "LAST SEEN", "ROUTES"],
                    &all,
                    overview,
                )
            }
            Nodes::Show { node } => {
                let info: NodeInfo = self.get(&self.path(&of(&node, "")).await?).await?;
                Ok(output::json(&info)?)
            }
            Nodes::Rename { node, name } => {
                let path = self.path(&of(&node, "/rename")).await?;
                let info: NodeInfo = self.post(&path, &RenameNode { name }).await?;
                self.one(&info, || format!("{node} is now called {}", info.name))
            }
            Nodes::Routes { node } => {
                let nodes: Vec<NodeInfo> = match node {
                    Some(node) => vec![self.get(&self.path(&of(&node, "")).await?).await?],
                    None => self.get(&self.path("/nodes").await?).await?,
                };
                self.routes(&nodes)
            }
            Nodes::ApproveRoutes { node, routes } => {
                let routes = prefixes(&routes)?;
                let path = self.path(&of(&node, "/approve-routes")).await?;
                let info: NodeInfo = self.post(&path, &ApproveRoutes { routes }).await?;
                self.one(&info, || approval(&info))
            }
            Nodes::Tag { node, tags } => {
                let path = self.path(&of(&node, "/tags")).await?;
                let info: NodeInfo = self.post(&path, &SetTags { tags }).await?;
                self.one(&info, || format!("{} has the tags {}", info.name, info.tags.join(", ")))
            }
            Nodes::Expire { node } => {
                self.send(Method::POST, &self.path(&of(&node, "/expire")).await?).await?;
                self.done(format!("{node} must sign in again"))
            }
            Nodes::Delete { node } => {
                self.send(Method::DELETE, &self.path(&of(&node, "")).await?).await?;
                self.done(format!("{node} is deleted"))
            }
        }
    }

    fn routes(&self, nodes: &[NodeInfo]) -> anyhow::Result<()> {
        if self.json {
            let of = |node: &NodeInfo| serde_json::json!({ "id": node.id, "name": node.name, "routes": node.routes });
            let routed: Vec<_> = nodes.iter().filter(|node| !node.routes.is_empty()).map(of).collect();
            return Ok(output::json(&routed)?);
        }
        let row = |node: &NodeInfo, route: &RouteInfo| {
            let approved = match route.approved {
                Some(Approval::Hand) => "by hand",
                Some(Approval::Policy) => "by the policy",
                None => "-",
            };
            vec![
                node.id.to_string(),
                node.name.clone(),
                route.route.to_string(),
                if route.advertised { "yes" } else { "-" }.to_owned(),
                approved.to_owned(),
                if route.primary { "yes" } else { "-" }.to_owned(),
            ]
        };
        let rows = nodes.iter().flat_map(|node| node.routes.iter().map(move |route| row(node, route)));
        output::table(&["ID", "NAME", "ROUTE", "ANNOUNCED", "APPROVED", "PRIMARY"], rows.collect());
        Ok(())
    }
}

fn overview(node: &NodeInfo) -> Vec<String> {
    let addresses: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
    let owner = node.user.clone().unwrap_or_else(|| node.tags.join(","));
    let state = match (node.expired, node.copies.is_empty(), node.online) {
        (true, _, _) => "expired",
        // Two machines have its keys.
        (_, false, _) => "online, copied",
        (_, _, true) => "online",
        (_, _, false) => "offline",
    };
    vec![
        node.id.to_string(),
        node.name.clone(),
        owner,
        addresses.join(", "),
        state.to_owned(),
        moment(node.last_seen),
        node.routes.iter().map(short).collect::<Vec<_>>().join(", "),
    ]
}

/// A route in a word: what is missing to its use, if anything.
fn short(route: &RouteInfo) -> String {
    let state = match (route.advertised, route.approved.is_some(), route.primary) {
        (false, _, _) => " (not announced)",
        (_, false, _) => " (not approved)",
        (_, _, true) => " (primary)",
        (true, true, false) => "",
    };
    format!("{}{state}", route.route)
}

fn prefixes(list: &str) -> anyhow::Result<Vec<IpNet>> {
    let pieces = list.split(',').map(str::trim).filter(|piece| !piece.is_empty());
    pieces
        .map(|piece| {
            let prefix = piece.parse::<IpNet>();
            prefix.map_err(|_| anyhow::anyhow!("--routes: {piece:?} is no prefix such as 10.1.0.0/24"))
        })
        .collect()
}

fn approval(node: &NodeInfo) -> String {
    let by_hand = || node.routes.iter().filter(|route| route.approved == Some(Approval::Hand));
    let names: Vec<_> = by_hand().map(|route| route.route.to_string()).collect();
    if names.is_empty() {
        return format!("{} has no routes that are approved by hand", node.name);
    }
    let waiting: Vec<_> =
        by_hand().filter(|route| !route.advertised).map(|route| route.route.to_string()).collect();
    let note = match waiting.as_slice() {
        [] => String::new(),
        waiting => format!(" (it does not announce {} now)", waiting.join(", ")),
    };
    format!("{} may offer {}{note}", node.name, names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_prefixes_may_be_empty_and_errors_name_the_piece() {
        assert!(prefixes("").unwrap().is_empty());
        assert_eq!(prefixes("10.0.0.0/8, ::/0").unwrap().len(), 2);
        assert!(prefixes("10.0.0.0/8,ten").unwrap_err().to_string().contains("\"ten\""));
    }

    #[test]
    fn a_route_says_what_is_missing_to_its_use() {
        let route = RouteInfo {
            route: "10.0.0.0/8".parse().unwrap(),
            advertised: true,
            approved: Some(Approval::Policy),
            primary: true,
        };
        assert_eq!(short(&route), "10.0.0.0/8 (primary)");
        assert_eq!(
            short(&RouteInfo { approved: None, primary: false, ..route.clone() }),
            "10.0.0.0/8 (not approved)"
        );
        assert_eq!(
            short(&RouteInfo { advertised: false, primary: false, ..route }),
            "10.0.0.0/8 (not announced)"
        );
    }
}
