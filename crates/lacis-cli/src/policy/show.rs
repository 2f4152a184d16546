//! `lacis policy show FILE --node web`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::anyhow;
use lacis_policy::{Network, Node, SshVerdict};
use lacis_wire::control::{FilterRule, NodeId, RawJson};

use super::Answer;
use super::access::Access;
use super::input::Who;
use super::reach::Span;
use super::who::node;
use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// HuJSON, or YAML when its name ends so; without it the policy that is in force
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// The node: its name or an address
    #[arg(long, value_name = "NODE")]
    node: String,
    #[command(flatten)]
    who: Who,
    /// Print the packet filter as the node is sent it
    #[arg(long)]
    json: bool,
}

impl Show {
    pub(super) async fn run(self) -> anyhow::Result<Answer> {
        let (network, _) = self.who.network(self.file.as_deref()).await?;
        let node = node(&network, &self.node)?.ok_or_else(|| {
            let names: Vec<&str> = network.nodes().map(|node| node.name.as_str()).collect();
            anyhow!("there is no node {} (there are {})", self.node, names.join(", "))
        })?;
        if self.json {
            output::json(&network.filter(node.id))?;
        } else {
            for line in lines(&network, node) {
                output::line(line);
            }
        }
        Ok(Answer::Yes)
    }
}

/// Names of nodes by address.
struct Names(BTreeMap<IpAddr, String>);

impl Names {
    fn of(network: &Network) -> Self {
        let named = |node: &Node| {
            let addresses = node.v4.map(IpAddr::V4).into_iter().chain(node.v6.map(IpAddr::V6));
            addresses.map(|address| (address, node.name.clone())).collect::<Vec<_>>()
        };
        Self(network.nodes().flat_map(named).collect())
    }

    /// Names where there are any, both addresses of a node as one; a range of nothing but nodes by their names.
    fn list<'a>(&self, texts: impl Iterator<Item = &'a str>) -> String {
        let mut names: Vec<String> = Vec::new();
        for text in texts {
            let spans = if text == "*" { Vec::new() } else { Span::read(text) };
            let inside = spans.iter().flat_map(|span| {
                let nodes: Vec<&String> =
                    self.0.range(span.first()..=span.last()).map(|(_, name)| name).collect();
                if span.size() == Some(nodes.len()) { nodes } else { Vec::new() }
            });
            let mut inside: Vec<String> = inside.cloned().collect();
            if inside.is_empty() {
                inside.push(text.to_owned());
            }
            for name in inside {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        names.join(", ")
    }
}

/// Everything that the policy comes to for this node, to be read.
fn lines(network: &Network, node: &Node) -> Vec<String> {
    let names = Names::of(network);
    let of = |id: NodeId| network.nodes().find(|node| node.id == id).map_or("?", |node| node.name.as_str());
    let mut lines = vec![title(network, node)];
    let mut rows = Vec::new();
    for rule in &network.filter(node.id) {
        rows.extend(rows_of(rule, &names));
    }
    if rows.is_empty() {
        lines.push("nobody may send it anything".to_owned());
    } else {
        let titles = ["FROM", "TO", "WHAT"].map(ToOwned::to_owned).to_vec();
        lines.extend(output::aligned(&[vec![titles], rows].concat()));
    }
    let rules = network.ssh_rules(node.id);
    let ssh = rules.iter().map(|rule| {
        let sources: Vec<String> = rule.principals.iter().map(ToString::to_string).collect();
        let users = rule.users.iter().filter(|(_, local)| !local.is_empty());
        let users: Vec<&str> = users.map(|(name, _)| name.as_str()).collect();
        let verdict = match rule.verdict {
            SshVerdict::Accept => "accept",
            SshVerdict::Check { .. } => "check",
        };
        vec![names.list(sources.iter().map(String::as_str)), users.join(", "), verdict.to_owned()]
    });
    let ssh: Vec<Vec<String>> = ssh.collect();
    if !ssh.is_empty() {
        lines.push(String::new());
        let titles = ["SSH FROM", "AS", "WHAT"].map(ToOwned::to_owned).to_vec();
        lines.extend(output::aligned(&[vec![titles], ssh].concat()));
    }
    lines.push(String::new());
    let peers: Vec<&str> = network.peers(node.id).map(of).collect();
    lines.push(format!("sees: {}", if peers.is_empty() { "nobody".to_owned() } else { peers.join(", ") }));
    for peer in network.peers(node.id) {
        let routes: Vec<String> =
            network.routes(node.id, peer).allowed.iter().map(ToString::to_string).collect();
        if !routes.is_empty() {
            lines.push(format!("routes by {}: {}", of(peer), routes.join(", ")));
        }
    }
    let approved: Vec<String> = network.approved(node.id).iter().map(ToString::to_string).collect();
    if !approved.is_empty() {
        lines.push(format!("is a way to: {}", approved.join(", ")));
    }
    let attributes = network.attributes(node.id);
    if !attributes.is_empty() {
        let attribute = |(name, values): (&String, &Option<Vec<RawJson>>)| match values {
            Some(values) if !values.is_empty() => {
                let values: Vec<String> = values.iter().map(ToString::to_string).collect();
                format!("{name}={}", values.join(","))
            }
            _ => name.clone(),
        };
        let texts: Vec<String> = attributes.iter().map(attribute).collect();
        lines.push(format!("attributes: {}", texts.join(", ")));
    }
    lines
}

fn title(network: &Network, node: &Node) -> String {
    let addresses: Vec<String> =
        network.addresses(node.id).iter().map(|net| net.addr().to_string()).collect();
    let user = network.users().iter().find(|user| Some(user.id) == node.user).map(|user| user.name.clone());
    let owner = if node.tags.is_empty() { user.unwrap_or_default() } else { node.tags.join(", ") };
    format!("{} ({}) {owner}", node.name, addresses.join(", ")).trim_end().to_owned()
}

/// A rule as rows of sources, destinations, and what is allowed.
fn rows_of(rule: &FilterRule, names: &Names) -> Vec<Vec<String>> {
    let from = names.list(rule.src_ips.iter().map(String::as_str));
    let mut targets: Vec<(&str, Access)> = Vec::new();
    for target in &rule.dst_ports {
        let at = targets.iter().position(|(ip, _)| *ip == target.ip).unwrap_or_else(|| {
            targets.push((&target.ip, Access::default()));
            targets.len() - 1
        });
        targets[at].1.add(&rule.ip_proto, target.ports);
    }
    let mut together: Vec<(Access, Vec<&str>)> = Vec::new();
    for (ip, access) in targets {
        match together.iter_mut().find(|(known, _)| *known == access) {
            Some((_, list)) => list.push(ip),
            None => together.push((access, vec![ip])),
        }
    }
    let mut rows: Vec<Vec<String>> = together
        .iter()
        .map(|(access, list)| vec![from.clone(), names.list(list.iter().copied()), access.to_string()])
        .collect();
    for grant in &rule.cap_grant {
        let targets: Vec<String> = grant.dsts.iter().map(ToString::to_string).collect();
        let targets = names.list(targets.iter().map(String::as_str));
        for (capability, values) in &grant.cap_map {
            let values: Vec<String> = values.iter().flatten().map(ToString::to_string).collect();
            let text = format!("{capability} {}", values.join(" "));
            rows.push(vec![from.clone(), targets.clone(), text.trim_end().to_owned()]);
        }
    }
    rows
}
