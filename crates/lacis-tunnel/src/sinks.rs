//! Where sealed packets are collected: one open batch for UDP and one for the relay.
//!
//! Packets are sealed straight into the batch. A batch goes out when its destination changes, when it is full, and
//! when the packet thread has nothing more to read; there are no timers.

use std::time::Instant;

use lacis_wire::derp::{SEND_PACKET_HEADER_LEN, write_send_packet_header};
use lacis_wire::key::NodeKey;

use crate::config::{Path, SocketId, Way};
use crate::outputs::{SendFailure, Senders};
use crate::stats::Counters;
use crate::sys::sockets::Sockets;
use crate::sys::udp::{MAX_SEGMENTS, max_batch};

/// A whole UDP batch and the largest packet after it.
const UDP_BUFFER: usize = 2 * (64 << 10) + 1024;
/// One relay batch: as many packets as one super-packet makes, and never less than the largest packet.
const RELAY_BUFFER: usize = 72 << 10;
/// Largest message that a seal can give instead of the packet itself: a handshake initiation.
const HANDSHAKE: usize = 148;
/// What sealing adds.
const OVERHEAD: usize = 32;
/// Failures kept until somebody asks, at the end of a turn.
const FAILURES: usize = 16;

/// Room that sealing a packet of this length may need.
pub(crate) fn sealed_len(packet: usize) -> usize {
    (packet + OVERHEAD).max(HANDSHAKE)
}

/// Packets of a peer could not be sent by its path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub(crate) key: NodeKey,
    pub(crate) way: Way,
    pub(crate) kind: SendFailure,
}

#[derive(Debug)]
struct UdpBatch {
    buffer: Box<[u8]>,
    to: Option<Way>,
    /// Whose packets these are.
    key: NodeKey,
    used: usize,
    segment: usize,
    count: usize,
    /// The last datagram was shorter: nothing may follow it.
    closed: bool,
}

#[derive(Debug)]
struct RelayFrames {
    buffer: Vec<u8>,
    key: NodeKey,
    used: usize,
    count: u64,
}

#[derive(Debug)]
pub(crate) struct Sinks {
    pub(crate) sockets: Sockets,
    udp: UdpBatch,
    relay: RelayFrames,
    /// What could not be sent since this was last emptied.
    pub(crate) failures: Vec<Failure>,
}

impl Sinks {
    pub(crate) fn new(sockets: Sockets, out: &Senders) -> Self {
        Self {
            sockets,
            udp: UdpBatch {
                buffer: vec![0; UDP_BUFFER].into_boxed_slice(),
                to: None,
                key: NodeKey::default(),
                used: 0,
                segment: 0,
                count: 0,
                closed: false,
            },
            relay: RelayFrames {
                buffer: out.pool().take(RELAY_BUFFER),
                key: NodeKey::default(),
                used: 0,
                count: 0,
            },
            failures: Vec::with_capacity(FAILURES),
        }
    }

    /// Lets `seal` write one WireGuard packet (of at most `need` bytes; 0 for none) to where `path` leads.
    /// Returns its bytes. With [`Path::None`] it is written and forgotten.
    pub(crate) fn emit(
        &mut self,
        path: Path,
        key: &NodeKey,
        need: usize,
        out: &Senders,
        now: Instant,
        seal: impl FnOnce(&mut [u8]) -> usize,
    ) -> &[u8] {
        match path {
            Path::Direct(to) | Path::DirectAndRelay(to) => {
                let len = seal(self.udp_space(to, need, out.counters(), now));
                if len == 0 {
                    return &[];
                }
                let at = self.udp_commit(key, len, out.counters(), now);
                if matches!(path, Path::DirectAndRelay(_)) {
                    let space = Self::relay_space(&mut self.relay, key, len, out);
                    space[..len].copy_from_slice(&self.udp.buffer[at..at + len]);
                    self.relay_commit(key, len);
                }
                &self.udp.buffer[at..at + len]
            }
            Path::Relay => {
                let len = seal(Self::relay_space(&mut self.relay, key, need, out));
                if len == 0 {
                    return &[];
                }
                let at = self.relay_commit(key, len);
                &self.relay.buffer[at..at + len]
            }
            Path::None => {
                // Written behind the open batch, where it is overwritten next.
                let start = self.udp.used;
                let len = seal(&mut self.udp.buffer[start..]);
                &self.udp.buffer[start..start + len]
            }
        }
    }

    /// Sends a sealed packet once more, by another path.
    pub(crate) fn repeat(&mut self, path: Path, key: &NodeKey, sealed: &[u8], out: &Senders, now: Instant) {
        self.emit(path, key, sealed.len(), out, now, |space| {
            space[..sealed.len()].copy_from_slice(sealed);
            sealed.len()
        });
    }

    fn udp_space(&mut self, to: Way, need: usize, counters: &Counters, now: Instant) -> &mut [u8] {
        let batch = &self.udp;
        let other = batch.to != Some(to) || batch.closed || batch.count >= MAX_SEGMENTS;
        if batch.count > 0 && (other || batch.used + need > max_batch(to.addr)) {
            self.flush_udp(counters, now);
        }
        self.udp.to = Some(to);
        &mut self.udp.buffer[self.udp.used..]
    }

    fn udp_commit(&mut self, key: &NodeKey, len: usize, counters: &Counters, now: Instant) -> usize {
        let mut at = self.udp.used;
        if self.udp.count > 0 && len > self.udp.segment {
            // A longer one cannot follow: what was there goes out, and this one begins the next batch.
            let to = self.udp.to;
            self.flush_udp(counters, now);
            self.udp.to = to;
            self.udp.buffer.copy_within(at..at + len, 0);
            at = 0;
        }
        let batch = &mut self.udp;
        if batch.count == 0 {
            batch.segment = len;
            batch.key = *key;
        }
        batch.closed = len < batch.segment;
        batch.used = at + len;
        batch.count += 1;
        at
    }

    fn relay_space<'a>(
        relay: &'a mut RelayFrames,
        key: &NodeKey,
        need: usize,
        out: &Senders,
    ) -> &'a mut [u8] {
        let full = relay.used + SEND_PACKET_HEADER_LEN + need > relay.buffer.len();
        if relay.used > 0 && (full || relay.key != *key) {
            Self::flush_relay(relay, out);
        }
        relay.key = *key;
        let start = relay.used + SEND_PACKET_HEADER_LEN;
        &mut relay.buffer[start..]
    }

    fn relay_commit(&mut self, key: &NodeKey, len: usize) -> usize {
        let relay = &mut self.relay;
        if let Some(header) = relay.buffer[relay.used..].first_chunk_mut::<SEND_PACKET_HEADER_LEN>() {
            write_send_packet_header(header, key, len);
        }
        let at = relay.used + SEND_PACKET_HEADER_LEN;
        relay.used = at + len;
        relay.count += 1;
        at
    }

    fn flush_udp(&mut self, counters: &Counters, now: Instant) {
        let batch = &mut self.udp;
        if let Some(to) = batch.to.take()
            && batch.count > 0
        {
            let sent = self.sockets.send(to, &batch.buffer[..batch.used], batch.segment, now);
            counters.udp_sent.add(sent.datagrams);
            counters.udp_send_errors.add(sent.errors);
            counters.udp_gso_fallbacks.add(u64::from(sent.fallback));
            counters.udp_sends.add(1);
            if let Some(kind) = sent.failure
                && self.failures.len() < FAILURES
            {
                self.failures.push(Failure { key: batch.key, way: to, kind });
            }
        }
        batch.used = 0;
        batch.count = 0;
        batch.closed = false;
    }

    fn flush_relay(relay: &mut RelayFrames, out: &Senders) {
        if relay.used > 0 {
            out.relay(relay.key, &mut relay.buffer, relay.used, relay.count);
        }
        relay.used = 0;
        relay.count = 0;
    }

    /// Closes an auxiliary socket, after what was meant for it has left.
    pub(crate) fn close_socket(&mut self, id: SocketId, out: &Senders, now: Instant) {
        self.flush_udp(out.counters(), now);
        self.sockets.close_auxiliary(id);
    }

    /// Sends what is collected.
    pub(crate) fn flush(&mut self, out: &Senders, now: Instant) {
        self.flush_udp(out.counters(), now);
        Self::flush_relay(&mut self.relay, out);
    }
}
