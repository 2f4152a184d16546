//! From options to a running daemon, and in good order out of it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lacis_relay::client::DialOptions;
use lacis_tunnel::{Tunnel, TunnelConfig};
use lacis_wire::io::Proxies;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::bus::Bus;
use crate::engine::{self, Engine, EngineHandle, Inputs, Parts, PathOptions};
use crate::host::{Host, HostOptions, is_in_use};
use crate::host_task::HostTask;
use crate::localapi::Socket;
use crate::netcheck::StunProbes;
use crate::portmap::PortMap;
use crate::relays::Relays;
use crate::state::StateDir;
use crate::{Error, hostinfo, links, uapi};

/// On every socket of the daemon, so that policy routing keeps it out of the tunnel.
const FWMARK: u32 = 0x80000;
/// The mesh's routing table.
const TABLE: u32 = 52;
/// News of relays and host that may wait.
const NEWS: usize = 256;

/// The command line.
#[derive(Clone, Debug)]
pub struct Options {
    pub state_dir: PathBuf,
    pub socket: PathBuf,
    pub tun: String,
    /// 0: the one used last, or any.
    pub port: u16,
    /// Addresses at which this node can be reached, for peers to try; besides those that are found out.
    pub endpoints: Vec<SocketAddr>,
    /// Whether the router is asked to map the port.
    pub port_mapping: bool,
    /// Whether ports of NATs may be searched for.
    pub port_search: bool,
    /// The proxies that lead to the control server and the relays.
    pub proxies: Arc<Proxies>,
}

/// How long a daemon that was in a network before waits with being ready for the host to look like it.
const FIRST_STATE: Duration = Duration::from_secs(5);

/// Runs until `stop`. `ready` is called when the local API answers and, where the network of the time before is known,
/// the host's routes are as they were: what starts after the daemon goes nowhere else.
pub async fn run(options: Options, stop: CancellationToken, ready: impl FnOnce()) -> Result<(), Error> {
    let dir = Arc::new(StateDir::open(&options.state_dir)?);
    let mut saved = dir.load()?;
    let socket = Socket::bind(&options.socket).await?;
    let fwmark = may_mark().then_some(FWMARK);
    if fwmark.is_none() {
        tracing::warn!("sockets cannot be marked (CAP_NET_ADMIN): an exit node cannot be used");
    }
    let host = Host::new(host_options(&options)).await?;
    let port = if options.port == 0 { saved.port } else { options.port };
    let config = TunnelConfig { tun_name: options.tun.clone(), port, fwmark, ..TunnelConfig::default() };
    let resolver = lacis_dns::Resolver::new(lacis_dns::Options { fwmark });
    let responder = resolver.clone();
    let (tunnel, outputs) =
        Tunnel::start(config, Box::new(move |packet, answer| responder.answer_packet(packet, answer)))?;
    saved.port = tunnel.udp_port().0;

    let (news, relay_news) = mpsc::channel(NEWS);
    if let Some(proxy) = options.proxies.https() {
        tracing::info!(%proxy, "a proxy leads to the control server and the relays");
    }
    let dial = DialOptions { fwmark, proxies: Arc::clone(&options.proxies), ..DialOptions::default() };
    let relays = Relays::new(tunnel.clone(), dial, news);
    tokio::spawn(relays.clone().carry(outputs.relay));
    tokio::spawn(engine::serve_quad100(outputs.quad100, tunnel.clone(), resolver.clone(), stop.clone()));
    let (host_sender, host_news) = mpsc::channel(NEWS);
    let returns = saved.prefs.want_running && dir.has_netmap();
    let (host, host_end) = HostTask::start(host, tunnel.tun_index(), host_sender);
    let mut tried = host.tried();
    let port_map = PortMap::start(tunnel.udp_port().0, tunnel.tun_index(), fwmark, options.port_mapping);
    let links = links::watch(tunnel.tun_index(), fwmark);
    let bus = Bus::default();
    let (commands, command_inbox) = engine::commands();
    let uapi_commands = commands.clone();
    let handle = EngineHandle { commands, bus: bus.clone() };

    let engine = Engine::new(Parts {
        dir,
        saved,
        tunnel: tunnel.clone(),
        relays,
        probes: StunProbes::default(),
        resolver,
        host,
        bus,
        fwmark,
        proxies: options.proxies,
        port_map,
        paths: PathOptions {
            port: options.port,
            endpoints: options.endpoints,
            low_ports: may_bind_low_ports(),
            searches: options.port_search,
        },
    });
    let inputs = Inputs {
        commands: command_inbox,
        relay_news,
        udp: outputs.udp,
        events: outputs.events,
        host_news,
        links,
    };
    let api = tokio::spawn(socket.serve(handle, options.tun.clone(), stop.clone()));
    let uapi = uapi::Socket::bind(tunnel.tun_name()).await;
    let uapi = uapi.map(|socket| tokio::spawn(socket.serve(uapi_commands, stop.clone())));
    let mut running = std::pin::pin!(engine.run(inputs, stop.clone()));
    let early = if returns {
        tokio::select! {
            ended = &mut running => Some(ended),
            _ = tokio::time::timeout(FIRST_STATE, tried.wait_for(|tried| *tried)) => None,
        }
    } else {
        None
    };
    let ended = match early {
        Some(ended) => ended,
        None => {
            tracing::info!(version = hostinfo::VERSION, socket = %options.socket.display(), tun = %options.tun, "lacisd ready");
            ready();
            running.await
        }
    };
    // Whatever ended it: everything else ends too.
    stop.cancel();
    // The engine held the host's handle: the host is put back now.
    if let Err(error) = host_end.await {
        tracing::error!(%error, "this host may not be as it was before");
    }
    tunnel.shutdown();
    api.abort();
    if let Some(uapi) = uapi {
        // It goes with its socket.
        let _ = uapi.await;
    }
    ended
}

/// Puts back what a daemon that was killed, or cannot be started again, has left on this host.
///
/// # Errors
/// When a daemon runs with these options, or what is needed is not allowed.
pub async fn cleanup(options: &Options) -> Result<(), Error> {
    if !may_mark() {
        return Err(Error::NotAllowed);
    }
    let host = host_options(options);
    let running = || Error::Running { tun: options.tun.clone() };
    // A state directory that is not there has no daemon, and none is made.
    let dir = options.state_dir.exists().then(|| StateDir::open(&options.state_dir)).transpose();
    let _lock =
        dir.map_err(|error| if matches!(error, Error::StateInUse { .. }) { running() } else { error })?;
    if is_in_use(&host).await? {
        return Err(running());
    }
    Host::new(host).await?.revert().await;
    Ok(())
}

fn host_options(options: &Options) -> HostOptions {
    HostOptions { tun_name: options.tun.clone(), fwmark: FWMARK, table: TABLE, ..HostOptions::default() }
}

/// Can this process send from ports below 1024? A taken port says yes as well.
fn may_bind_low_ports() -> bool {
    let bound = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 1000));
    bound.map_or_else(|error| error.kind() == std::io::ErrorKind::AddrInUse, |_| true)
}

/// Can this process set SO_MARK?
fn may_mark() -> bool {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None);
    socket.is_ok_and(|socket| socket.set_mark(FWMARK).is_ok())
}
