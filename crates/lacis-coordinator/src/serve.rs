//! Start, run, stop: everything that the program `lacis-coordinator serve` is made of, put together.
//!
//! [`Service::start`] does all that can fail; [`Service::run`] serves until it is told to stop. The
//! order of a stop: no new connections, map streams end, sessions end, relay ends, the database is written and closed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::{Router, middleware};
use lacis_relay::server::{AdmitIf, Limits, Relay};
use lacis_relay::stun;
use lacis_serve::keys::{StateDir, load_or_generate};
use lacis_serve::listener::{HttpLimits, Listeners};
use lacis_serve::tls::Certificate;
use lacis_serve::{bind, metrics};
use lacis_wire::key::{MachinePrivateKey, RelayPrivateKey};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin_socket::AdminSocket;
use crate::config::Config;
use crate::core::{self, Core};
use crate::store::{Missing, Store};
use crate::ts2021::Noise;
use crate::{Error, admin, fault, inner, outer};

/// How long connections may take to end at a stop. With the database's turn it makes less than five seconds.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the database may take after that. It takes milliseconds; a slow disk is waited for rather than left with
/// half of the network in the write-ahead log.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// Users, keys and nodes, in the state directory.
const DATABASE: &str = "coordinator.db";
/// What clients know the server by, in the state directory.
const NOISE_KEY: &str = "noise.key";
/// The embedded relay's key, in the state directory.
const RELAY_KEY: &str = "relay.key";

/// A coordinator whose sockets are bound and whose state is read.
#[derive(Debug)]
pub struct Service {
    core: Core,
    noise: Noise,
    relay: Option<Relay>,
    certificate: Option<Arc<Certificate>>,
    router: Router,
    trusted_proxies: Vec<ipnet::IpNet>,
    limits: HttpLimits,
    listeners: Vec<TcpListener>,
    stun: Vec<stun::Server>,
    metrics: Option<TcpListener>,
    registry: Arc<Registry>,
    admin: AdminSocket,
    stop: CancellationToken,
    /// Locked as long as this runs.
    _state: StateDir,
}

impl Service {
    /// Reads keys, certificate and database, and binds all sockets.
    ///
    /// # Errors
    /// When something is wrong with any of them. A state directory in which the database or the key is missing, and the
    /// other is not, is refused: only a whole one and an empty one are taken.
    pub async fn start(config: &Config, stop: CancellationToken) -> Result<Self, Error> {
        Self::start_from(config, stop, false).await
    }

    /// The same, and makes what is missing in the state directory.
    ///
    /// # Errors
    /// When something is wrong with what is there.
    pub async fn init(config: &Config, stop: CancellationToken) -> Result<Self, Error> {
        Self::start_from(config, stop, true).await
    }

    async fn start_from(config: &Config, stop: CancellationToken, init: bool) -> Result<Self, Error> {
        let certificate = config
            .tls
            .as_ref()
            .map(|tls| Certificate::load(&tls.cert_file.0, &tls.key_file.0))
            .transpose()?;
        warn_of_surprises(config, certificate.as_deref());
        let state = StateDir::open(&config.state_dir.0, "coordinator")?;

        let mut listeners = Vec::new();
        let addresses: Vec<_> = config.listen.iter().map(|address| address.0).collect();
        for address in &addresses {
            listeners.push(listen(*address, &addresses, "clients", "listen")?);
        }
        let metrics = match config.metrics() {
            Some((address, given)) => metrics_listener(address, given)?,
            None => None,
        };
        let embedded = config.embedded();
        let mut stun = Vec::new();
        let addresses: Vec<_> =
            embedded.iter().flat_map(|relay| &relay.stun_listen).map(|address| address.0).collect();
        for address in &addresses {
            stun.push(bind_stun(*address, &addresses)?);
        }

        let derp_map = Arc::new(config.derp_map());
        let core = open_core(config, &state, init).await?;
        // After the database: a first start that is interrupted between the two is still one.
        let noise_key = load_or_generate(
            &state.path().join(NOISE_KEY),
            MachinePrivateKey::generate,
            MachinePrivateKey::to_text,
        )?;
        let relay = match &embedded {
            Some(_) => {
                let asked = core.clone();
                let admission = AdmitIf(move |key: &lacis_wire::key::NodeKey| asked.may_relay(key));
                let path = state.path().join(RELAY_KEY);
                let key = load_or_generate(&path, RelayPrivateKey::generate, RelayPrivateKey::to_text)?;
                let relay = Relay::new(key, Arc::new(admission), Limits::default());
                let told = relay.clone();
                core.on_revoked(move |key| {
                    told.disconnect(key);
                });
                Some(relay)
            }
            None => None,
        };
        let admin = AdminSocket::bind(&config.admin_socket()).await?;

        let noise = Noise::new(noise_key.clone(), core.clone(), inner::router(core.clone()), stop.clone());
        let mut router = outer::router(core.clone(), noise.clone(), noise_key.public(), derp_map);
        if let Some(relay) = &relay {
            router = router.merge(relay.router());
        }
        let router = router.layer(middleware::from_fn_with_state(Arc::clone(core.log()), fault::log));
        let mut registry = Registry::default();
        core.register_metrics(registry.sub_registry_with_prefix("lacis_coordinator"));
        noise.register_metrics(&mut registry);
        if let Some(relay) = &relay {
            relay.register_metrics(&mut registry);
        }
        for server in &stun {
            server.register_metrics(&mut registry);
        }
        Ok(Self {
            core,
            noise,
            relay,
            certificate,
            router,
            trusted_proxies: config.trusted_proxies.iter().map(|prefix| prefix.0).collect(),
            limits: HttpLimits::default(),
            listeners,
            stun,
            metrics,
            registry: Arc::new(registry),
            admin,
            stop,
            _state: state,
        })
    }

    /// With other limits for connections that are not upgraded.
    pub fn http_limits(mut self, limits: HttpLimits) -> Self {
        self.limits = limits;
        self
    }

    /// The core, for programs that embed the service.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// Where clients may connect.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// The certificate, to be read again when told so.
    pub fn certificate(&self) -> Option<Arc<Certificate>> {
        self.certificate.clone()
    }

    /// Serves until the stop that [`Self::start`] was given.
    pub async fn run(self) -> Result<(), Error> {
        let Self { core, noise, relay, stop, .. } = self;
        let tasks = TaskTracker::new();
        let tls = self.certificate.as_ref().map(Certificate::server_config).transpose()?;
        let clients = Listeners::new(self.router, Arc::clone(core.log()), stop.clone())
            .tls(tls)
            .trusted_proxies(self.trusted_proxies)
            .limits(self.limits);
        let clients = Arc::new(clients);
        for listener in self.listeners {
            tasks.spawn(Arc::clone(&clients).serve(listener));
        }
        if let Some(certificate) = self.certificate {
            tasks.spawn(certificate.follow(stop.clone()));
        }
        for server in self.stun {
            tasks.spawn(server.run(stop.clone()));
        }
        if let Some(listener) = self.metrics {
            let router = metrics::router(self.registry);
            let metrics = Listeners::new(router, Arc::clone(core.log()), stop.clone());
            tasks.spawn(Arc::new(metrics).serve(listener));
        }
        if let Some(relay) = relay.clone() {
            let stopped = stop.clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = relay.ask_again() => {}
                    () = stopped.cancelled() => {}
                }
            });
        }
        let log = Arc::clone(core.log());
        tasks.spawn(self.admin.serve(admin::router(core.clone()), log, stop.clone()));

        stop.cancelled().await;
        tasks.close();
        let ended = tokio::time::timeout(STOP_TIMEOUT, async {
            core.end_streams();
            if let Some(relay) = &relay {
                relay.shutdown().await;
            }
            noise.wait().await;
            tasks.wait().await;
        });
        if ended.await.is_err() {
            tracing::warn!("some connections did not end in time");
        }
        match tokio::time::timeout(CLOSE_TIMEOUT, core.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "closing the database"),
            Err(_) => tracing::error!("the database was not closed in time, its -wal file belongs to it"),
        }
        Ok(())
    }
}

/// Binds a TCP listener that a key of the configuration names; `all` as for [`bind::tcp`].
fn listen(
    address: SocketAddr,
    all: &[SocketAddr],
    what: &'static str,
    key: &'static str,
) -> Result<TcpListener, Error> {
    bind::tcp(address, all).map_err(|source| Error::Listen { address, what, key, source })
}

fn bind_stun(address: SocketAddr, all: &[SocketAddr]) -> Result<stun::Server, Error> {
    stun::Server::bind(address, all).map_err(|error| match error {
        lacis_relay::Error::Bind { address, source, .. } => {
            Error::Listen { address, what: "STUN", key: "embedded_relay.stun_listen", source }
        }
        other => Error::Relay(other),
    })
}

/// The default port is also Prometheus' own: when nobody asked for it, having it is not worth a failure.
fn metrics_listener(address: SocketAddr, given: bool) -> Result<Option<TcpListener>, Error> {
    match listen(address, &[], "metrics", "metrics_listen") {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if !given => {
            tracing::warn!(%error, "metrics are not served");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// What is allowed and probably not meant.
fn warn_of_surprises(config: &Config, certificate: Option<&Certificate>) {
    let url = &config.server_url.0;
    if let Some(certificate) = certificate {
        match certificate.is_for(url.host()) {
            Ok(false) => tracing::warn!(
                host = url.host(),
                "the certificate is not for the host of server_url: clients will refuse it"
            ),
            Err(error) => tracing::warn!(%error, "cannot tell what the certificate is for"),
            Ok(true) => {}
        }
    }
}

/// Opens the database and reads the networks' state. What looks like a loss is not begun again without `init`.
async fn open_core(config: &Config, state: &StateDir, init: bool) -> Result<Core, Error> {
    let made = |name: &str| state.path().join(name).symlink_metadata().is_ok();
    let missing = match [NOISE_KEY, RELAY_KEY].into_iter().find(|name| made(name)) {
        Some(key) if !init => Missing::Refuse { key: state.path().join(key) },
        _ => Missing::Make,
    };
    let opened = Store::open_or(state.path().join(DATABASE), missing).await;
    let (store, loaded) = opened.map_err(core::Error::Store)?;
    if !init && !made(NOISE_KEY) && !loaded.nodes.is_empty() {
        return Err(Error::MissingKey { path: state.path().join(NOISE_KEY), nodes: loaded.nodes.len() });
    }
    Ok(Core::open(config.core(), store, loaded)?)
}
