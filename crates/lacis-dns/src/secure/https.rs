//! DNS over HTTPS: each question a `POST` on one HTTP/2 connection (RFC 8484).

use std::fmt;
use std::sync::Weak;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::{IDLE, MAX_MESSAGE, SecureError, Slot};
use crate::forward::{answers, id_of, with_id};
use crate::state::SecureUpstream;

pub(super) const ALPN: &[u8] = b"h2";
const MESSAGE: HeaderValue = HeaderValue::from_static("application/dns-message");

#[derive(Clone)]
pub(super) struct Client {
    sender: http2::SendRequest<Full<Bytes>>,
    uri: Uri,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("uri", &self.uri).finish_non_exhaustive()
    }
}

fn broken(error: &hyper::Error) -> SecureError {
    SecureError::Broken(error.to_string())
}

impl Client {
    /// Starts HTTP/2. The connection is closed when its place was not used for a while, or is no more.
    pub(super) async fn new(
        stream: TlsStream<TcpStream>,
        to: &SecureUpstream,
        path: &str,
        slot: Weak<Slot>,
    ) -> Result<Self, SecureError> {
        if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            return Err(SecureError::NoHttp2);
        }
        Self::start(stream, to, path, slot).await
    }

    async fn start(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        to: &SecureUpstream,
        path: &str,
        slot: Weak<Slot>,
    ) -> Result<Self, SecureError> {
        let host = if to.host.contains(':') { format!("[{}]", to.host) } else { to.host.clone() };
        let port = if to.port == 443 { String::new() } else { format!(":{}", to.port) };
        let uri = format!("https://{host}{port}{path}");
        let uri = uri.parse().map_err(|_| SecureError::Broken(format!("{uri} is no URL")))?;
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (sender, connection) = handshake.await.map_err(|error| broken(&error))?;
        tokio::spawn(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "a connection for DNS over HTTPS has ended");
                },
                () = unused(slot) => {}
            }
        });
        Ok(Self { sender, uri })
    }

    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    pub(super) async fn ask(&self, query: &[u8]) -> Result<Vec<u8>, SecureError> {
        // Always the same id, so that proxies on the way know equal questions (RFC 8484, section 4.1).
        let mut request = Request::new(Full::from(with_id(query, 0)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        request.headers_mut().insert(CONTENT_TYPE, MESSAGE);
        request.headers_mut().insert(ACCEPT, MESSAGE);
        let mut sender = self.sender.clone();
        sender.ready().await.map_err(|error| broken(&error))?;
        let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
        let is_message = response.headers().get(CONTENT_TYPE).is_some_and(|kind| {
            kind.to_str()
                .is_ok_and(|kind| kind.trim().to_ascii_lowercase().starts_with("application/dns-message"))
        });
        if response.status() != StatusCode::OK || !is_message {
            return Err(SecureError::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_MESSAGE).collect().await;
        let answer = body.map_err(|error| SecureError::Broken(error.to_string()))?.to_bytes();
        // Some servers choose an id.
        if !answers(query, &answer, id_of(&answer)) {
            return Err(SecureError::NotDns);
        }
        Ok(with_id(&answer, id_of(query)))
    }
}

/// Waits until a connection's place was not used for a while.
async fn unused(slot: Weak<Slot>) {
    loop {
        let Some(idle) = slot.upgrade().map(|slot| slot.used().elapsed()) else { return };
        let Some(left) = IDLE.checked_sub(idle) else { return };
        tokio::time::sleep(left).await;
    }
}
