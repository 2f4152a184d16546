//! One node of a simulated network: a [`Paths`] and what a daemon keeps around it.
//!
//! No decisions about ways are made here. The node knows its sockets, measures itself by STUN, and counts.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lacis_wire::disco::TxId;
use lacis_wire::disco::traversal::Mapping;
use lacis_wire::key::NodeKey;

use super::internet::Host;
use super::scenario::NodeSpec;
use crate::{Input, Local, Path, Paths, Peer, SocketId, Way};

/// Questions of one measurement are asked again after so many milliseconds, those without an answer; at the last
/// it ends.
pub(super) const MEASURE_STEPS: [u64; 6] = [0, 150, 450, 1000, 2000, 3000];
/// Once something has answered, the rest has so long to do so.
const STRAGGLERS: Duration = Duration::from_millis(800);

/// Key of a node, by its number.
pub(super) fn key(node: usize) -> NodeKey {
    NodeKey::from_bytes([node as u8 + 1; 32])
}

/// The number of a node, by its key.
pub(super) fn number(key: &NodeKey) -> usize {
    usize::from(key.as_bytes()[0]) - 1
}

/// One measurement by STUN.
#[derive(Debug)]
pub(super) struct Measuring {
    /// The how manieth.
    pub(super) run: u32,
    asked: Vec<(TxId, SocketAddr, Option<SocketAddr>)>,
    first_answer: Option<Duration>,
}

impl Measuring {
    /// Asks those servers that the host has a route to.
    pub(super) fn new(run: u32, host: Host, servers: &[SocketAddr]) -> Self {
        let reachable = servers.iter().filter(|server| match server.ip() {
            IpAddr::V4(_) => host.v4.is_some(),
            IpAddr::V6(_) => host.v6.is_some(),
        });
        let asked = reachable.enumerate().map(|(number, &server)| {
            let mut tx = [0xff; 12];
            tx[..4].copy_from_slice(&run.to_be_bytes());
            tx[4] = number as u8;
            (TxId(tx), server, None)
        });
        Self { run, asked: asked.collect(), first_answer: None }
    }

    /// Whether this names a question of some measurement: one that is over may still be answered.
    pub(super) fn is_mark(tx: TxId) -> bool {
        tx.0[5..] == [0xff; 7]
    }

    /// What is still to be asked.
    pub(super) fn open(&self) -> impl Iterator<Item = (TxId, SocketAddr)> + '_ {
        self.asked.iter().filter(|(_, _, seen)| seen.is_none()).map(|(tx, server, _)| (*tx, *server))
    }

    /// An answer: whether it belongs here.
    pub(super) fn answered(&mut self, now: Duration, tx: TxId, at: SocketAddr) -> bool {
        let Some((_, _, seen)) = self.asked.iter_mut().find(|(asked, _, _)| *asked == tx) else {
            return false;
        };
        seen.get_or_insert(at);
        self.first_answer.get_or_insert(now);
        true
    }

    /// Whether nothing more is worth waiting for.
    pub(super) fn is_over(&self, now: Duration) -> bool {
        self.open().next().is_none() || self.first_answer.is_some_and(|first| now >= first + STRAGGLERS)
    }

    fn seen(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.asked.iter().filter_map(|(_, _, seen)| *seen)
    }

    /// What it says about the node.
    pub(super) fn local(&self, spec: &NodeSpec, host: Host, servers: &[SocketAddr]) -> Local {
        let by_v4: Vec<_> = self
            .seen()
            .filter_map(|seen| match seen {
                SocketAddr::V4(seen) => Some(seen),
                SocketAddr::V6(_) => None,
            })
            .collect();
        let own_v4 = host.v4.map(|ip| SocketAddr::new(ip.into(), spec.port));
        let own_v6 = host.v6.map(|ip| SocketAddr::new(ip.into(), spec.port));
        let mapping = match by_v4[..] {
            [first, ..] if Some(SocketAddr::V4(first)) == own_v4 => Mapping::Open,
            [first, second] if first == second => Mapping::Independent,
            [_, _] => Mapping::Varies,
            _ => Mapping::Unknown,
        };
        let mut endpoints: Vec<_> = self.seen().collect();
        if mapping == Mapping::Varies {
            endpoints.extend(by_v4.first().map(|seen| SocketAddr::new((*seen.ip()).into(), spec.port)));
        }
        endpoints.extend(own_v6);
        endpoints.extend(own_v4);
        let mut known = Vec::new();
        endpoints.retain(|endpoint| {
            let new = !known.contains(endpoint);
            known.push(*endpoint);
            new
        });
        Local {
            endpoints,
            seen_v4: by_v4.first().copied(),
            udp: self.first_answer.is_some(),
            mapping,
            stun: servers.iter().copied().filter(|server| server.is_ipv4() && host.v4.is_some()).collect(),
            low_ports: spec.low_ports,
            searches: spec.searches,
        }
    }
}

/// What a node counts.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Packets of disco and STUN sent by UDP, second by second.
    pub control: Vec<u16>,
    /// Sockets opened and not closed.
    pub sockets: usize,
    /// The most that were open at once.
    pub most_sockets: usize,
    /// When the path to which peer changed.
    pub changes: Vec<(Duration, usize)>,
}

impl Counts {
    /// One more packet of control.
    pub(super) fn control(&mut self, now: Duration) {
        let second = now.as_secs() as usize;
        if self.control.len() <= second {
            self.control.resize(second + 1, 0);
        }
        self.control[second] += 1;
    }

    /// Packets from one second to another.
    pub fn sent(&self, from: usize, to: usize) -> u32 {
        let to = to.min(self.control.len());
        self.control.get(from.min(to)..to).unwrap_or_default().iter().map(|n| u32::from(*n)).sum()
    }

    /// The most packets in any minute.
    pub fn most_in_a_minute(&self) -> u32 {
        let mut window = 0_u32;
        let mut most = 0;
        for (second, sent) in self.control.iter().enumerate() {
            window += u32::from(*sent);
            if let Some(gone) = second.checked_sub(60) {
                window -= u32::from(self.control[gone]);
            }
            most = most.max(window);
        }
        most
    }
}

/// What a node knows of one peer outside of [`Paths`].
#[derive(Clone, Debug, Default)]
pub(super) struct Conversation {
    /// Where its packets go, by the last [`crate::Output::Path`].
    pub(super) path: Path,
    /// When [`Input::Sending`] was said last.
    pub(super) said: Option<Duration>,
    /// The last way on which something authentic came, and when that was told.
    pub(super) heard: Option<(Way, Duration)>,
    /// The newest packet that was opened, and which of the 64 up to it: what comes twice is not opened again.
    opened: (u64, u64),
}

impl Conversation {
    /// Whether WireGuard opens this packet.
    pub(super) fn opens(&mut self, number: u64) -> bool {
        let (newest, seen) = self.opened;
        let (newest, seen) = if number > newest {
            (number, seen.checked_shl((number - newest).min(64) as u32).unwrap_or(0))
        } else {
            (newest, seen)
        };
        let bit = 1_u64.checked_shl((newest - number).min(64) as u32).unwrap_or(0);
        self.opened = (newest, seen | bit);
        bit != 0 && seen & bit == 0
    }
}

/// A node.
#[derive(Debug)]
pub(super) struct Node {
    /// What decides.
    pub(super) paths: Paths,
    /// Whether its daemon runs.
    pub(super) up: bool,
    /// Counts starts of the daemon.
    pub(super) life: u64,
    /// Ports of its sockets besides the main one.
    pub(super) sockets: Vec<(SocketId, u16)>,
    /// What is to be told to `paths` next.
    pub(super) inbox: Vec<Input>,
    /// When the next wake-up is planned.
    pub(super) wake: Option<Duration>,
    /// The measurement under way.
    pub(super) measuring: Option<Measuring>,
    /// Another one is wanted after it.
    pub(super) again: bool,
    /// Measurements so far.
    pub(super) measured: u32,
    /// What it told the coordinator last.
    pub(super) announced: Vec<SocketAddr>,
    /// When its connection to the relay stands; it is lost at `Duration::MAX`.
    pub(super) relay_from: Duration,
    /// By number of the peer.
    pub(super) peers: Vec<Conversation>,
    /// What a restart hands on.
    pub(super) remembered: Vec<(NodeKey, SocketAddr)>,
    /// For the checks.
    pub(super) counts: Counts,
}

impl Node {
    /// Switched off.
    pub(super) fn new(paths: Paths, peers: usize) -> Self {
        Self {
            paths,
            up: false,
            life: 0,
            sockets: Vec::new(),
            inbox: Vec::new(),
            wake: None,
            measuring: None,
            again: false,
            measured: 0,
            announced: Vec::new(),
            relay_from: Duration::MAX,
            peers: vec![Conversation::default(); peers],
            remembered: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// The port of a socket.
    pub(super) fn port(&self, spec: &NodeSpec, socket: SocketId) -> Option<u16> {
        if socket == SocketId::MAIN {
            return Some(spec.port);
        }
        self.sockets.iter().find(|(id, _)| *id == socket).map(|(_, port)| *port)
    }

    /// The socket that a packet to this port comes to. All but the main one are IPv4.
    pub(super) fn socket(&self, spec: &NodeSpec, to: SocketAddr) -> Option<SocketId> {
        if to.port() == spec.port {
            return Some(SocketId::MAIN);
        }
        let by_port = |(_, port): &&(SocketId, u16)| *port == to.port();
        self.sockets.iter().find(by_port).filter(|_| to.is_ipv4()).map(|(id, _)| *id)
    }
}

/// The map that a node is given.
pub(super) fn peers(node: usize, view: &[Vec<SocketAddr>]) -> Vec<Peer> {
    let others = view.iter().enumerate().filter(|(number, _)| *number != node);
    others
        .map(|(number, endpoints)| Peer {
            key: key(number),
            disco: true,
            home: super::REGION,
            endpoints: endpoints.clone(),
            wireguard_only: false,
        })
        .collect()
}
