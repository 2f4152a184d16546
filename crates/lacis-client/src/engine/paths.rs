//! Ways to the peers: where home is, what the network around this host is like, disco messages and pings.
//!
//! Looking for direct paths is not done yet; every peer is reached through its relay. What peers ask by disco is
//! answered on the way it came.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lacis_relay::client::RelayEvent;
use lacis_tunnel::{Event, PongKind, UdpIn};
use lacis_wire::control::{NetInfo, Node};
use lacis_wire::disco::{self, Message, TxId};
use lacis_wire::key::NodeKey;
use lacis_wire::local::{Netcheck, NetcheckReport, PingResult};
use lacis_wire::{derp, stun};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::network::accepted_ips;
use super::{Engine, PingKind};
use crate::interfaces;
use crate::netcheck::{self, choose_home};
use crate::relays::RelayNews;

/// The network is measured again after this, with some chance, so that nodes do not all do it at once.
const MEASURE_EVERY: Duration = Duration::from_secs(20);
const MEASURE_SPREAD: Duration = Duration::from_secs(6);
/// Pings that may be outstanding; more are refused.
const MOST_PINGS: usize = 256;

/// When the network was and will be measured.
#[derive(Debug, Default)]
pub(super) struct NetcheckRuns {
    on: bool,
    running: bool,
    again: bool,
    next: Option<Instant>,
    waiting: Vec<oneshot::Sender<Result<Netcheck, String>>>,
}

impl NetcheckRuns {
    /// Is this node in its network?
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    pub(super) fn set_on(&mut self, on: bool) {
        self.on = on;
    }
}

/// Which answer a ping waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Token {
    Disco(TxId),
    Tsmp(u64),
    Icmp(u16),
}

struct Ping {
    sent: Instant,
    result: PingResult,
    reply: oneshot::Sender<PingResult>,
}

/// Pings of users that wait for their answers.
#[derive(Default)]
pub(super) struct Pings {
    waiting: HashMap<Token, Ping>,
    last_icmp: u16,
}

impl Pings {
    /// Whoever asked has gone.
    pub(super) fn forget_abandoned(&mut self) {
        self.waiting.retain(|_, ping| !ping.reply.is_closed());
    }

    fn answered(&mut self, token: Token, took: Option<Duration>, edit: impl FnOnce(&mut PingResult)) {
        let Some(mut ping) = self.waiting.remove(&token) else { return };
        ping.result.latency_seconds = took.unwrap_or_else(|| ping.sent.elapsed()).as_secs_f64();
        edit(&mut ping.result);
        // Gone meanwhile: nobody to tell.
        let _ = ping.reply.send(ping.result);
    }
}

impl Engine {
    pub(super) fn relay_news(&mut self, news: RelayNews) {
        match news {
            RelayNews::Disco { region, from, data } => self.disco(&data, Came::Relay(region, from)),
            RelayNews::Event(region, event) => self.relay_event(region, event),
        }
    }

    fn relay_event(&mut self, region: u16, event: RelayEvent) {
        match event {
            RelayEvent::Connected { node, remote, took, .. } => {
                tracing::info!(region, %node, %remote, ?took, "relay connected");
                self.relay_trouble.remove(&region);
            }
            RelayEvent::Disconnected { reason, retry_in } => {
                let text = format!("relay {}: {reason}", self.region_code(region));
                if self.relay_trouble.insert(region, text).is_none() {
                    tracing::warn!(region, %reason, ?retry_in, "relay disconnected");
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

    pub(super) fn region_code(&self, region: u16) -> String {
        let code = self.map.as_ref().and_then(|map| map.derp_map.regions.get(&region));
        code.map_or_else(|| region.to_string(), |region| region.region_code.clone())
    }

    /// A home at once, if there is any choice to make at all: the last one, or the only one. Otherwise the relays are
    /// measured, quickly.
    pub(super) fn find_home(&mut self) {
        let Some(map) = &self.map else { return };
        let home = self.relays.home();
        if map.derp_map.regions.contains_key(&home) {
            self.relays.set_home(home);
            return;
        }
        let mut dialled = map.derp_map.regions.iter().filter(|(_, region)| !region.nodes.is_empty());
        match (dialled.next(), dialled.next()) {
            (Some((only, _)), None) => self.set_home(*only),
            (None, _) => self.relays.set_home(0),
            (Some(_), Some(_)) => self.measure(false),
        }
    }

    fn set_home(&mut self, home: u16) {
        if self.relays.home() != home {
            tracing::info!(region = home, code = %self.region_code(home), "home relay");
        }
        self.relays.set_home(home);
        self.saved.home_region = home;
    }

    /// Measures the network; `whole` takes as long as it needs to know everything.
    pub(super) fn measure(&mut self, whole: bool) {
        let Some(map) = &self.map else { return };
        if std::mem::replace(&mut self.netcheck.running, true) {
            self.netcheck.again = true;
            return;
        }
        let (map, tunnel, probes) = (map.derp_map.clone(), self.tunnel.clone(), self.probes.clone());
        let (dial, reports) = (self.relays.dial_options(), self.reports.clone());
        tokio::spawn(async move {
            let report = netcheck::measure(&map, &tunnel, &probes, &dial, whole).await;
            // The engine may have stopped.
            let _ = reports.send((report, whole)).await;
        });
    }

    pub(super) fn measure_if_due(&mut self) {
        if self.netcheck.next.is_some_and(|at| at <= Instant::now()) {
            self.netcheck.next = None;
            self.measure(true);
        }
    }

    pub(super) fn measured(&mut self, mut report: NetcheckReport, whole: bool) {
        self.netcheck.running = false;
        let again = std::mem::take(&mut self.netcheck.again);
        let chance = f64::from(derp::random_nonce()[0]) / 255.0;
        self.netcheck.next = Some(Instant::now() + MEASURE_EVERY + MEASURE_SPREAD.mul_f64(chance));
        let Some(map) = &self.map else { return };
        let present = self.relays.home();
        // Peers could not learn of a new home while the control server is away.
        let may_move = self.streaming || !map.derp_map.regions.contains_key(&present);
        if let Some(home) = choose_home(&report, &map.derp_map, present).filter(|_| may_move) {
            self.set_home(home);
        }
        report.preferred_derp = self.relays.home();
        tracing::debug!(udp = report.udp, home = report.preferred_derp, global = %report.global_v4, "measured the network");
        if whole {
            let derp_map = self.map.as_ref().map(|map| (*map.derp_map).clone()).unwrap_or_default();
            for reply in self.netcheck.waiting.drain(..) {
                let _ = reply.send(Ok(Netcheck { report: report.clone(), derp_map: derp_map.clone() }));
            }
            let seen = netcheck::reflexive(&report);
            // Without an answer the last ones may still be true: servers are away more often than addresses change.
            if !seen.is_empty() {
                self.saved.endpoints = seen;
            }
            self.report = report;
        }
        if again || !whole {
            self.measure(true);
        }
    }

    /// Whoever waits for a measurement gets none.
    pub(super) fn fail_netchecks(&mut self, why: &str) {
        for reply in self.netcheck.waiting.drain(..) {
            // Gone meanwhile: nobody to tell.
            let _ = reply.send(Err(why.to_owned()));
        }
    }

    pub(super) fn netcheck_for(&mut self, reply: oneshot::Sender<Result<Netcheck, String>>) {
        if self.map.is_none() {
            let text = "no relays are known before this node has joined a network: run `lacis up` first";
            let _ = reply.send(Err(text.to_owned()));
            return;
        }
        self.netcheck.waiting.push(reply);
        self.measure(true);
    }

    /// What the control server is told of the network around this host; nothing before there is a home.
    pub(super) fn net_info(&self) -> Option<NetInfo> {
        let home = self.relays.home();
        (home != 0).then(|| netcheck::net_info(&self.report, home))
    }

    pub(super) fn endpoints(&self) -> (Vec<SocketAddr>, Vec<u8>) {
        interfaces::endpoints(&self.saved.endpoints, &self.own_addresses, self.tunnel.udp_port())
    }

    pub(super) fn datagram(&mut self, datagram: &UdpIn) {
        if disco::looks_like(&datagram.data) {
            self.disco(&datagram.data, Came::Udp(datagram.from));
        } else if stun::looks_like(&datagram.data) {
            self.probes.answer(&datagram.data);
        }
    }

    fn disco(&mut self, data: &[u8], came: Came) {
        let Some(map) = &self.map else { return };
        let Some(peer) = disco::sender(data).and_then(|key| map.peer_by_disco(&key)) else { return };
        let (peer_key, Some(disco_key)) = (peer.key, peer.disco_key) else { return };
        // What came by relay must come from the node that it claims.
        if matches!(came, Came::Relay(_, from) if from != peer_key) {
            return;
        }
        let message = match self.boxes.open(data) {
            Ok((_, message)) => message,
            Err(error) => {
                tracing::debug!(peer = %peer_key, %error, "a disco message is ignored");
                return;
            }
        };
        match message {
            Message::Ping { tx, node_key, .. } => {
                if node_key.is_some_and(|claimed| claimed != peer_key) {
                    return;
                }
                match came {
                    Came::Udp(from) => {
                        let pong = self.boxes.seal(&disco_key, &Message::Pong { tx, src: from });
                        self.tunnel.send_udp(from, pong);
                    }
                    Came::Relay(region, _) => {
                        // Relays have the address 127.3.3.40 and their number as port.
                        let src = SocketAddr::from(([127, 3, 3, 40], region));
                        let pong = self.boxes.seal(&disco_key, &Message::Pong { tx, src });
                        self.relays.send_packet(Some(region), &peer_key, &pong);
                    }
                }
            }
            Message::Pong { tx, .. } => {
                let code = match came {
                    Came::Relay(region, _) => Some((region, self.region_code(region))),
                    Came::Udp(_) => None,
                };
                self.pings.answered(Token::Disco(tx), None, |result| match (code, came) {
                    (Some((region, code)), _) => {
                        result.derp_region_id = region;
                        result.derp_region_code = code;
                    }
                    (None, Came::Udp(from)) => result.endpoint = from.to_string(),
                    (None, Came::Relay(..)) => {}
                });
            }
            // Direct paths are not looked for.
            other => tracing::trace!(peer = %peer_key, ?other, "disco message"),
        }
    }

    pub(super) fn tunnel_event(&mut self, event: Event) {
        match event {
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
                let peer = self.map.as_ref().and_then(|map| map.by_key(&key)).map(|node| node.name.clone());
                tracing::debug!(peer, ?reject, "a peer refused a packet");
            }
            Event::HandshakeDone { key } => tracing::debug!(peer = %key, "handshake done"),
            other => tracing::trace!(event = ?other),
        }
    }

    pub(super) fn ping(&mut self, ip: IpAddr, kind: PingKind, reply: oneshot::Sender<PingResult>) {
        let mut result = PingResult { ip: ip.to_string(), ..PingResult::default() };
        let refuse = |mut result: PingResult, error: String, reply: oneshot::Sender<PingResult>| {
            result.err = error;
            let _ = reply.send(result);
        };
        let node = self.map.as_ref().and_then(|map| {
            // The router whose accepted prefix fits best: the way that a packet would take.
            let fit = |node: &std::sync::Arc<Node>| {
                let nets = accepted_ips(node, &self.saved.prefs).into_iter();
                nets.filter(|net| net.contains(&ip)).map(|net| net.prefix_len()).max()
            };
            let router = || {
                let routers = map.peers.values().filter_map(|node| Some((fit(node)?, node)));
                routers.max_by_key(|(length, _)| *length).map(|(_, node)| node)
            };
            map.by_address(ip).or_else(router).cloned()
        });
        let Some(node) = node.filter(|_| self.netcheck.is_on()) else {
            return refuse(result, "no matching peer".to_owned(), reply);
        };
        result.node_name = node.name.split('.').next().unwrap_or_default().to_owned();
        result.node_ip = node.addresses.first().map(|net| net.addr().to_string()).unwrap_or_default();
        if Some(node.key) == self.own_key() {
            result.is_local_ip = true;
            return refuse(result, format!("{ip} is local to this node"), reply);
        }
        self.pings.forget_abandoned();
        if self.pings.waiting.len() >= MOST_PINGS {
            return refuse(result, "too many pings wait for their answers".to_owned(), reply);
        }
        let token = match kind {
            PingKind::Disco => {
                let (Some(disco_key), Some(own_key)) = (node.disco_key, self.own_key()) else {
                    return refuse(
                        result,
                        format!("{} cannot be pinged this way", result_name(&node)),
                        reply,
                    );
                };
                let tx = TxId::random();
                let ping = Message::Ping { tx, node_key: Some(own_key), padding: 0 };
                let sealed = self.boxes.seal(&disco_key, &ping);
                if self.relays.send_packet(None, &node.key, &sealed).is_none() {
                    return refuse(result, format!("{} has no relay yet", result_name(&node)), reply);
                }
                Token::Disco(tx)
            }
            PingKind::Tsmp => {
                let token = u64::from_le_bytes(derp::random_nonce()[..8].try_into().unwrap_or_default());
                self.tunnel.tsmp_ping(node.key, ip, token);
                Token::Tsmp(token)
            }
            PingKind::Icmp => {
                self.pings.last_icmp = self.pings.last_icmp.wrapping_add(1);
                self.tunnel.icmp_ping(node.key, ip, std::process::id() as u16, self.pings.last_icmp);
                Token::Icmp(self.pings.last_icmp)
            }
        };
        self.pings.waiting.insert(token, Ping { sent: Instant::now(), result, reply });
    }
}

fn result_name(node: &Node) -> &str {
    node.name.split('.').next().unwrap_or_default()
}

/// How a disco message came, and so how it is answered.
#[derive(Clone, Copy, Debug)]
enum Came {
    Udp(SocketAddr),
    Relay(u16, NodeKey),
}
