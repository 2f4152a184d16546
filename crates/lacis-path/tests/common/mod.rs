//! A node whose clock and network are the test's.
#![allow(dead_code, unreachable_pub)] // each test target uses its part

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lacis_path::{Input, Local, Output, Paths, Peer, Via, Way};
use lacis_wire::disco::traversal::Mapping;
use lacis_wire::disco::{Message, TxId};
use lacis_wire::key::NodeKey;

pub const BOB: NodeKey = NodeKey::from_bytes([2; 32]);

pub struct Alice {
    pub paths: Paths,
    pub now: Instant,
}

impl Alice {
    pub fn new(bob: Peer) -> Self {
        Self::with_peers(vec![bob])
    }

    pub fn with_peers(peers: Vec<Peer>) -> Self {
        let mut alice =
            Self { paths: Paths::new(NodeKey::from_bytes([1; 32]), 1280, [7; 32]), now: Instant::now() };
        alice.give(Input::Local(local()));
        alice.give(Input::Peers(peers));
        alice
    }

    pub fn give(&mut self, input: Input) -> Vec<Output> {
        self.paths.handle(self.now, input);
        std::iter::from_fn(|| self.paths.poll_output()).collect()
    }

    /// A message of bob.
    pub fn hear(&mut self, via: Via, message: Message) -> Vec<Output> {
        self.hear_of(BOB, via, message)
    }

    pub fn hear_of(&mut self, peer: NodeKey, via: Via, message: Message) -> Vec<Output> {
        self.give(Input::Disco { peer, via, message })
    }

    /// Lets time pass, with all timers in it.
    pub fn pass(&mut self, time: Duration) -> Vec<Output> {
        let end = self.now + time;
        let mut outputs = Vec::new();
        while let Some(due) = self.paths.poll_timeout().filter(|due| *due <= end) {
            self.now = due.max(self.now);
            self.paths.wake(self.now);
            outputs.extend(std::iter::from_fn(|| self.paths.poll_output()));
        }
        self.now = end;
        outputs
    }
}

/// Alice's place: behind a usual router, with a STUN server that tells where sockets are seen.
pub fn local() -> Local {
    Local {
        endpoints: vec![at("198.51.100.1:41641")],
        seen_v4: Some("198.51.100.1:41641".parse().expect("an address")),
        udp: true,
        mapping: Mapping::Independent,
        ..Local::default()
    }
}

pub fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

pub fn bob(endpoints: &[&str]) -> Peer {
    Peer {
        key: BOB,
        disco: true,
        home: 1,
        endpoints: endpoints.iter().map(|text| at(text)).collect(),
        wireguard_only: false,
    }
}

pub fn pings(outputs: &[Output]) -> Vec<(Way, TxId, usize)> {
    let ping = |output: &Output| match output {
        Output::Send { way, message: Message::Ping { tx, padding, .. }, .. } => Some((*way, *tx, *padding)),
        _ => None,
    };
    outputs.iter().filter_map(ping).collect()
}
