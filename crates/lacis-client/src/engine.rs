//! The heart of the daemon: one task that owns every decision.
//!
//! Whatever happens (a frame of the map stream, a command of the local API, a relay that connects, a ping) comes in
//! as a message; handlers change the engine's own state; then [`Engine::settle`] makes the rest follow from it: what
//! is announced, which state users see, what is saved. The parts: [`login`] and [`logout`] (who we are to the control server),
//! [`network`] (the map, turned into tunnel, relays, resolver and host), [`measure`] (the network around this host),
//! [`home`] (which relays can be used, and which is home), [`paths`] (which way to each peer), [`clock`], [`pings`],
//! [`status`] (what users see).

mod clock;
mod home;
mod login;
mod logout;
mod measure;
mod network;
mod paths;
mod pings;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ipnet::IpNet;
use lacis_dns::Resolver;
use lacis_path::Via;
use lacis_serve::log::LogLimiter;
use lacis_tunnel::{Event, Tunnel, UdpIn};
use lacis_wire::control::{DerpMap, DnsConfig, Hostinfo, NodeId};
use lacis_wire::disco;
use lacis_wire::io::Proxies;
use lacis_wire::key::NodeKey;
use lacis_wire::local::{
    MaskedPrefs, Netcheck, NetcheckReport, Notify, PathReport, PingResult, Prefs, StartOptions, State,
    Status, SuggestedExitNode, WhoIs,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::Error;
use crate::bus::Bus;
use crate::control::{Announcement, Control, ControlEvent};
use crate::host_task::{HostNews, HostTask};
use crate::hostinfo;
use crate::links::LinkState;
use crate::netcheck::StunProbes;
use crate::netmap::{NetMap, Session};
use crate::portmap::PortMap;
use crate::relays::{Reach, RelayNews, Relays};
use crate::state::{Saved, StateDir};
use crate::uapi;
use clock::{Clock, Reading};
use login::Login;
use logout::{Logouts, Outcome};
use measure::{Measurement, NetcheckRuns};
use paths::Reflections;
use pings::Pings;

/// Housekeeping: idle relays, expiry, saving the map, measuring the network again.
const TICK: Duration = Duration::from_secs(5);
/// The map is saved no more often than this: in a large network something changes all the time.
const SAVE_MAP: Duration = Duration::from_secs(15);
/// Commands that may wait.
const COMMANDS: usize = 64;

/// What the local API asks for.
#[derive(Debug)]
pub(crate) enum Command {
    Status {
        peers: bool,
        reply: oneshot::Sender<Status>,
    },
    Prefs {
        reply: oneshot::Sender<Prefs>,
    },
    EditPrefs {
        change: MaskedPrefs,
        reply: oneshot::Sender<Result<Prefs, String>>,
    },
    CheckPrefs {
        prefs: Box<Prefs>,
        reply: oneshot::Sender<Result<(), String>>,
    },
    Start {
        options: Box<StartOptions>,
        reply: oneshot::Sender<Result<(), String>>,
    },
    LoginInteractive {
        reply: oneshot::Sender<Result<(), String>>,
    },
    Logout {
        reply: oneshot::Sender<Result<(), String>>,
    },
    WhoIs {
        who: Who,
        reply: oneshot::Sender<Option<Box<WhoIs>>>,
    },
    Ping {
        ip: IpAddr,
        kind: PingKind,
        reply: oneshot::Sender<PingResult>,
    },
    /// How a peer is reached, and why not better.
    Why {
        ip: IpAddr,
        reply: oneshot::Sender<Result<PathReport, String>>,
    },
    Netcheck {
        reply: oneshot::Sender<Result<Netcheck, String>>,
    },
    DerpMap {
        reply: oneshot::Sender<Option<Arc<DerpMap>>>,
    },
    SuggestExitNode {
        reply: oneshot::Sender<Option<SuggestedExitNode>>,
    },
    DnsConfig {
        reply: oneshot::Sender<Option<Arc<DnsConfig>>>,
    },
    /// The interface as WireGuard's own tools see one.
    WireGuard {
        reply: oneshot::Sender<uapi::Device>,
    },
    /// What a new watcher of the bus must hear first.
    Initial {
        mask: u64,
        reply: oneshot::Sender<Notify>,
    },
}

/// Whom `whois` is about.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Who {
    Address(IpAddr),
    Key(NodeKey),
}

/// How to ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PingKind {
    Disco,
    Tsmp,
    Icmp,
}

/// Everything that comes in by channels.
pub(crate) struct Inputs {
    pub commands: mpsc::Receiver<Command>,
    pub relay_news: mpsc::Receiver<RelayNews>,
    pub udp: mpsc::Receiver<UdpIn>,
    pub events: mpsc::Receiver<Event>,
    pub host_news: mpsc::Receiver<HostNews>,
    pub links: mpsc::Receiver<LinkState>,
}

/// A way to ask the engine.
#[derive(Clone, Debug)]
pub(crate) struct EngineHandle {
    pub commands: mpsc::Sender<Command>,
    pub bus: Bus,
}

pub(crate) fn commands() -> (mpsc::Sender<Command>, mpsc::Receiver<Command>) {
    mpsc::channel(COMMANDS)
}

/// What the engine is built from.
pub(crate) struct Parts {
    pub dir: Arc<StateDir>,
    pub saved: Saved,
    pub tunnel: Tunnel,
    pub relays: Relays,
    pub probes: StunProbes,
    pub resolver: Resolver,
    pub host: HostTask,
    pub bus: Bus,
    pub fwmark: Option<u32>,
    pub proxies: Arc<Proxies>,
    pub port_map: PortMap,
    pub paths: PathOptions,
}

/// What the user says about paths.
#[derive(Clone, Debug, Default)]
pub(crate) struct PathOptions {
    /// The UDP port asked for; 0 for any.
    pub port: u16,
    /// Addresses at which this node is reached, whatever is found out.
    pub endpoints: Vec<SocketAddr>,
    /// Ports below 1024 can be bound.
    pub low_ports: bool,
    /// Ports of NATs may be searched for.
    pub searches: bool,
}

pub(crate) struct Engine {
    dir: Arc<StateDir>,
    saved: Saved,
    /// As it is on disk. It has the keys.
    on_disk: Zeroizing<Vec<u8>>,
    /// Saving failed; it is tried again at the next tick.
    disk_trouble: bool,
    host_facts: Hostinfo,
    tunnel: Tunnel,
    relays: Relays,
    probes: StunProbes,
    resolver: Resolver,
    host: HostTask,
    bus: Bus,
    fwmark: Option<u32>,
    proxies: Arc<Proxies>,

    control: Option<Control>,
    /// A login that is under way.
    login: Option<Login>,
    logouts: Logouts,
    logout_outcomes: mpsc::Receiver<Outcome>,
    /// The user accepts another key of the control server, once.
    accept_new_key: bool,
    /// When `start` began a login with a new key and an auth key.
    reauth_began: Option<Instant>,
    /// Where a person must sign in.
    auth_url: Option<String>,
    /// Why the control server cannot be reached, or refuses us.
    trouble: Option<String>,
    /// When to register again after a refusal that may be temporary.
    retry_at: Option<Instant>,
    /// Whether the map stream stands.
    streaming: bool,

    session: Session,
    map: Option<NetMap>,
    map_unsaved: bool,
    map_saved: Option<Instant>,
    /// Nodes whose keys had expired when it was looked last.
    expired: Vec<NodeId>,
    /// Addresses that peers have in the map and that are other nodes'.
    foreign_addresses: BTreeSet<(NodeId, IpNet)>,
    /// Whether the host is as it was told to be.
    host_ready: bool,
    host_trouble: Option<String>,
    /// What the host lacks to route as is wished.
    host_missing: Vec<String>,

    report: NetcheckReport,
    reports: mpsc::Sender<Measurement>,
    report_inbox: mpsc::Receiver<Measurement>,
    netcheck: NetcheckRuns,
    early: mpsc::Sender<SocketAddr>,
    early_inbox: mpsc::Receiver<SocketAddr>,
    /// STUN servers that have answered, nearest first.
    stun_servers: Vec<SocketAddr>,
    link: LinkState,
    own_addresses: Vec<IpAddr>,
    port_map: PortMap,
    /// Where the router lets this node be reached.
    mapped: watch::Receiver<Option<SocketAddrV4>>,
    path_options: PathOptions,
    paths: lacis_path::Paths,
    reflections: Reflections,
    /// The path logic knows the ways of the last run.
    remembered: bool,
    announced_home: u16,
    /// Which relays cannot be used from here.
    reach: Reach,
    /// How far the regions are, in ns, as measured last.
    latencies: BTreeMap<u16, u64>,
    /// Since when the connection to home stands.
    home_since: Option<Instant>,
    /// The relays that are announced as ones this node cannot use.
    unusable: BTreeSet<u16>,
    /// When the relays are looked at again.
    relays_due: Option<Instant>,
    /// What each region's relay complains of.
    relay_trouble: BTreeMap<u16, String>,
    /// For log lines that the control server, relays and peers cause.
    log: LogLimiter,
    boxes: disco::Boxes,
    clock: Clock,
    pings: Pings,

    /// What users see; once running, small interruptions do not show.
    state: State,
    was_ready: bool,
}

impl Engine {
    pub(crate) fn new(parts: Parts) -> Self {
        let (reports, report_inbox) = mpsc::channel(4);
        let (early, early_inbox) = mpsc::channel(16);
        let (logouts, logout_outcomes) = Logouts::new();
        let on_disk = encoded(&parts.saved);
        let own_key = parts.saved.node_key.as_ref().map(|key| key.public()).unwrap_or_default();
        Self {
            host_facts: hostinfo::read(&parts.saved.log_id),
            boxes: disco::Boxes::new(parts.saved.disco_key.clone()),
            clock: Clock::new(Reading::now(), parts.saved.latest_time),
            on_disk,
            disk_trouble: false,
            dir: parts.dir,
            saved: parts.saved,
            tunnel: parts.tunnel,
            relays: parts.relays,
            probes: parts.probes,
            resolver: parts.resolver,
            host: parts.host,
            bus: parts.bus,
            fwmark: parts.fwmark,
            proxies: parts.proxies,
            control: None,
            login: None,
            logouts,
            logout_outcomes,
            accept_new_key: false,
            reauth_began: None,
            auth_url: None,
            trouble: None,
            retry_at: None,
            streaming: false,
            session: Session::default(),
            map: None,
            map_unsaved: false,
            map_saved: None,
            host_ready: false,
            host_trouble: None,
            host_missing: Vec::new(),
            report: NetcheckReport::default(),
            reports,
            report_inbox,
            netcheck: NetcheckRuns::default(),
            early,
            early_inbox,
            stun_servers: Vec::new(),
            link: LinkState::default(),
            own_addresses: Vec::new(),
            mapped: parts.port_map.external(),
            port_map: parts.port_map,
            path_options: parts.paths,
            paths: lacis_path::Paths::new(own_key, lacis_tunnel::DEFAULT_MTU, random_seed()),
            reflections: Reflections::default(),
            remembered: false,
            announced_home: 0,
            reach: Reach::default(),
            latencies: BTreeMap::new(),
            home_since: None,
            unusable: BTreeSet::new(),
            relays_due: None,
            relay_trouble: BTreeMap::new(),
            log: LogLimiter::default(),
            expired: Vec::new(),
            foreign_addresses: BTreeSet::new(),
            pings: Pings::default(),
            state: State::NoState,
            was_ready: false,
        }
    }

    /// Works until told to stop, or until the tunnel is lost.
    pub(crate) async fn run(mut self, mut inputs: Inputs, stop: CancellationToken) -> Result<(), Error> {
        // How this host is connected comes first.
        if let Some(link) = inputs.links.recv().await {
            self.link_news(link);
        }
        self.begin();
        self.settle();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ended = loop {
            let paths_due = self.paths.poll_timeout().map(Instant::from_std);
            tokio::select! {
                () = stop.cancelled() => break Ok(()),
                Some(command) = inputs.commands.recv() => self.command(command),
                event = next_event(&mut self.control) => self.control_event(event),
                Some(news) = inputs.relay_news.recv() => match news {
                    RelayNews::Disco { region, from, data } => {
                        // As with datagrams.
                        self.disco(&data, Via::Relay(region), Some(from));
                        continue;
                    }
                    RelayNews::Event(region, event) => self.relay_event(region, event),
                },
                Some(datagram) = inputs.udp.recv() => {
                    // Answers go to those who wait for them. Nothing follows from it here, and anybody can send one.
                    self.datagram(&datagram);
                    continue;
                }
                event = inputs.events.recv() => match event {
                    Some(Event::TunLost { error }) => break Err(Error::TunLost(error)),
                    Some(event) => self.tunnel_event(event),
                    None => break Err(Error::PacketThread),
                },
                () = at(paths_due) => {
                    self.wake_paths();
                    continue;
                }
                () = at(self.relays_due) => self.follow_relays(),
                Some(measurement) = self.report_inbox.recv() => self.measured(measurement),
                Some(outcome) = self.logout_outcomes.recv() => self.logout_outcome(outcome),
                Some(seen) = self.early_inbox.recv() => self.seen_early(seen),
                Some(link) = inputs.links.recv() => {
                    self.link_news(link);
                    self.retry_logouts_now();
                }
                Ok(()) = self.mapped.changed() => self.tell_local(),
                Some(news) = inputs.host_news.recv() => self.host_news(news),
                _ = tick.tick() => self.tick(),
            }
            self.settle();
        };
        if ended.is_err() {
            self.host.abandon();
        }
        self.control = None;
        self.relays.set_identity(None);
        self.remember_ways();
        self.save_map();
        self.saved.latest_time = self.clock.latest(Reading::now());
        self.disk_trouble = false;
        self.save();
        self.port_map.close().await;
        ended
    }

    /// What was there before the restart goes on: peers are talked to before the control server answers.
    fn begin(&mut self) {
        self.relays.set_home(self.saved.home_region);
        if !self.saved.is_logged_in() {
            return;
        }
        if let Some(frame) = self.dir.load_netmap() {
            let mut session = Session::default();
            match session.apply(frame, time::OffsetDateTime::now_utc()) {
                Ok(_) => {
                    self.map = session.map().cloned();
                    tracing::info!("starting from the saved network map");
                }
                Err(error) => tracing::warn!(%error, "the saved network map is ignored"),
            }
        }
    }

    fn command(&mut self, command: Command) {
        // Whoever asked may be gone: then the answer is of no use to anybody.
        match command {
            Command::Status { peers, reply } => drop(reply.send(self.status(peers))),
            Command::Prefs { reply } => drop(reply.send(self.visible_prefs())),
            Command::EditPrefs { change, reply } => drop(reply.send(self.edit_prefs(&change))),
            Command::CheckPrefs { prefs, reply } => drop(reply.send(login::check_prefs(&prefs))),
            Command::Start { options, reply } => drop(reply.send(self.start(*options))),
            Command::LoginInteractive { reply } => drop(reply.send(self.login_interactive())),
            Command::Logout { reply } => self.logout(reply),
            Command::WhoIs { who, reply } => drop(reply.send(self.who_is(who).map(Box::new))),
            Command::Ping { ip, kind, reply } => self.ping(ip, kind, reply),
            Command::Why { ip, reply } => drop(reply.send(self.why(ip))),
            Command::SuggestExitNode { reply } => drop(reply.send(self.suggest_exit_node())),
            Command::Netcheck { reply } => self.netcheck_for(reply),
            Command::DerpMap { reply } => {
                drop(reply.send(self.map.as_ref().map(|map| Arc::clone(&map.derp_map))));
            }
            Command::DnsConfig { reply } => {
                drop(reply.send(self.map.as_ref().map(|map| Arc::clone(&map.dns))));
            }
            Command::WireGuard { reply } => drop(reply.send(self.wireguard())),
            Command::Initial { mask, reply } => drop(reply.send(self.initial(mask))),
        }
    }

    fn control_event(&mut self, event: Option<ControlEvent>) {
        match event {
            Some(event) => self.heard(event),
            // The task ends only after it has told why.
            None => self.control = None,
        }
    }

    fn host_news(&mut self, news: HostNews) {
        match news {
            HostNews::Applied { warnings } => {
                self.host_ready = true;
                let trouble = (!warnings.is_empty()).then(|| warnings.join("; "));
                if trouble != self.host_trouble {
                    match &trouble {
                        Some(trouble) => tracing::warn!("{trouble}; trying again"),
                        None => tracing::info!("this host is set up for the mesh now"),
                    }
                    self.host_trouble = trouble;
                }
            }
            HostNews::Reverted => {
                self.host_ready = false;
                self.host_trouble = None;
                self.host_missing.clear();
            }
            HostNews::Failed(error) => {
                if self.host_trouble.as_ref() != Some(&error) {
                    tracing::error!(%error, "this host cannot be set up for the mesh; trying again");
                    self.publish(Notify { err_message: Some(error.clone()), ..Notify::default() });
                }
                self.host_trouble = Some(error);
            }
            HostNews::Missing(missing) => {
                for line in missing.iter().filter(|line| !self.host_missing.contains(line)) {
                    tracing::warn!("{line}");
                }
                self.host_missing = missing;
            }
            HostNews::BaseResolvers => self.apply_host(),
        }
    }

    fn tick(&mut self) {
        self.follow_clock();
        self.relays.close_idle();
        let Self { relay_trouble, relays, .. } = self;
        relay_trouble.retain(|region, _| relays.is_open(*region));
        self.follow_relays();
        self.pings.forget_abandoned();
        self.follow_expiry();
        self.retry_logouts();
        if self.map_saved.is_none_or(|at| at.elapsed() >= SAVE_MAP) {
            self.save_map();
        }
        self.disk_trouble = false;
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.retry_at = None;
        }
        self.remember_ways();
        if self.is_on() {
            self.measure_if_due();
        }
    }

    /// Makes everything follow from the state that the last message left.
    fn settle(&mut self) {
        self.follow_wishes();
        if let Some(control) = &self.control {
            control.announce(self.announcement());
        }
        self.update_state();
        self.save();
    }

    fn announcement(&self) -> Announcement {
        let (endpoints, endpoint_types) = self.endpoints();
        Announcement {
            hostinfo: Hostinfo {
                net_info: self.net_info(),
                services: home::services(&self.unusable),
                ..hostinfo::with_prefs(&self.host_facts, &self.saved.prefs)
            },
            endpoints,
            endpoint_types,
            disco_key: Some(*self.boxes.public()),
        }
    }

    fn publish(&self, notify: Notify) {
        self.bus.publish(notify);
    }

    fn save(&mut self) {
        let now = encoded(&self.saved);
        if now == self.on_disk || self.disk_trouble {
            return;
        }
        match self.dir.save(&self.saved) {
            Ok(()) => self.on_disk = now,
            Err(error) => {
                tracing::error!(%error, "the state is not saved; trying again");
                self.disk_trouble = true;
            }
        }
    }

    fn save_map(&mut self) {
        if !std::mem::take(&mut self.map_unsaved) {
            return;
        }
        self.map_saved = Some(Instant::now());
        if let Some(map) = &self.map
            && let Err(error) = self.dir.save_netmap(&map.to_message())
        {
            tracing::warn!(%error, "the network map is not saved");
        }
    }
}

fn encoded(saved: &Saved) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(lacis_wire::control::to_json(saved))
}

/// Sleeps until then; for ever without a time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

fn random_seed() -> [u8; 32] {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).expect("the system gives randomness"); // nothing is safe without
    seed
}

fn random_number() -> u64 {
    u64::from_le_bytes(lacis_wire::derp::random_nonce()[..8].try_into().unwrap_or_default())
}

async fn next_event(control: &mut Option<Control>) -> Option<ControlEvent> {
    match control {
        Some(control) => control.events.recv().await,
        None => std::future::pending().await,
    }
}

/// Resolver packets go from the tunnel to the resolver and back.
pub(crate) async fn serve_quad100(
    packets: mpsc::Receiver<Bytes>,
    tunnel: Tunnel,
    resolver: Resolver,
    stop: CancellationToken,
) {
    lacis_dns::Quad100::run(packets, move |packet| tunnel.inject(packet), resolver, stop).await;
}
