//! Pings of users, and the question why a path is not direct.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use lacis_path::Input;
use lacis_wire::control::Node;
use lacis_wire::disco::traversal::{Allocator, Mapping, NatReport};
use lacis_wire::local::{NatStatus, PathReport, PathTried, PingResult};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::paths::short_name;
use super::{Engine, PingKind, random_number};
use crate::routing::accepted_ips;

/// Pings that may be outstanding; more are refused.
const MOST_PINGS: usize = 256;

/// Which answer a ping waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Token {
    Disco(u64),
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
    last_disco: u64,
    last_icmp: u16,
}

impl Pings {
    /// Whoever asked has gone.
    pub(super) fn forget_abandoned(&mut self) {
        self.waiting.retain(|_, ping| !ping.reply.is_closed());
    }

    pub(super) fn answered(
        &mut self,
        token: Token,
        took: Option<Duration>,
        edit: impl FnOnce(&mut PingResult),
    ) {
        let Some(mut ping) = self.waiting.remove(&token) else { return };
        ping.result.latency_seconds = took.unwrap_or_else(|| ping.sent.elapsed()).as_secs_f64();
        edit(&mut ping.result);
        // Gone meanwhile: nobody to tell.
        let _ = ping.reply.send(ping.result);
    }
}

impl Engine {
    /// The peer that a packet to this address would go to.
    fn peer_for(&self, ip: IpAddr) -> Option<Arc<Node>> {
        let map = self.map.as_ref().filter(|_| self.netcheck.is_on())?;
        // The router whose accepted prefix fits best: the way that a packet would take.
        let fit = |node: &Arc<Node>| {
            let nets = accepted_ips(node, &self.saved.prefs).into_iter();
            nets.filter(|net| net.contains(&ip)).map(|net| net.prefix_len()).max()
        };
        let router = || {
            let routers = map.peers.values().filter_map(|node| Some((fit(node)?, node)));
            routers.max_by_key(|(length, _)| *length).map(|(_, node)| node)
        };
        map.by_address(ip).or_else(router).cloned()
    }

    pub(super) fn ping(&mut self, ip: IpAddr, kind: PingKind, reply: oneshot::Sender<PingResult>) {
        let mut result = PingResult { ip: ip.to_string(), ..PingResult::default() };
        let refuse = |mut result: PingResult, error: String, reply: oneshot::Sender<PingResult>| {
            result.err = error;
            let _ = reply.send(result);
        };
        let Some(node) = self.peer_for(ip) else {
            return refuse(result, "no matching peer".to_owned(), reply);
        };
        result.node_name = short_name(&node).to_owned();
        result.node_ip = node.addresses.first().map(|net| net.addr().to_string()).unwrap_or_default();
        if Some(node.key) == self.own_key() {
            result.is_local_ip = true;
            return refuse(result, format!("{ip} is local to this node"), reply);
        }
        self.pings.forget_abandoned();
        if self.pings.waiting.len() >= MOST_PINGS {
            return refuse(result, "too many pings wait for their answers".to_owned(), reply);
        }
        let sent = Instant::now();
        let token = match kind {
            PingKind::Disco => {
                if node.disco_key.is_none() {
                    return refuse(result, format!("{} cannot be pinged this way", short_name(&node)), reply);
                }
                self.pings.last_disco += 1;
                Token::Disco(self.pings.last_disco)
            }
            PingKind::Tsmp => {
                let token = random_number();
                self.tunnel.tsmp_ping(node.key, ip, token);
                Token::Tsmp(token)
            }
            PingKind::Icmp => {
                self.pings.last_icmp = self.pings.last_icmp.wrapping_add(1);
                self.tunnel.icmp_ping(node.key, ip, random_number() as u16, self.pings.last_icmp);
                Token::Icmp(self.pings.last_icmp)
            }
        };
        self.pings.waiting.insert(token, Ping { sent, result, reply });
        if let Token::Disco(token) = token {
            self.path_input(Input::Ping { peer: node.key, token });
        }
    }

    /// How the peer with this address is reached, and why not better.
    pub(super) fn why(&self, ip: IpAddr) -> Result<PathReport, String> {
        let node = self.peer_for(ip).ok_or_else(|| format!("no peer has the address {ip}"))?;
        if Some(node.key) == self.own_key() {
            return Err(format!("{ip} is this node itself"));
        }
        let why = self.paths.why(Instant::now().into_std(), &node.key);
        let why = why.ok_or_else(|| format!("{} is no peer at the moment", short_name(&node)))?;
        let (kind, address) = match why.path {
            lacis_path::Path::None => ("none", None),
            lacis_path::Path::Relay => ("relay", None),
            lacis_path::Path::Direct(way) => ("direct", Some(way.addr)),
            lacis_path::Path::Both(way) => ("both", Some(way.addr)),
        };
        Ok(PathReport {
            peer: short_name(&node).to_owned(),
            path: kind.to_owned(),
            address,
            relay: self.region_code_or_empty(node.home_derp),
            own_nat: nat_status(&why.own_nat),
            peer_nat: why.peer_nat.as_ref().map(nat_status),
            tried: why
                .tried
                .into_iter()
                .map(|tried| PathTried {
                    address: tried.addr,
                    extra_socket: tried.extra_socket,
                    unanswered: tried.unanswered,
                    answered_ago: tried.answered.map(|ago| ago.as_secs_f64()),
                    too_small: tried.too_small,
                })
                .collect(),
            probes: why.probes,
            reasons: why.reasons,
            remedies: why.remedies,
        })
    }
}

fn nat_status(nat: &NatReport) -> NatStatus {
    let mapping = match nat.mapping {
        Mapping::Unknown => "unknown",
        Mapping::Open => "none",
        Mapping::Independent => "endpoint-independent",
        Mapping::Varies => "varies",
    };
    let allocator = match nat.allocator {
        Allocator::Unknown => String::new(),
        Allocator::Linux => "as Linux".to_owned(),
        Allocator::Block(first, last) => format!("ports {first}-{last}"),
        Allocator::Counter(_) => "one after the other".to_owned(),
        Allocator::Random => "random".to_owned(),
    };
    NatStatus {
        udp: nat.udp,
        mapping: mapping.to_owned(),
        allocator,
        low_ports: nat.low_ports,
        searches: nat.searches,
        seen: nat.seen.map(Into::into),
    }
}
