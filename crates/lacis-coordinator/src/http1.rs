//! Listening, and HTTP/1.1 for strangers: limits on everything that has not been upgraded.
//!
//! A connection has a bounded time for its TLS handshake and for each request's head, and there is a
//! bounded number of such connections. Upgraded connections (Noise, DERP) belong to their own tasks
//! and have none of these limits.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use ipnet::IpNet;
use lacis_relay::bind;
use lacis_relay::readahead::ReadAhead;
use lacis_relay::server::{RemoteAddr, tune_socket};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::Error;
use crate::proxy::client_address;

/// For a TLS handshake, and for the head of a request (also the next one on a kept connection).
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For the whole of a request, its body included; an upgraded connection is answered at once.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest head of any client is about 1 KiB.
const MAX_HEAD: usize = 16 << 10;
/// Connections that are not upgraded (yet). A mass reconnect passes each in milliseconds.
const MAX_CONNECTIONS: usize = 4096;
/// Pause after the system could not give a connection (out of descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Binds a TCP listener that a key of the configuration names; `all` as for [`bind::tcp`].
pub(crate) fn listen(
    address: SocketAddr,
    all: &[SocketAddr],
    what: &'static str,
    key: &'static str,
) -> Result<TcpListener, Error> {
    bind::tcp(address, all).map_err(|source| Error::Listen { address, what, key, source })
}

/// Calls a router with something added to each request's extensions.
///
/// Cheaper for a connection than a layer, which would copy the router's table.
pub(crate) async fn call<T: Clone + Send + Sync + 'static>(
    router: axum::Router,
    extension: T,
    request: Request<Incoming>,
) -> Result<Response, Infallible> {
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(extension);
    router.oneshot(request).await
}

/// What the listeners of one router share.
#[derive(Debug)]
pub(crate) struct Listeners {
    pub(crate) router: axum::Router,
    pub(crate) tls: Option<Arc<ServerConfig>>,
    pub(crate) trusted_proxies: Vec<IpNet>,
    pub(crate) stop: CancellationToken,
    slots: Arc<Semaphore>,
    connections: TaskTracker,
}

impl Listeners {
    pub(crate) fn new(router: axum::Router, stop: CancellationToken) -> Self {
        Self {
            router,
            tls: None,
            trusted_proxies: Vec::new(),
            stop,
            slots: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            connections: TaskTracker::new(),
        }
    }

    /// Accepts until the stop, then waits for the connections that are not upgraded.
    pub(crate) async fn serve(self: Arc<Self>, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            let (stream, remote) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
                tracing::warn!(%remote, limit = MAX_CONNECTIONS, "too many open connections, this one is closed");
                continue;
            };
            let this = Arc::clone(&self);
            self.connections.spawn(async move {
                this.connection(stream, remote).await;
                drop(slot);
            });
        }
        drop(listener);
        self.connections.close();
        self.connections.wait().await;
    }

    async fn connection(&self, stream: TcpStream, remote: SocketAddr) {
        if let Err(error) = tune_socket(&stream) {
            tracing::debug!(%remote, %error, "socket options");
        }
        let Some(tls) = &self.tls else { return self.requests(stream, remote).await };
        let handshake = tokio_rustls::TlsAcceptor::from(Arc::clone(tls)).accept(ReadAhead::new(stream));
        match tokio::time::timeout(HEAD_TIMEOUT, handshake).await {
            Ok(Ok(stream)) => self.requests(stream, remote).await,
            Ok(Err(error)) => tracing::debug!(%remote, %error, "no TLS"),
            Err(_) => tracing::debug!(%remote, "no TLS in time"),
        }
    }

    async fn requests<S>(&self, stream: S, remote: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let service = hyper::service::service_fn(|request: Request<Incoming>| {
            let client = client_address(remote, request.headers(), &self.trusted_proxies);
            let answer = call(self.router.clone(), RemoteAddr(client), request);
            async move {
                match tokio::time::timeout(REQUEST_TIMEOUT, answer).await {
                    Ok(answer) => answer,
                    Err(_) => Ok(StatusCode::REQUEST_TIMEOUT.into_response()),
                }
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = &mut connection => ended,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%remote, error = &error as &dyn std::error::Error, "HTTP connection ended");
        }
    }
}
