//! The DERP server: accepts upgraded connections, checks who they are, and routes packets by node key.
//!
//! [`Relay`] is a cheap handle. A listener serves [`Relay::router`] (or hands any byte stream to
//! [`Relay::serve`]); each connection is one task that reads and writes ([`session`]); [`registry`] finds the
//! connections of a key; [`outbox`] holds what waits to be written to one connection, bounded, so that a slow
//! reader loses packets of its own and delays nobody. Behaviour: the DERP protocol, sections "login sequence" and "server behaviour".

mod http;
mod login;
mod metrics;
mod outbox;
mod registry;
mod session;
#[cfg(test)]
mod tests;
mod websocket;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use lacis_serve::log::LogLimiter;
use lacis_serve::places::{Capacity, SharedPlaces};
use lacis_wire::derp;
use lacis_wire::key::{NodeKey, RelayKey, RelayPrivateKey};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::buffers::BufferPool;
use metrics::Metrics;
use registry::Registry;
pub use websocket::WebSocketStream;

/// The answer of an [`Admission`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// May use this relay.
    Allow,
    /// May not.
    Deny,
    /// There is no answer now. Nobody is let in by it, and nobody who is in is sent away.
    Unknown,
}

impl From<bool> for Verdict {
    fn from(allow: bool) -> Self {
        if allow { Self::Allow } else { Self::Deny }
    }
}

/// Says who may use the relay. Asked for each login, after the client has proven to hold the key, and again while
/// its connection lasts ([`Relay::ask_again`]).
pub trait Admission: Send + Sync + 'static {
    /// Whether the holder of `key`, connecting from `source`, may use the relay.
    fn admit(&self, key: NodeKey, source: IpAddr) -> BoxFuture<'_, Verdict>;
}

/// Admits everybody who reaches the relay.
#[derive(Debug, Clone, Copy)]
pub struct Everybody;

impl Admission for Everybody {
    fn admit(&self, _: NodeKey, _: IpAddr) -> BoxFuture<'_, Verdict> {
        Box::pin(std::future::ready(Verdict::Allow))
    }
}

/// Admits by a question that needs no waiting, such as a look into a table in memory.
pub struct AdmitIf<F>(pub F);

impl<F> std::fmt::Debug for AdmitIf<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdmitIf")
    }
}

impl<F: Fn(&NodeKey) -> bool + Send + Sync + 'static> Admission for AdmitIf<F> {
    fn admit(&self, key: NodeKey, _: IpAddr) -> BoxFuture<'_, Verdict> {
        Box::pin(std::future::ready((self.0)(&key).into()))
    }
}

/// Sizes and times of one relay.
#[derive(Debug, Clone)]
pub struct Limits {
    /// What may wait for one client, in bytes; the oldest packets give way. A few milliseconds at a gigabit,
    /// several full windows of a stream at the round trips that relays are used for.
    pub data_queue_bytes: usize,
    /// How many disco messages may wait for one client; they go before data and are small.
    pub disco_queue_frames: usize,
    /// From the upgrade to a complete `ClientInfo`.
    pub login_timeout: Duration,
    /// A client whose connection takes nothing for this long is closed.
    pub write_timeout: Duration,
    /// How often a client hears that the relay is there.
    pub keepalive: Duration,
    /// Drawn once per connection and added to `keepalive`.
    pub keepalive_jitter: Duration,
    /// Connections that are upgraded and not logged in, in all and by address. The oldest of whoever has most gives
    /// way.
    pub logins: Capacity,
    /// Clients, in all and by address, in the same way.
    pub clients: Capacity,
    /// Connections of one node key; the oldest gives way.
    pub connections_each: usize,
    /// How often the admission is asked again about each client.
    pub ask_again: Duration,
}

/// Half of the descriptors that the programs' units allow.
const MAX_CLIENTS: usize = 32 << 10;

impl Default for Limits {
    fn default() -> Self {
        Self {
            data_queue_bytes: 512 << 10,
            disco_queue_frames: 32,
            login_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(2),
            keepalive: derp::KEEPALIVE,
            keepalive_jitter: derp::KEEPALIVE_JITTER,
            logins: Capacity { total: 1024, each: 128 },
            clients: Capacity { total: MAX_CLIENTS, each: MAX_CLIENTS },
            connections_each: 8,
            ask_again: Duration::from_mins(3),
        }
    }
}

/// A DERP relay. Clones are handles of the same relay.
#[derive(Clone)]
pub struct Relay {
    inner: Arc<Inner>,
}

struct Inner {
    key: RelayPrivateKey,
    public: RelayKey,
    admission: Arc<dyn Admission>,
    limits: Limits,
    registry: Registry,
    logins: SharedPlaces<IpAddr>,
    clients: SharedPlaces<IpAddr>,
    metrics: Metrics,
    log: LogLimiter,
    buffers: BufferPool,
    next_id: AtomicU64,
    sessions: TaskTracker,
    stop: CancellationToken,
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay").field("public", &self.inner.public).finish_non_exhaustive()
    }
}

impl Relay {
    /// A relay with this key, asking `admission` about each client.
    pub fn new(key: RelayPrivateKey, admission: Arc<dyn Admission>, limits: Limits) -> Self {
        Self {
            inner: Arc::new(Inner {
                public: key.public(),
                key,
                admission,
                logins: SharedPlaces::new(limits.logins),
                clients: SharedPlaces::new(limits.clients),
                limits,
                registry: Registry::default(),
                metrics: Metrics::default(),
                log: LogLimiter::default(),
                buffers: BufferPool::new(session::READ_BUFFER),
                next_id: AtomicU64::new(1),
                sessions: TaskTracker::new(),
                stop: CancellationToken::new(),
            }),
        }
    }

    /// The public key that clients are told.
    pub fn public_key(&self) -> RelayKey {
        self.inner.public
    }

    /// `/derp`, `/derp/probe`, `/derp/latency-check` and `/generate_204`. The listener adds
    /// [`RemoteAddr`](lacis_serve::listener::RemoteAddr) to the
    /// extensions of each request, speaks HTTP/1.1 only on these paths, and serves with upgrades enabled.
    pub fn router(&self) -> axum::Router {
        http::router(self.clone())
    }

    /// Serves one connection on which the HTTP upgrade is done, until it ends. `fresh` bytes that were read
    /// beyond the request's head must still come out of `stream`.
    pub async fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        remote: SocketAddr,
    ) {
        let inner = &self.inner;
        inner.metrics.accepts.inc();
        let id = inner.next_id.fetch_add(1, Ordering::Relaxed);
        let span = tracing::debug_span!("relay", conn = id, %remote, peer = tracing::field::Empty);
        let run = async {
            tokio::select! {
                biased;
                () = inner.stop.cancelled() => {}
                () = session::run(Arc::clone(inner), stream, remote, id) => {}
            }
        };
        run.instrument(span).await;
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.inner.sessions.spawn(work);
    }

    /// Closes every connection of a node key: when the node is deleted, expires or logs out. Returns how many.
    pub fn disconnect(&self, key: &NodeKey) -> usize {
        self.inner.registry.close(key)
    }

    /// Asks the admission again about each client, every [`Limits::ask_again`] or a little later, and disconnects whom
    /// it refuses, until dropped. One question at a time, spread over the interval: logins must not wait behind them.
    pub async fn ask_again(&self) {
        let inner = &self.inner;
        loop {
            let clients = inner.registry.clients();
            let pause = inner.limits.ask_again / u32::try_from(clients.len() + 1).unwrap_or(u32::MAX);
            for (key, source) in clients {
                tokio::time::sleep(pause).await;
                if inner.admission.admit(key, source).await == Verdict::Deny && self.disconnect(&key) > 0 {
                    inner.metrics.refused_later.inc();
                    tracing::info!(peer = %key, "a client may not use this relay any more: disconnected");
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Whether a node key is connected now.
    pub fn is_connected(&self, key: &NodeKey) -> bool {
        self.inner.registry.find(key).is_some()
    }

    /// How many connections are logged in.
    pub fn connections(&self) -> usize {
        usize::try_from(self.inner.metrics.connections.get()).unwrap_or(0)
    }

    /// Adds the relay's counters, named `lacis_relay_…`, to a registry.
    pub fn register_metrics(&self, registry: &mut prometheus_client::registry::Registry) {
        self.inner.metrics.register(registry);
    }

    /// Ends all connections and waits until their tasks are done.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.sessions.close();
        self.inner.sessions.wait().await;
    }
}

/// The address used when a listener told none.
const UNKNOWN_REMOTE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
