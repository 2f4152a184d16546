//! What waits for the packet thread: settings, of which the newest counts, and work in its order. All of it is
//! bounded, since the thread may be slower than those who give it work.
//!
//! Full means: datagrams, packets and pings are dropped and counted ([`crate::Stats::commands_full`]). Settings are
//! never lost.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use ipnet::IpNet;
use lacis_wire::key::{NodeKey, NodePrivateKey};

use crate::config::{Path, PeerConfig, SocketId, Way};
use crate::filter::Filter;

/// Commands that may wait: more than a burst of the path logic makes (257 sockets, 2,000 packets a second).
const MAX_COMMANDS: usize = 4096;
/// Bytes of datagrams and packets in them.
const MAX_COMMAND_BYTES: usize = 4 << 20;
/// Bytes of relayed packets that may wait, each with its share of the bookkeeping.
const MAX_RELAYED_BYTES: usize = 4 << 20;
/// Batches of relayed packets: each holds the buffer of one read, 64 KiB, whatever it has of it.
const MAX_RELAYED_BATCHES: usize = 1024;
/// What a relayed packet costs beside its bytes.
const RELAYED_OVERHEAD: usize = size_of::<(NodeKey, Bytes)>();

/// A datagram, how it is sent, and its TTL if not the usual.
pub(crate) type Datagram = (Way, Vec<u8>, Option<u8>);

/// Work for the packet thread, done in its order.
#[derive(Debug)]
pub(crate) enum Command {
    SendUdp(Datagram),
    SendUdpMany(Vec<Datagram>),
    OpenSocket { id: SocketId, low: bool },
    CloseSocket(SocketId),
    Inject(Bytes),
    TsmpPing { key: NodeKey, dst: IpAddr, token: u64 },
    IcmpPing { key: NodeKey, dst: IpAddr, id: u16, sequence: u16 },
    BeginSession(NodeKey),
}

impl Command {
    fn bytes(&self) -> usize {
        match self {
            Self::SendUdp((_, data, _)) => data.len(),
            Self::SendUdpMany(datagrams) => datagrams.iter().map(|(_, data, _)| data.len()).sum(),
            Self::Inject(packet) => packet.len(),
            _ => 0,
        }
    }

    /// As many as this are dropped with it, and as many places it takes.
    fn count(&self) -> usize {
        if let Self::SendUdpMany(datagrams) = self { datagrams.len() } else { 1 }
    }
}

/// What the packet thread is to be like. Applied before the commands, in the order of the members: a path counts only
/// for a peer that is there.
#[derive(Default)]
pub(crate) struct Settings {
    pub(crate) identity: Option<NodePrivateKey>,
    pub(crate) peers: Option<Vec<PeerConfig>>,
    /// Of peers whose session is to be forgotten.
    pub(crate) reset: HashSet<NodeKey>,
    pub(crate) paths: HashMap<NodeKey, Path>,
    pub(crate) filter: Option<Arc<Filter>>,
    pub(crate) local_addresses: Option<Vec<IpAddr>>,
    pub(crate) routes: Option<Vec<IpNet>>,
}

/// See the file's head.
#[derive(Default)]
pub(crate) struct Queue {
    settings: Settings,
    pub(crate) commands: Vec<Command>,
    count: usize,
    bytes: usize,
    pub(crate) relayed: Vec<Vec<(NodeKey, Bytes)>>,
    relayed_bytes: usize,
    /// Peers that are there, or will be when the settings are applied: others have no path and no session.
    known: HashSet<NodeKey>,
}

impl Queue {
    /// Exchanges the waiting work for an empty queue, which keeps the allocations in use.
    pub(crate) fn take(&mut self, empty: &mut Self) {
        std::mem::swap(self, empty);
        std::mem::swap(&mut self.known, &mut empty.known);
        self.settings = Settings::default();
        (self.count, self.bytes, self.relayed_bytes) = (0, 0, 0);
    }

    /// The settings that changed.
    pub(crate) fn settings(&mut self) -> Settings {
        std::mem::take(&mut self.settings)
    }

    pub(crate) fn set_identity(&mut self, key: NodePrivateKey) {
        self.settings.identity = Some(key);
    }

    pub(crate) fn set_peers(&mut self, peers: Vec<PeerConfig>) {
        self.known = peers.iter().map(|peer| peer.key).collect();
        let Self { known, settings, .. } = self;
        settings.paths.retain(|key, _| known.contains(key));
        settings.reset.retain(|key| known.contains(key));
        settings.peers = Some(peers);
    }

    pub(crate) fn set_path(&mut self, key: NodeKey, path: Path) {
        if self.known.contains(&key) {
            self.settings.paths.insert(key, path);
        }
    }

    pub(crate) fn reset_session(&mut self, key: NodeKey) {
        if self.known.contains(&key) {
            self.settings.reset.insert(key);
        }
    }

    pub(crate) fn set_filter(&mut self, filter: Arc<Filter>) {
        self.settings.filter = Some(filter);
    }

    pub(crate) fn set_local_addresses(&mut self, addresses: Vec<IpAddr>) {
        self.settings.local_addresses = Some(addresses);
    }

    pub(crate) fn set_routes(&mut self, routes: Vec<IpNet>) {
        self.settings.routes = Some(routes);
    }

    /// Adds work; if there is no room, gives how many datagrams, packets or orders are lost with it.
    pub(crate) fn push(&mut self, command: Command) -> Result<(), usize> {
        let (count, bytes) = (command.count(), command.bytes());
        // Closing frees, and comes once for each socket that was opened.
        let close = matches!(command, Command::CloseSocket(_));
        if !close && (self.count + count > MAX_COMMANDS || self.bytes + bytes > MAX_COMMAND_BYTES) {
            return Err(count);
        }
        self.count += count;
        self.bytes += bytes;
        self.commands.push(command);
        Ok(())
    }

    /// Adds packets that came by relay. False if there is no room for them.
    pub(crate) fn push_relayed(&mut self, packets: Vec<(NodeKey, Bytes)>) -> bool {
        let bytes: usize = packets.iter().map(|(_, data)| data.len() + RELAYED_OVERHEAD).sum();
        if self.relayed.len() >= MAX_RELAYED_BATCHES || self.relayed_bytes + bytes > MAX_RELAYED_BYTES {
            return false;
        }
        self.relayed_bytes += bytes;
        self.relayed.push(packets);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn datagram(len: usize) -> Datagram {
        (Way::main(SocketAddr::from(([192, 0, 2, 1], 9))), vec![0; len], None)
    }

    fn peer(n: u8) -> PeerConfig {
        PeerConfig { key: NodeKey::from_bytes([n; 32]), ..PeerConfig::default() }
    }

    #[test]
    fn work_is_bounded_by_its_number_and_its_bytes() {
        let mut queue = Queue::default();
        let small = (0..10_000).filter(|_| queue.push(Command::SendUdp(datagram(1))).is_ok()).count();
        assert_eq!(small, MAX_COMMANDS);
        assert_eq!(queue.push(Command::SendUdpMany(vec![datagram(1); 7])), Err(7));
        let mut queue = Queue::default();
        let packet = || Command::Inject(Bytes::from(vec![0; 64 << 10]));
        let large = (0..10_000).filter(|_| queue.push(packet()).is_ok()).count();
        assert_eq!(large, MAX_COMMAND_BYTES / (64 << 10));
        let many = (0..10_000).filter(|_| queue.push(Command::SendUdpMany(vec![datagram(0); 100])).is_ok());
        assert!(many.count() * 100 <= MAX_COMMANDS);
    }

    #[test]
    fn sockets_can_be_closed_when_nothing_else_has_room() {
        let mut queue = Queue::default();
        let open = |n| Command::OpenSocket { id: SocketId(n), low: false };
        let opened = (1..10_000).take_while(|n| queue.push(open(*n)).is_ok()).count();
        assert_eq!(opened, MAX_COMMANDS);
        assert_eq!(queue.push(Command::CloseSocket(SocketId(1))), Ok(()));
    }

    #[test]
    fn of_each_setting_the_newest_waits_and_no_more_than_one_for_each_peer() {
        let mut queue = Queue::default();
        queue.set_peers(vec![peer(1), peer(2)]);
        for _ in 0..10_000 {
            queue.set_path(peer(1).key, Path::None);
            queue.set_path(peer(1).key, Path::Relay);
            queue.reset_session(peer(2).key);
            queue.set_local_addresses(Vec::new());
        }
        queue.set_path(peer(3).key, Path::Relay);
        let settings = queue.settings();
        assert_eq!(settings.paths.into_iter().collect::<Vec<_>>(), [(peer(1).key, Path::Relay)]);
        assert_eq!(settings.reset.len(), 1);
        assert!(queue.commands.is_empty());
    }

    #[test]
    fn peers_that_were_set_before_are_known_after_the_work_was_taken() {
        let (mut queue, mut taken) = (Queue::default(), Queue::default());
        queue.set_peers(vec![peer(1)]);
        for _ in 0..3 {
            queue.take(&mut taken);
            taken.settings();
            queue.set_path(peer(1).key, Path::Relay);
        }
        assert_eq!(queue.settings().paths.len(), 1);
        queue.set_path(peer(1).key, Path::Relay);
        queue.set_peers(vec![peer(2)]);
        assert!(queue.settings().paths.is_empty());
    }

    #[test]
    fn relayed_packets_without_content_have_a_bound_too() {
        let mut queue = Queue::default();
        let batch = || vec![(peer(1).key, Bytes::new()); 1000];
        let taken = (0..10_000).filter(|_| queue.push_relayed(batch())).count();
        assert!(taken * 1000 * RELAYED_OVERHEAD <= MAX_RELAYED_BYTES);
        let mut queue = Queue::default();
        let single = || vec![(peer(1).key, Bytes::from_static(b"x"))];
        assert_eq!((0..10_000).filter(|_| queue.push_relayed(single())).count(), MAX_RELAYED_BATCHES);
    }
}
