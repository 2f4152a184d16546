//! Admission by asking a coordinator: `POST {"NodePublic", "Source"}` (tailcfg's `DERPAdmitClientRequest`), answered
//! by `{"Allow": true}`.
//!
//! While the coordinator does not answer, those it admitted before are still served and unknown keys are
//! refused: a network must not stop because its control plane is being restarted.
//!
//! Anybody can cause a question, with any key. So there is one connection with one question at a time, a bounded
//! number wait, by address, refusals are remembered for some seconds, and so is a coordinator that does not answer.

use std::collections::{HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use lacis_serve::log::LogLimiter;
use lacis_serve::places::{Capacity, SharedPlaces, prefix};
use lacis_wire::io::{BoxStream, ControlUrl, native_roots};
use lacis_wire::key::NodeKey;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::Error;
use crate::error::chain;
use crate::server::{Admission, Verdict};

/// For the exchange: the stock relay's. With [`TURN_TIMEOUT`] it is less than a login may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// For the questions before this one.
const TURN_TIMEOUT: Duration = Duration::from_secs(4);
/// No honest answer is longer.
const MAX_ANSWER: usize = 4 << 10;
/// 32 bytes each; beyond this, keys admitted later are not remembered for times without a coordinator.
const MAX_ADMITTED: usize = 100_000;
/// Questions that wait, in all and by the address that caused them. The oldest of whoever has most gets no answer.
const WAITING: Capacity = Capacity { total: 128, each: 32 };
/// How long a refusal is remembered. A node that has just been let into the network waits as long at most.
const REFUSED_FOR: Duration = Duration::from_secs(5);
/// The oldest refusals are forgotten beyond this.
const MAX_REFUSED: usize = 10_000;
/// After a question that got no answer, others get none for so long.
const AWAY_FOR: Duration = Duration::from_secs(2);

/// See the module's description.
pub struct VerifyUrl {
    url: String,
    target: ControlUrl,
    path: String,
    tls: Option<Arc<ClientConfig>>,
    admitted: Mutex<HashSet<NodeKey>>,
    refused: Mutex<Refused>,
    waiting: SharedPlaces<IpAddr>,
    link: tokio::sync::Mutex<Link>,
    log: LogLimiter,
}

impl std::fmt::Debug for VerifyUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerifyUrl").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Why there is no answer to trust. Only the first kind leaves those admitted before in place.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("the coordinator cannot be reached")]
    Away(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("too many questions wait for the coordinator")]
    Busy,
    #[error("the coordinator answered with status {0}")]
    Status(http::StatusCode),
    #[error("the coordinator's answer is not {{\"Allow\": true}} or {{\"Allow\": false}}")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl AskError {
    fn away(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Away(error.into())
    }

    /// Whether it says nothing about the coordinator's will.
    fn is_absence(&self) -> bool {
        match self {
            Self::Away(_) | Self::Busy => true,
            Self::Status(status) => status.is_server_error(),
            Self::Answer(_) => false,
        }
    }
}

/// The connection to the coordinator, kept between questions.
#[derive(Default)]
struct Link {
    kept: Option<Connection>,
    /// When a question last got no answer.
    failed: Option<Instant>,
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    _driver: AbortOnDropHandle<()>,
}

/// Keys that were refused, the oldest first.
#[derive(Default)]
struct Refused {
    keys: HashSet<NodeKey>,
    order: VecDeque<(Instant, NodeKey)>,
}

impl Refused {
    fn insert(&mut self, key: NodeKey, now: Instant) {
        if self.keys.insert(key) {
            self.order.push_back((now, key));
        }
        self.forget(now);
    }

    fn contains(&mut self, key: &NodeKey, now: Instant) -> bool {
        self.forget(now);
        self.keys.contains(key)
    }

    fn forget(&mut self, now: Instant) {
        while let Some((at, key)) = self.order.front()
            && (now - *at >= REFUSED_FOR || self.order.len() > MAX_REFUSED)
        {
            self.keys.remove(key);
            self.order.pop_front();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VerifyUrl {
    /// Asks `url`, over TLS if it is `https://` (system roots, `SSL_CERT_FILE` honoured).
    pub fn new(url: &str) -> Result<Self, Error> {
        let bad = |message: String| Error::Url { url: url.to_owned(), message };
        let (target, path) = split(url).map_err(bad)?;
        let tls = if target.is_https() {
            let roots = native_roots().map_err(|error| bad(chain(&error)))?;
            Some(lacis_wire::io::client_config(roots, &[]).map_err(|error| bad(chain(&error)))?)
        } else {
            None
        };
        Ok(Self {
            url: url.to_owned(),
            target,
            path,
            tls,
            admitted: Mutex::default(),
            refused: Mutex::default(),
            waiting: SharedPlaces::new(WAITING),
            link: tokio::sync::Mutex::default(),
            log: LogLimiter::default(),
        })
    }

    /// Says what is wrong with a URL, if anything.
    pub fn check(url: &str) -> Result<(), String> {
        split(url).map(drop)
    }

    async fn decide(&self, key: NodeKey, source: IpAddr) -> Verdict {
        if lock(&self.refused).contains(&key, Instant::now()) {
            return Verdict::Deny;
        }
        let place = self.waiting.enter(prefix(source));
        let answer = tokio::select! {
            biased;
            () = place.evicted() => Err(AskError::Busy),
            answer = self.ask(key, source) => answer,
        };
        match answer {
            Ok(true) => {
                let mut admitted = lock(&self.admitted);
                if admitted.len() < MAX_ADMITTED {
                    admitted.insert(key);
                }
                Verdict::Allow
            }
            Ok(false) => {
                lock(&self.admitted).remove(&key);
                lock(&self.refused).insert(key, Instant::now());
                Verdict::Deny
            }
            Err(error) => {
                let admitted = error.is_absence() && lock(&self.admitted).contains(&key);
                if let Some(suppressed) = self.log.allow("no verdict", prefix(source)) {
                    let reason = chain(&error);
                    tracing::warn!(
                        url = self.url, peer = %key, admitted, %reason, suppressed,
                        "no verdict from the coordinator"
                    );
                }
                if admitted { Verdict::Allow } else { Verdict::Unknown }
            }
        }
    }

    /// Asks over the kept connection, or a new one if there is none or the far side has closed it.
    async fn ask(&self, key: NodeKey, source: IpAddr) -> Result<bool, AskError> {
        let Ok(mut link) = tokio::time::timeout(TURN_TIMEOUT, self.link.lock()).await else {
            return Err(AskError::Busy);
        };
        if link.failed.is_some_and(|at| at.elapsed() < AWAY_FOR) {
            return Err(AskError::away("it did not answer a moment ago"));
        }
        let answer = tokio::time::timeout(TIMEOUT, self.exchange(&mut link, key, source))
            .await
            .unwrap_or_else(|_| Err(AskError::away(format!("no answer within {TIMEOUT:?}"))));
        link.failed = matches!(answer, Err(AskError::Away(_))).then(Instant::now);
        answer
    }

    async fn exchange(&self, link: &mut Link, key: NodeKey, source: IpAddr) -> Result<bool, AskError> {
        // Taken out: a connection whose answer was not awaited is not used again.
        if let Some(mut kept) = link.kept.take()
            && kept.sender.ready().await.is_ok()
        {
            match self.question(&mut kept, key, source).await {
                // The far side may close an idle connection just when the question comes.
                Err(AskError::Away(error)) => tracing::debug!(%error, "the kept connection has ended"),
                answer => {
                    link.kept = Some(kept);
                    return answer;
                }
            }
        }
        let mut connection = self.connect().await?;
        let answer = self.question(&mut connection, key, source).await;
        if !matches!(answer, Err(AskError::Away(_))) {
            link.kept = Some(connection);
        }
        answer
    }

    async fn connect(&self) -> Result<Connection, AskError> {
        let host = self.target.host().trim_matches(['[', ']']).to_owned();
        let tcp = TcpStream::connect((host.as_str(), self.target.port())).await.map_err(AskError::away)?;
        let stream: BoxStream = match &self.tls {
            None => Box::new(tcp),
            Some(config) => {
                let name = ServerName::try_from(host).map_err(AskError::away)?;
                let connector = tokio_rustls::TlsConnector::from(Arc::clone(config));
                Box::new(connector.connect(name, tcp).await.map_err(AskError::away)?)
            }
        };
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(AskError::away)?;
        let driver = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = &error as &dyn std::error::Error, "connection to the coordinator");
            }
        });
        Ok(Connection { sender, _driver: AbortOnDropHandle::new(driver) })
    }

    async fn question(
        &self,
        connection: &mut Connection,
        key: NodeKey,
        source: IpAddr,
    ) -> Result<bool, AskError> {
        let body = serde_json::json!({ "NodePublic": key.to_string(), "Source": source.to_string() });
        let request = http::Request::post(&self.path)
            .header(http::header::HOST, self.target.authority())
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .map_err(AskError::away)?;
        let response = connection.sender.send_request(request).await.map_err(AskError::away)?;
        let status = response.status();
        // Read in any case: what is left of an answer would stand before the next one.
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(AskError::Answer);
        if status != http::StatusCode::OK {
            return Err(AskError::Status(status));
        }
        let answer: serde_json::Value =
            serde_json::from_slice(&body?.to_bytes()).map_err(|error| AskError::Answer(error.into()))?;
        answer["Allow"].as_bool().ok_or_else(|| AskError::Answer("Allow is missing".into()))
    }
}

/// A control URL's own rules fit the front (scheme, host, port); the path is kept apart.
fn split(url: &str) -> Result<(ControlUrl, String), String> {
    let uri: http::Uri = url.parse().map_err(|error: http::uri::InvalidUri| error.to_string())?;
    let authority = uri.authority().ok_or("it must begin with https:// or http:// and a host")?;
    let scheme = uri.scheme_str().unwrap_or_default();
    let target = ControlUrl::parse(&format!("{scheme}://{authority}")).map_err(|error| chain(&error))?;
    let path = uri.path_and_query().map_or("/verify", |path| path.as_str());
    Ok((target, path.to_owned()))
}

impl Admission for VerifyUrl {
    fn admit(&self, key: NodeKey, source: IpAddr) -> BoxFuture<'_, Verdict> {
        Box::pin(self.decide(key, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::extract::{ConnectInfo, State};
    use axum::routing::post;
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicU16, Ordering};
    use tokio_util::sync::CancellationToken;

    const KNOWN: NodeKey = NodeKey::from_bytes([1; 32]);
    const UNKNOWN: NodeKey = NodeKey::from_bytes([2; 32]);
    const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    /// A coordinator that knows one node.
    struct Coordinator {
        status: AtomicU16,
        questions: Mutex<Vec<SocketAddr>>,
    }

    async fn verify(
        State(coordinator): State<Arc<Coordinator>>,
        ConnectInfo(from): ConnectInfo<SocketAddr>,
        body: String,
    ) -> (http::StatusCode, String) {
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["Source"], "192.0.2.1");
        lock(&coordinator.questions).push(from);
        let allow = body["NodePublic"] == KNOWN.to_string();
        let status = http::StatusCode::from_u16(coordinator.status.load(Ordering::SeqCst)).unwrap();
        (status, format!("{{\"Allow\":{allow}}}"))
    }

    struct Running {
        coordinator: Arc<Coordinator>,
        address: SocketAddr,
        stop: CancellationToken,
        server: tokio::task::JoinHandle<()>,
    }

    impl Running {
        async fn start(address: &str) -> Self {
            let status = AtomicU16::new(200);
            let coordinator = Arc::new(Coordinator { status, questions: Mutex::default() });
            let listener = loop {
                // A port that was in use a moment ago is free a moment later.
                if let Ok(listener) = lacis_serve::bind::tcp(address.parse().unwrap(), &[]) {
                    break listener;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            };
            let address = listener.local_addr().unwrap();
            let router =
                axum::Router::new().route("/verify", post(verify)).with_state(Arc::clone(&coordinator));
            let stop = CancellationToken::new();
            let service = router.into_make_service_with_connect_info::<SocketAddr>();
            let stopped = stop.clone().cancelled_owned();
            let server = tokio::spawn(async move {
                axum::serve(listener, service).with_graceful_shutdown(stopped).await.unwrap();
            });
            Self { coordinator, address, stop, server }
        }

        fn questions(&self) -> Vec<SocketAddr> {
            lock(&self.coordinator.questions).clone()
        }

        async fn end(self) {
            self.stop.cancel();
            self.server.await.unwrap();
        }
    }

    fn forget_refusals(admission: &VerifyUrl) {
        *lock(&admission.refused) = Refused::default();
    }

    #[tokio::test]
    async fn while_the_coordinator_is_away_those_admitted_before_are_served_and_others_refused() {
        let running = Running::start("127.0.0.1:0").await;
        let status = &running.coordinator.status;
        let admission = VerifyUrl::new(&format!("http://{}/verify", running.address)).unwrap();
        assert_eq!(admission.admit(KNOWN, SOURCE).await, Verdict::Allow);
        assert_eq!(admission.admit(UNKNOWN, SOURCE).await, Verdict::Deny);
        forget_refusals(&admission);

        status.store(503, Ordering::SeqCst);
        assert_eq!(admission.admit(KNOWN, SOURCE).await, Verdict::Allow);
        assert_eq!(admission.admit(UNKNOWN, SOURCE).await, Verdict::Unknown);
        status.store(403, Ordering::SeqCst);
        assert_eq!(admission.admit(KNOWN, SOURCE).await, Verdict::Unknown, "no reason to send it away");

        running.end().await;
        assert_eq!(admission.admit(KNOWN, SOURCE).await, Verdict::Allow);
        assert_eq!(admission.admit(UNKNOWN, SOURCE).await, Verdict::Unknown);
    }

    #[tokio::test]
    async fn all_questions_go_over_one_connection_and_a_closed_one_is_replaced() {
        let running = Running::start("127.0.0.1:0").await;
        let (address, url) = (running.address, format!("http://{}/verify", running.address));
        let admission = VerifyUrl::new(&url).unwrap();
        let keys = (10..40).map(|n| NodeKey::from_bytes([n; 32])).chain([KNOWN]);
        let verdicts = futures_util::future::join_all(keys.map(|key| admission.admit(key, SOURCE))).await;
        assert_eq!(verdicts.iter().filter(|verdict| **verdict == Verdict::Allow).count(), 1);
        let questions = running.questions();
        assert_eq!(questions.len(), 31);
        assert!(questions.iter().all(|from| *from == questions[0]), "{questions:?}");

        running.end().await;
        let again = Running::start(&address.to_string()).await;
        assert_eq!(admission.admit(KNOWN, SOURCE).await, Verdict::Allow);
        assert_eq!(again.questions().len(), 1);
        again.end().await;
    }

    #[tokio::test]
    async fn a_refusal_is_remembered_for_some_seconds_and_a_stranger_asks_once() {
        let running = Running::start("127.0.0.1:0").await;
        let admission = VerifyUrl::new(&format!("http://{}/verify", running.address)).unwrap();
        for _ in 0..10 {
            assert_eq!(admission.admit(UNKNOWN, SOURCE).await, Verdict::Deny);
        }
        assert_eq!(running.questions().len(), 1);
        let mut refused = Refused::default();
        let now = Instant::now();
        for n in 0..=MAX_REFUSED as u64 {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&n.to_be_bytes());
            refused.insert(NodeKey::from_bytes(key), now);
        }
        assert_eq!((refused.keys.len(), refused.order.len()), (MAX_REFUSED, MAX_REFUSED));
        assert!(!refused.contains(&NodeKey::from_bytes([0; 32]), now), "the oldest");
        refused.insert(UNKNOWN, now);
        assert!(refused.contains(&UNKNOWN, now + REFUSED_FOR / 2));
        assert!(!refused.contains(&UNKNOWN, now + REFUSED_FOR));
        assert!(refused.keys.is_empty());
    }

    #[tokio::test]
    async fn one_address_with_many_keys_leaves_room_for_the_questions_of_another() {
        // Takes the connection and never answers.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admission =
            Arc::new(VerifyUrl::new(&format!("http://{}/verify", silent.local_addr().unwrap())).unwrap());
        let ask = |key: NodeKey, source: IpAddr| {
            let admission = Arc::clone(&admission);
            tokio::spawn(async move { admission.admit(key, source).await })
        };
        let honest = ask(KNOWN, "192.0.2.9".parse().unwrap());
        let flood: Vec<_> = (0..200).map(|n| ask(NodeKey::from_bytes([n; 32]), SOURCE)).collect();
        let mut flood = flood.into_iter();
        for question in flood.by_ref().take(200 - WAITING.each) {
            assert_eq!(question.await.unwrap(), Verdict::Unknown, "gave way at once");
        }
        assert_eq!(admission.waiting.len(), WAITING.each + 1);
        honest.abort();
        flood.for_each(|question| question.abort());
    }

    #[test]
    fn a_url_of_another_kind_is_refused() {
        assert!(VerifyUrl::new("ftp://mesh.example/verify").is_err());
        assert!(VerifyUrl::new("/verify").is_err());
    }
}
