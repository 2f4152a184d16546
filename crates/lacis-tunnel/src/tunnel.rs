//! The handle: starts the packet thread and puts commands into its queue, never blocking on packet work.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use bytes::Bytes;
use ipnet::IpNet;
use lacis_wire::key::{NodeKey, NodePrivateKey};
use tracing::{info, warn};

use crate::config::{Path, PeerConfig, Responder, SocketId, TunnelConfig, Way};
use crate::error::Error;
use crate::filter::Filter;
use crate::outputs::{Event, Outputs, Senders};
use crate::queue::{Command, Datagram, Queue};
use crate::stats::{Counters, PeerCounters, PeerStats, Stats};
use crate::sys::sockets::Sockets;
use crate::sys::tun::Tun;
use crate::sys::wake::Wake;
use crate::worker::Worker;

/// Shared by the handles and the packet thread.
pub(crate) struct Shared {
    queue: Mutex<Queue>,
    pub(crate) wake: Wake,
    pub(crate) stop: AtomicBool,
    pub(crate) counters: Arc<Counters>,
    pub(crate) peers: ArcSwap<HashMap<NodeKey, Arc<PeerCounters>>>,
}

impl Shared {
    pub(crate) fn queue(&self) -> MutexGuard<'_, Queue> {
        // A panic elsewhere cannot leave the queue half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Inner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    name: String,
    index: u32,
    ports: (u16, u16),
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Inner {
    fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.wake();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            warn!(tun = %self.name, "the packet thread had panicked");
        }
    }
}

/// Handle of a running tunnel. Clones are the same tunnel; dropping the last one shuts it down.
#[derive(Clone)]
pub struct Tunnel {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tunnel").field("name", &self.inner.name).finish_non_exhaustive()
    }
}

impl Tunnel {
    /// Opens the TUN device (up, with its MTU, without addresses) and the UDP sockets, and starts the packet thread,
    /// which asks `responder` first about packets to the resolver's addresses.
    ///
    /// # Errors
    /// See [`Error`]: each says what to do. A taken UDP port is no error, see [`Event::PortTaken`].
    pub fn start(config: TunnelConfig, responder: Responder) -> Result<(Self, Outputs), Error> {
        let tun = Tun::open(&config.tun_name, config.mtu)?;
        let sockets = Sockets::open(config.port, config.fwmark)?;
        let ports = sockets.ports();
        let (name, index) = (tun.name().to_owned(), tun.index());
        let counters = Arc::new(Counters::default());
        let (senders, outputs) = Senders::new(Arc::clone(&counters));
        if config.port != 0 && [ports.0, ports.1].iter().any(|&port| port != 0 && port != config.port) {
            warn!(wanted = config.port, v4 = ports.0, v6 = ports.1, "the UDP port is taken, using others");
            senders.event(Event::PortTaken { wanted: config.port, v4: ports.0, v6: ports.1 });
        }
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            wake: Wake::new().map_err(Error::Thread)?,
            stop: AtomicBool::new(false),
            counters,
            peers: ArcSwap::default(),
        });
        info!(tun = %name, mtu = config.mtu, v4 = ports.0, v6 = ports.1, offloads = %tun.offloads(), "tunnel opened");
        let worker = Worker::new(Arc::clone(&shared), tun, sockets, senders, responder, config.mtu);
        let thread = std::thread::Builder::new()
            .name("packets".to_owned())
            .spawn(move || worker.run())
            .map_err(Error::Thread)?;
        let inner = Inner { shared, thread: Mutex::new(Some(thread)), name, index, ports };
        Ok((Self { inner: Arc::new(inner) }, outputs))
    }

    /// Changes what waits for the packet thread, and wakes it.
    fn enqueue<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> Option<T> {
        // Nobody would ever take it.
        if self.inner.shared.stop.load(Ordering::Acquire) {
            return None;
        }
        let result = change(&mut self.inner.shared.queue());
        self.inner.shared.wake.wake();
        Some(result)
    }

    /// False when there was no room for it.
    fn command(&self, command: Command) -> bool {
        let Some(Err(lost)) = self.enqueue(|queue| queue.push(command)) else { return true };
        self.inner.shared.counters.commands_full.add_shared(lost as u64);
        false
    }

    /// Sets or changes the node key. All sessions end, since they were made with the old one.
    pub fn set_identity(&self, key: NodePrivateKey) {
        self.enqueue(|queue| queue.set_identity(key));
    }

    /// Sets all peers. Peers that were there keep their session, path and counters; others begin with [`Path::None`].
    pub fn set_peers(&self, peers: Vec<PeerConfig>) {
        self.enqueue(|queue| queue.set_peers(peers));
    }

    /// Says where a peer's packets go. Ignored for keys that are no peer: call [`Self::set_peers`] before.
    pub fn set_path(&self, key: NodeKey, path: Path) {
        self.enqueue(|queue| queue.set_path(key, path.canonical()));
    }

    /// Replaces the packet filter. Flows that this host began stay allowed.
    pub fn set_filter(&self, filter: Arc<Filter>) {
        self.enqueue(|queue| queue.set_filter(filter));
    }

    /// Own addresses inside the tunnel: the source of pings.
    pub fn set_local_addresses(&self, addresses: Vec<IpAddr>) {
        self.enqueue(|queue| queue.set_local_addresses(addresses));
    }

    /// The networks that this node routes for its peers: what they send to 4via6 routes among them is translated to
    /// IPv4 for this host, and its answers back. Other networks do not matter here.
    pub fn set_routes(&self, routes: Vec<IpNet>) {
        self.enqueue(|queue| queue.set_routes(routes));
    }

    /// Sends a datagram by one of the tunnel's sockets. `ttl` is the number of hops that it may make (from 1), if
    /// not the usual one. A failure is only counted ([`Stats::udp_send_errors`], [`Stats::commands_full`]).
    pub fn send_udp(&self, way: Way, data: Vec<u8>, ttl: Option<u8>) {
        self.command(Command::SendUdp((way.canonical(), data, ttl)));
    }

    /// Like [`Self::send_udp`] for several datagrams, which wake the packet thread once.
    pub fn send_udp_many(&self, mut datagrams: Vec<Datagram>) {
        if datagrams.is_empty() {
            return;
        }
        for (way, ..) in &mut datagrams {
            *way = way.canonical();
        }
        self.command(Command::SendUdpMany(datagrams));
    }

    /// Opens an IPv4 UDP socket beside the main ones, which datagrams and paths can use from then on; `low` asks for
    /// a port from 512 to 1023 (any free one, at random). The answer is [`Event::SocketOpened`], and is the last the
    /// caller hears of a socket that cannot be opened. A number in use gets a new socket; [`SocketId::MAIN`] never.
    /// False, and no event, when too much waits for the packet thread.
    #[must_use]
    pub fn open_socket(&self, id: SocketId, low: bool) -> bool {
        self.command(Command::OpenSocket { id, low })
    }

    /// Closes an auxiliary socket. Sends of a path that still uses it fail.
    pub fn close_socket(&self, id: SocketId) {
        self.command(Command::CloseSocket(id));
    }

    /// WireGuard packets that came by relay, with the source key that the relay told. One call for each batch read.
    pub fn relay_in(&self, packets: Vec<(NodeKey, Bytes)>) {
        if packets.is_empty() {
            return;
        }
        let count = packets.len() as u64;
        if self.enqueue(|queue| queue.push_relayed(packets)) == Some(false) {
            self.inner.shared.counters.relay_in_full.add_shared(count);
        }
    }

    /// Gives an IP packet to the host, such as an answer of the resolver. Its checksums must be complete.
    pub fn inject(&self, packet: Bytes) {
        self.command(Command::Inject(packet));
    }

    /// Sends a TSMP ping to an address of this peer; the answer is [`Event::Pong`] with the same token.
    pub fn tsmp_ping(&self, key: NodeKey, destination: IpAddr, token: u64) {
        self.command(Command::TsmpPing { key, dst: destination, token });
    }

    /// Sends an ICMP echo request to an address of this peer; the answer is [`Event::Pong`].
    pub fn icmp_ping(&self, key: NodeKey, destination: IpAddr, id: u16, sequence: u16) {
        self.command(Command::IcmpPing { key, dst: destination, id, sequence });
    }

    /// Forgets the session with this peer, so that the next packet begins a new handshake.
    pub fn reset_session(&self, key: NodeKey) {
        self.enqueue(|queue| queue.reset_session(key));
    }

    /// Begins a handshake with a peer with which there is no session.
    pub fn begin_session(&self, key: NodeKey) {
        self.command(Command::BeginSession(key));
    }

    /// Counters of a peer; `None` for a key that is no peer (or not yet: commands take a moment).
    pub fn peer_stats(&self, key: &NodeKey) -> Option<PeerStats> {
        self.inner.shared.peers.load().get(key).map(|counters| counters.read())
    }

    /// Counters of all peers, as of now.
    pub fn all_peer_stats(&self) -> Vec<(NodeKey, PeerStats)> {
        self.inner.shared.peers.load().iter().map(|(key, counters)| (*key, counters.read())).collect()
    }

    /// Counters of the thread.
    pub fn stats(&self) -> Stats {
        self.inner.shared.counters.read()
    }

    /// UDP ports in use, IPv4 and IPv6; 0 where the host does not have the family.
    pub fn udp_port(&self) -> (u16, u16) {
        self.inner.ports
    }

    /// Interface index of the TUN device.
    pub fn tun_index(&self) -> u32 {
        self.inner.index
    }

    /// Name of the TUN device.
    pub fn tun_name(&self) -> &str {
        &self.inner.name
    }

    /// Stops the packet thread, waits for it and removes the device. Later calls do nothing.
    pub fn shutdown(&self) {
        self.inner.stop();
    }
}
