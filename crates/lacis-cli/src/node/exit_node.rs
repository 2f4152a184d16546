//! `lacis exit-node`: which nodes everything can be sent through.

use anyhow::anyhow;
use lacis_wire::local::{PeerStatus, Status, SuggestedExitNode};

use super::{Daemon, short_name};
use crate::{Failure, output};

/// Where a node is told no place.
const NOWHERE: &str = "-";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum ExitNode {
    /// Show the nodes that offer to be one
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Name the nearest that is online
    Suggest {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl ExitNode {
    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        match self {
            Self::List { json } => {
                let status = daemon.status(true).await?;
                let nodes = offers(&status);
                if json {
                    return Ok(output::json(&nodes)?);
                }
                if nodes.is_empty() {
                    return Err(
                        anyhow!("no node offers to be an exit node, or none is approved as one").into()
                    );
                }
                output::table(
                    &["IP", "HOSTNAME", "COUNTRY", "CITY", "STATUS"],
                    nodes.into_iter().map(row).collect(),
                );
                Ok(())
            }
            Self::Suggest { json } => {
                let found: SuggestedExitNode = daemon.post("suggest-exit-node").await?;
                if json {
                    return Ok(output::json(&found)?);
                }
                let name = found.name.trim_end_matches('.');
                output::line(format_args!("Suggested exit node: {name}"));
                output::line(format_args!("To use it: lacis set --exit-node={name}"));
                Ok(())
            }
        }
    }
}

fn offers(status: &Status) -> Vec<&PeerStatus> {
    let peers = status.peer.iter().flat_map(|peers| peers.values());
    let mut nodes: Vec<_> = peers.filter(|peer| peer.exit_node_option).collect();
    nodes.sort_by_key(|peer| (short_name(peer), peer.node_id));
    nodes
}

fn row(peer: &PeerStatus) -> Vec<String> {
    let ip = peer.tailscale_ips.first().map_or_else(|| NOWHERE.to_owned(), ToString::to_string);
    let state = match (peer.exit_node, peer.online) {
        (true, true) => "selected",
        (true, false) => "selected but offline",
        (false, true) => NOWHERE,
        (false, false) => "offline",
    };
    let name = peer.dns_name.trim_end_matches('.');
    let name = if name.is_empty() { peer.host_name.as_str() } else { name };
    vec![ip, name.to_owned(), NOWHERE.to_owned(), NOWHERE.to_owned(), state.to_owned()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacis_wire::key::NodeKey;

    #[test]
    fn those_that_offer_are_listed_with_their_state() {
        let peer = |n: u8, offers: bool, used: bool, online: bool| {
            let peer = PeerStatus {
                dns_name: format!("p{n}.lab.example."),
                tailscale_ips: vec![[100, 64, 0, n].into()],
                exit_node_option: offers,
                exit_node: used,
                online,
                ..PeerStatus::default()
            };
            (NodeKey::from_bytes([n; 32]), peer)
        };
        let peers = [
            peer(3, true, true, false),
            peer(2, true, false, true),
            peer(4, false, false, true),
            peer(5, true, false, false),
        ];
        let status = Status { peer: Some(peers.into()), ..Status::default() };
        let rows: Vec<_> = offers(&status).into_iter().map(row).collect();
        assert_eq!(
            output::aligned(&rows),
            [
                "100.64.0.2  p2.lab.example  -  -  -",
                "100.64.0.3  p3.lab.example  -  -  selected but offline",
                "100.64.0.5  p5.lab.example  -  -  offline",
            ]
        );
    }
}
