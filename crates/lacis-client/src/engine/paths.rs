//! Ways to the peers: the owner of [`lacis_path::Paths`]. What happens (disco messages, packets that leave, sockets, the
//! host's network) goes in, and what comes out is carried out here; the decisions are all in that crate.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use lacis_path::{Input, Local, Output, Paths, Via};
use lacis_relay::client::RelayEvent;
use lacis_tunnel::{Event, PongKind, SocketId, UdpIn, Way};
use lacis_wire::control::Node;
use lacis_wire::disco::traversal::Mapping;
use lacis_wire::disco::{self, Message};
use lacis_wire::key::{DiscoKey, NodeKey};
use lacis_wire::local::NetcheckReport;
use lacis_wire::stun;
use tokio::time::Instant;

use super::Engine;
use super::pings::Token;
use crate::interfaces;
use crate::links::{Change, LinkState};
use crate::netcheck;
use crate::netmap::NetMap;

/// STUN answers that are waited for.
const MOST_REFLECTIONS: usize = 1024;
/// An answer later than this is of no use.
const REFLECTION: Duration = Duration::from_secs(5);
/// Ways kept over a restart.
const MOST_REMEMBERED: usize = 1024;

/// Requests of the path logic that servers have not answered.
#[derive(Debug, Default)]
pub(super) struct Reflections(HashMap<stun::TxId, Instant>);

fn to_tunnel(way: lacis_path::Way) -> Way {
    Way { socket: SocketId(way.socket.0), addr: way.addr }
}

fn from_tunnel(way: Way) -> lacis_path::Way {
    lacis_path::Way { socket: lacis_path::SocketId(way.socket.0), addr: way.addr }
}

impl Engine {
    /// Tells the path logic, and does what follows from it.
    pub(super) fn path_input(&mut self, input: Input) {
        self.paths.handle(Instant::now().into_std(), input);
        self.follow_paths();
    }

    /// Timers of the path logic that are due.
    pub(super) fn wake_paths(&mut self) {
        self.paths.wake(Instant::now().into_std());
        self.follow_paths();
    }

    fn follow_paths(&mut self) {
        let mut datagrams = Vec::new();
        while let Some(output) = self.paths.poll_output() {
            match output {
                Output::Send { peer, way, ttl, message } => {
                    if let Some(sealed) = self.sealed(&peer, &message) {
                        datagrams.push((to_tunnel(way), sealed, ttl));
                    }
                }
                Output::SendRelay { peer, region, message } => {
                    if let Some(sealed) = self.sealed(&peer, &message) {
                        self.relays.send_packet(region, &peer, &sealed);
                    }
                }
                Output::Reflect { socket, server, tx } => {
                    let id = stun::TxId(tx.0);
                    let now = Instant::now();
                    let waiting = &mut self.reflections.0;
                    waiting.retain(|_, asked| now < *asked + REFLECTION);
                    if waiting.len() < MOST_REFLECTIONS {
                        waiting.insert(id, now);
                        let way = Way { socket: SocketId(socket.0), addr: server };
                        datagrams.push((way, stun::request(id).to_vec(), None));
                    }
                }
                Output::OpenSocket { socket, low } => {
                    if !self.tunnel.open_socket(SocketId(socket.0), low) {
                        let input = Input::SocketOpened { socket, ok: false };
                        self.paths.handle(Instant::now().into_std(), input);
                    }
                }
                Output::CloseSocket { socket } => {
                    // What is still to be sent from it goes first.
                    self.tunnel.send_udp_many(std::mem::take(&mut datagrams));
                    self.tunnel.close_socket(SocketId(socket.0));
                }
                Output::Path { peer, path } => {
                    tracing::debug!(peer = %self.peer_name(&peer), ?path, "path");
                    let path = match path {
                        lacis_path::Path::None => lacis_tunnel::Path::None,
                        lacis_path::Path::Relay => lacis_tunnel::Path::Relay,
                        lacis_path::Path::Direct(way) => lacis_tunnel::Path::Direct(to_tunnel(way)),
                        lacis_path::Path::Both(way) => lacis_tunnel::Path::DirectAndRelay(to_tunnel(way)),
                    };
                    self.tunnel.set_path(peer, path);
                }
                Output::Measure => self.measure(true),
                Output::Pong { token, via, latency } => self.disco_pong(token, via, latency),
            }
        }
        if !datagrams.is_empty() {
            self.tunnel.send_udp_many(datagrams);
        }
    }

    fn sealed(&mut self, peer: &NodeKey, message: &Message) -> Option<Vec<u8>> {
        let key = self.map.as_ref()?.by_key(peer)?.disco_key?;
        Some(self.boxes.seal(&key, message))
    }

    fn peer_name(&self, peer: &NodeKey) -> String {
        let node = self.map.as_ref().and_then(|map| map.by_key(peer));
        node.map_or_else(|| peer.to_string(), |node| short_name(node).to_owned())
    }

    fn disco_pong(&mut self, token: u64, via: Via, latency: Duration) {
        let code = match via {
            Via::Relay(region) => Some((region, self.region_code(region))),
            Via::Udp(_) => None,
        };
        self.pings.answered(Token::Disco(token), Some(latency), |result| match (code, via) {
            (Some((region, code)), _) => {
                result.derp_region_id = region;
                result.derp_region_code = code;
            }
            (None, Via::Udp(way)) => result.endpoint = way.addr.to_string(),
            (None, Via::Relay(_)) => {}
        });
    }

    pub(super) fn relay_event(&mut self, region: u16, event: RelayEvent) {
        match event {
            RelayEvent::Connected { node, remote, took, .. } => {
                if let Some(suppressed) = self.log.allow("relay connected", region) {
                    tracing::info!(region, %node, %remote, ?took, suppressed, "relay connected");
                }
                self.relay_trouble.remove(&region);
                self.reach.connected(region, Instant::now());
                self.follow_relays();
                if region == self.relays.home() {
                    self.path_input(Input::RelayConnected);
                }
            }
            RelayEvent::Disconnected { reason, retry_in, silent } => {
                self.reach.failed(region, &reason, silent, Instant::now());
                self.follow_relays();
                let text = format!("relay {}: {reason}", self.region_code(region));
                if self.relay_trouble.insert(region, text).is_none()
                    && let Some(suppressed) = self.log.allow("relay disconnected", region)
                {
                    tracing::warn!(region, %reason, ?retry_in, suppressed, "relay disconnected");
                }
            }
            RelayEvent::PeerGone { peer, .. } => self.relays.forget(region, &peer),
            RelayEvent::Health(Some(problem)) => {
                let text = format!("relay {}: {problem}", self.region_code(region));
                self.relay_trouble.insert(region, text);
            }
            RelayEvent::Health(None) => drop(self.relay_trouble.remove(&region)),
            RelayEvent::Restarting { .. } => {}
        }
    }

    pub(super) fn datagram(&mut self, datagram: &UdpIn) {
        if disco::looks_like(&datagram.data) {
            self.disco(&datagram.data, Via::Udp(from_tunnel(datagram.way)), None);
        } else if stun::looks_like(&datagram.data) {
            match stun::parse_response(&datagram.data) {
                Ok((id, seen)) if self.reflections.0.remove(&id).is_some() => {
                    self.path_input(Input::Reflected { tx: disco::TxId(id.0), seen });
                }
                _ => self.probes.answer(&datagram.data),
            }
        }
    }

    /// A sealed message; `from` is the source that the relay gives.
    pub(super) fn disco(&mut self, data: &[u8], via: Via, from: Option<NodeKey>) {
        let Some(map) = &self.map else { return };
        // Only keys of the network map get a shared secret.
        let Some(key) = disco::sender(data).filter(|key| map.peers_by_disco(key).next().is_some()) else {
            return;
        };
        match self.boxes.open(data) {
            Ok((_, message)) => {
                if let Some(peer) = sender(map, &self.paths, &key, from, &message) {
                    self.path_input(Input::Disco { peer, via, message });
                }
            }
            Err(error) => tracing::debug!(disco_key = %key, %error, "a disco message is ignored"),
        }
    }

    pub(super) fn tunnel_event(&mut self, event: Event) {
        match event {
            Event::PeerActive { key, .. } => self.path_input(Input::Sending(key)),
            Event::AuthenticatedSource { key, way } => {
                self.path_input(Input::Authenticated { peer: key, way: from_tunnel(way) });
            }
            Event::SocketOpened { socket, port } => {
                let socket = lacis_path::SocketId(socket.0);
                self.path_input(Input::SocketOpened { socket, ok: port.is_some() });
            }
            Event::SendFailed { key, way, kind } => {
                tracing::debug!(peer = %self.peer_name(&key), ?way, ?kind, "packets cannot be sent this way");
                self.path_input(Input::SendFailed { peer: key, way: from_tunnel(way) });
            }
            Event::StraySession { way } => {
                for peer in self.paths.peers_at(way.addr) {
                    tracing::debug!(peer = %self.peer_name(&peer), "a peer talks on where this node has restarted");
                    self.tunnel.begin_session(peer);
                    // It may be that only a direct way reaches it.
                    self.path_input(Input::Sending(peer));
                }
            }
            Event::Pong { kind: PongKind::Tsmp { token, peer_api_port }, rtt, .. } => {
                self.pings.answered(Token::Tsmp(token), Some(rtt), |result| {
                    result.peer_api_port = peer_api_port.unwrap_or(0);
                });
            }
            Event::Pong { kind: PongKind::Icmp { sequence, .. }, rtt, .. } => {
                self.pings.answered(Token::Icmp(sequence), Some(rtt), |_| {});
            }
            Event::PortTaken { wanted, v4, v6 } => {
                tracing::warn!(wanted, v4, v6, "the UDP port is in use by another program; using others");
            }
            Event::Rejected { key, reject } => {
                tracing::debug!(peer = %self.peer_name(&key), ?reject, "a peer refused a packet");
            }
            Event::HandshakeDone { key } => tracing::debug!(peer = %self.peer_name(&key), "handshake done"),
            other => tracing::trace!(event = ?other),
        }
    }

    /// The host's network is another one, or has other addresses.
    pub(super) fn link_news(&mut self, link: LinkState) {
        let change = link.change_since(&self.link);
        let first = self.link == LinkState::default();
        let moved = self.link.lan != link.lan;
        self.link = link;
        self.own_addresses.clone_from(&self.link.addresses);
        if moved {
            self.follow_lan();
        }
        let Some(change) = change.filter(|_| !first) else {
            self.tell_local();
            return;
        };
        tracing::info!(?change, addresses = ?self.own_addresses, "this host's network has changed");
        if change == Change::Major {
            // What others saw was behind another router.
            self.saved.endpoints.clear();
            self.report = NetcheckReport::default();
            self.port_map.renew();
            self.relays.redial();
            self.resolver.reconnect();
            if let Some(control) = &self.control {
                control.redial();
            }
            self.reach.clear();
            self.netcheck.start_over();
            if self.netcheck.is_on() {
                self.path_input(Input::LinkChanged);
            }
        }
        self.tell_local();
        if self.netcheck.is_on() {
            self.measure(true);
        }
    }

    /// Tells the path logic of this host's place.
    pub(super) fn tell_local(&mut self) {
        let measured = self.report.now.is_some();
        let seen_v4 = self.saved.endpoints.iter().find_map(|seen| match seen {
            SocketAddr::V4(v4) => Some(*v4),
            SocketAddr::V6(_) => None,
        });
        let nat = netcheck::Nat::new(&self.report, &self.own_addresses);
        let mapping = match nat.mapping {
            _ if nat.public_v4 => Mapping::Open,
            // One server alone does not show it, but whether the port is kept: most routers that keep it do so for all
            // destinations.
            Mapping::Unknown => match seen_v4 {
                Some(seen) if measured && self.report.udp => {
                    let kept = seen.port() == self.tunnel.udp_port().0;
                    if kept { Mapping::Independent } else { Mapping::Varies }
                }
                _ => Mapping::Unknown,
            },
            known => known,
        };
        let local = Local {
            endpoints: self.endpoints().0,
            seen_v4,
            // Until it is known better.
            udp: !measured || self.report.udp,
            mapping,
            stun: self.stun_servers.iter().copied().filter(SocketAddr::is_ipv4).collect(),
            low_ports: self.path_options.low_ports,
            searches: self.path_options.searches && !self.link.metered,
        };
        self.path_input(Input::Local(local));
    }

    /// This node's endpoints and the type of each.
    pub(super) fn endpoints(&self) -> (Vec<SocketAddr>, Vec<u8>) {
        interfaces::endpoints(&interfaces::Sources {
            mapped: *self.mapped.borrow(),
            seen: &self.saved.endpoints,
            forwarded: netcheck::forwarded(&self.report, self.path_options.port),
            declared: &self.path_options.endpoints,
            own: &self.own_addresses,
            ports: self.tunnel.udp_port(),
        })
    }

    /// Tells the path logic of the peers; those that may not be talked to are left out.
    pub(super) fn tell_peers(&mut self, peers: Vec<lacis_path::Peer>) {
        let first = !std::mem::replace(&mut self.remembered, true);
        self.path_input(Input::Peers(peers));
        if first {
            self.path_input(Input::Remembered(self.saved.ways.clone()));
        }
    }

    /// Keeps the ways that work, for the next start.
    pub(super) fn remember_ways(&mut self) {
        let Some(map) = &self.map else { return };
        let mut ways: BTreeMap<_, _> = std::mem::take(&mut self.saved.ways).into_iter().collect();
        ways.retain(|key, _| map.by_key(key).is_some());
        ways.extend(self.paths.remember());
        self.saved.ways = ways.into_iter().take(MOST_REMEMBERED).collect();
    }
}

/// The peer that a disco message is from. Several may announce the same disco key, since nothing keeps a node from
/// announcing another's: so the key alone does not decide, but who sent it, as in the stock client. By relay that is
/// the source node key, of a ping by UDP the node key in it, of a pong the peer that was pinged with this transaction
/// id. In every case that peer must announce the key with which the message is sealed.
fn sender(
    map: &NetMap,
    paths: &Paths,
    key: &DiscoKey,
    from: Option<NodeKey>,
    message: &Message,
) -> Option<NodeKey> {
    let claimed = match message {
        Message::Ping { node_key, .. } => *node_key,
        Message::Pong { tx, .. } if from.is_none() => Some(paths.pinged(*tx)?),
        _ => None,
    };
    let node_key = match (from, claimed) {
        (Some(from), Some(claimed)) if from != claimed => return None,
        (Some(node_key), _) | (None, Some(node_key)) => node_key,
        (None, None) => {
            // A ping of an old client, or something that counts by relay only.
            let mut holders = map.peers_by_disco(key);
            let only = holders.next()?.key;
            return holders.next().is_none().then_some(only);
        }
    };
    map.peers_by_disco(key).any(|peer| peer.key == node_key).then_some(node_key)
}

pub(super) fn short_name(node: &Node) -> &str {
    node.name.split('.').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use lacis_path::{Peer, RegionId};
    use lacis_wire::disco::TxId;
    use serde_json::json;
    use time::OffsetDateTime;

    use super::*;
    use crate::netmap::Session;

    const REGION: RegionId = 1;

    fn node(n: u8) -> NodeKey {
        NodeKey::from_bytes([n; 32])
    }

    fn disco_key(n: u8) -> DiscoKey {
        DiscoKey::from_bytes([n; 32])
    }

    /// Mallory (2), who comes first in the map, announces bob's (3) disco key as his own. Carol (4) has her own.
    fn network() -> (NetMap, Paths) {
        let peer = |id: u8, disco: u8| {
            json!({"ID": id, "Name": format!("n{id}.lab.example."), "Key": node(id), "DiscoKey": disco_key(disco),
                   "Endpoints": [format!("198.51.100.{id}:41641")]})
        };
        let frame = serde_json::from_value(json!({
            "Node": {"ID": 1, "Name": "a.lab.example.", "Key": node(1)},
            "Peers": [peer(2, 3), peer(3, 3), peer(4, 4)],
        }));
        let mut session = Session::default();
        session.apply(frame.unwrap(), OffsetDateTime::UNIX_EPOCH).unwrap();
        let mut paths = Paths::new(node(1), 1280, [7; 32]);
        let peers = (2..=4).map(|n| Peer {
            key: node(n),
            disco: true,
            home: REGION,
            endpoints: vec![SocketAddr::from(([198, 51, 100, n], 41641))],
            wireguard_only: false,
        });
        paths.handle(std::time::Instant::now(), Input::Peers(peers.collect()));
        (session.map().unwrap().clone(), paths)
    }

    fn ping(from: Option<u8>) -> Message {
        Message::Ping { tx: TxId([1; 12]), node_key: from.map(node), padding: 0 }
    }

    #[test]
    fn by_relay_the_source_decides_whose_a_message_is() {
        let (map, paths) = network();
        let from = |source: u8, disco: u8, message: &Message| {
            sender(&map, &paths, &disco_key(disco), Some(node(source)), message)
        };
        let call = Message::CallMeMaybe { endpoints: Vec::new() };
        assert_eq!(from(3, 3, &call), Some(node(3)), "bob is heard although another announces his key");
        assert_eq!(from(3, 3, &ping(Some(3))), Some(node(3)));
        assert_eq!(from(3, 3, &ping(Some(2))), None, "the ping says that it is another's");
        assert_eq!(from(4, 3, &call), None, "carol does not announce that key");
        assert_eq!(from(9, 3, &call), None);
    }

    #[test]
    fn a_ping_by_udp_is_whose_node_key_it_has() {
        let (map, paths) = network();
        let of = |disco: u8, message: &Message| sender(&map, &paths, &disco_key(disco), None, message);
        assert_eq!(of(3, &ping(Some(3))), Some(node(3)));
        assert_eq!(of(4, &ping(Some(3))), None, "carol cannot ping as bob");
        assert_eq!(of(3, &ping(None)), None, "two announce that key");
        assert_eq!(of(4, &ping(None)), Some(node(4)));
    }

    #[test]
    fn a_pong_by_udp_is_whom_the_ping_went_to() {
        let (map, mut paths) = network();
        paths.handle(std::time::Instant::now(), Input::Sending(node(3)));
        let sent = std::iter::from_fn(|| paths.poll_output()).find_map(|output| match output {
            Output::Send { message: Message::Ping { tx, .. }, .. } => Some(tx),
            _ => None,
        });
        let pong = |tx| Message::Pong { tx, src: SocketAddr::from(([192, 0, 2, 1], 1)) };
        let of = |disco: u8, message| sender(&map, &paths, &disco_key(disco), None, &message);
        assert_eq!(of(3, pong(sent.unwrap())), Some(node(3)));
        assert_eq!(of(4, pong(sent.unwrap())), None, "carol was not pinged");
        assert_eq!(of(3, pong(TxId([0; 12]))), None);
    }
}
