//! Admission by asking a coordinator: `POST {"NodePublic", "Source"}`, answered by `{"Allow": true}`.
//!
//! While the coordinator does not answer, those it admitted before are still served and unknown keys are
//! refused: a network must not stop because its control plane is being restarted.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use lacis_wire::io::{BoxStream, ControlUrl, native_roots};
use lacis_wire::key::NodeKey;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;

use crate::Error;
use crate::error::chain;
use crate::server::{Admission, Verdict};

/// The stock relay's.
const TIMEOUT: Duration = Duration::from_secs(5);
/// No honest answer is longer.
const MAX_ANSWER: usize = 4 << 10;
/// 32 bytes each; beyond this, keys admitted later are not remembered for times without a coordinator.
const REMEMBERED: usize = 100_000;

/// See the module's description.
pub struct VerifyUrl {
    url: String,
    target: ControlUrl,
    path: String,
    tls: Option<Arc<ClientConfig>>,
    admitted: Mutex<HashSet<NodeKey>>,
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
    #[error("the coordinator answered with status {0}")]
    Status(http::StatusCode),
    #[error("the coordinator's answer is not {{\"Allow\": true}} or {{\"Allow\": false}}")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl AskError {
    fn away(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Away(error.into())
    }
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
        Ok(Self { url: url.to_owned(), target, path, tls, admitted: Mutex::default() })
    }

    /// Says what is wrong with a URL, if anything.
    pub fn check(url: &str) -> Result<(), String> {
        split(url).map(drop)
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, HashSet<NodeKey>> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn decide(&self, key: NodeKey, source: IpAddr) -> Verdict {
        let answer = tokio::time::timeout(TIMEOUT, self.ask(key, source))
            .await
            .unwrap_or_else(|_| Err(AskError::away(format!("no answer within {TIMEOUT:?}"))));
        match answer {
            Ok(true) => {
                let mut remembered = self.remembered();
                if remembered.len() < REMEMBERED {
                    remembered.insert(key);
                }
                Verdict::Allow
            }
            Ok(false) => {
                self.remembered().remove(&key);
                Verdict::Deny
            }
            Err(error) => {
                let away = match &error {
                    AskError::Away(_) => true,
                    AskError::Status(status) => status.is_server_error(),
                    AskError::Answer(_) => false,
                };
                let admitted = away && self.remembered().contains(&key);
                let reason = chain(&error);
                tracing::warn!(url = self.url, peer = %key, admitted, %reason, "no verdict from the coordinator");
                admitted.into()
            }
        }
    }

    async fn ask(&self, key: NodeKey, source: IpAddr) -> Result<bool, AskError> {
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
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(AskError::away)?;
        let body = serde_json::json!({ "NodePublic": key.to_string(), "Source": source.to_string() });
        let request = http::Request::post(&self.path)
            .header(http::header::HOST, self.target.authority())
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .map_err(AskError::away)?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(AskError::away)?;
            if response.status() != http::StatusCode::OK {
                return Err(AskError::Status(response.status()));
            }
            let body =
                Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(AskError::Answer)?;
            let answer: serde_json::Value =
                serde_json::from_slice(&body.to_bytes()).map_err(|error| AskError::Answer(error.into()))?;
            answer["Allow"].as_bool().ok_or_else(|| AskError::Answer("Allow is missing".into()))
        };
        tokio::pin!(exchange);
        tokio::pin!(connection);
        // the connection lives as long as the question
        tokio::select! {
            answer = &mut exchange => answer,
            ended = &mut connection => {
                let ended = ended.map_err(AskError::away);
                match exchange.await {
                    Err(AskError::Away(error)) => Err(ended.err().unwrap_or(AskError::Away(error))),
                    answer => answer,
                }
            }
        }
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
    use axum::extract::State;
    use axum::routing::post;
    use std::sync::atomic::{AtomicU16, Ordering};
    use tokio_util::sync::CancellationToken;

    const KNOWN: NodeKey = NodeKey::from_bytes([1; 32]);
    const UNKNOWN: NodeKey = NodeKey::from_bytes([2; 32]);
    const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    async fn verify(State(status): State<Arc<AtomicU16>>, body: String) -> (http::StatusCode, String) {
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["Source"], "192.0.2.1");
        let allow = body["NodePublic"] == KNOWN.to_string();
        let status = http::StatusCode::from_u16(status.load(Ordering::SeqCst)).unwrap();
        (status, format!("{{\"Allow\":{allow}}}"))
    }

    #[tokio::test]
    async fn while_the_coordinator_is_away_those_admitted_before_are_served_and_others_refused() {
        let status = Arc::new(AtomicU16::new(200));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/verify", listener.local_addr().unwrap());
        let router = axum::Router::new().route("/verify", post(verify)).with_state(Arc::clone(&status));
        let stop = CancellationToken::new();
        let server = tokio::spawn(crate::serve::http(listener, None, router, stop.clone()));

        let admission = VerifyUrl::new(&url).unwrap();
        assert_eq!(admission.admit(KNOWN, SOURCE).await, Verdict::Allow);
        assert_eq!(admission.admit(UNKNOWN, SOURCE).await, Verdict::Deny);

        status.store(503, Ordering::SeqCst);
        assert_eq!(admission.admit(KNOWN, SOURCE).await, Verdict::Allow);
        assert_eq!(admission.admit(UNKNOWN, SOURCE).await, Verdict::Deny);
        status.store(403, Ordering::SeqCst);
        assert_eq!(admission.admit(KNOWN, SOURCE).await, Verdict::Deny);

        stop.cancel();
        server.await.unwrap();
        assert_eq!(admission.admit(KNOWN, SOURCE).await, Verdict::Allow);
        assert_eq!(admission.admit(UNKNOWN, SOURCE).await, Verdict::Deny);
    }

    #[test]
    fn a_url_of_another_kind_is_refused() {
        assert!(VerifyUrl::new("ftp://mesh.example/verify").is_err());
        assert!(VerifyUrl::new("/verify").is_err());
    }
}
