//! HTTP/2 over a control session: one connection, many requests at once.

use std::fmt;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::task::JoinHandle;

use super::{ControlStream, ControlUrl, EarlyPayload, EarlyStream};
use crate::key::MachineKey;

/// Windows for map streams, whose first frame can have megabytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Requests to `/machine/*` over one Noise session. Cheap to clone; all clones share the session.
#[derive(Clone)]
pub struct ControlClient {
    sender: http2::SendRequest<Full<Bytes>>,
    base: std::sync::Arc<str>,
    server_key: MachineKey,
    early: EarlyPayload,
}

impl fmt::Debug for ControlClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlClient")
            .field("base", &self.base)
            .field("server_key", &self.server_key)
            .finish_non_exhaustive()
    }
}

impl ControlClient {
    /// Starts HTTP/2 on a session that was dialled for `url`.
    ///
    /// The task that is returned ends when the connection does, with its reason; aborting it closes
    /// the connection.
    pub async fn new(
        url: &ControlUrl,
        control: ControlStream,
    ) -> Result<(Self, JoinHandle<Result<(), hyper::Error>>), hyper::Error> {
        let stream = EarlyStream::new(control.stream);
        let early = stream.payload();
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake(TokioIo::new(stream))
            .await?;
        let task = tokio::spawn(connection);
        let scheme = if url.is_https() { "https" } else { "http" };
        let client = Self {
            sender,
            base: format!("{scheme}://{}", url.authority()).into(),
            server_key: control.server_key,
            early,
        };
        Ok((client, task))
    }

    /// The key that authenticated the server.
    pub fn server_key(&self) -> MachineKey {
        self.server_key
    }

    /// The early payload's JSON, if the server has sent one by now.
    pub fn early_payload(&self) -> Option<&[u8]> {
        self.early.get().map(Vec::as_slice)
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends a request to a path such as `/machine/map`; the reply's body may be a stream.
    ///
    /// Dropping the reply's body cancels the request, as `RST_STREAM`; the connection stays.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: impl Into<Bytes>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let mut request = Request::new(Full::new(body.into()));
        *request.method_mut() = method;
        // The base was made from a checked URL; a path that is no path gives the root.
        *request.uri_mut() = format!("{}{path}", self.base).parse().unwrap_or_default();
        let json = http::HeaderValue::from_static("application/json");
        request.headers_mut().insert(http::header::CONTENT_TYPE, json);
        let mut sender = self.sender.clone();
        sender.ready().await?;
        sender.send_request(request).await
    }

    /// [`Self::request`] with `POST`, as almost all are.
    pub async fn post(&self, path: &str, body: impl Into<Bytes>) -> Result<Response<Incoming>, hyper::Error> {
        self.request(Method::POST, path, body).await
    }
}
