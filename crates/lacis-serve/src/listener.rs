//! Listening, and HTTP/1.1 for strangers: limits on everything that has not been upgraded.
//!
//! A connection has a bounded time for its TLS handshake, for each request's head, for each request and in all, and
//! there is a bounded number of such connections, in all and by address ([`crate::places`]). Behind a trusted proxy
//! the client's own address counts as soon as a request's head names it. Upgraded connections (Noise, DERP) belong to
//! their own tasks, which count them themselves.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::response::IntoResponse as _;
use http::{Request, StatusCode};
use hyper::body::Incoming;
use ipnet::IpNet;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::call;
use crate::http1::{self, Deadlines};
use crate::log::LogLimiter;
use crate::places::{Capacity, Place, SharedPlaces, prefix};
use crate::proxy::{client_address, is_trusted};
use crate::readahead::ReadAhead;

/// Connections that are not upgraded (yet). A mass reconnect passes each in milliseconds.
const MAX_CONNECTIONS: usize = 4096;
/// Of these, from one address: many clients may share one.
const MAX_CONNECTIONS_EACH: usize = 256;
/// For a TLS handshake, and for the head of a request (also the next one on a kept connection).
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For the whole of a request, its body included; an upgraded connection is answered at once.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// For all requests of one connection.
const MAX_AGE: Duration = Duration::from_mins(10);
/// Pause after the system could not give a connection (out of descriptors).
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// As the stock relay has it.
#[cfg(target_os = "linux")]
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(15);
/// As the stock relay has it; the protocols' own keep-alives find dead peers sooner.
const TCP_KEEPALIVE: Duration = Duration::from_mins(10);

/// The address a connection came from, which the listener puts into the extensions of each request: the client's own,
/// as far as trusted proxies name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteAddr(pub SocketAddr);

/// What connections that are not upgraded may take.
#[derive(Debug, Clone, Copy)]
pub struct HttpLimits {
    /// How many there may be.
    pub connections: Capacity,
    /// For a TLS handshake, and for the whole head of a request. An idle connection is closed after it.
    pub head: Duration,
    /// For a request, from its head to its answer.
    pub request: Duration,
    /// For a connection, however many requests it has.
    pub age: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections: Capacity { total: MAX_CONNECTIONS, each: MAX_CONNECTIONS_EACH },
            head: HEAD_TIMEOUT,
            request: REQUEST_TIMEOUT,
            age: MAX_AGE,
        }
    }
}

/// Whom a connection counts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Holder {
    Address(IpAddr),
    /// A connection of a trusted proxy that has not said for whom: each counts for itself.
    Unnamed(u64),
}

/// What the listeners of one router share.
#[derive(Debug)]
pub struct Listeners {
    router: axum::Router,
    tls: Option<Arc<ServerConfig>>,
    trusted_proxies: Vec<IpNet>,
    limits: HttpLimits,
    places: SharedPlaces<Holder>,
    unnamed: AtomicU64,
    log: Arc<LogLimiter>,
    stop: CancellationToken,
    connections: TaskTracker,
}

impl Listeners {
    /// Plain HTTP with the default limits, until `stop`.
    pub fn new(router: axum::Router, log: Arc<LogLimiter>, stop: CancellationToken) -> Self {
        let limits = HttpLimits::default();
        Self {
            router,
            tls: None,
            trusted_proxies: Vec::new(),
            limits,
            places: SharedPlaces::new(limits.connections),
            unnamed: AtomicU64::new(0),
            log,
            stop,
            connections: TaskTracker::new(),
        }
    }

    /// With TLS, if given.
    pub fn tls(mut self, tls: Option<Arc<ServerConfig>>) -> Self {
        self.tls = tls;
        self
    }

    /// Proxies whose `X-Forwarded-For` is believed.
    pub fn trusted_proxies(mut self, trusted: Vec<IpNet>) -> Self {
        self.trusted_proxies = trusted;
        self
    }

    /// With other limits.
    pub fn limits(mut self, limits: HttpLimits) -> Self {
        self.limits = limits;
        self.places = SharedPlaces::new(limits.connections);
        self
    }

    /// Accepts until the stop, then waits for the connections that are not upgraded.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, remote)) => {
                    let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
                    self.connections.spawn(Arc::clone(&self).connection(stream, remote));
                }
                Err(error) => {
                    if let Some(suppressed) = self.log.allow("accept", ()) {
                        tracing::warn!(%error, suppressed, "cannot accept a connection");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        self.connections.close();
        self.connections.wait().await;
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, remote: SocketAddr) {
        let place = self.places.enter(self.holder(remote, remote));
        tokio::select! {
            biased;
            () = place.evicted() => {
                let source = prefix(remote.ip());
                if let Some(suppressed) = self.log.allow("connection evicted", source) {
                    tracing::warn!(%remote, suppressed, "too many open connections, an old one is closed");
                }
            }
            () = self.handshake(stream, remote, &place) => {}
        }
    }

    /// Whom a connection from `remote` counts for while it serves `client`.
    fn holder(&self, remote: SocketAddr, client: SocketAddr) -> Holder {
        if client == remote && is_trusted(remote.ip(), &self.trusted_proxies) {
            return Holder::Unnamed(self.unnamed.fetch_add(1, Ordering::Relaxed));
        }
        Holder::Address(prefix(client.ip()))
    }

    async fn handshake(&self, stream: TcpStream, remote: SocketAddr, place: &Place<Holder>) {
        if let Err(error) = tune_socket(&stream) {
            tracing::debug!(%remote, %error, "socket options");
        }
        let Some(tls) = &self.tls else { return self.requests(stream, remote, place).await };
        let handshake = tokio_rustls::TlsAcceptor::from(Arc::clone(tls)).accept(ReadAhead::new(stream));
        match tokio::time::timeout(self.limits.head, handshake).await {
            Ok(Ok(stream)) => self.requests(stream, remote, place).await,
            Ok(Err(error)) => tracing::debug!(%remote, %error, "no TLS"),
            Err(_) => tracing::debug!(%remote, "no TLS in time"),
        }
    }

    async fn requests<S>(&self, stream: S, remote: SocketAddr, place: &Place<Holder>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let service = hyper::service::service_fn(|request: Request<Incoming>| {
            let client = client_address(remote, request.headers(), &self.trusted_proxies);
            if client != remote {
                place.rekey(self.holder(remote, client));
            }
            place.set_busy(true);
            let answer = call(self.router.clone(), RemoteAddr(client), request);
            async move {
                let answer = tokio::time::timeout(self.limits.request, answer).await;
                place.set_busy(false);
                if client != remote {
                    // The next request may be another client's.
                    place.rekey(self.holder(remote, remote));
                }
                match answer {
                    Ok(answer) => answer,
                    Err(_) => Ok(StatusCode::REQUEST_TIMEOUT.into_response()),
                }
            }
        });
        let deadlines =
            Deadlines { head: self.limits.head, age: Some(self.limits.age), grace: self.limits.request };
        if let Err(error) = http1::serve(stream, service, deadlines, &self.stop).await {
            tracing::debug!(%remote, error = &*error as &dyn std::error::Error, "HTTP connection ended");
        }
    }
}

/// Sets what a server wants of an accepted TCP connection: no delay for small packets, and an end within 15 s when
/// the far side stops acknowledging (a reader that is gone holds a queue until then).
pub fn tune_socket(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT))?;
    socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE))
}
