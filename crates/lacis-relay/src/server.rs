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

/// The address a connection came from, which the listener puts into the request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteAddr(pub SocketAddr);

/// The answer of an [`Admission`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// May use this relay.
    Allow,
    /// May not.
    Deny,
}

impl From<bool> for Verdict {
    fn from(allow: bool) -> Self {
        if allow { Self::Allow } else { Self::Deny }
    }
}

/// Says who may use the relay. Asked once for each login, after the client has proven to hold the key.
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
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            data_queue_bytes: 512 << 10,
            disco_queue_frames: 32,
            login_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(2),
            keepalive: derp::KEEPALIVE,
            keepalive_jitter: derp::KEEPALIVE_JITTER,
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
    metrics: Metrics,
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
                limits,
                registry: Registry::default(),
                metrics: Metrics::default(),
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

    /// `/derp`, `/derp/probe`, `/derp/latency-check` and `/generate_204`. The listener adds [`RemoteAddr`] to the
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

/// Sets what a relay wants of an accepted TCP connection: no delay for small packets, and an end within 15 s when
/// the far side stops acknowledging (a reader that is gone holds a queue until then).
pub fn tune_socket(stream: &tokio::net::TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT))?;
    socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE))
}

/// As the stock relay has it.
#[cfg(target_os = "linux")]
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(15);
/// As the stock relay has it; the protocol's own keep-alive finds dead peers sooner.
const TCP_KEEPALIVE: Duration = Duration::from_mins(10);
