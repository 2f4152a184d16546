//! What leaves the packet thread: relay frames, datagrams for others, resolver packets and events.
//!
//! All channels are bounded and the thread never waits on them: what does not fit is dropped and counted in
//! [`crate::Stats`]. Relay batches are bounded by their bytes as well, since their sizes differ so much.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use lacis_wire::key::NodeKey;
use tokio::sync::mpsc;

use crate::config::{SocketId, Way};
use crate::stats::Counters;
use crate::tsmp::Reject;

/// Bytes of relay frames that may wait for the relay connection.
const RELAY_BYTES: usize = 1 << 20;
/// Batches that may wait: small ones (acknowledgements) hit this before the byte limit.
const RELAY_BATCHES: usize = 8192;
/// Datagrams of path discovery and STUN that may wait.
const UDP_DATAGRAMS: usize = 1024;
/// Packets to the resolver that may wait.
const QUAD100_PACKETS: usize = 256;
/// Events that may wait: more than hundreds of sockets opened at once make.
const EVENTS: usize = 2048;
/// Large frame buffers kept for the next batch.
const POOLED: usize = 16;
/// Batches below this are copied into a buffer of their own size: what waits then takes at most about four times
/// the bytes that [`RELAY_BYTES`] counts, where an acknowledgement would hold a buffer of 72 KiB.
const SMALL: usize = 16 << 10;

/// The receiving ends of everything that the packet thread produces. They end when the thread does: after a shutdown,
/// and also if it should ever panic.
#[derive(Debug)]
pub struct Outputs {
    /// Sealed packets for peers whose path is the relay.
    pub relay: RelayOutput,
    /// STUN and disco datagrams from the UDP sockets.
    pub udp: mpsc::Receiver<UdpIn>,
    /// IP packets that this host sent to 100.100.100.100 or fd7a:115c:a1e0::53, checksums complete.
    pub quad100: mpsc::Receiver<Bytes>,
    /// What happened.
    pub events: mpsc::Receiver<Event>,
}

/// A datagram that is not WireGuard's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpIn {
    /// By which socket it came and who sent it. IPv4 is never written as mapped IPv6.
    pub way: Way,
    /// The whole datagram: STUN or disco by its first bytes, otherwise unchecked.
    pub data: Bytes,
}

/// Frames for one peer, in the order they must be sent.
#[derive(Debug)]
pub struct RelayBatch {
    /// Whose WireGuard packets these are: the destination in every frame.
    pub key: NodeKey,
    /// Complete DERP `SendPacket` frames, back to back. The byte budget is given back when the last clone is dropped.
    pub frames: Bytes,
}

/// The receiving end for relay batches.
#[derive(Debug)]
pub struct RelayOutput {
    receiver: mpsc::Receiver<RelayBatch>,
}

impl RelayOutput {
    /// The next batch; `None` once the tunnel is shut down. Cancel safe.
    pub async fn recv(&mut self) -> Option<RelayBatch> {
        self.receiver.recv().await
    }

    /// Waits for at least one batch and appends up to `limit` of them; 0 once the tunnel is shut down. Cancel safe.
    pub async fn recv_many(&mut self, batches: &mut Vec<RelayBatch>, limit: usize) -> usize {
        self.receiver.recv_many(batches, limit).await
    }

    /// A batch that waits already.
    pub fn try_recv(&mut self) -> Result<RelayBatch, mpsc::error::TryRecvError> {
        self.receiver.try_recv()
    }

    /// For threads outside the runtime: blocks for the next batch.
    pub fn blocking_recv(&mut self) -> Option<RelayBatch> {
        self.receiver.blocking_recv()
    }
}

/// Which ping was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PongKind {
    /// The answer to [`crate::Tunnel::tsmp_ping`].
    Tsmp {
        /// What the ping carried.
        token: u64,
        /// Port of the peer's API, if it told one.
        peer_api_port: Option<u16>,
    },
    /// The answer to [`crate::Tunnel::icmp_ping`].
    Icmp {
        /// Identifier of the echo request.
        id: u16,
        /// Its sequence number.
        sequence: u16,
    },
}

/// Why nothing can be sent by a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SendFailure {
    /// The host has no route there, or no interface that is up.
    Unreachable,
    /// The host's firewall forbids it.
    Forbidden,
    /// Datagrams of this size cannot go there, not even in fragments.
    TooBig,
    /// The socket is closed, or has not the family of the address.
    NoSocket,
}

/// Something the client may act on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A WireGuard session with this peer works now (both sides have proved their keys).
    HandshakeDone {
        /// The peer.
        key: NodeKey,
    },
    /// A packet that opened with this peer's session came by UDP by a way other than the last one.
    /// At most twice a second for each peer.
    AuthenticatedSource {
        /// The peer.
        key: NodeKey,
        /// How the packet came.
        way: Way,
    },
    /// Packets for this peer could not be sent by its path and are lost. At most twice a second for each peer.
    SendFailed {
        /// The peer.
        key: NodeKey,
        /// The way of its path.
        way: Way,
        /// Why.
        kind: SendFailure,
    },
    /// The answer to [`crate::Tunnel::open_socket`].
    SocketOpened {
        /// The number it was given.
        socket: SocketId,
        /// Its port; `None` when it could not be opened (the log says why).
        port: Option<u16>,
    },
    /// This host sends packets to the peer: time to find or keep a path. At most every two seconds for each peer.
    PeerActive {
        /// The peer.
        key: NodeKey,
        /// Whether it has a path at all ([`crate::Path::None`] otherwise).
        has_path: bool,
    },
    /// A ping of ours was answered.
    Pong {
        /// The peer that answered.
        key: NodeKey,
        /// Which ping.
        kind: PongKind,
        /// From sending to reading the answer.
        rtt: Duration,
    },
    /// The peer says that it refused a packet of ours.
    Rejected {
        /// The peer.
        key: NodeKey,
        /// What and why.
        reject: Reject,
    },
    /// A handshake with a valid MAC came from a key that is no peer. At most ten a second.
    UnknownPeer {
        /// The key it claims (proved only as far as the first message proves it).
        key: NodeKey,
        /// Where it came from; `None` by relay.
        addr: Option<SocketAddr>,
    },
    /// A WireGuard packet of a session that this node does not have came by UDP: a peer talks on with somebody who has
    /// restarted. Whoever knows which peer that is calls [`crate::Tunnel::begin_session`]. At most ten a second.
    StraySession {
        /// How it came.
        way: Way,
    },
    /// The UDP port asked for was taken and others were used.
    PortTaken {
        /// The configured one.
        wanted: u16,
        /// What is used for IPv4, 0 for none.
        v4: u16,
        /// What is used for IPv6, 0 for none.
        v6: u16,
    },
    /// The TUN device is gone (deleted by somebody); no packet moves until the tunnel is started anew.
    TunLost {
        /// What reading it said.
        error: String,
    },
}

/// Frame buffers and the byte budget of the relay output.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Mutex<Vec<Vec<u8>>>,
    in_flight: AtomicUsize,
}

impl Pool {
    /// A buffer of `size` bytes, used before or zeroed.
    pub(crate) fn take(&self, size: usize) -> Vec<u8> {
        let used = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match used {
            Some(buffer) if buffer.len() == size => buffer,
            _ => vec![0; size],
        }
    }
}

/// Owner of the bytes of a batch: gives budget and buffer back when the last handle is gone.
struct Frames {
    buffer: Vec<u8>,
    len: usize,
    recycle: bool,
    pool: Arc<Pool>,
}

impl AsRef<[u8]> for Frames {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.pool.in_flight.fetch_sub(self.len, Ordering::Relaxed);
        if self.recycle {
            let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
            if free.len() < POOLED {
                free.push(std::mem::take(&mut self.buffer));
            }
        }
    }
}

/// The sending ends, owned by the packet thread.
#[derive(Debug)]
pub(crate) struct Senders {
    relay: mpsc::Sender<RelayBatch>,
    udp: mpsc::Sender<UdpIn>,
    quad100: mpsc::Sender<Bytes>,
    events: mpsc::Sender<Event>,
    pool: Arc<Pool>,
    counters: Arc<Counters>,
}

impl Senders {
    pub(crate) fn new(counters: Arc<Counters>) -> (Self, Outputs) {
        let (relay, relay_out) = mpsc::channel(RELAY_BATCHES);
        let (udp, udp_out) = mpsc::channel(UDP_DATAGRAMS);
        let (quad100, quad100_out) = mpsc::channel(QUAD100_PACKETS);
        let (events, events_out) = mpsc::channel(EVENTS);
        let pool = Arc::new(Pool::default());
        let outputs = Outputs {
            relay: RelayOutput { receiver: relay_out },
            udp: udp_out,
            quad100: quad100_out,
            events: events_out,
        };
        (Self { relay, udp, quad100, events, pool, counters }, outputs)
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Hands the first `len` bytes of `buffer` to the relay; leaves a usable buffer of the same size behind.
    pub(crate) fn relay(&self, key: NodeKey, buffer: &mut Vec<u8>, len: usize, packets: u64) {
        if self.pool.in_flight.load(Ordering::Relaxed) + len > RELAY_BYTES {
            self.counters.relay_full.add(packets);
            return;
        }
        let Ok(slot) = self.relay.try_reserve() else {
            self.counters.relay_full.add(packets);
            return;
        };
        self.pool.in_flight.fetch_add(len, Ordering::Relaxed);
        let pool = Arc::clone(&self.pool);
        let frames = if len < SMALL {
            Frames { buffer: buffer[..len].to_vec(), len, recycle: false, pool }
        } else {
            let size = buffer.len();
            let full = std::mem::replace(buffer, self.pool.take(size));
            Frames { buffer: full, len, recycle: true, pool }
        };
        self.counters.relay_sent.add(packets);
        slot.send(RelayBatch { key, frames: Bytes::from_owner(frames) });
    }

    pub(crate) fn udp(&self, way: Way, data: &[u8]) {
        match self.udp.try_reserve() {
            Ok(slot) => slot.send(UdpIn { way, data: Bytes::copy_from_slice(data) }),
            Err(_) => self.counters.udp_output_full.add(1),
        }
    }

    pub(crate) fn quad100(&self, packet: &[u8]) {
        match self.quad100.try_reserve() {
            Ok(slot) => slot.send(Bytes::copy_from_slice(packet)),
            Err(_) => self.counters.quad100_full.add(1),
        }
    }

    pub(crate) fn event(&self, event: Event) {
        if self.events.try_send(event).is_err() {
            self.counters.events_full.add(1);
        }
    }
}
