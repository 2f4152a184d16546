//! `/ts2021`: from an HTTP upgrade to Noise to HTTP/2, served by the inner router.
//!
//! The client's first Noise frame comes with the request, so a client that cannot be served is told so
//! as an HTTP error. Native clients use POST and an upgrade; browsers GET and a WebSocket, with the
//! frame in the query. After that the connection belongs to a task of its own: the machine key that
//! the handshake proved goes into the extensions of each request as a [`Session`].

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequestParts as _, Request, State};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderName, HeaderValue, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use lacis_relay::server::{RemoteAddr, WebSocketStream};
use lacis_wire::MIN_CAPABILITY_VERSION;
use lacis_wire::control::{EarlyNoise, to_json};
use lacis_wire::io::{NoiseStream, encode_early};
use lacis_wire::key::{ChallengePrivateKey, MachinePrivateKey};
use lacis_wire::noise::{RESPONSE_LEN, Responder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http1::call;
use crate::inner::Session;

const PROTOCOL: &str = "tailscale-control-protocol";
const HANDSHAKE: HeaderName = HeaderName::from_static("x-tailscale-handshake");
/// From the 101 to the client's first request; one that never asks anything is not kept.
const FIRST_REQUEST: Duration = Duration::from_secs(30);
/// A client that is gone without a word is noticed by pings that nobody answers: behind a proxy its connection stays.
const PING_EVERY: Duration = Duration::from_mins(1);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// A client has a long poll, lite updates and follow-ups at once. Times the limit of a body it is what a stranger can
/// make one session hold.
const MAX_STREAMS: u32 = 128;
/// Noise records are 4 KiB; whoever puts many of them into one message has the patience to make several.
const MAX_MESSAGE: usize = 256 << 10;
/// Bodies of requests are small.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// What may wait for one stream: a first map can be large, but is taken piece by piece.
const SEND_BUFFER: usize = 64 << 10;
/// Heads of requests are small.
const MAX_HEADERS: u32 = 16 << 10;

/// The Noise side of the server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Noise {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    key: MachinePrivateKey,
    inner: axum::Router,
    sessions: TaskTracker,
    stop: CancellationToken,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct Metrics {
    open: Gauge,
    accepted: Counter,
    refused: Counter,
}

impl Noise {
    /// Serves `inner` to clients that know `key`'s public half, until `stop`.
    pub fn new(key: MachinePrivateKey, inner: axum::Router, stop: CancellationToken) -> Self {
        let sessions = TaskTracker::new();
        Self { shared: Arc::new(Shared { key, inner, sessions, stop, metrics: Metrics::default() }) }
    }

    /// Adds the sessions' counters to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        let metrics = &self.shared.metrics;
        let r = registry.sub_registry_with_prefix("lacis_noise");
        r.register("sessions", "Open Noise sessions", metrics.open.clone());
        r.register("accepted", "Noise handshakes made", metrics.accepted.clone());
        r.register("refused", "Noise handshakes refused", metrics.refused.clone());
    }

    /// Waits until all sessions have ended, which they do some time after the stop.
    pub async fn wait(&self) {
        self.shared.sessions.close();
        self.shared.sessions.wait().await;
    }

    fn refuse(&self, status: StatusCode, text: impl Into<String>) -> Response {
        self.shared.metrics.refused.inc();
        (status, text.into()).into_response()
    }

    /// Reads the client's first frame from its base64 form, or says why not.
    fn handshake(&self, text: Option<&str>) -> Result<Responder, String> {
        let text = text.ok_or("the Noise handshake is missing\n")?;
        let frame = STANDARD.decode(text).map_err(|_| "the Noise handshake is not base64\n")?;
        let responder = Responder::read(&self.shared.key, &frame).map_err(|error| format!("{error}\n"))?;
        if responder.version() < MIN_CAPABILITY_VERSION {
            return Err(format!(
                "this client is too old: it speaks version {}, {MIN_CAPABILITY_VERSION} is needed (Tailscale 1.80)\n",
                responder.version()
            ));
        }
        Ok(responder)
    }

    /// Serves one session in a task of its own.
    fn spawn<S, F>(&self, responder: Responder, remote: SocketAddr, early: bool, stream: F)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: Future<Output = Option<S>> + Send + 'static,
    {
        let this = self.clone();
        self.shared.sessions.spawn(async move {
            let machine = responder.machine();
            let (response, session) = match responder.respond() {
                Ok(made) => made,
                Err(error) => return tracing::debug!(%remote, %error, "Noise handshake"),
            };
            let Some(stream) = stream.await else { return };
            let tag = Session { machine, version: session.version, remote };
            let stream = NoiseStream::new(stream, session, &[]);
            this.shared.metrics.accepted.inc();
            this.shared.metrics.open.inc();
            this.serve(stream, &response, early, tag).await;
            this.shared.metrics.open.dec();
        });
    }

    async fn serve<S>(
        &self,
        mut stream: NoiseStream<S>,
        response: &[u8; RESPONSE_LEN],
        early: bool,
        session: Session,
    ) where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (machine, remote) = (session.machine, session.remote);
        // Response, early payload and the first HTTP/2 frames leave together.
        stream.prepend_clear(response);
        let sent = if early {
            let challenge = ChallengePrivateKey::generate().public();
            let payload = to_json(&EarlyNoise { node_key_challenge: challenge });
            stream.write_all(&encode_early(&payload)).await
        } else {
            stream.flush().await
        };
        if let Err(error) = sent {
            return tracing::debug!(%remote, %machine, %error, "Noise session ended at once");
        }
        let asked = Arc::new(AtomicBool::new(false));
        let service = hyper::service::service_fn(|request: http::Request<Incoming>| {
            asked.store(true, Ordering::Relaxed);
            call(self.shared.inner.clone(), session, request)
        });
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .max_concurrent_streams(MAX_STREAMS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let silent = tokio::time::sleep(FIRST_REQUEST);
        tokio::pin!(silent);
        let mut waiting = true;
        let ended = loop {
            tokio::select! {
                ended = &mut connection => break ended,
                () = &mut silent, if waiting => {
                    waiting = false;
                    if !asked.load(Ordering::Relaxed) {
                        return tracing::debug!(%remote, %machine, "no request came over the Noise session");
                    }
                }
                () = self.shared.stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    break connection.await;
                }
            }
        };
        match ended {
            Ok(()) => tracing::debug!(%remote, %machine, "Noise session ended"),
            Err(error) => {
                tracing::debug!(%remote, %machine, error = &error as &dyn std::error::Error, "Noise session ended");
            }
        }
    }
}

/// `POST /ts2021`.
pub(crate) async fn post(State(noise): State<Noise>, mut request: Request) -> Response {
    let header = |name| request.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let Some(upgrade) = header(UPGRADE) else {
        let text = "Upgrade: tailscale-control-protocol is missing (does a proxy in front strip it?)\n";
        return noise.refuse(StatusCode::BAD_REQUEST, text);
    };
    if !upgrade.eq_ignore_ascii_case(PROTOCOL) {
        return noise.refuse(StatusCode::BAD_REQUEST, "unknown protocol to upgrade to\n");
    }
    let responder = match noise.handshake(header(HANDSHAKE)) {
        Ok(responder) => responder,
        Err(why) => return noise.refuse(StatusCode::BAD_REQUEST, why),
    };
    let remote = remote(&request);
    let upgrading = hyper::upgrade::on(&mut request);
    noise.spawn(responder, remote, true, async move {
        match tokio::time::timeout(FIRST_REQUEST, upgrading).await {
            Ok(Ok(upgraded)) => Some(TokioIo::new(upgraded)),
            Ok(Err(error)) => {
                tracing::debug!(%remote, %error, "no upgrade");
                None
            }
            Err(_) => None,
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static(PROTOCOL));
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response
}

#[derive(Debug, serde::Deserialize)]
struct WebSocketQuery {
    #[serde(rename = "X-Tailscale-Handshake")]
    handshake: Option<String>,
}

/// `GET /ts2021`: the same inside the binary messages of a WebSocket, without the early payload.
pub(crate) async fn get(State(noise): State<Noise>, request: Request) -> Response {
    let remote = remote(&request);
    let (mut parts, _) = request.into_parts();
    let upgrade = match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => {
            upgrade.max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE).protocols([PROTOCOL])
        }
        Err(rejection) => return rejection.into_response(),
    };
    if upgrade.selected_protocol().is_none() {
        let text = "the WebSocket must offer the protocol tailscale-control-protocol\n";
        return noise.refuse(StatusCode::BAD_REQUEST, text);
    }
    let query = axum::extract::Query::<WebSocketQuery>::try_from_uri(&parts.uri);
    let handshake = query.ok().and_then(|query| query.0.handshake);
    let responder = match noise.handshake(handshake.as_deref()) {
        Ok(responder) => responder,
        Err(why) => return noise.refuse(StatusCode::BAD_REQUEST, why),
    };
    upgrade.on_upgrade(move |socket| async move {
        noise.spawn(responder, remote, false, async move { Some(WebSocketStream::new(socket)) });
    })
}

fn remote(request: &Request) -> SocketAddr {
    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
    request.extensions().get::<RemoteAddr>().map_or(unknown, |remote| remote.0)
}
