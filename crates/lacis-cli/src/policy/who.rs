//! Whom a person means by a word on the command line: a node's name, an address, a user, a tag, a group.

use std::net::IpAddr;

use anyhow::bail;
use ipnet::IpNet;
use lacis_policy::{Endpoint, Network, Node, User};
use lacis_wire::control::NodeId;

/// One of those that are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Party {
    pub(super) name: String,
    pub(super) end: Endpoint,
}

/// The node of a name or an address, if there is one.
///
/// # Errors
/// When several nodes have this first label.
pub(super) fn node<'a>(network: &'a Network, word: &str) -> anyhow::Result<Option<&'a Node>> {
    let address: Option<IpAddr> = word.parse().ok();
    let label = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    let is = |node: &&Node| match address {
        Some(address) => node.v4.map(IpAddr::V4) == Some(address) || node.v6.map(IpAddr::V6) == Some(address),
        None => node.name.eq_ignore_ascii_case(word),
    };
    let short = |node: &&Node| address.is_none() && label(&node.name).eq_ignore_ascii_case(word);
    if let Some(node) = network.nodes().find(is) {
        return Ok(Some(node));
    }
    let found: Vec<&Node> = network.nodes().filter(short).collect();
    if found.len() > 1 {
        let names: Vec<&str> = found.iter().map(|node| node.name.as_str()).collect();
        bail!("{word} is the name of several nodes: use one of {}, or an address", names.join(", "));
    }
    Ok(found.first().copied())
}

/// Is this user called so? By name, by email address, or by what stands before the `@`.
fn is_user(user: &User, word: &str) -> bool {
    let name = |text: &str| {
        text.eq_ignore_ascii_case(word)
            || text.split_once('@').is_some_and(|(name, _)| name.eq_ignore_ascii_case(word))
    };
    name(&user.name) || user.email.as_deref().is_some_and(name)
}

/// Everybody who is meant, each node once.
pub(super) fn resolve(network: &Network, word: &str) -> anyhow::Result<Vec<Party>> {
    let of = |node: &Node| Party { name: node.name.clone(), end: Endpoint::Node(node.id) };
    if let Some(node) = node(network, word)? {
        return Ok(vec![of(node)]);
    }
    let address = |address: IpAddr| vec![Party { name: word.to_owned(), end: Endpoint::Address(address) }];
    if let Ok(ip) = word.parse() {
        return Ok(address(ip));
    }
    let users: Vec<_> =
        network.users().iter().filter(|user| is_user(user, word)).map(|user| user.id).collect();
    let of_users = |node: &&Node| node.tags.is_empty() && node.user.is_some_and(|id| users.contains(&id));
    let found: Vec<Party> = network.nodes().filter(of_users).map(of).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    if !users.is_empty() {
        bail!("{word} has no nodes");
    }
    let alias = network.policy().to_json().pointer("/hosts").and_then(|hosts| hosts.get(word)).cloned();
    let net = alias.as_ref().and_then(|text| text.as_str()).unwrap_or(word);
    let net: Option<IpNet> = net.parse().or_else(|_| net.parse::<IpAddr>().map(IpNet::from)).ok();
    if let Some(net) = net.filter(|net| net.prefix_len() == net.max_prefix_len()) {
        return Ok(match node(network, &net.addr().to_string())? {
            Some(node) => vec![of(node)],
            None => address(net.addr()),
        });
    }
    if net.is_some() {
        bail!("{word} is a network: ask about one of its addresses");
    }
    let members: Vec<NodeId> = network.members(word).unwrap_or_default();
    let found: Vec<Party> = network.nodes().filter(|node| members.contains(&node.id)).map(of).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    if word.contains(':') {
        bail!("{word} means no node here");
    }
    let names: Vec<&str> = network.nodes().map(|node| node.name.as_str()).collect();
    bail!("there is no node, user or host {word} (nodes: {})", names.join(", "))
}

#[cfg(test)]
mod tests {
    use lacis_policy::{Policy, Population};

    use super::*;

    #[test]
    fn a_first_label_that_several_nodes_have_means_none_of_them() {
        let names = ["web.a.example", "web.b.example", "db.a.example"];
        let nodes = (1..).zip(names).map(|(id, name)| Node {
            id: NodeId(id),
            name: name.to_owned(),
            ..Node::default()
        });
        let population = Population { nodes: nodes.collect(), ..Population::default() };
        let network = Network::compile(&Policy::allow_all(), population);
        let found = |word| node(&network, word).map(|node| node.map(|node| node.id.0));
        assert_eq!(found("db").unwrap(), Some(3));
        assert_eq!(found("web.b.example").unwrap(), Some(2));
        let error = found("web").unwrap_err().to_string();
        assert!(error.contains("web.a.example, web.b.example"), "{error}");
        assert!(resolve(&network, "web").is_err());
    }
}
