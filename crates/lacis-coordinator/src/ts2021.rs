//! `/ts2021`: from an HTTP upgrade to Noise to HTTP/2, served by the inner router.
//!
//! The client's first Noise frame comes with the request, so a client that cannot be served is told so
//! as an HTTP error. Native clients use POST and an upgrade; browsers GET and a WebSocket, with the
//! frame in the query. After that the connection belongs to a task of its own: the machine key that
//! the handshake proved goes into the extensions of each request as a [`Session`].
//!
//! Anybody can make a machine key. A session whose machine has no node has one of a few places, by address, and
//! little memory; one of a node has one of the node's own places.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequestParts as _, Request, State};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderName, HeaderValue, StatusCode};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use lacis_relay::server::WebSocketStream;
use lacis_serve::listener::RemoteAddr;
use lacis_serve::places::{Capacity, Place, SharedPlaces, prefix};
use lacis_wire::MIN_CAPABILITY_VERSION;
use lacis_wire::control::{EarlyNoise, to_json};
use lacis_wire::io::{NoiseStream, encode_early};
use lacis_wire::key::{ChallengePrivateKey, MachineKey, MachinePrivateKey};
use lacis_wire::noise::{RESPONSE_LEN, Responder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::core::Core;
use crate::inner::{MAX_MAP_BODY, MAX_REGISTER_BODY, Session};

const PROTOCOL: &str = "tailscale-control-protocol";
const HANDSHAKE: HeaderName = HeaderName::from_static("x-tailscale-handshake");
/// From the 101 to the client's first request; one that never asks anything is not kept.
const FIRST_REQUEST: Duration = Duration::from_secs(30);
/// A client that is gone without a word is noticed by pings that nobody answers: behind a proxy its connection stays. Often
/// enough that the proxy does not cut a session that waits (nginx: 60 s).
const PING_EVERY: Duration = Duration::from_secs(40);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Sessions of machines that have no node: they sign in, or wait for approval.
const STRANGERS: Capacity = Capacity { total: 512, each: 128 };
/// Sessions of each machine that has a node. Clients have one, and a second one while the first is not known to be
/// dead.
const MAX_SESSIONS_OF_NODE: usize = 8;
/// A client has a long poll, lite updates and follow-ups at once.
const MAX_STREAMS: u32 = 128;
/// Requests at a time of a machine that has no node; it has a registration and its follow-up. HTTP/2 could say so, but
/// not take it back when the machine has joined.
const MAX_REQUESTS_OF_STRANGER: usize = 8;
/// For the body of a request, and for those before it.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Noise records are 4 KiB; whoever puts many of them into one message has the patience to make several.
const MAX_MESSAGE: usize = 64 << 10;
/// Of one WebSocket, allocated as long as it is open.
const READ_BUFFER: usize = 16 << 10;
/// Bodies of requests are small. What is not read yet is bounded by these.
const CONNECTION_WINDOW_OF_STRANGER: u32 = 128 << 10;
const STREAM_WINDOW_OF_STRANGER: u32 = 64 << 10;
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
    core: Core,
    inner: axum::Router,
    sessions: TaskTracker,
    last_session: AtomicU64,
    strangers: SharedPlaces<IpAddr>,
    nodes: SharedPlaces<MachineKey>,
    stop: CancellationToken,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct Metrics {
    open: Gauge,
    accepted: Counter,
    refused: Counter,
    evicted: Counter,
}

/// What a session counts as.
enum Seat {
    Stranger(Place<IpAddr>),
    Node(Place<MachineKey>),
}

impl Seat {
    async fn evicted(&self) {
        match self {
            Self::Stranger(place) => place.evicted().await,
            Self::Node(place) => place.evicted().await,
        }
    }

    fn set_busy(&self, busy: bool) {
        match self {
            Self::Stranger(place) => place.set_busy(busy),
            Self::Node(place) => place.set_busy(busy),
        }
    }
}

/// What the requests of one session share.
struct Requests {
    session: Session,
    /// Whether the machine has a node.
    is_node: AtomicBool,
    asked: AtomicBool,
    running: AtomicUsize,
    /// Held while a body is read.
    body: tokio::sync::Mutex<()>,
    /// Some of the above has changed.
    changed: Notify,
}

impl Noise {
    /// Serves `inner` to clients that know `key`'s public half, until `stop`. `core` knows which machines have nodes.
    pub fn new(key: MachinePrivateKey, core: Core, inner: axum::Router, stop: CancellationToken) -> Self {
        Self {
            shared: Arc::new(Shared {
                key,
                core,
                inner,
                sessions: TaskTracker::new(),
                last_session: AtomicU64::new(0),
                strangers: SharedPlaces::new(STRANGERS),
                nodes: SharedPlaces::new(Capacity { total: usize::MAX, each: MAX_SESSIONS_OF_NODE }),
                stop,
                metrics: Metrics::default(),
            }),
        }
    }

    /// Adds the sessions' counters to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        let metrics = &self.shared.metrics;
        let r = registry.sub_registry_with_prefix("lacis_noise");
        r.register("sessions", "Open Noise sessions", metrics.open.clone());
        r.register("accepted", "Noise handshakes made", metrics.accepted.clone());
        r.register("refused", "Noise handshakes refused", metrics.refused.clone());
        r.register("evicted", "Noise sessions that gave way to newer ones", metrics.evicted.clone());
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
            let seat = this.seat(&machine, remote);
            let Some(stream) = stream.await else { return };
            let number = this.shared.last_session.fetch_add(1, Ordering::Relaxed);
            let tag = Session { machine, version: session.version, remote, number };
            let stream = NoiseStream::new(stream, session, &[]);
            this.shared.metrics.accepted.inc();
            this.shared.metrics.open.inc();
            this.serve(stream, &response, early, tag, seat).await;
            this.shared.metrics.open.dec();
        });
    }

    async fn serve<S>(
        &self,
        mut stream: NoiseStream<S>,
        response: &[u8; RESPONSE_LEN],
        early: bool,
        session: Session,
        mut seat: Seat,
    ) where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (machine, remote) = (session.machine, session.remote);
        // Response, early payload and the first HTTP/2 frames leave together.
        stream.prepend_clear(response);
        let begin = async {
            if early {
                let challenge = ChallengePrivateKey::generate().public();
                let payload = to_json(&EarlyNoise { node_key_challenge: challenge });
                stream.write_all(&encode_early(&payload)).await
            } else {
                stream.flush().await
            }
        };
        match tokio::time::timeout(FIRST_REQUEST, begin).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                return tracing::debug!(%remote, %machine, %error, "Noise session ended at once");
            }
            Err(_) => return tracing::debug!(%remote, %machine, "the Noise session was not taken"),
        }
        let is_node = matches!(seat, Seat::Node(_));
        let requests = Arc::new(Requests {
            session,
            is_node: AtomicBool::new(is_node),
            asked: AtomicBool::new(false),
            running: AtomicUsize::new(0),
            body: tokio::sync::Mutex::new(()),
            changed: Notify::new(),
        });
        let service = hyper::service::service_fn(|request: http::Request<Incoming>| {
            self.clone().request(Arc::clone(&requests), request)
        });
        let (window, connection_window) = if is_node {
            (STREAM_WINDOW, CONNECTION_WINDOW)
        } else {
            (STREAM_WINDOW_OF_STRANGER, CONNECTION_WINDOW_OF_STRANGER)
        };
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .max_concurrent_streams(MAX_STREAMS)
            .initial_stream_window_size(window)
            .initial_connection_window_size(connection_window)
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
                    if !requests.asked.load(Ordering::Relaxed) {
                        return tracing::debug!(%remote, %machine, "no request came over the Noise session");
                    }
                }
                () = requests.changed.notified() => {
                    if matches!(seat, Seat::Stranger(_)) && requests.is_node.load(Ordering::Relaxed) {
                        seat = Seat::Node(self.shared.nodes.enter(machine));
                    }
                    seat.set_busy(requests.running.load(Ordering::Relaxed) > 0);
                }
                () = seat.evicted() => {
                    self.shared.metrics.evicted.inc();
                    return tracing::debug!(%remote, %machine, "too many Noise sessions, an old one is closed");
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

    /// A place for a session of this machine.
    fn seat(&self, machine: &MachineKey, remote: SocketAddr) -> Seat {
        if self.shared.core.knows_machine(machine) {
            Seat::Node(self.shared.nodes.enter(*machine))
        } else {
            Seat::Stranger(self.shared.strangers.enter(prefix(remote.ip())))
        }
    }

    /// Answers one request of a session.
    async fn request(
        self,
        requests: Arc<Requests>,
        request: http::Request<Incoming>,
    ) -> Result<Response, Infallible> {
        requests.asked.store(true, Ordering::Relaxed);
        let _running = Running::of(Arc::clone(&requests));
        let was_node = requests.is_node.load(Ordering::Relaxed);
        if !was_node && requests.running.load(Ordering::Relaxed) > MAX_REQUESTS_OF_STRANGER {
            return Ok(StatusCode::TOO_MANY_REQUESTS.into_response());
        }
        let limit = if was_node { MAX_MAP_BODY } else { MAX_REGISTER_BODY };
        let (parts, body) = request.into_parts();
        // One at a time: what a session can make the program hold is one body.
        let read = tokio::time::timeout(BODY_TIMEOUT, async {
            let _turn = requests.body.lock().await;
            Limited::new(body, limit).collect().await
        });
        let body = match read.await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                return Ok(StatusCode::PAYLOAD_TOO_LARGE.into_response());
            }
            Ok(Err(_)) => return Ok(StatusCode::BAD_REQUEST.into_response()),
            Err(_) => return Ok(StatusCode::REQUEST_TIMEOUT.into_response()),
        };
        let mut request = http::Request::from_parts(parts, Body::from(body));
        request.extensions_mut().insert(requests.session);
        let answer = self.shared.inner.clone().oneshot(request).await;
        if !was_node && self.shared.core.knows_machine(&requests.session.machine) {
            requests.is_node.store(true, Ordering::Relaxed);
            requests.changed.notify_one();
        }
        answer
    }
}

/// A request that is being answered. Map streams count only until their first frame.
struct Running(Arc<Requests>);

impl Running {
    fn of(requests: Arc<Requests>) -> Self {
        if requests.running.fetch_add(1, Ordering::Relaxed) == 0 {
            requests.changed.notify_one();
        }
        Self(requests)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.changed.notify_one();
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
        Ok(upgrade) => upgrade
            .max_message_size(MAX_MESSAGE)
            .max_frame_size(MAX_MESSAGE)
            .read_buffer_size(READ_BUFFER)
            .protocols([PROTOCOL]),
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
