//! The control session: one task that keeps this node registered and follows its map stream.
//!
//! It dials, registers, opens the stream and sends what this node says of itself ([`Announcement`]) as it changes,
//! all over one HTTP/2 connection inside Noise, and starts again with growing pauses whenever that breaks (the
//! control dossier, sections 5 to 7 and 16). It decides nothing about logins: what the server wants is told to the
//! engine as a [`ControlEvent`], which keeps this task, starts another, or none.

mod ping;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use lacis_wire::CURRENT_CAPABILITY_VERSION;
use lacis_wire::control::{
    Hostinfo, MapRequest, MapResponse, RegisterAuth, RegisterRequest, RegisterResponse, to_json,
};
use lacis_wire::io::{ControlClient, ControlDialer, DialError, Proxies};
use lacis_wire::key::{DiscoKey, LockKey, MachineKey, MachinePrivateKey, NodeKey, NodePrivateKey};
use lacis_wire::mapframe::{self, Compression};
use lacis_wire::text;
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;
use zeroize::Zeroizing;

use lacis_serve::log::chain;

/// A stream that says nothing for this long is dead: servers send keep-alives every minute or so.
const STREAM_SILENCE: Duration = Duration::from_mins(2);
/// Answers other than a map stream. A follow-up waits for a person and has no limit.
const REPLY: Duration = Duration::from_secs(30);
/// The largest answer to a registration.
const REPLY_BYTES: usize = 1 << 20;
/// The longest pause between attempts, and what a busy server's advice may be at most.
const MAX_PAUSE: Duration = Duration::from_secs(30);
const MAX_RETRY_AFTER: Duration = Duration::from_hours(1);
/// A session that lasted this long makes the next pauses short again; a server that ends each soon is spared.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// Events that may wait for the engine; the stream is read no further then. Few, since one can be a whole map.
const MAX_EVENTS: usize = 2;
/// Pings of the server that are answered at a time; more are dropped.
const MAX_PINGS: usize = 4;
/// From the name of the server to its answer that the key has expired; the user waits for it.
const LOGOUT: Duration = Duration::from_secs(10);

/// A pre-auth key: not printed, and wiped when it is used up.
#[derive(Clone)]
pub(crate) struct AuthKey(Zeroizing<String>);

impl AuthKey {
    pub(crate) fn new(key: String) -> Self {
        Self(Zeroizing::new(key))
    }
}

impl std::fmt::Debug for AuthKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Who registers, and where.
#[derive(Debug)]
pub(crate) struct ControlConfig {
    pub url: String,
    pub machine_key: MachinePrivateKey,
    pub node_key: NodePrivateKey,
    pub old_node_key: Option<NodeKey>,
    pub lock_key: LockKey,
    pub auth_key: Option<AuthKey>,
    /// As found the last time.
    pub server_key: Option<MachineKey>,
    /// The server may have another key, also over http: the user said so.
    pub accept_new_key: bool,
    pub server_address: Option<IpAddr>,
    pub fwmark: Option<u32>,
    pub proxies: Arc<Proxies>,
}

/// What this node says of itself. Sent when it changes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Announcement {
    pub hostinfo: Hostinfo,
    pub endpoints: Vec<SocketAddr>,
    pub endpoint_types: Vec<u8>,
    pub disco_key: Option<DiscoKey>,
}

impl Announcement {
    /// The home region in it; 0 while there is none.
    pub(crate) fn home(&self) -> u16 {
        self.hostinfo.net_info.as_ref().map_or(0, |info| info.preferred_derp)
    }

    /// Is there something new for the server? Latencies alone are not: they differ each time they are measured, and
    /// some servers tell every peer of every change.
    fn differs_from(&self, told: &Self) -> bool {
        if self == told {
            return false;
        }
        let mut same_latencies = told.clone();
        if let (Some(own), Some(info)) = (&self.hostinfo.net_info, &mut same_latencies.hostinfo.net_info) {
            info.derp_latency.clone_from(&own.derp_latency);
        }
        *self != same_latencies
    }
}

/// What the engine hears.
#[derive(Debug)]
pub(crate) enum ControlEvent {
    /// A session stands.
    Connected {
        server_key: MachineKey,
        /// None through a proxy.
        address: Option<SocketAddr>,
    },
    /// The server knows us; the map follows.
    Registered(Box<RegisterResponse>),
    /// A person must sign in there. The task goes on and waits for it.
    AuthUrl(String),
    /// The server refuses this login for the reason given. The task has ended.
    Refused(String),
    /// The node key has expired: only a login with a new one helps. The task has ended.
    KeyExpired,
    /// A new stream: frames describe the network from nothing.
    StreamStarted,
    Frame(Box<MapResponse>),
    /// The server has what we say of ourselves, with this home region.
    Announced {
        home: u16,
    },
    /// Not connected, and why.
    Trouble {
        error: String,
        hopeless: bool,
    },
}

/// A running control session. Dropping it ends the session.
#[derive(Debug)]
pub(crate) struct Control {
    pub events: mpsc::Receiver<ControlEvent>,
    announce: watch::Sender<Announcement>,
    moved: Arc<Notify>,
    _task: AbortOnDropHandle<()>,
}

impl Control {
    pub(crate) fn start(config: ControlConfig, announcement: Announcement) -> Self {
        let (events, receiver) = mpsc::channel(MAX_EVENTS);
        let (announce, announcement) = watch::channel(announcement);
        let moved = Arc::new(Notify::new());
        let task = Task { config, events, announcement, registered: false };
        let task = tokio::spawn(task.run(Arc::clone(&moved)));
        Self { events: receiver, announce, moved, _task: AbortOnDropHandle::new(task) }
    }

    /// The host's network is another one: what is connected may hang for long, so it is connected anew.
    pub(crate) fn redial(&self) {
        self.moved.notify_one();
    }

    /// Says this from now on.
    pub(crate) fn announce(&self, announcement: Announcement) {
        self.announce.send_if_modified(|old| {
            let changed = announcement.differs_from(old);
            *old = announcement;
            changed
        });
    }
}

/// Why the server has not expired a node's key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogoutError {
    /// Another attempt may succeed.
    #[error("{0}")]
    Unreachable(String),
    #[error("the control server refuses it: {0}")]
    Refused(String),
}

/// Asks the server to expire this node's key, or to delete the node if it is ephemeral. A key that the server does not
/// know is as good as expired.
pub(crate) async fn logout(config: ControlConfig, hostinfo: Hostinfo) -> Result<(), LogoutError> {
    let work = async {
        // Dropping the handle would close the connection.
        let (client, _connection, _) = connect(&config, config.server_key).await?;
        let request = RegisterRequest {
            expiry: time::OffsetDateTime::from_unix_timestamp(123).ok(),
            ..register_request(&config, hostinfo, String::new())
        };
        post_register(&client, &request).await
    };
    match timeout(LOGOUT, work).await.unwrap_or(Err(Broken::Late("the logout"))) {
        Ok(reply) if reply.error.is_empty() => Ok(()),
        Ok(reply) => Err(LogoutError::Refused(reply.error)),
        Err(Broken::Status { status, text, .. })
            if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS =>
        {
            Err(LogoutError::Refused(format!("status {status}{}", after_colon(&text))))
        }
        Err(error) => Err(LogoutError::Unreachable(chain(&error))),
    }
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the connection to the control server broke: {0}")]
    Http(#[from] hyper::Error),
    #[error("the control server answered {doing} with {status}{}", after_colon(.text))]
    Status { doing: &'static str, status: StatusCode, text: String, retry_after: Option<Duration> },
    #[error("the control server's answer to {doing} makes no sense: {why}")]
    Garbage { doing: &'static str, why: String },
    #[error("the control server did not answer {0} in time")]
    Late(&'static str),
    #[error("the control server was silent for {} s", STREAM_SILENCE.as_secs())]
    Silent,
    #[error("the control server closed the map stream")]
    Closed,
    #[error("this host's network has changed")]
    Moved,
    #[error("the engine has stopped")]
    Stopped,
    /// Told to the engine already.
    #[error("the login has ended")]
    LoginEnded,
}

fn after_colon(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

impl Broken {
    /// Can only a person heal it?
    fn is_hopeless(&self) -> bool {
        match self {
            // A connection that breaks or is refused says less.
            Self::Dial(DialError::KeyUnproven { source, .. }) => matches!(**source, DialError::Noise { .. }),
            Self::Dial(DialError::Proxy(error)) => error.is_hopeless(),
            Self::Dial(error) => matches!(
                error,
                DialError::Url { .. }
                    | DialError::NoRoots { .. }
                    | DialError::TlsSetup { .. }
                    | DialError::Clock { .. }
                    | DialError::Tls { .. }
                    | DialError::NotControl { .. }
                    | DialError::Upgrade { .. }
            ),
            Self::Garbage { .. } => true,
            Self::Status { status, .. } => *status == StatusCode::BAD_REQUEST,
            _ => false,
        }
    }
}

/// Pauses that grow with the square of the failures, with some chance in them.
#[derive(Debug, Default)]
struct Pauses(u32);

impl Pauses {
    fn next(&mut self) -> Duration {
        self.0 = self.0.saturating_add(1);
        let pause = Duration::from_millis(10).saturating_mul(self.0.saturating_mul(self.0)).min(MAX_PAUSE);
        let chance = lacis_wire::derp::random_nonce()[0];
        pause.mul_f64(0.5 + f64::from(chance) / 255.0)
    }
}

fn dialer(config: &ControlConfig) -> Result<ControlDialer, DialError> {
    let dialer = ControlDialer::new(&config.url, config.machine_key.clone())?;
    let fallback = config.server_address.into_iter().collect();
    let dialer =
        dialer.fwmark(config.fwmark).fallback_addresses(fallback).proxies(Arc::clone(&config.proxies));
    Ok(dialer.accept_new_key(config.accept_new_key))
}

async fn connect(
    config: &ControlConfig,
    known: Option<MachineKey>,
) -> Result<(ControlClient, AbortOnDropHandle<Result<(), hyper::Error>>, Option<SocketAddr>), Broken> {
    let dialer = dialer(config)?;
    let stream = dialer.dial(known).await?;
    let address = stream.address;
    let (client, connection) = ControlClient::new(dialer.url(), stream).await?;
    Ok((client, AbortOnDropHandle::new(connection), address))
}

fn register_request(config: &ControlConfig, hostinfo: Hostinfo, followup: String) -> RegisterRequest {
    RegisterRequest {
        version: CURRENT_CAPABILITY_VERSION,
        node_key: config.node_key.public(),
        old_node_key: config.old_node_key.unwrap_or_default(),
        nl_key: Some(config.lock_key),
        auth: config
            .auth_key
            .as_ref()
            .filter(|_| followup.is_empty())
            .map(|key| RegisterAuth { auth_key: key.0.to_string() }),
        hostinfo: Some(hostinfo),
        followup,
        ..RegisterRequest::default()
    }
}

async fn post_register(
    client: &ControlClient,
    request: &RegisterRequest,
) -> Result<RegisterResponse, Broken> {
    const DOING: &str = "the registration";
    let reply = client.post("/machine/register", to_json(request)).await?;
    let reply = successful(reply, DOING).await?;
    decode(&body(reply, DOING).await?, DOING)
}

/// A message of the server. Its texts are made plain here, once for all that show or log them.
fn decode<T: DeserializeOwned>(message: &[u8], doing: &'static str) -> Result<T, Broken> {
    let garbage = |why: String| Broken::Garbage { doing, why };
    let message = std::str::from_utf8(message).map_err(|error| garbage(error.to_string()))?;
    let message = text::plain_json(message).map_err(|error| garbage(error.to_string()))?;
    serde_json::from_str(&message).map_err(|error| garbage(text::plain(&error.to_string()).into_owned()))
}

async fn body(reply: http::Response<Incoming>, doing: &'static str) -> Result<Bytes, Broken> {
    let read = Limited::new(reply.into_body(), REPLY_BYTES).collect();
    let read = timeout(REPLY, read).await.map_err(|_| Broken::Late(doing))?;
    Ok(read.map_err(|error| Broken::Garbage { doing, why: error.to_string() })?.to_bytes())
}

async fn successful(
    reply: http::Response<Incoming>,
    doing: &'static str,
) -> Result<http::Response<Incoming>, Broken> {
    let status = reply.status();
    if status == StatusCode::OK {
        return Ok(reply);
    }
    let retry_after = reply.headers().get(http::header::RETRY_AFTER);
    let retry_after = retry_after
        .and_then(|value| Some(Duration::from_secs(value.to_str().ok()?.parse().ok()?)))
        .filter(|advice| *advice <= MAX_RETRY_AFTER);
    let text = body(reply, doing).await.unwrap_or_default();
    let text: String =
        String::from_utf8_lossy(&text).lines().next().unwrap_or_default().chars().take(200).collect();
    let text = text::plain(&text).into_owned();
    Err(Broken::Status { doing, status, text, retry_after })
}

struct Task {
    config: ControlConfig,
    events: mpsc::Sender<ControlEvent>,
    announcement: watch::Receiver<Announcement>,
    registered: bool,
}

impl Task {
    async fn run(mut self, moved: Arc<Notify>) {
        let mut pauses = Pauses::default();
        let mut known = self.config.server_key;
        loop {
            let started = Instant::now();
            let mut had_map = false;
            let result = tokio::select! {
                result = self.session(&mut known, &mut had_map) => result,
                () = moved.notified() => Err(Broken::Moved),
            };
            let error = match result {
                Err(Broken::Stopped | Broken::LoginEnded) => return,
                Err(error) => error,
                Ok(()) => Broken::Closed,
            };
            if had_map && started.elapsed() >= STABLE_AFTER {
                pauses = Pauses::default();
            }
            let hopeless = error.is_hopeless();
            let text = chain(&error);
            tracing::debug!(error = %text, "control session ended");
            let mut pause = pauses.next();
            match error {
                Broken::Moved => {
                    pauses = Pauses::default();
                    pause = Duration::ZERO;
                }
                Broken::Status { status, retry_after, .. } => {
                    pause = retry_after.unwrap_or(pause);
                    // The server does not know this key (any more): ask it by registering.
                    if status == StatusCode::NOT_FOUND || status == StatusCode::UNAUTHORIZED {
                        self.registered = false;
                    }
                }
                _ => {}
            }
            if self.tell(ControlEvent::Trouble { error: text, hopeless }).await.is_err() {
                return;
            }
            tokio::select! { () = tokio::time::sleep(pause) => {}, () = moved.notified() => {} }
        }
    }

    async fn tell(&self, event: ControlEvent) -> Result<(), Broken> {
        self.events.send(event).await.map_err(|_| Broken::Stopped)
    }

    async fn session(&mut self, known: &mut Option<MachineKey>, had_map: &mut bool) -> Result<(), Broken> {
        let started = Instant::now();
        let (client, _connection, address) = connect(&self.config, *known).await?;
        *known = Some(client.server_key());
        // Accepted once: from now on this key counts.
        self.config.accept_new_key = false;
        tracing::info!(url = %self.config.url, ?address, took = ?started.elapsed(), "connected to the control server");
        self.tell(ControlEvent::Connected { server_key: client.server_key(), address }).await?;
        if !self.registered {
            self.register(&client).await?;
            self.registered = true;
            // Used up: a later registration is of a node that is known.
            self.config.auth_key = None;
        }
        let announcement = self.announcement.borrow_and_update().clone();
        let sent = announcement.clone();
        tokio::select! {
            end = self.stream(&client, announcement, had_map) => end,
            end = self.announcements(&client, sent) => end,
        }
    }

    async fn register(&self, client: &ControlClient) -> Result<(), Broken> {
        let mut followup = String::new();
        let mut same_again = Pauses::default();
        loop {
            let hostinfo = self.announcement.borrow().hostinfo.clone();
            let request = register_request(&self.config, hostinfo, followup.clone());
            let reply = if followup.is_empty() {
                timeout(REPLY, post_register(client, &request))
                    .await
                    .map_err(|_| Broken::Late("the registration"))??
            } else {
                post_register(client, &request).await?
            };
            if !reply.error.is_empty() {
                self.tell(ControlEvent::Refused(reply.error)).await?;
                return Err(Broken::LoginEnded);
            }
            if reply.node_key_expired {
                self.tell(ControlEvent::KeyExpired).await?;
                return Err(Broken::LoginEnded);
            }
            if reply.auth_url.is_empty() {
                return self.tell(ControlEvent::Registered(Box::new(reply))).await;
            }
            if reply.auth_url == followup {
                tokio::time::sleep(same_again.next()).await;
            } else {
                followup = reply.auth_url;
                self.tell(ControlEvent::AuthUrl(followup.clone())).await?;
            }
        }
    }

    fn map_request(&self, announcement: &Announcement, stream: bool) -> Vec<u8> {
        to_json(&MapRequest {
            version: CURRENT_CAPABILITY_VERSION,
            compress: "zstd".to_owned(),
            keep_alive: true,
            node_key: self.config.node_key.public(),
            disco_key: announcement.disco_key,
            stream,
            omit_peers: !stream,
            hostinfo: Some(announcement.hostinfo.clone()),
            endpoints: Some(announcement.endpoints.clone()),
            endpoint_types: announcement.endpoint_types.clone(),
            ..MapRequest::default()
        })
    }

    async fn stream(
        &self,
        client: &ControlClient,
        announcement: Announcement,
        had_map: &mut bool,
    ) -> Result<(), Broken> {
        const DOING: &str = "the map request";
        let reply = client.post("/machine/map", self.map_request(&announcement, true));
        let reply = timeout(STREAM_SILENCE, reply).await.map_err(|_| Broken::Silent)??;
        let mut body = successful(reply, DOING).await?.into_body();
        self.tell(ControlEvent::StreamStarted).await?;
        let garbage = |why: String| Broken::Garbage { doing: DOING, why };
        let mut decoder = mapframe::Decoder::new(Compression::Zstd);
        let pings = Arc::new(Semaphore::new(MAX_PINGS));
        let mut last_ping = String::new();
        loop {
            let piece = timeout(STREAM_SILENCE, body.frame()).await.map_err(|_| Broken::Silent)?;
            let Some(piece) = piece else { return Err(Broken::Closed) };
            let Ok(piece) = piece?.into_data() else { continue };
            decoder.push(&piece);
            while let Some(message) = decoder.next_message().map_err(|error| garbage(error.to_string()))? {
                let mut frame: MapResponse = decode(&message, DOING)?;
                if let Some(request) = frame.ping_request.take()
                    && request.url != last_ping
                    && let Ok(place) = Arc::clone(&pings).try_acquire_owned()
                {
                    last_ping.clone_from(&request.url);
                    tokio::spawn(ping::answer(client.clone(), dialer(&self.config)?, request, place));
                }
                if !*had_map && !frame.keep_alive {
                    if frame.node.is_none() {
                        return Err(garbage("it does not say who this node is".to_owned()));
                    }
                    *had_map = true;
                }
                self.tell(ControlEvent::Frame(Box::new(frame))).await?;
            }
        }
    }

    /// Sends what changes. The stream's own request said `sent`, but servers may overlook that: a home in it is
    /// said again.
    async fn announcements(&self, client: &ControlClient, sent: Announcement) -> Result<(), Broken> {
        const DOING: &str = "an update of what this node says of itself";
        let mut changes = self.announcement.clone();
        let mut sent = if sent.home() == 0 { Some(sent) } else { None };
        loop {
            let current = changes.borrow_and_update().clone();
            if sent.as_ref().is_none_or(|sent| current.differs_from(sent)) {
                let reply = client.post("/machine/map", self.map_request(&current, false));
                let reply = timeout(REPLY, reply).await.map_err(|_| Broken::Late(DOING))??;
                successful(reply, DOING).await?;
                self.tell(ControlEvent::Announced { home: current.home() }).await?;
                sent = Some(current);
            }
            changes.changed().await.map_err(|_| Broken::Stopped)?;
        }
    }
}

#[cfg(test)]
mod tests;
