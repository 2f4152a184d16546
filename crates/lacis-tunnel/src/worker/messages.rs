//! Pings of ours and of peers, refusals: the packets that the thread makes and consumes itself.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use lacis_wire::key::NodeKey;
use tracing::debug;

use super::Worker;
use crate::outputs::{Event, PongKind};
use crate::packet::Parsed;
use crate::tsmp::{self, Message, Reject, RejectReason};

/// Pings that may be on their way; older ones are forgotten.
const MAX_PINGS: usize = 64;
/// An answer later than this is nobody's.
const PING_LIFE: Duration = Duration::from_secs(30);
/// Least time between two refusals sent: nobody shall use us to make traffic.
const REFUSE_EVERY: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tsmp(u64),
    Icmp(u16, u16),
}

#[derive(Clone, Copy, Debug)]
struct Ping {
    slot: u32,
    key: NodeKey,
    kind: Kind,
    sent: Instant,
}

/// Pings of ours that are on their way, and the pace of refusals.
#[derive(Debug, Default)]
pub(super) struct Pings {
    waiting: Vec<Ping>,
    refused: Option<Instant>,
}

impl Pings {
    fn add(&mut self, ping: Ping) {
        self.waiting.retain(|old| ping.sent.saturating_duration_since(old.sent) < PING_LIFE);
        if self.waiting.len() >= MAX_PINGS {
            self.waiting.remove(0);
        }
        self.waiting.push(ping);
    }

    fn take(&mut self, slot: u32, kind: Kind) -> Option<Ping> {
        let at = self.waiting.iter().position(|ping| ping.slot == slot && ping.kind == kind)?;
        Some(self.waiting.remove(at))
    }

    /// Whether echo replies have to be looked at.
    pub(super) fn has_echoes(&self) -> bool {
        self.waiting.iter().any(|ping| matches!(ping.kind, Kind::Icmp(..)))
    }
}

impl Worker {
    /// An address of ours in the family of `dst`.
    fn local_for(&self, dst: IpAddr) -> Option<IpAddr> {
        let found = self.local.iter().find(|addr| addr.is_ipv4() == dst.is_ipv4()).copied();
        if found.is_none() {
            debug!(%dst, "no address of this family to ping from");
        }
        found
    }

    pub(super) fn tsmp_ping(&mut self, key: NodeKey, dst: IpAddr, token: u64) {
        let (Some(slot), Some(src)) = (self.peers.slot_of(&key), self.local_for(dst)) else { return };
        let mut packet = [0; tsmp::MAX_LEN];
        let Some(len) = tsmp::build(&mut packet, src, dst, &Message::Ping(token.to_be_bytes())) else {
            return;
        };
        self.pings.add(Ping { slot, key, kind: Kind::Tsmp(token), sent: Instant::now() });
        self.send_to_peer(slot, &packet[..len]);
    }

    pub(super) fn icmp_ping(&mut self, key: NodeKey, dst: IpAddr, id: u16, sequence: u16) {
        let (Some(slot), Some(src)) = (self.peers.slot_of(&key), self.local_for(dst)) else { return };
        let mut packet = [0; tsmp::ECHO_LEN];
        let Some(len) = tsmp::build_echo(&mut packet, src, dst, id, sequence) else { return };
        self.pings.add(Ping { slot, key, kind: Kind::Icmp(id, sequence), sent: Instant::now() });
        self.send_to_peer(slot, &packet[..len]);
    }

    /// An echo reply came from this peer; true when it answers a ping of ours and is thereby consumed.
    pub(super) fn echo_reply(&mut self, slot: u32, id: u16, sequence: u16) -> bool {
        let Some(ping) = self.pings.take(slot, Kind::Icmp(id, sequence)) else { return false };
        self.shared.counters.in_consumed.add(1);
        self.out.event(Event::Pong {
            key: ping.key,
            kind: PongKind::Icmp { id, sequence },
            rtt: ping.sent.elapsed(),
        });
        true
    }

    /// A TSMP message came in the tunnel of this peer.
    pub(super) fn message(&mut self, slot: u32, parsed: &Parsed, message: Message) {
        let Some(key) = self.peers.get(slot).map(|peer| peer.key) else { return };
        match message {
            Message::Ping(token) => {
                let peer_api_port = self.filter.peer_api_port(parsed.src.is_ipv4());
                let mut packet = [0; tsmp::MAX_LEN];
                let pong = Message::Pong { token, peer_api_port };
                // Only from our own address: not for somebody behind us.
                if self.local.contains(&parsed.dst)
                    && let Some(len) = tsmp::build(&mut packet, parsed.dst, parsed.src, &pong)
                {
                    self.send_to_peer(slot, &packet[..len]);
                }
            }
            Message::Pong { token, peer_api_port } => {
                let token = u64::from_be_bytes(token);
                if let Some(ping) = self.pings.take(slot, Kind::Tsmp(token)) {
                    let kind = PongKind::Tsmp { token, peer_api_port };
                    self.out.event(Event::Pong { key, kind, rtt: ping.sent.elapsed() });
                }
            }
            Message::Reject(reject) => self.out.event(Event::Rejected { key, reject }),
            Message::DiscoKey => {}
        }
    }

    /// Tells the sender of a connection request that it was refused.
    pub(super) fn refuse(&mut self, slot: u32, parsed: &Parsed, jailed: bool) {
        if !crate::peers::Peer::due(&mut self.pings.refused, self.now.instant, REFUSE_EVERY) {
            return;
        }
        let reason = if jailed || self.filter.shields_up() {
            RejectReason::ShieldsUp
        } else {
            RejectReason::AccessRules
        };
        let reject = Message::Reject(Reject {
            proto: parsed.proto,
            reason,
            src: (parsed.src, parsed.src_port),
            dst: (parsed.dst, parsed.dst_port),
            maybe_broken: false,
        });
        let mut packet = [0; tsmp::MAX_LEN];
        if let Some(len) = tsmp::build(&mut packet, parsed.dst, parsed.src, &reject) {
            self.send_to_peer(slot, &packet[..len]);
        }
    }
}
