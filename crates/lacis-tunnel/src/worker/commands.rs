//! What the client orders: settings (identity, peers, paths, filter) and work (datagrams, packets for the host, pings).

use std::collections::HashSet;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use lacis_wire::key::{NodeKey, NodePrivateKey};
use tracing::debug;

use super::Worker;
use crate::coalesce::plain_header;
use crate::config::{Path, SocketId, Way};
use crate::outputs::Event;
use crate::peers::Identity;
use crate::queue::{Command, Settings};

/// An answer that comes by the old path has this long before the new one gets an initiation of its own.
const NEW_PATH: Duration = Duration::from_millis(100);

impl Worker {
    /// Takes over the settings that changed.
    pub(super) fn apply(&mut self, settings: Settings) {
        let Settings { identity, peers, reset, paths, filter, local_addresses, routes } = settings;
        if let Some(key) = identity {
            self.set_identity(&key);
        }
        if let Some(peers) = peers {
            self.peers.set(peers, self.now.instant);
            self.checked_source = None;
            self.shared.peers.store(Arc::new(self.peers.counters()));
            let known: HashSet<_> = self.peers.iter_mut().filter_map(|peer| peer.config.ipv4).collect();
            self.via.retain(|source| known.contains(&source));
            self.unpark();
        }
        if let Some(routes) = routes {
            self.via.set_routes(&routes);
        }
        for key in reset {
            if let Some(slot) = self.peers.slot_of(&key)
                && let Some(peer) = self.peers.get(slot)
            {
                peer.reset();
            }
        }
        for (key, path) in paths {
            self.set_path(key, path);
        }
        if let Some(filter) = filter {
            self.filter = filter;
        }
        if let Some(addresses) = local_addresses {
            self.local = addresses;
            self.checked_source = None;
        }
    }

    fn set_identity(&mut self, key: &NodePrivateKey) {
        let identity = Identity::new(key);
        if self.identity.as_ref().is_some_and(|old| old.public == identity.public) {
            return;
        }
        self.identity = Some(identity);
        for peer in self.peers.iter_mut() {
            peer.reset();
        }
        self.peers.live.clear();
    }

    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::SendUdp((way, data, ttl)) => self.send_udp(way, &data, ttl),
            Command::SendUdpMany(datagrams) => {
                for (way, data, ttl) in datagrams {
                    self.send_udp(way, &data, ttl);
                }
            }
            Command::OpenSocket { id, low } => self.open_socket(id, low),
            Command::CloseSocket(id) => self.sinks.close_socket(id, &self.out, self.now.instant),
            Command::Inject(packet) => self.inject(&packet),
            Command::TsmpPing { key, dst, token } => self.tsmp_ping(key, dst, token),
            Command::IcmpPing { key, dst, id, sequence } => self.icmp_ping(key, dst, id, sequence),
            Command::BeginSession(key) => self.begin_session(&key),
        }
    }

    fn set_path(&mut self, key: NodeKey, path: Path) {
        let now = self.now.instant;
        let Some(slot) = self.peers.slot_of(&key) else { return };
        let Some(peer) = self.peers.get(slot) else { return };
        let before = peer.way_out();
        peer.path = path;
        peer.heard = Path::None;
        if before.covers(path) {
            return;
        }
        if before == Path::None {
            // Packets have waited for a path, and the initiation that they caused went nowhere.
            if peer.waiting || peer.config.persistent_keepalive.is_some() {
                let waits = peer.waiting;
                self.initiate(slot, true, None);
                if waits && let Some(peer) = self.peers.get(slot) {
                    peer.wait(now);
                }
            }
        } else if peer.waiting {
            peer.retries = 0;
            let soon = now + NEW_PATH;
            peer.retry = Some(peer.retry.map_or(soon, |retry| retry.min(soon)));
        }
        self.note_retry(slot);
    }

    fn send_udp(&mut self, way: Way, data: &[u8], ttl: Option<u8>) {
        let sent = self.sinks.sockets.send_one(way, data, ttl);
        self.shared.counters.udp_send_errors.add(u64::from(!sent));
    }

    fn open_socket(&mut self, id: SocketId, low: bool) {
        let opened = if id == SocketId::MAIN {
            debug!("the main sockets cannot be opened a second time");
            None
        } else {
            let opened = self.sinks.sockets.open_auxiliary(id, low);
            opened.inspect_err(|error| debug!(%error, ?id, low, "no auxiliary socket")).ok()
        };
        self.out.event(Event::SocketOpened { socket: id, port: opened });
    }

    pub(super) fn inject(&mut self, packet: &[u8]) {
        let counters = &self.shared.counters;
        match self.tun.write(&[IoSlice::new(&plain_header()), IoSlice::new(packet)]) {
            Ok(()) => {
                counters.tun_written.add(1);
                counters.tun_writes.add(1);
            }
            Err(_) => counters.tun_write_errors.add(1),
        }
    }
}
