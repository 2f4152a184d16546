//! The client's way into a control server: `GET /key`, `POST /ts2021`, Noise.
//!
//! Both requests go over one connection, so that joining costs one TCP and one TLS handshake. The
//! URL's own scheme and port are dialled and nothing else: an `https://` URL is verified TLS from
//! the first byte, with no detour over port 80. The key is fetched over verified TLS, then Noise
//! authenticates the server by it. Over `http://` the first key that is fetched stays: a server that
//! does not prove to have it is refused, until the user says that it may have another.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use http::header::{CONNECTION, HOST, UPGRADE, USER_AGENT};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;

use super::error::tls_error;
use super::{BoxStream, DialError, NoiseStream, Proxies, Proxy, ProxyError, client_config, native_roots};
use crate::key::{MachineKey, MachinePrivateKey};
use crate::noise::{HEADER_LEN, Initiator};

/// The upgrade's protocol name.
const PROTOCOL: &str = "tailscale-control-protocol";
const HANDSHAKE_HEADER: &str = "X-Tailscale-Handshake";
/// From the first packet to a finished handshake; the stock clients' limit.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one address may hold up the next (RFC 8305 recommends 250 ms).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// The reply to `/key` is two short keys; the stock clients read at most this much.
const MAX_KEY_REPLY: usize = 64 * 1024;
/// How much of an error's body is shown.
const MAX_ERROR_BODY: usize = 200;

/// A control URL, checked and taken apart.
#[derive(Clone, PartialEq, Eq)]
pub struct ControlUrl {
    text: String,
    https: bool,
    host: String,
    port: u16,
}

impl fmt::Debug for ControlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for ControlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl ControlUrl {
    /// Takes `http://host[:port]` or `https://host[:port]`; a trailing slash is dropped.
    pub fn parse(url: &str) -> Result<Self, DialError> {
        let wrong = |why| DialError::Url { url: url.to_owned(), why };
        let text = url.trim().trim_end_matches('/');
        let uri: http::Uri = text.parse().map_err(|_| wrong("it must look like https://mesh.example.org"))?;
        let https = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(wrong("it must begin with https:// or http://")),
        };
        let authority = uri.authority().ok_or_else(|| wrong("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("it must not contain a user name or password"));
        }
        if !uri.path().trim_matches('/').is_empty() || uri.query().is_some() {
            return Err(wrong("it must end after the host and port, without a path"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(wrong("it names no host"));
        }
        // `Authority::port` calls a port that is out of range absent.
        let port = match authority.as_str().strip_prefix(authority.host()).unwrap_or_default() {
            "" if https => 443,
            "" => 80,
            given => match given.trim_start_matches(':').parse() {
                Ok(port) if port > 0 => port,
                _ => return Err(wrong("its port is not a number from 1 to 65535")),
            },
        };
        Ok(Self { text: text.to_owned(), https, host, port })
    }

    /// As it was given, without a trailing slash.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it is an `https://` URL.
    pub fn is_https(&self) -> bool {
        self.https
    }

    /// The host without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, given or implied.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Host, and the port where it is not the scheme's own: for `Host` and `:authority`.
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match (self.https, self.port) {
            (true, 443) | (false, 80) => host,
            (_, port) => format!("{host}:{port}"),
        }
    }

    /// Path and query of a URL, if it is one of this very server.
    fn path_of(&self, url: &str) -> Option<String> {
        let uri: http::Uri = url.parse().ok()?;
        let other = Self::parse(&format!("{}://{}", uri.scheme_str()?, uri.authority()?)).ok()?;
        let same = (other.https, other.port) == (self.https, self.port)
            && other.host.eq_ignore_ascii_case(&self.host);
        same.then(|| uri.path_and_query().map_or("/", PathAndQuery::as_str).to_owned())
    }
}

/// A connected and authenticated control session, before HTTP/2.
pub struct ControlStream {
    /// The byte stream.
    pub stream: NoiseStream<BoxStream>,
    /// The server's key that authenticated it.
    pub server_key: MachineKey,
    /// The server's address that was connected to, worth remembering for when DNS is away; none through a proxy.
    pub address: Option<SocketAddr>,
}

impl fmt::Debug for ControlStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlStream")
            .field("server_key", &self.server_key)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// Dials one control server, as often as needed.
#[derive(Debug, Clone)]
pub struct ControlDialer {
    url: ControlUrl,
    machine: MachinePrivateKey,
    version: u16,
    fwmark: Option<u32>,
    fallback: Vec<IpAddr>,
    proxies: Arc<Proxies>,
    accept_new_key: bool,
    timeout: Duration,
    tls: Arc<OnceLock<Arc<ClientConfig>>>,
}

impl ControlDialer {
    /// A dialer for this URL with this machine's key.
    pub fn new(url: &str, machine: MachinePrivateKey) -> Result<Self, DialError> {
        Ok(Self {
            url: ControlUrl::parse(url)?,
            machine,
            version: crate::CURRENT_CAPABILITY_VERSION,
            fwmark: None,
            fallback: Vec::new(),
            proxies: Arc::default(),
            accept_new_key: false,
            timeout: DIAL_TIMEOUT,
            tls: Arc::default(),
        })
    }

    /// Marks the sockets (`SO_MARK`), so that they stay out of the mesh's own routes.
    #[must_use]
    pub fn fwmark(mut self, mark: Option<u32>) -> Self {
        self.fwmark = mark;
        self
    }

    /// Speaks this capability version instead of the current one.
    #[must_use]
    pub fn version(mut self, version: u16) -> Self {
        self.version = version;
        self
    }

    /// Verifies servers with this configuration instead of the system's roots.
    #[must_use]
    pub fn tls_config(mut self, config: Arc<ClientConfig>) -> Self {
        self.tls = Arc::new(OnceLock::from(config));
        self
    }

    /// Addresses to try when the name does not resolve.
    #[must_use]
    pub fn fallback_addresses(mut self, addresses: Vec<IpAddr>) -> Self {
        self.fallback = addresses;
        self
    }

    /// Goes through these proxies, where they lead to the server.
    #[must_use]
    pub fn proxies(mut self, proxies: Arc<Proxies>) -> Self {
        self.proxies = proxies;
        self
    }

    /// Lets the server have another key than the one known, also over `http`, where anybody on the
    /// way can have replaced it: only for when the user says so.
    #[must_use]
    pub fn accept_new_key(mut self, accept: bool) -> Self {
        self.accept_new_key = accept;
        self
    }

    /// Limits a whole dial, from the name to the finished handshake.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// The URL that is dialled.
    pub fn url(&self) -> &ControlUrl {
        &self.url
    }

    /// Asks the server for its key, over verified TLS where the URL says `https`.
    pub async fn fetch_key(&self) -> Result<MachineKey, DialError> {
        self.limited("fetching its key", async {
            let (mut http, _) = self.open().await?;
            self.key(&mut http).await
        })
        .await
    }

    /// Asks for a URL of this server by `HEAD`, outside Noise, and gives the status of the answer.
    /// One of another server is refused: nobody may send a node about in its own network.
    pub async fn head(&self, url: &str) -> Result<StatusCode, DialError> {
        let path = self.url.path_of(url).ok_or_else(|| DialError::Url {
            url: url.to_owned(),
            why: "it is not one of the control server itself",
        })?;
        self.limited("answering its ping", async {
            let (mut http, _) = self.open().await?;
            Ok(self.ask(&mut http, Method::HEAD, &path, "answering its ping").await?.status())
        })
        .await
    }

    /// Connects and makes the handshake. Without a known key the server is asked for it first, on
    /// the same connection.
    ///
    /// A server that does not prove to have the known key is asked for its present one over `https`
    /// only, or with [`Self::accept_new_key`]. That it is another is a warning in the log.
    pub async fn dial(&self, known: Option<MachineKey>) -> Result<ControlStream, DialError> {
        let (known, error) = match (self.attempt(known).await, known) {
            (Err(error), Some(known)) if error.suspects_key() => (known, error),
            (result, _) => return result,
        };
        if !self.url.https && !self.accept_new_key {
            return Err(DialError::KeyUnproven { url: self.url.text.clone(), source: Box::new(error) });
        }
        let stream = self.attempt(None).await?;
        if stream.server_key != known {
            tracing::warn!(
                url = %self.url, before = %known, now = %stream.server_key,
                "the control server has another key than before: was it set up again?"
            );
        }
        Ok(stream)
    }

    async fn attempt(&self, known: Option<MachineKey>) -> Result<ControlStream, DialError> {
        let doing = if self.proxy().is_some() { "connecting through the proxy" } else { "connecting" };
        self.limited(doing, async {
            let (mut http, address) = self.open().await?;
            let server_key = match known {
                Some(key) => key,
                None => self.key(&mut http).await?,
            };
            // A server or proxy may close the connection after its reply.
            let (mut http, address) =
                if http.ready().await.is_ok() { (http, address) } else { self.open().await? };
            let stream = self.upgrade(&mut http, &server_key).await?;
            Ok(ControlStream { stream, server_key, address })
        })
        .await
    }

    async fn limited<T>(
        &self,
        doing: &'static str,
        work: impl Future<Output = Result<T, DialError>>,
    ) -> Result<T, DialError> {
        tokio::time::timeout(self.timeout, work).await.unwrap_or_else(|_| {
            Err(DialError::Timeout { host: self.url.host.clone(), doing, after: self.timeout })
        })
    }

    fn http_error(&self, doing: &'static str) -> impl FnOnce(hyper::Error) -> DialError {
        let url = self.url.text.clone();
        move |source| {
            if source.is_parse() {
                DialError::NotControl { url, what: format!("its answer is not HTTP ({source})") }
            } else {
                DialError::Http { url, doing, source }
            }
        }
    }

    fn not_control(&self, what: impl Into<String>) -> DialError {
        DialError::NotControl { url: self.url.text.clone(), what: what.into() }
    }

    /// The proxy that leads to the server, if any does.
    fn proxy(&self) -> Option<&Proxy> {
        self.proxies.to(self.url.https, &self.url.host, self.url.port)
    }

    /// TCP, the proxy where there is one, TLS where the URL asks for it, and HTTP/1.1 on top.
    async fn open(&self) -> Result<(http1::SendRequest<Empty<Bytes>>, Option<SocketAddr>), DialError> {
        let (stream, address) = match self.proxy() {
            Some(proxy) => (self.through(proxy).await.map_err(DialError::Proxy)?, None),
            None => {
                let (tcp, address) = self.connect().await?;
                (Box::new(tcp) as BoxStream, Some(address))
            }
        };
        let stream: BoxStream = if self.url.https { Box::new(self.encrypt(stream).await?) } else { stream };
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(self.http_error("connecting"))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "control connection ended before its upgrade");
            }
        });
        Ok((sender, address))
    }

    async fn addresses(&self) -> Result<Vec<SocketAddr>, DialError> {
        let found = tokio::net::lookup_host((self.url.host.as_str(), self.url.port)).await;
        let source = match found {
            Ok(found) => {
                let found: Vec<_> = found.collect();
                if !found.is_empty() {
                    return Ok(found);
                }
                std::io::Error::other("the name has no address")
            }
            Err(error) => error,
        };
        if self.fallback.is_empty() {
            return Err(DialError::Resolve { host: self.url.host.clone(), source });
        }
        let with_port = |ip: &IpAddr| SocketAddr::new(*ip, self.url.port);
        Ok(self.fallback.iter().map(with_port).collect())
    }

    /// TCP to the server itself.
    async fn connect(&self) -> Result<(TcpStream, SocketAddr), DialError> {
        match first_to_accept(self.addresses().await?, self.fwmark).await {
            Ok(found) => Ok(found),
            Err(Some((address, source))) => Err(DialError::Connect { address, source }),
            Err(None) => Err(self.not_control("it has no address")),
        }
    }

    /// A tunnel through a proxy, which resolves the server's name.
    async fn through(&self, proxy: &Proxy) -> Result<BoxStream, ProxyError> {
        let unresolved = |source| ProxyError::Resolve { proxy: proxy.to_string(), source };
        let found = tokio::net::lookup_host((proxy.host(), proxy.port())).await.map_err(unresolved)?;
        match first_to_accept(found.collect(), self.fwmark).await {
            Ok((tcp, _)) => proxy.connect(Box::new(tcp), &self.url.host, self.url.port).await,
            Err(Some((address, source))) => {
                Err(ProxyError::Connect { proxy: proxy.to_string(), address, source })
            }
            Err(None) => Err(unresolved(std::io::Error::other("the name has no address"))),
        }
    }

    fn tls(&self) -> Result<Arc<ClientConfig>, DialError> {
        if let Some(config) = self.tls.get() {
            return Ok(Arc::clone(config));
        }
        let config = client_config(native_roots()?, &[])?;
        Ok(Arc::clone(self.tls.get_or_init(|| config)))
    }

    async fn encrypt(&self, tcp: BoxStream) -> Result<tokio_rustls::client::TlsStream<BoxStream>, DialError> {
        let name = ServerName::try_from(self.url.host.clone()).map_err(|_| DialError::Url {
            url: self.url.text.clone(),
            why: "its host is neither a DNS name nor an IP address",
        })?;
        TlsConnector::from(self.tls()?)
            .connect(name, tcp)
            .await
            .map_err(|error| tls_error(&self.url.host, &error))
    }

    fn request(&self, method: Method, path: &str) -> http::request::Builder {
        Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.url.authority())
            .header(USER_AGENT, concat!("lacis/", env!("CARGO_PKG_VERSION")))
    }

    async fn ask(
        &self,
        http: &mut http1::SendRequest<Empty<Bytes>>,
        method: Method,
        path: &str,
        doing: &'static str,
    ) -> Result<Response<Incoming>, DialError> {
        let request = self
            .request(method, path)
            .body(Empty::new())
            .map_err(|_| self.not_control("its name cannot stand in a request"))?;
        http.send_request(request).await.map_err(self.http_error(doing))
    }

    async fn key(&self, http: &mut http1::SendRequest<Empty<Bytes>>) -> Result<MachineKey, DialError> {
        #[derive(serde::Deserialize)]
        struct Reply {
            #[serde(default, rename = "publicKey")]
            public_key: MachineKey,
        }
        let path = format!("/key?v={}", self.version);
        let reply = self.ask(http, Method::GET, &path, "fetching its key").await?;
        let status = reply.status();
        if status != StatusCode::OK {
            return Err(self.not_control(format!("it answers /key with status {status}")));
        }
        let body = Limited::new(reply.into_body(), MAX_KEY_REPLY)
            .collect()
            .await
            .map_err(|_| self.not_control("its answer to /key is cut or too long"))?
            .to_bytes();
        if body.is_empty() {
            return Err(self.not_control(format!(
                "its answer to /key is empty (it may not know version {})",
                self.version
            )));
        }
        let reply: Reply = serde_json::from_slice(&body)
            .map_err(|_| self.not_control("its answer to /key is not that of a control server"))?;
        if reply.public_key.is_zero() {
            return Err(self.not_control("its answer to /key has no Noise key"));
        }
        Ok(reply.public_key)
    }

    async fn upgrade(
        &self,
        http: &mut http1::SendRequest<Empty<Bytes>>,
        server_key: &MachineKey,
    ) -> Result<NoiseStream<BoxStream>, DialError> {
        let noise = |source| DialError::Noise { url: self.url.text.clone(), source };
        let broken = |source| DialError::Broken { url: self.url.text.clone(), source };
        let doing = "upgrading to the control protocol";
        let (initiator, initiation) =
            Initiator::new(&self.machine, server_key, self.version).map_err(noise)?;
        let request = self
            .request(Method::POST, "/ts2021")
            .header(UPGRADE, PROTOCOL)
            .header(CONNECTION, "upgrade")
            .header(HANDSHAKE_HEADER, STANDARD.encode(initiation))
            .body(Empty::new())
            .map_err(|_| self.not_control("its name cannot stand in a request"))?;
        let reply = http.send_request(request).await.map_err(self.http_error(doing))?;
        let upgraded = reply
            .headers()
            .get(UPGRADE)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(PROTOCOL.as_bytes()));
        if reply.status() != StatusCode::SWITCHING_PROTOCOLS || !upgraded {
            return Err(self.refused(reply).await);
        }
        let stream = hyper::upgrade::on(reply).await.map_err(self.http_error(doing))?;
        let mut stream: BoxStream = Box::new(TokioIo::new(stream));

        let mut frame = vec![0; HEADER_LEN];
        stream.read_exact(&mut frame).await.map_err(broken)?;
        let length = Initiator::response_len(&frame);
        frame.resize(length, 0);
        stream.read_exact(&mut frame[HEADER_LEN..]).await.map_err(broken)?;
        let session = initiator.finish(&frame).map_err(noise)?;
        Ok(NoiseStream::new(stream, session, &[]))
    }

    async fn refused(&self, reply: Response<Incoming>) -> DialError {
        let status = reply.status();
        if status == StatusCode::NOT_FOUND {
            return self.not_control("it has no /ts2021");
        }
        let body = Limited::new(reply.into_body(), 16 * MAX_ERROR_BODY).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        let text = String::from_utf8_lossy(&body[..body.len().min(MAX_ERROR_BODY)])
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect::<String>();
        DialError::Upgrade {
            url: self.url.text.clone(),
            status: status.as_u16(),
            text: text.trim().to_owned(),
        }
    }
}

/// The first address that accepts, each started a little after the one before; otherwise the last failure.
async fn first_to_accept(
    addresses: Vec<SocketAddr>,
    fwmark: Option<u32>,
) -> Result<(TcpStream, SocketAddr), Option<(SocketAddr, std::io::Error)>> {
    let mut attempts = FuturesUnordered::new();
    for (i, address) in addresses.into_iter().enumerate() {
        attempts.push(async move {
            tokio::time::sleep(NEXT_ADDRESS * i as u32).await;
            (address, connect_one(address, fwmark).await)
        });
    }
    let mut last = None;
    while let Some((address, result)) = attempts.next().await {
        match result {
            Ok(stream) => return Ok((stream, address)),
            Err(source) => last = Some((address, source)),
        }
    }
    Err(last)
}

async fn connect_one(address: SocketAddr, fwmark: Option<u32>) -> std::io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(mark) = fwmark {
        #[cfg(target_os = "linux")]
        socket2::SockRef::from(&socket).set_mark(mark)?;
        #[cfg(not(target_os = "linux"))]
        let _ = mark;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
