//! `lacis status`.

use lacis_wire::control::UserProfile;
use lacis_wire::local::{PeerStatus, Status};
use time::OffsetDateTime;

use super::{Daemon, short_name};
use crate::{Failure, output};

#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Only peers with traffic
    #[arg(long)]
    active: bool,
    /// Show this node
    #[arg(long = "self", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    this: bool,
    /// Show peers
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    peers: bool,
    /// Show titles of the columns
    #[arg(long)]
    header: bool,
}

impl StatusArgs {
    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        let mut status = daemon.status(self.peers).await?;
        if self.json {
            if self.active
                && let Some(peers) = &mut status.peer
            {
                peers.retain(|_, peer| peer.active);
            }
            return Ok(output::json(&status)?);
        }
        if let Some(sentence) = not_running(&status) {
            output::line(sentence);
            print_health(&status);
            return Err(Failure::Quiet);
        }
        output::columns(&self.rows(&status, OffsetDateTime::now_utc()));
        print_health(&status);
        Ok(())
    }

    fn rows(&self, status: &Status, now: OffsetDateTime) -> Vec<Vec<String>> {
        let mut rows = Vec::new();
        if self.header {
            rows.push(["IP", "Hostname", "Owner", "OS", "Status"].map(ToOwned::to_owned).to_vec());
        }
        if self.this {
            rows.push(row(status, &status.self_status, "-".to_owned()));
        }
        let mut peers: Vec<_> = status.peer.iter().flat_map(|peers| peers.values()).collect();
        peers.sort_by_key(|peer| (short_name(peer).to_owned(), peer.node_id));
        for peer in peers.into_iter().filter(|peer| !self.active || peer.active) {
            rows.push(row(status, peer, state(peer, now)));
        }
        rows
    }
}

fn row(status: &Status, node: &PeerStatus, state: String) -> Vec<String> {
    let ip = node.tailscale_ips.first().map_or_else(|| "-".to_owned(), ToString::to_string);
    let name = node.dns_name.trim_end_matches('.');
    let suffix = format!(".{}", status.magic_dns_suffix);
    let name = match name.strip_suffix(&suffix).unwrap_or(name) {
        "" => format!("({:?})", node.host_name),
        name => name.to_owned(),
    };
    let profile = status.user.as_ref().and_then(|users| users.get(&node.user_id));
    vec![ip, name, owner(node, profile), node.os.clone(), state]
}

/// The login name up to its `@`.
fn owner(node: &PeerStatus, profile: Option<&UserProfile>) -> String {
    if node.user_id.0 == 0 {
        return "-".to_owned();
    }
    match profile {
        Some(profile) => match profile.login_name.split_once('@') {
            Some((before, _)) => format!("{before}@"),
            None => profile.login_name.clone(),
        },
        None => node.user_id.to_string(),
    }
}

fn state(peer: &PeerStatus, now: OffsetDateTime) -> String {
    let exit = match (peer.exit_node, peer.exit_node_option) {
        (true, _) => "; exit node",
        (false, true) => "; offers exit node",
        (false, false) => "",
    };
    let traffic = peer.tx_bytes != 0 || peer.rx_bytes != 0;
    let mut text = if peer.active {
        let way = if peer.cur_addr.is_empty() {
            format!("relay {:?}", peer.relay)
        } else {
            format!("direct {}", peer.cur_addr)
        };
        format!("active{exit}; {way}")
    } else if !peer.online {
        String::new()
    } else if !exit.is_empty() {
        format!("idle{exit}")
    } else if traffic {
        "idle".to_owned()
    } else {
        "-".to_owned()
    };
    if !peer.online {
        if !text.is_empty() {
            text.push_str("; ");
        }
        text.push_str("offline");
        if let Some(seen) = peer.last_seen {
            let ago = std::time::Duration::try_from(now - seen).unwrap_or_default();
            let rounded = std::time::Duration::from_secs(ago.as_secs());
            text.push_str(
                &["; last seen ", &humantime::format_duration(rounded).to_string(), " ago"].concat(),
            );
        }
    }
    if peer.expired {
        text.push_str("; expired");
    }
    if traffic {
        text.push_str(&[", tx ", &peer.tx_bytes.to_string(), " rx ", &peer.rx_bytes.to_string()].concat());
    }
    text
}

/// What to say instead of a list.
pub(crate) fn not_running(status: &Status) -> Option<String> {
    match status.backend_state.as_str() {
        "Running" | "Starting" => None,
        "Stopped" => Some("Lacis is stopped.".to_owned()),
        "NeedsLogin" if status.auth_url.is_empty() => Some("Logged out.".to_owned()),
        "NeedsLogin" => Some(format!("Logged out.\nLog in at: {}", status.auth_url)),
        "NeedsMachineAuth" => Some("Machine is not yet approved by an administrator.".to_owned()),
        other => Some(format!("unexpected state: {other}")),
    }
}

fn print_health(status: &Status) {
    if status.health.is_empty() {
        return;
    }
    output::line("");
    output::line("# Health check:");
    for problem in &status.health {
        output::line(format_args!("#     - {problem}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacis_wire::control::{NodeId, UserId};
    use lacis_wire::key::NodeKey;

    fn peer(n: u8, edit: impl FnOnce(&mut PeerStatus)) -> (NodeKey, PeerStatus) {
        let mut peer = PeerStatus {
            node_id: NodeId(n.into()),
            user_id: UserId(1),
            dns_name: format!("p{n}.lab.example."),
            os: "linux".into(),
            tailscale_ips: vec![[100, 64, 0, n].into()],
            relay: "home".into(),
            online: true,
            ..PeerStatus::default()
        };
        edit(&mut peer);
        (NodeKey::from_bytes([n; 32]), peer)
    }

    #[test]
    fn a_line_says_who_and_how() {
        let now = OffsetDateTime::UNIX_EPOCH + time::Duration::hours(1);
        let status = Status {
            magic_dns_suffix: "lab.example".into(),
            self_status: peer(1, |_| {}).1,
            user: Some(
                [(UserId(1), UserProfile { login_name: "alice@x.example".into(), ..Default::default() })]
                    .into(),
            ),
            peer: Some(
                [
                    peer(2, |p| (p.active, p.tx_bytes, p.rx_bytes) = (true, 10, 20)),
                    peer(3, |p| (p.active, p.cur_addr) = (true, "192.0.2.1:41641".into())),
                    peer(4, |p| (p.online, p.last_seen) = (false, Some(OffsetDateTime::UNIX_EPOCH))),
                    peer(5, |p| p.exit_node_option = true),
                ]
                .into(),
            ),
            ..Status::default()
        };
        let args = StatusArgs { json: false, active: false, this: true, peers: true, header: false };
        let lines = output::aligned(&args.rows(&status, now));
        assert_eq!(
            lines,
            [
                "100.64.0.1  p1  alice@  linux  -",
                "100.64.0.2  p2  alice@  linux  active; relay \"home\", tx 10 rx 20",
                "100.64.0.3  p3  alice@  linux  active; direct 192.0.2.1:41641",
                "100.64.0.4  p4  alice@  linux  offline; last seen 1h ago",
                "100.64.0.5  p5  alice@  linux  idle; offers exit node",
            ]
        );
    }

    #[test]
    fn what_does_not_run_is_said_in_a_sentence() {
        let say = |state: &str| not_running(&Status { backend_state: state.into(), ..Status::default() });
        assert_eq!(say("Running"), None);
        assert_eq!(say("Stopped").unwrap(), "Lacis is stopped.");
        assert_eq!(say("NeedsLogin").unwrap(), "Logged out.");
    }
}
