//! Running a relay: its listeners, its key, and the order of starting and stopping. What `lacis-relay serve`
//! does; [`http`] is also for tests and other programs that serve [`crate::server::Relay::router`].

use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use lacis_wire::key::RelayPrivateKey;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{AdmissionConfig, Config};
use crate::readahead::ReadAhead;
use crate::server::{Admission, Everybody, Limits, Relay, RemoteAddr, tune_socket};
use crate::stun;
use crate::tls::Certificate;
use crate::verify::VerifyUrl;
use crate::{Error, bind};

/// For the TLS handshake and the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// No client's request has a longer head.
const MAX_HEAD: usize = 16 << 10;
/// Pause after the system could not give a connection (out of descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long running requests and sessions may take to end at a stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Name of the key's file in the state directory.
const KEY_FILE: &str = "relay.key";

/// Everything that can fail at the start, done; [`Service::run`] then serves.
#[derive(Debug)]
pub struct Service {
    relay: Relay,
    certificate: Option<Arc<Certificate>>,
    listeners: Vec<TcpListener>,
    stun: Vec<stun::Server>,
    metrics: Vec<TcpListener>,
    registry: Arc<Registry>,
}

impl Service {
    /// Reads keys and certificates and binds all sockets.
    pub fn start(config: &Config) -> Result<Self, Error> {
        let certificate = load_certificate(config)?;
        let admission: Arc<dyn Admission> = match &config.admission {
            AdmissionConfig::Open => Arc::new(Everybody),
            AdmissionConfig::VerifyUrl(url) => Arc::new(VerifyUrl::new(url)?),
        };
        let relay = Relay::new(load_key(&config.state_dir)?, admission, Limits::default());
        let mut registry = Registry::default();
        relay.register_metrics(&mut registry);
        let listen = |addresses: &[SocketAddr], what| -> Result<Vec<TcpListener>, Error> {
            addresses
                .iter()
                .map(|&address| {
                    bind::tcp(address, addresses).map_err(|source| Error::Bind { address, what, source })
                })
                .collect()
        };
        let stun = config
            .stun
            .iter()
            .map(|&address| stun::Server::bind(address, &config.stun))
            .collect::<Result<Vec<_>, _>>()?;
        for server in &stun {
            server.register_metrics(&mut registry);
        }
        Ok(Self {
            listeners: listen(&config.listen, "clients")?,
            metrics: listen(&config.metrics, "metrics")?,
            relay,
            certificate,
            stun,
            registry: Arc::new(registry),
        })
    }

    /// Where clients may connect, for logs and tests.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// The relay, for metrics and tests.
    pub fn relay(&self) -> &Relay {
        &self.relay
    }

    /// Serves until `stop` is cancelled, then ends what runs.
    pub async fn run(self, stop: CancellationToken) -> Result<(), Error> {
        let tasks = TaskTracker::new();
        let tls = self.certificate.as_ref().map(Certificate::server_config).transpose()?;
        if let Some(certificate) = self.certificate {
            tasks.spawn(certificate.follow(stop.clone()));
        }
        for server in self.stun {
            tasks.spawn(server.run(stop.clone()));
        }
        for listener in self.metrics {
            let registry = Arc::clone(&self.registry);
            let router = Router::new().route("/metrics", get(move || metrics(Arc::clone(&registry))));
            tasks.spawn(http(listener, None, router, stop.clone()));
        }
        let router = self
            .relay
            .router()
            .route("/", get(|| async { "This is a DERP relay of a mesh network.\n" }))
            .route("/robots.txt", get(|| async { "User-agent: *\nDisallow: /\n" }));
        for listener in self.listeners {
            tasks.spawn(http(listener, tls.clone(), router.clone(), stop.clone()));
        }
        stop.cancelled().await;
        tasks.close();
        let ended = tokio::time::timeout(STOP_TIMEOUT, async {
            self.relay.shutdown().await;
            tasks.wait().await;
        });
        if ended.await.is_err() {
            tracing::warn!("some connections did not end in time");
        }
        Ok(())
    }
}

async fn metrics(registry: Arc<Registry>) -> ([(http::HeaderName, &'static str); 1], String) {
    let mut text = String::new();
    // writing to a String cannot fail
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    ([(http::header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
}

/// Reads the certificate named in the configuration and checks that it is for `hostname`.
fn load_certificate(config: &Config) -> Result<Option<Arc<Certificate>>, Error> {
    let Some(tls) = &config.tls else { return Ok(None) };
    let certificate = Certificate::load(&tls.cert_file, &tls.key_file)?;
    if let Some(host) = &config.hostname
        && !certificate.is_for(host)?
    {
        let message = format!("it is not for hostname {host}");
        return Err(Error::Certificate { path: tls.cert_file.clone(), message });
    }
    Ok(Some(certificate))
}

/// Reads the relay's key from the state directory, or makes one (directory 0700, file 0600).
pub fn load_key(state_dir: &Path) -> Result<RelayPrivateKey, Error> {
    let path = state_dir.join(KEY_FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let text = zeroize::Zeroizing::new(text);
            return text.trim().parse().map_err(|error: lacis_wire::key::KeyError| Error::KeyFile {
                path,
                message: error.to_string(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(Error::Read { path, source }),
    }
    let cannot = |path: &Path, source| Error::Write { path: path.to_owned(), source };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir)
        .map_err(|source| cannot(state_dir, source))?;
    let key = RelayPrivateKey::generate();
    // a new name first: a crash must not leave half a key
    let temporary = state_dir.join(format!("{KEY_FILE}.new"));
    let write = || -> io::Result<()> {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        writeln!(file, "{}", *key.to_text())?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)
    };
    write().map_err(|source| cannot(&path, source))?;
    Ok(key)
}

/// Serves a router on a listener, over TLS if given, HTTP/1.1 with upgrades, until `stop`; then lets running
/// requests end. Every request carries [`RemoteAddr`].
pub async fn http(
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    router: Router,
    stop: CancellationToken,
) {
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, remote)) => {
                let serve = connection(stream, remote, tls.clone(), router.clone(), stop.clone());
                connections.spawn(serve);
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    connections.close();
    connections.wait().await;
}

async fn connection(
    stream: TcpStream,
    remote: SocketAddr,
    tls: Option<Arc<rustls::ServerConfig>>,
    router: Router,
    stop: CancellationToken,
) {
    if let Err(error) = tune_socket(&stream) {
        tracing::debug!(%remote, %error, "socket options");
    }
    let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
    let Some(tls) = tls else { return requests(stream, remote, router, stop).await };
    let handshake = tokio_rustls::TlsAcceptor::from(tls).accept(ReadAhead::new(stream));
    match tokio::time::timeout(HEAD_TIMEOUT, handshake).await {
        Ok(Ok(stream)) => requests(stream, remote, router, stop).await,
        Ok(Err(error)) => tracing::debug!(%remote, %error, "no TLS"),
        Err(_) => tracing::debug!(%remote, "no TLS in time"),
    }
}

async fn requests<S>(stream: S, remote: SocketAddr, router: Router, stop: CancellationToken)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let service = TowerToHyperService::new(router.layer(axum::Extension(RemoteAddr(remote))));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%remote, error = &error as &dyn std::error::Error, "HTTP connection ended");
    }
}
