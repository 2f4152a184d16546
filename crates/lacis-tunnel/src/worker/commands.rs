//! What the client orders: identity, peers, paths, filter, datagrams, packets for the host.

use std::io::IoSlice;

use boringtun::noise::TunnResult;
use lacis_wire::key::NodeKey;
use std::sync::Arc;

use super::Worker;
use crate::coalesce::plain_header;
use crate::config::Path;
use crate::peers::Identity;
use crate::sinks::sealed_len;
use crate::tunnel::Command;

impl Worker {
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::Identity(key) => {
                let identity = Identity::new(&key);
                if self.identity.as_ref().is_some_and(|old| old.public == identity.public) {
                    return;
                }
                self.identity = Some(identity);
                for peer in self.peers.iter_mut() {
                    peer.reset();
                }
                self.peers.live.clear();
            }
            Command::Peers(peers) => {
                self.peers.set(peers, self.now.instant);
                self.checked_source = None;
                self.shared.peers.store(Arc::new(self.peers.counters()));
            }
            Command::Path(key, path) => self.set_path(key, path),
            Command::Filter(filter) => self.filter = filter,
            Command::LocalAddresses(addresses) => {
                self.local = addresses;
                self.checked_source = None;
            }
            Command::SendUdp(to, data) => {
                let sent = self.sinks.sockets.send(to, &data, data.len(), self.now.instant);
                self.shared.counters.udp_send_errors.add(sent.errors);
            }
            Command::Inject(packet) => self.inject(&packet),
            Command::TsmpPing { key, dst, token } => self.tsmp_ping(key, dst, token),
            Command::IcmpPing { key, dst, id, sequence } => self.icmp_ping(key, dst, id, sequence),
            Command::ResetSession(key) => {
                if let Some(slot) = self.peers.slot_of(&key)
                    && let Some(peer) = self.peers.get(slot)
                {
                    peer.reset();
                }
            }
        }
    }

    fn set_path(&mut self, key: NodeKey, path: Path) {
        let Some(slot) = self.peers.slot_of(&key) else { return };
        let Some(peer) = self.peers.get(slot) else { return };
        let before = std::mem::replace(&mut peer.path, path);
        if before != Path::None || path == Path::None {
            return;
        }
        self.unpark(&key);
        let Some(peer) = self.peers.get(slot) else { return };
        let (waiting, keep_alive) = (peer.waiting, peer.config.persistent_keepalive.is_some());
        // Packets have waited for a path, and the handshake that they began went nowhere: begin it again.
        if (waiting || keep_alive)
            && self.prepare(slot)
            && let Some(peer) = self.peers.get(slot)
            && let Some(tunn) = peer.tunn.as_deref_mut()
        {
            let sent = self.sinks.emit(path, &key, sealed_len(0), &self.out, self.now.instant, |space| {
                match tunn.format_handshake_initiation(space, true) {
                    TunnResult::WriteToNetwork(packet) => packet.len(),
                    _ => 0,
                }
            });
            peer.counters.tx_bytes.add(sent.len() as u64);
            peer.counters.tx_packets.add(u64::from(!sent.is_empty()));
        }
    }

    fn inject(&mut self, packet: &[u8]) {
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
