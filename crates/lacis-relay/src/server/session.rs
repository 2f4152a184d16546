//! One connection after the upgrade: one task that reads, routes and writes.
//!
//! Reading: as much as there is, into a buffer borrowed for the poll; the frames in it are re-addressed where
//! they lie and copied run by run into their destinations' outboxes. What is left of an incomplete frame is
//! kept (`carry`). Writing: whatever the own outbox holds, a chunk at a time. Neither waits for the other.

use std::collections::HashSet;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use lacis_serve::places::prefix;
use lacis_wire::derp::{self, FrameType, HEADER_LEN, Header, KEY_LEN, PEER_GONE_LEN, PeerGoneReason};
use lacis_wire::disco;
use lacis_wire::key::NodeKey;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Duration, Instant, Sleep};

use super::Inner;
use super::login::{LoggedIn, login};
use super::metrics::{Kind, Reason};
use super::outbox::Outbox;
use super::registry::{Client, Departure};

/// The longest frame that is not skipped.
const LONGEST: usize = HEADER_LEN + KEY_LEN + derp::MAX_PACKET;
/// What one round reads at most beyond a carried piece of a frame.
const READ_AT_ONCE: usize = 64 << 10;
/// Size of the borrowed read buffers.
pub(super) const READ_BUFFER: usize = LONGEST + READ_AT_ONCE;
/// Rounds before other tasks get their turn. Few: the tasks that are to drain what a round brings may be waiting for
/// this very thread, and their queues hold only some rounds.
const ROUNDS: usize = 2;
/// The body limit of one client family, its key included.
const NARROW_BODY: usize = 64 << 10;
/// Disco messages are short; what is longer and looks like one must not have their queue, which is bounded by number.
const LONGEST_DISCO: usize = 4 << 10;
/// `PeerGone(NotHere)` answers: this many at once, then one a second. WireGuard retries too often to answer all.
const NOT_HERE_BURST: u32 = 3;
const NOT_HERE_INTERVAL: Duration = Duration::from_secs(1);
/// Of a peer that sends to ever new destinations, so many are remembered before those that left are forgotten.
const TOLD_CHECK: usize = 4096;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the client closed the connection")]
    Left,
    #[error("the connection failed")]
    Io(#[from] std::io::Error),
    #[error("the client broke the protocol")]
    Protocol(#[from] derp::Error),
    #[error("the client asked for what only relays of a mesh may do (frame type {0:#04x})")]
    Mesh(u8),
    #[error("the client took nothing for too long")]
    Stuck,
    #[error("disconnected by the relay")]
    Disconnected,
    #[error("too many clients")]
    Crowded,
}

/// Serves one upgraded connection until it ends.
pub(super) async fn run<S: AsyncRead + AsyncWrite + Unpin>(
    relay: Arc<Inner>,
    mut stream: S,
    remote: SocketAddr,
    id: u64,
) {
    let LoggedIn { key, info, server_info, rest } = match login(&relay, &mut stream, remote).await {
        Ok(logged_in) => logged_in,
        Err(error) => {
            relay.metrics.refused(error.refusal());
            if let Some(suppressed) = relay.log.allow("no login", prefix(remote.ip())) {
                tracing::info!(error = &error as &dyn std::error::Error, suppressed, "no login");
            }
            return;
        }
    };
    tracing::Span::current().record("peer", tracing::field::display(&key));
    let outbox = Outbox::new(relay.limits.data_queue_bytes, relay.limits.disco_queue_frames);
    let source = remote.ip().to_canonical();
    let client = Arc::new(Client::new(id, key, source, outbox, !info.can_ack_pings));
    let place = relay.clients.enter(prefix(source));
    let present = relay.registry.insert(&client, relay.limits.connections_each);
    relay.metrics.logins.inc();
    relay.metrics.connections.inc();
    if present > 1 {
        relay.metrics.duplicate_connections.inc();
    }
    tracing::debug!(prober = info.is_prober, app = info.app_name, present, "client logged in");

    let mut guard = Guard { relay, client, told: HashSet::new(), home: false };
    let mut session = Session::new(stream, &guard, server_info);
    let end = match session.route_login_rest(&mut guard, rest.into()) {
        Ok(()) => tokio::select! {
            biased;
            end = poll_fn(|cx| session.poll(&mut guard, cx)) => end,
            () = place.evicted() => End::Crowded,
        },
        Err(end) => end,
    };
    if matches!(end, End::Stuck) {
        guard.relay.metrics.write_timeouts.inc();
    }
    tracing::debug!(reason = &end as &dyn std::error::Error, "client gone");
}

/// The part of a session that must be undone however it ends, also when its task is dropped.
struct Guard {
    relay: Arc<Inner>,
    client: Arc<Client>,
    /// Who has received packets from this connection.
    told: HashSet<NodeKey>,
    home: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let metrics = &self.relay.metrics;
        metrics.connections.dec();
        if self.home {
            metrics.home_connections.dec();
        }
        match self.relay.registry.remove(&self.client, std::mem::take(&mut self.told)) {
            Departure::OthersRemain(_) => {
                metrics.duplicate_connections.dec();
            }
            Departure::Last(told) => {
                let mut frame = [0; PEER_GONE_LEN];
                derp::write_peer_gone(&mut frame, &self.client.key, PeerGoneReason::Disconnected);
                for peer in told {
                    if let Some(peer) = self.relay.registry.find(&peer)
                        && peer.outbox.push_control(&frame)
                    {
                        metrics.peer_gone_disconnected.inc();
                    }
                }
            }
        }
        let (data, disco) = self.client.outbox.clear();
        metrics.dropped(Reason::Gone, Kind::Other, data);
        metrics.dropped(Reason::Gone, Kind::Disco, disco);
    }
}

struct Session<S> {
    stream: S,
    /// The start of a frame whose rest has not come yet.
    carry: Vec<u8>,
    /// What is left to skip of a frame of no interest.
    skip: usize,
    out: Vec<u8>,
    written: usize,
    flush: bool,
    pong: Option<[u8; 8]>,
    /// The destination of the last packet: almost always that of the next one.
    last: Option<Arc<Client>>,
    not_here: Allowance,
    keepalive_every: Duration,
    keepalive_at: Instant,
    stuck_at: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    fn new(stream: S, guard: &Guard, server_info: Vec<u8>) -> Self {
        let limits = &guard.relay.limits;
        // the connection's number spreads keep-alives as well as chance would
        let jitter =
            limits.keepalive_jitter * (guard.client.id.wrapping_mul(0x9E37_79B9) as u32 % 1024) / 1024;
        let keepalive_every = limits.keepalive + jitter;
        let keepalive_at = Instant::now() + keepalive_every;
        Self {
            stream,
            carry: Vec::new(),
            skip: 0,
            out: server_info,
            written: 0,
            flush: false,
            pong: None,
            last: None,
            not_here: Allowance::new(),
            keepalive_every,
            keepalive_at,
            stuck_at: None,
            timer: Box::pin(tokio::time::sleep_until(keepalive_at)),
        }
    }

    fn poll(&mut self, guard: &mut Guard, cx: &mut Context<'_>) -> Poll<End> {
        guard.client.outbox.register(cx.waker());
        for _ in 0..ROUNDS {
            if guard.client.outbox.is_closed() {
                return Poll::Ready(End::Disconnected);
            }
            let read = self.poll_read(guard, cx);
            if let Poll::Ready(Err(end)) = read {
                return Poll::Ready(end);
            }
            let written = self.poll_write(guard, cx);
            if let Poll::Ready(Err(end)) = written {
                return Poll::Ready(end);
            }
            let timer = self.poll_timer(guard, cx);
            if let Poll::Ready(Err(end)) = timer {
                return Poll::Ready(end);
            }
            if read.is_pending() && written.is_pending() && timer.is_pending() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    // reading

    /// Reads and routes once; ready if there may be more to read.
    fn poll_read(&mut self, guard: &mut Guard, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let relay = Arc::clone(&guard.relay);
        let mut buffer = relay.buffers.take();
        let result = self.read_into(&mut buffer, guard, cx);
        relay.buffers.give(buffer);
        result
    }

    fn read_into(
        &mut self,
        buffer: &mut [u8],
        guard: &mut Guard,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        let carried = self.carry.len();
        let mut read = ReadBuf::new(&mut buffer[carried..carried + READ_AT_ONCE]);
        let end = loop {
            let before = read.filled().len();
            match Pin::new(&mut self.stream).poll_read(cx, &mut read) {
                Poll::Pending => break None,
                Poll::Ready(Err(error)) => break Some(End::Io(error)),
                Poll::Ready(Ok(())) if read.filled().len() == before => break Some(End::Left),
                Poll::Ready(Ok(())) if read.remaining() == 0 => break None,
                Poll::Ready(Ok(())) => {}
            }
        };
        let (got, full) = (read.filled().len(), read.remaining() == 0);
        if got > 0 {
            buffer[..carried].copy_from_slice(&self.carry);
            let taken = self.route(&mut buffer[..carried + got], guard)?;
            self.keep(&buffer[taken..carried + got]);
        }
        match end {
            Some(end) => Poll::Ready(Err(end)),
            None if full => Poll::Ready(Ok(())),
            None => Poll::Pending,
        }
    }

    fn keep(&mut self, rest: &[u8]) {
        if rest.is_empty() && self.carry.capacity() > 4096 {
            self.carry = Vec::new();
        } else {
            self.carry.clear();
            self.carry.extend_from_slice(rest);
        }
    }

    /// Clients do not wait for `ServerInfo` before they send.
    fn route_login_rest(&mut self, guard: &mut Guard, mut rest: Vec<u8>) -> Result<(), End> {
        let taken = self.route(&mut rest, guard)?;
        self.keep(&rest[taken..]);
        Ok(())
    }

    /// Handles all whole frames at the front of `bytes`; returns how many bytes they were.
    fn route(&mut self, bytes: &mut [u8], guard: &mut Guard) -> Result<usize, End> {
        if !bytes.is_empty() && !guard.client.is_active() {
            guard.relay.registry.activate(&guard.client);
        }
        let mut at = self.skip.min(bytes.len());
        self.skip -= at;
        while let Some(header) = Header::parse(&bytes[at..]) {
            let Header { kind, len } = header;
            match header.frame_type() {
                Some(FrameType::SendPacket) => {
                    derp::Role::Server.check(header)?;
                    let Some(end) = whole(bytes, at, len) else { break };
                    at = self.route_packets(bytes, at, end, guard);
                    continue;
                }
                Some(FrameType::NotePreferred) => {
                    derp::Role::Server.check(header)?;
                    let Some(end) = whole(bytes, at, len) else { break };
                    guard.set_home(bytes[end - 1] != 0);
                    at = end;
                    continue;
                }
                Some(FrameType::Ping) => {
                    derp::Role::Server.check(header)?;
                    let Some(end) = whole(bytes, at, len) else { break };
                    // one answer may wait; a client that asks faster than it reads gets fewer
                    if self.pong.is_none() {
                        self.pong = bytes[at + HEADER_LEN..end].first_chunk().copied();
                        guard.relay.metrics.pings.inc();
                    }
                    at = end;
                    continue;
                }
                Some(FrameType::ForwardPacket | FrameType::WatchConns | FrameType::ClosePeer) => {
                    return Err(End::Mesh(kind));
                }
                Some(FrameType::Pong) => {}
                _ => {
                    guard.relay.metrics.unknown_frames.inc();
                }
            }
            if len > derp::MAX_FRAME {
                return Err(derp::Error::Length { kind, len }.into());
            }
            let here = bytes.len() - at - HEADER_LEN;
            self.skip = len.saturating_sub(here);
            at += HEADER_LEN + len.min(here);
        }
        Ok(at)
    }

    /// Delivers the run of packets for one destination that starts with the frame `at..end`, and returns where
    /// it ends.
    fn route_packets(&mut self, bytes: &mut [u8], at: usize, end: usize, guard: &mut Guard) -> usize {
        let dst = key_at(bytes, at);
        let source = *guard.client.key.as_bytes();
        let readdress = |frame: &mut [u8]| {
            frame[0] = FrameType::RecvPacket as u8;
            frame[HEADER_LEN..HEADER_LEN + KEY_LEN].copy_from_slice(&source);
        };
        let disco = is_disco(&bytes[at + HEADER_LEN + KEY_LEN..end]);
        let (mut stop, mut count) = (end, 1);
        readdress(&mut bytes[at..end]);
        if !disco && end - at <= HEADER_LEN + NARROW_BODY {
            while let Some(next) = next_of_run(bytes, stop, &dst) {
                readdress(&mut bytes[stop..next]);
                stop = next;
                count += 1;
            }
        }
        let (run, metrics) = (&bytes[at..stop], &guard.relay.metrics);
        metrics.packets_received.inc_by(count as u64);
        metrics.bytes_received.inc_by(run.len() as u64);
        let kind = if disco { Kind::Disco } else { Kind::Other };

        let Some(peer) = self.destination(&dst, guard) else {
            metrics_dropped_unknown(guard, kind, count);
            if disco && self.not_here.take() {
                let mut frame = [0; PEER_GONE_LEN];
                derp::write_peer_gone(&mut frame, &dst, PeerGoneReason::NotHere);
                if guard.client.outbox.push_control(&frame) {
                    guard.relay.metrics.peer_gone_not_here.inc();
                }
            }
            return stop;
        };
        let metrics = &guard.relay.metrics;
        if peer.narrow && run.len() > HEADER_LEN + NARROW_BODY && count == 1 {
            metrics.dropped(Reason::TooLong, kind, 1);
            return stop;
        }
        let dropped = if disco { peer.outbox.push_disco(run) } else { peer.outbox.push_data(run, count) };
        metrics.packets_queued.inc_by(count as u64);
        metrics.dropped(Reason::QueueHead, kind, dropped);
        stop
    }

    /// The active connection of a key, and a note that it hears from us.
    fn destination(&mut self, dst: &NodeKey, guard: &mut Guard) -> Option<&Arc<Client>> {
        let known = self.last.as_ref().is_some_and(|last| last.key == *dst && last.is_active());
        if !known {
            self.last = Some(guard.relay.registry.find(dst)?);
            if guard.told.len() >= TOLD_CHECK && guard.told.len().is_power_of_two() {
                let registry = &guard.relay.registry;
                guard.told.retain(|peer| registry.find(peer).is_some());
            }
            guard.told.insert(*dst);
        }
        self.last.as_ref()
    }

    // writing

    /// Writes one chunk; ready if there may be more to write.
    fn poll_write(&mut self, guard: &Guard, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if self.written == self.out.len() {
            self.out.clear();
            self.written = 0;
            if let Some(pong) = self.pong.take() {
                self.out.extend_from_slice(&derp::Frame::Pong(pong).to_bytes());
            } else {
                guard.client.outbox.fill(&mut self.out);
            }
        }
        if self.written < self.out.len() {
            let result = Pin::new(&mut self.stream).poll_write(cx, &self.out[self.written..]);
            let Poll::Ready(result) = result else {
                self.note_stuck(guard);
                return Poll::Pending;
            };
            let written = result?;
            if written == 0 {
                return Poll::Ready(Err(End::Left));
            }
            guard.relay.metrics.bytes_sent.inc_by(written as u64);
            self.written += written;
            self.stuck_at = None;
            self.flush = true;
            return Poll::Ready(Ok(()));
        }
        if self.flush {
            let Poll::Ready(result) = Pin::new(&mut self.stream).poll_flush(cx) else {
                self.note_stuck(guard);
                return Poll::Pending;
            };
            result?;
            self.flush = false;
            self.stuck_at = None;
        }
        Poll::Pending
    }

    fn note_stuck(&mut self, guard: &Guard) {
        if self.stuck_at.is_none() {
            let at = Instant::now() + guard.relay.limits.write_timeout;
            self.stuck_at = Some(at);
            if at < self.timer.deadline() {
                self.timer.as_mut().reset(at);
            }
        }
    }

    /// One timer for both deadlines. It may fire early; then it is only set again.
    fn poll_timer(&mut self, guard: &Guard, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        ready!(self.timer.as_mut().poll(cx));
        let now = Instant::now();
        if self.stuck_at.is_some_and(|at| at <= now) {
            return Poll::Ready(Err(End::Stuck));
        }
        if self.keepalive_at <= now {
            self.keepalive_at = now + self.keepalive_every;
            // a client whose queue is full hears from us anyhow
            guard.client.outbox.push_control(&[FrameType::KeepAlive as u8, 0, 0, 0, 0]);
            guard.client.outbox.shrink();
            if self.written == self.out.len() {
                self.out = Vec::new();
                self.written = 0;
            }
        }
        let next = self.stuck_at.map_or(self.keepalive_at, |at| at.min(self.keepalive_at));
        self.timer.as_mut().reset(next);
        Poll::Ready(Ok(()))
    }
}

impl Guard {
    fn set_home(&mut self, home: bool) {
        if home != self.home {
            self.home = home;
            let gauge = &self.relay.metrics.home_connections;
            if home {
                gauge.inc();
            } else {
                gauge.dec();
            }
        }
    }
}

fn metrics_dropped_unknown(guard: &Guard, kind: Kind, count: usize) {
    guard.relay.metrics.dropped(Reason::UnknownDestination, kind, count);
}

/// Where the frame at `at` with a body of `len` ends, if it is all there.
fn whole(bytes: &[u8], at: usize, len: usize) -> Option<usize> {
    let end = at + HEADER_LEN + len;
    (end <= bytes.len()).then_some(end)
}

fn is_disco(data: &[u8]) -> bool {
    data.len() <= LONGEST_DISCO && disco::looks_like(data)
}

fn key_at(bytes: &[u8], at: usize) -> NodeKey {
    let mut key = [0; KEY_LEN];
    key.copy_from_slice(&bytes[at + HEADER_LEN..at + HEADER_LEN + KEY_LEN]);
    NodeKey::from_bytes(key)
}

/// The end of the packet frame at `at` if it is whole and continues a run of ordinary packets for `dst`.
fn next_of_run(bytes: &[u8], at: usize, dst: &NodeKey) -> Option<usize> {
    let header = Header::parse(&bytes[at..])?;
    if header.kind != FrameType::SendPacket as u8 || !(KEY_LEN..=NARROW_BODY).contains(&header.len) {
        return None;
    }
    let end = whole(bytes, at, header.len)?;
    let (key, data) = bytes[at + HEADER_LEN..end].split_at(KEY_LEN);
    (key == dst.as_bytes() && !is_disco(data)).then_some(end)
}

/// A token bucket of `NOT_HERE_BURST`, one more every `NOT_HERE_INTERVAL`.
struct Allowance {
    left: u32,
    since: Instant,
}

impl Allowance {
    fn new() -> Self {
        Self { left: NOT_HERE_BURST, since: Instant::now() }
    }

    fn take(&mut self) -> bool {
        let now = Instant::now();
        while self.left < NOT_HERE_BURST && now - self.since >= NOT_HERE_INTERVAL {
            self.since += NOT_HERE_INTERVAL;
            self.left += 1;
        }
        if self.left == NOT_HERE_BURST {
            self.since = now;
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}
