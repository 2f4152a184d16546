//! Running a relay: its listeners, its key, and the order of starting and stopping. What `lacis-relay serve`
//! does; [`http`] is also for tests and other programs that serve [`crate::server::Relay::router`].

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use ipnet::IpNet;
use lacis_serve::listener::{HttpLimits, Listeners};
use lacis_serve::log::LogLimiter;
use lacis_serve::tls::Certificate;
use lacis_serve::{bind, keys, metrics};
use lacis_wire::key::RelayPrivateKey;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::Error;
use crate::config::{AdmissionConfig, Config};
use crate::server::{Admission, Everybody, Limits, Relay};
use crate::stun;
use crate::verify::VerifyUrl;

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
    trusted_proxies: Vec<IpNet>,
    limits: HttpLimits,
}

impl Service {
    /// Reads keys and certificates and binds all sockets.
    pub fn start(config: &Config) -> Result<Self, Error> {
        let certificate = load_certificate(config)?;
        let admission: Arc<dyn Admission> = match &config.admission {
            AdmissionConfig::Open => Arc::new(Everybody),
            AdmissionConfig::VerifyUrl(url) => Arc::new(VerifyUrl::new(url)?),
        };
        let limits = Limits { ask_again: config.verify_interval, ..Limits::default() };
        let relay = Relay::new(load_key(&config.state_dir)?, admission, limits);
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
            trusted_proxies: config.trusted_proxies.clone(),
            limits: HttpLimits::default(),
        })
    }

    /// With other limits for connections that are not upgraded.
    pub fn http_limits(mut self, limits: HttpLimits) -> Self {
        self.limits = limits;
        self
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
        let log = Arc::new(LogLimiter::default());
        let metrics =
            Arc::new(Listeners::new(metrics::router(self.registry), Arc::clone(&log), stop.clone()));
        for listener in self.metrics {
            tasks.spawn(Arc::clone(&metrics).serve(listener));
        }
        let router = self
            .relay
            .router()
            .route("/", get(|| async { "This is a DERP relay of a mesh network.\n" }))
            .route("/robots.txt", get(|| async { "User-agent: *\nDisallow: /\n" }));
        let clients = Listeners::new(router, log, stop.clone())
            .tls(tls)
            .trusted_proxies(self.trusted_proxies)
            .limits(self.limits);
        let clients = Arc::new(clients);
        for listener in self.listeners {
            tasks.spawn(Arc::clone(&clients).serve(listener));
        }
        let (relay, stopped) = (self.relay.clone(), stop.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = relay.ask_again() => {}
                () = stopped.cancelled() => {}
            }
        });
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

/// Reads the certificate named in the configuration and checks that it is for `hostname`.
fn load_certificate(config: &Config) -> Result<Option<Arc<Certificate>>, Error> {
    let Some(tls) = &config.tls else { return Ok(None) };
    let certificate = Certificate::load(&tls.cert_file, &tls.key_file)?;
    if let Some(host) = &config.hostname
        && !certificate.is_for(host)?
    {
        let message = format!("it is not for hostname {host}");
        return Err(lacis_serve::Error::Certificate { path: tls.cert_file.clone(), message }.into());
    }
    Ok(Some(certificate))
}

/// Reads the relay's key from the state directory, or makes one (directory 0700, file 0600). One that others may read
/// is refused.
pub fn load_key(state_dir: &Path) -> Result<RelayPrivateKey, Error> {
    keys::make_directory(state_dir)?;
    let path = state_dir.join(KEY_FILE);
    Ok(keys::load_or_generate(&path, RelayPrivateKey::generate, RelayPrivateKey::to_text)?)
}

/// Serves a router on a listener, over TLS if given, until `stop`, with the default limits.
pub async fn http(
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    router: Router,
    stop: CancellationToken,
) {
    Arc::new(Listeners::new(router, Arc::default(), stop).tls(tls)).serve(listener).await;
}
