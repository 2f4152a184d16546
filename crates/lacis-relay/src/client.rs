//! The relay client: keeps one connection to one region alive and moves packets through it in batches.
//!
//! [`RelayClient::start`] spawns one task that dials the region's nodes in order ([`dial`]), logs in, and then
//! reads and writes until the connection breaks, after which it tries again (at once the first time, then with
//! growing pauses up to 5 s). Outgoing buffers wait in a queue bounded by bytes ([`queue`]); incoming packets go to
//! a [`RelayHandler`] as one batch per read. A handler that is full gives a future to wait for, and the relay
//! then feels the pressure through TCP.

mod connection;
mod dial;
mod queue;
mod region;
#[cfg(test)]
mod tests;
mod verifier;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use lacis_wire::derp::{self, PeerGoneReason};
use lacis_wire::key::{NodeKey, NodePrivateKey, RelayKey};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use connection::End;
pub use dial::{ConnectError, DialOptions, latency_check};
use queue::SendQueue;
pub use region::{CertCheck, Family, RegionId, RelayNode, RelayRegion};

/// What may wait to be written, in bytes. At 1 Gb/s these are 4 ms; more would only be delay.
pub const SEND_QUEUE_BYTES: usize = 512 << 10;
/// What may wait while there is no connection: enough for the handshakes of the peers, nothing more.
const OFFLINE_QUEUE_BYTES: usize = 32 << 10;
/// The longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// The pause before the second attempt; it doubles from there. The first follows at once.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// A connection that lasted this long starts the pauses anew.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// As the stock client has it.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Packets with the node keys they came from, in order.
pub type Batch = Vec<(NodeKey, Bytes)>;

/// Takes what comes from the relay. Called from the connection's task: must not block.
pub trait RelayHandler: Send + Sync + 'static {
    /// One read's worth of packets. `Some(future)`: read no more until it is done.
    fn packets(&self, region: RegionId, batch: Batch) -> Option<BoxFuture<'static, ()>>;
    /// Something other than a packet.
    fn event(&self, region: RegionId, event: RelayEvent);
}

/// What a [`RelayHandler`] hears besides packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelayEvent {
    /// Logged in: the relay has accepted us.
    Connected {
        /// The relay's key.
        relay: RelayKey,
        /// The node of the region.
        node: String,
        /// Where the connection leads: to it, or to a proxy.
        remote: SocketAddr,
        /// From the first packet of the dial to here.
        took: Duration,
    },
    /// No longer connected, or an attempt failed.
    Disconnected {
        /// Why, in one line.
        reason: String,
        /// When the next attempt starts.
        retry_in: Duration,
        /// A connection stood, and the relay fell silent on it.
        silent: bool,
    },
    /// A peer is not reachable through this relay.
    PeerGone {
        /// Which peer.
        peer: NodeKey,
        /// Why.
        reason: PeerGoneReason,
    },
    /// The relay reports a problem, or `None` that it is over.
    Health(Option<String>),
    /// The relay is about to restart.
    Restarting {
        /// When reconnecting makes sense.
        reconnect_in: Duration,
    },
}

/// What a [`RelayClient`] needs to know.
#[derive(Debug, Clone)]
pub struct RelayClientConfig {
    /// Where to.
    pub region: RelayRegion,
    /// As whom.
    pub node_key: NodePrivateKey,
    /// Whether this is the home region.
    pub home: bool,
    /// How to dial.
    pub dial: DialOptions,
    /// [`SEND_QUEUE_BYTES`] unless there is a reason.
    pub send_queue_bytes: usize,
}

/// Counters of one client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayStats {
    /// Packets given to the relay.
    pub packets_sent: u64,
    /// Bytes of these with their frame headers.
    pub bytes_sent: u64,
    /// Packets from the relay.
    pub packets_received: u64,
    /// Bytes of these.
    pub bytes_received: u64,
    /// Packets dropped because the queue was full or there was no connection.
    pub packets_dropped: u64,
    /// Connections made.
    pub connects: u64,
}

#[derive(Debug, Default)]
struct Counters {
    packets_received: AtomicU64,
    bytes_received: AtomicU64,
    connects: AtomicU64,
}

type PingReply = (Instant, oneshot::Sender<Duration>);

struct Shared {
    region: RegionId,
    queue: SendQueue,
    counters: Counters,
    connected: AtomicBool,
    home: AtomicBool,
    pings: Mutex<std::collections::HashMap<[u8; 8], PingReply>>,
    redial: Notify,
    handler: Arc<dyn RelayHandler>,
}

/// A handle of one region's connection. Dropping it ends the connection.
pub struct RelayClient {
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

impl std::fmt::Debug for RelayClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RelayClient")
            .field("region", &self.shared.region)
            .field("connected", &self.is_connected())
            .finish_non_exhaustive()
    }
}

impl Drop for RelayClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RelayClient {
    /// Starts connecting. Must be called within a tokio runtime.
    pub fn start(config: RelayClientConfig, handler: Arc<dyn RelayHandler>) -> Self {
        let shared = Arc::new(Shared {
            region: config.region.id,
            queue: SendQueue::new(config.send_queue_bytes, OFFLINE_QUEUE_BYTES),
            counters: Counters::default(),
            connected: AtomicBool::new(false),
            home: AtomicBool::new(config.home),
            pings: Mutex::default(),
            redial: Notify::new(),
            handler,
        });
        let task = tokio::spawn(keep_connected(Arc::clone(&shared), config));
        Self { shared, task }
    }

    /// The region.
    pub fn region(&self) -> RegionId {
        self.shared.region
    }

    /// Queues a buffer of one or more complete `SendPacket` frames, back to back. When the queue is full its
    /// oldest buffers are dropped and counted. Never waits; may be called from any thread.
    pub fn send(&self, frames: Bytes) {
        self.shared.queue.push(frames);
    }

    /// How much waits to be written: a sender that can wait keeps this below the limit and loses nothing.
    pub fn queued_bytes(&self) -> usize {
        self.shared.queue.bytes()
    }

    /// Queues one packet.
    pub fn send_packet(&self, dst: &NodeKey, packet: &[u8]) {
        let mut frame = Vec::with_capacity(derp::SEND_PACKET_HEADER_LEN + packet.len());
        let mut header = [0; derp::SEND_PACKET_HEADER_LEN];
        derp::write_send_packet_header(&mut header, dst, packet.len());
        frame.extend_from_slice(&header);
        frame.extend_from_slice(packet);
        self.send(frame.into());
    }

    /// Tells the relay whether it is our home, now and after every reconnect.
    pub fn set_home(&self, home: bool) {
        if self.shared.home.swap(home, Ordering::AcqRel) != home {
            self.shared.queue.wake();
        }
    }

    /// Whether the relay has accepted us and the connection stands.
    pub fn is_connected(&self) -> bool {
        self.shared.connected.load(Ordering::Acquire)
    }

    /// How long ago the last packet was queued (for closing unused connections).
    pub fn idle_for(&self) -> Duration {
        self.shared.queue.last_push().elapsed()
    }

    /// Asks the relay for a sign of life and returns the round trip; `None` after 5 s or without a connection.
    pub async fn ping(&self) -> Option<Duration> {
        if !self.is_connected() {
            return None;
        }
        let (tx, rx) = oneshot::channel();
        let mut token = [0; 8];
        token.copy_from_slice(&derp::random_nonce()[..8]);
        {
            let mut pings = self.shared.pings();
            // those whose asker has stopped waiting
            pings.retain(|_, (sent, _)| sent.elapsed() < PING_TIMEOUT);
            pings.insert(token, (Instant::now(), tx));
        }
        self.shared.queue.push_control(derp::Frame::Ping(token).to_bytes());
        let answer = tokio::time::timeout(PING_TIMEOUT, rx).await;
        self.shared.pings().remove(&token);
        answer.ok()?.ok()
    }

    /// Gives the connection up and dials again at once: after a change of the host's network.
    pub fn redial(&self) {
        self.shared.redial.notify_one();
    }

    /// The counters.
    pub fn stats(&self) -> RelayStats {
        let counters = &self.shared.counters;
        let queue = self.shared.queue.stats();
        RelayStats {
            packets_sent: queue.packets_sent,
            bytes_sent: queue.bytes_sent,
            packets_dropped: queue.packets_dropped,
            packets_received: counters.packets_received.load(Ordering::Relaxed),
            bytes_received: counters.bytes_received.load(Ordering::Relaxed),
            connects: counters.connects.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    fn pings(&self) -> std::sync::MutexGuard<'_, std::collections::HashMap<[u8; 8], PingReply>> {
        self.pings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn event(&self, event: RelayEvent) {
        self.handler.event(self.region, event);
    }
}

/// Pauses between attempts: none, then doubling with some chance in it, never above [`MAX_PAUSE`].
#[derive(Debug, Default)]
struct Pauses(u32);

impl Pauses {
    fn next(&mut self, chance: u8) -> Duration {
        let failures = self.0;
        self.0 = self.0.saturating_add(1);
        let Some(doublings) = failures.checked_sub(1) else { return Duration::ZERO };
        let pause = FIRST_PAUSE.saturating_mul(1 << doublings.min(10)).min(MAX_PAUSE);
        // 75 to 100 %: clients of a relay that restarts do not all come at once
        pause.mul_f64(0.75 + f64::from(chance) / 1020.0)
    }
}

async fn keep_connected(shared: Arc<Shared>, config: RelayClientConfig) {
    let mut pauses = Pauses::default();
    let dialer = dial::Dialer::new(config.dial);
    loop {
        let started = Instant::now();
        let attempt = async {
            let dialed = dialer.derp(&config.region).await?;
            connection::run(&shared, dialed, &config.node_key, started).await
        };
        let end = tokio::select! {
            end = attempt => end,
            () = shared.redial.notified() => Err(End::Redial),
        };
        let was_connected = shared.connected.swap(false, Ordering::AcqRel);
        shared.queue.set_online(false);
        shared.pings().clear();
        if was_connected && started.elapsed() >= STABLE_AFTER || matches!(end, Err(End::Redial)) {
            pauses = Pauses::default();
        }
        let silent = matches!(end, Err(End::Silent | End::Stuck));
        let reason = match end {
            Ok(()) => "the relay closed the connection".to_owned(),
            Err(end) => crate::error::chain(&end),
        };
        let retry_in = pauses.next(derp::random_nonce()[0]);
        tracing::debug!(region = shared.region, %reason, ?retry_in, "relay connection ended");
        shared.event(RelayEvent::Disconnected { reason, retry_in, silent });
        tokio::select! {
            () = tokio::time::sleep(retry_in) => {}
            () = shared.redial.notified() => pauses = Pauses::default(),
        }
    }
}
