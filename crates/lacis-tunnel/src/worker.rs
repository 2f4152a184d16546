//! The packet thread: polls device, sockets and commands, and moves packets in batches until nothing waits.
//!
//! All state is the thread's own; nothing on the way of a packet is locked or allocated.

mod commands;
mod inbound;
mod messages;
mod outbound;
mod timers;

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{debug, error, warn};

use crate::coalesce::{Coalescer, Sink};
use crate::config::{Responder, SocketId, Way};
use crate::filter::{Filter, Flows};
use crate::outputs::{Event, Senders};
use crate::peers::{Identity, Peer, Peers};
use crate::queue::Queue;
use crate::segment::VnetHeader;
use crate::sinks::{Failure, Sinks};
use crate::stats::{Counters, unix_millis};
use crate::sys::sockets::Sockets;
use crate::sys::tun::{MAX_PACKET, Tun, VNET_LEN};
use crate::sys::udp::{MAX_SEGMENTS, Received};
use crate::tunnel::Shared;
use crate::via::Translator;
use messages::Pings;
use timers::Ticker;

/// Bytes taken from one descriptor before the others get their turn.
const TURN_BYTES: usize = 256 << 10;
/// Reads from one descriptor before the others get their turn: as many small packets as one send takes.
const TURN_READS: usize = MAX_SEGMENTS;

/// Between two [`Event::SendFailed`] of a peer.
const TELL_FAILURE: Duration = Duration::from_millis(500);
/// Descriptors that are always polled: wake, device, the main sockets.
const MAIN_FDS: usize = 4;

/// The moment that a turn began; one clock reading serves all its packets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    pub(crate) millis: u64,
}

impl Now {
    fn read() -> Self {
        Self { instant: Instant::now(), millis: unix_millis() }
    }
}

pub(crate) struct Worker {
    shared: Arc<Shared>,
    tun: Tun,
    tun_alive: bool,
    tun_buffer: Box<[u8]>,
    udp_buffer: Box<[u8]>,
    /// Auxiliary sockets that have something, in one turn.
    ready_sockets: Vec<SocketId>,
    identity: Option<Identity>,
    peers: Peers,
    /// The inner source checked last and the peer it belongs to.
    checked_source: Option<(IpAddr, u32)>,
    unknown_told: Option<Instant>,
    stray_told: Option<Instant>,
    parked: inbound::Parked,
    sinks: Sinks,
    coalescer: Coalescer,
    via: Translator,
    filter: Arc<Filter>,
    flows: Flows,
    local: Vec<IpAddr>,
    pings: Pings,
    out: Senders,
    responder: Responder,
    now: Now,
    ticker: Ticker,
}

/// Writes to the device and counts.
struct TunSink<'a> {
    tun: &'a Tun,
    counters: &'a Counters,
    udp_refused: bool,
}

impl Sink for TunSink<'_> {
    fn write(&mut self, pieces: &[IoSlice<'_>], packets: u64, merged_udp: bool) {
        match self.tun.write(pieces) {
            Ok(()) => {
                self.counters.tun_written.add(packets);
                self.counters.tun_writes.add(1);
            }
            Err(error) => {
                self.counters.tun_write_errors.add(packets);
                if merged_udp && error.raw_os_error() == Some(libc::EINVAL) {
                    self.udp_refused = true;
                }
                debug!(%error, packets, "a write to the device failed");
            }
        }
    }
}

fn flush(coalescer: &mut Coalescer, tun: &Tun, counters: &Counters) {
    if coalescer.is_empty() {
        return;
    }
    let mut sink = TunSink { tun, counters, udp_refused: false };
    coalescer.flush(&mut sink);
    if sink.udp_refused {
        warn!("the device refuses merged UDP: writing it singly from now on");
        coalescer.stop_merging_udp();
    }
}

impl Worker {
    pub(crate) fn new(
        shared: Arc<Shared>,
        tun: Tun,
        sockets: Sockets,
        out: Senders,
        responder: Responder,
        mtu: u16,
    ) -> Self {
        let offloads = tun.offloads();
        let mask = crate::sys::random() as u32;
        Self {
            shared,
            tun,
            tun_alive: true,
            tun_buffer: vec![0; VNET_LEN + MAX_PACKET + 1].into_boxed_slice(),
            udp_buffer: vec![0; 64 << 10].into_boxed_slice(),
            ready_sockets: Vec::new(),
            identity: None,
            peers: Peers::new(mask),
            checked_source: None,
            unknown_told: None,
            stray_told: None,
            parked: inbound::Parked::default(),
            sinks: Sinks::new(sockets, &out),
            coalescer: Coalescer::new(offloads.tcp(), offloads.udp()),
            via: Translator::new(mtu),
            filter: Arc::default(),
            flows: Flows::default(),
            local: Vec::new(),
            pings: Pings::default(),
            out,
            responder,
            now: Now::read(),
            ticker: Ticker::default(),
        }
    }

    /// Runs until [`Shared::stop`] is set.
    pub(crate) fn run(mut self) {
        let mut queue = Queue::default();
        while !self.shared.stop.load(Ordering::Acquire) {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(error) => {
                    error!(%error, "the packet thread cannot wait for packets and ends");
                    self.out.event(Event::TunLost { error: error.to_string() });
                    self.shared.stop.store(true, Ordering::Release);
                    return;
                }
            };
            self.now = Now::read();
            if ready.wake {
                self.shared.wake.clear();
                self.shared.queue().take(&mut queue);
                let settings = queue.settings();
                self.apply(settings);
                for command in queue.commands.drain(..) {
                    self.command(command);
                }
                for packets in queue.relayed.drain(..) {
                    self.relayed(&packets);
                }
            }
            if ready.v4 {
                self.receive_udp(SocketId::MAIN, true);
            }
            if ready.v6 {
                self.receive_udp(SocketId::MAIN, false);
            }
            while let Some(id) = self.ready_sockets.pop() {
                self.receive_udp(id, true);
            }
            if ready.tun {
                self.read_tun();
            }
            if self.ticker.retry_due(self.now.instant) {
                self.retry();
            }
            if self.ticker.due(self.now.instant) {
                self.tick();
            }
            self.finish_turn();
        }
    }

    fn wait(&mut self) -> io::Result<Ready> {
        let sockets = &self.sinks.sockets;
        let wake = self.shared.wake.as_fd();
        let idle = || PollFd::from_borrowed_fd(wake, PollFlags::empty());
        let mut fixed: [_; MAIN_FDS] = [
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
            if self.tun_alive { PollFd::new(&self.tun, PollFlags::IN) } else { idle() },
            sockets.v4.as_ref().map_or_else(idle, |socket| PollFd::new(socket, PollFlags::IN)),
            sockets.v6.as_ref().map_or_else(idle, |socket| PollFd::new(socket, PollFlags::IN)),
        ];
        // There are seldom any, and then an allocation is the least of what a turn costs.
        let mut with_auxiliary;
        let fds: &mut [PollFd<'_>] = if sockets.auxiliary().is_empty() {
            &mut fixed
        } else {
            let auxiliary = sockets.auxiliary().iter();
            let auxiliary = auxiliary.map(|(_, socket)| PollFd::new(socket, PollFlags::IN));
            with_auxiliary = fixed.into_iter().chain(auxiliary).collect::<Vec<_>>();
            &mut with_auxiliary
        };
        let timeout = self.ticker.timeout(Instant::now(), !self.peers.live.is_empty());
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        match poll(fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |at: usize| !fds[at].revents().is_empty();
        let auxiliary = sockets.auxiliary().iter().zip(&fds[MAIN_FDS..]);
        let auxiliary = auxiliary.filter(|(_, fd)| !fd.revents().is_empty()).map(|((id, _), _)| *id);
        self.ready_sockets.clear();
        self.ready_sockets.extend(auxiliary);
        Ok(Ready {
            wake: ready(0),
            tun: self.tun_alive && ready(1),
            v4: sockets.v4.is_some() && ready(2),
            v6: sockets.v6.is_some() && ready(3),
        })
    }

    /// Everything collected leaves: nothing waits for a timer.
    fn finish_turn(&mut self) {
        self.flush_tun();
        self.sinks.flush(&self.out, self.now.instant);
        self.tell_failures();
    }

    /// Paths by which nothing can be sent.
    fn tell_failures(&mut self) {
        let Self { sinks, peers, out, now, .. } = self;
        for Failure { key, way, kind } in sinks.failures.drain(..) {
            if let Some(slot) = peers.slot_of(&key)
                && let Some(peer) = peers.get(slot)
                && Peer::due(&mut peer.failure_told, now.instant, TELL_FAILURE)
            {
                out.event(Event::SendFailed { key, way, kind });
            }
        }
    }

    fn flush_tun(&mut self) {
        flush(&mut self.coalescer, &self.tun, &self.shared.counters);
    }

    fn receive_udp(&mut self, id: SocketId, v4: bool) {
        // Out of the way, so that its contents and everything else can be used together.
        let mut buffer = std::mem::take(&mut self.udp_buffer);
        let mut bytes = 0;
        for _ in 0..TURN_READS {
            // An order of this turn may have closed it.
            let Some(socket) = self.sinks.sockets.get(id, v4) else { break };
            let Received { len, segment, from } = match socket.receive(&mut buffer) {
                Ok(Some(received)) => received,
                Ok(None) => break,
                Err(error) => {
                    debug!(%error, "receiving by UDP failed");
                    break;
                }
            };
            self.shared.counters.udp_receives.add(1);
            self.shared.counters.udp_received.add(len.div_ceil(segment) as u64);
            for datagram in buffer[..len].chunks(segment) {
                self.datagram(datagram, inbound::Source::Udp(Way { socket: id, addr: from }));
            }
            bytes += len;
            if bytes >= TURN_BYTES {
                break;
            }
        }
        self.udp_buffer = buffer;
    }

    fn relayed(&mut self, packets: &[(lacis_wire::key::NodeKey, Bytes)]) {
        self.shared.counters.relay_received.add(packets.len() as u64);
        for (key, packet) in packets {
            self.datagram(packet, inbound::Source::Relay(*key));
        }
    }

    fn read_tun(&mut self) {
        let mut buffer = std::mem::take(&mut self.tun_buffer);
        let mut bytes = 0;
        for _ in 0..TURN_READS {
            let len = match self.tun.read(&mut buffer) {
                Ok(Some(len)) => len,
                Ok(None) => break,
                Err(error) => {
                    self.tun_alive = false;
                    error!(%error, tun = %self.tun.name(), "the network device is gone");
                    self.out.event(Event::TunLost { error: error.to_string() });
                    break;
                }
            };
            self.shared.counters.tun_reads.add(1);
            let Some((header, packet)) = buffer[..len].split_first_chunk_mut::<VNET_LEN>() else {
                self.shared.counters.out_malformed.add(1);
                continue;
            };
            self.outgoing(VnetHeader::read(header), packet);
            bytes += len;
            if bytes >= TURN_BYTES {
                break;
            }
        }
        self.tun_buffer = buffer;
    }
}

/// Which descriptors have something.
#[derive(Clone, Copy, Debug)]
struct Ready {
    wake: bool,
    tun: bool,
    v4: bool,
    v6: bool,
}
