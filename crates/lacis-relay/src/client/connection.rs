//! One connection: the login, then reading and writing until it breaks. One task does both, neither waits for
//! the other, except that a handler which is full stops the reading.

use std::future::poll_fn;
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use futures_util::future::BoxFuture;
use lacis_wire::derp::{self, ClientInfo, Decoder, Frame, LoginBox, Role, ServerInfo};
use lacis_wire::io::BoxStream;
use lacis_wire::key::{NodePrivateKey, RelayKey};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Sleep, timeout};
use tokio_util::io::poll_read_buf;

use super::dial::{ConnectError, Dialed};
use super::queue::Outgoing;
use super::{Batch, RelayEvent, Shared};

/// From the end of the dial to the relay's `ServerInfo`.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(10);
/// The relay is pinged this long after its last pong, and without another this long after that the connection has ended: one
/// that broke silently, in either direction, is noticed within ten seconds, whatever TCP or a proxy in between acknowledge.
const PING_AFTER: Duration = Duration::from_secs(4);
const PONG_WITHIN: Duration = Duration::from_secs(4);
/// So many bytes from the relay since the ping: its pong waits behind what a slow link still carries.
const BULK: usize = 64 << 10;
/// A relay that takes nothing for this long is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Read at once.
const READ_AT_ONCE: usize = 64 << 10;
/// Below this much free space the read buffer is renewed.
const READ_MIN: usize = 4 << 10;
/// Written at once.
const WRITE_AT_ONCE: usize = 64 << 10;
/// With more than this waiting, pings are not answered: a relay that asks and does not read must not fill our memory.
const PONG_LIMIT: usize = 2 * WRITE_AT_ONCE;
/// Parts of one write; the system takes up to 1024.
const WRITE_PARTS: usize = 64;
/// Rounds before other tasks get their turn. Few: the tasks that are to drain what a round brings may be waiting for
/// this very thread, and their queues hold only some rounds.
const ROUNDS: usize = 2;

/// Why a connection ended or was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the connection to the relay failed")]
    Io(#[from] std::io::Error),
    #[error("the relay broke the protocol")]
    Protocol(#[from] derp::Error),
    #[error("the relay did not accept this node: it closed the connection during the login")]
    Refused,
    #[error("the relay did not finish the login within {LOGIN_TIMEOUT:?}")]
    Late,
    #[error("the relay fell silent: it did not answer a ping within {PONG_WITHIN:?}")]
    Silent,
    #[error("the relay took nothing for {WRITE_TIMEOUT:?}")]
    Stuck,
    #[error("dialling again as asked")]
    Redial,
}

/// Logs in and serves the connection until it ends.
pub(super) async fn run(
    shared: &Arc<Shared>,
    dialed: Dialed,
    node_key: &NodePrivateKey,
    started: Instant,
) -> Result<(), End> {
    let Dialed { mut stream, node, remote, rest } = dialed;
    let mut input = BytesMut::with_capacity(READ_AT_ONCE);
    input.extend_from_slice(&rest);
    let mut decoder = Decoder::new(Role::Client);
    let home = shared.home.load(Ordering::Acquire);
    let relay = timeout(LOGIN_TIMEOUT, login(&mut stream, &mut decoder, &mut input, node_key, home))
        .await
        .unwrap_or(Err(End::Late))?;
    shared.counters.connects.fetch_add(1, Ordering::Relaxed);
    shared.queue.set_online(true);
    shared.connected.store(true, Ordering::Release);
    let took = started.elapsed();
    tracing::debug!(region = shared.region, node, %remote, ?took, "relay connected");
    shared.event(RelayEvent::Connected { relay, node, remote, took });

    let silent_at = Instant::now() + PING_AFTER;
    let mut connection = Connection {
        shared,
        stream,
        decoder,
        input,
        told_home: home,
        out: Outgoing::default(),
        flush: false,
        wait: None,
        pinged: false,
        since_ping: 0,
        silent_at,
        stuck_at: None,
        timer: Box::pin(tokio::time::sleep_until(silent_at)),
    };
    connection.deliver()?;
    poll_fn(|cx| connection.poll(cx)).await
}

async fn login(
    stream: &mut BoxStream,
    decoder: &mut Decoder,
    input: &mut BytesMut,
    node_key: &NodePrivateKey,
    home: bool,
) -> Result<RelayKey, End> {
    let Frame::ServerKey(relay) = next(stream, decoder, input).await? else {
        return Err(derp::Error::Magic.into());
    };
    let login = LoginBox::client(node_key, &relay);
    let sealed = ClientInfo::default().seal(&login, derp::random_nonce());
    let mut out = BytesMut::new();
    Frame::ClientInfo { key: node_key.public(), sealed }.encode(&mut out);
    if home {
        Frame::NotePreferred(true).encode(&mut out);
    }
    stream.write_all(&out).await?;
    stream.flush().await?;
    loop {
        match next(stream, decoder, input).await? {
            Frame::ServerInfo(sealed) => {
                ServerInfo::open(&login, &sealed)?;
                return Ok(relay);
            }
            Frame::KeepAlive | Frame::Unknown { .. } => {}
            _ => return Err(derp::Error::Box.into()),
        }
    }
}

async fn next(stream: &mut BoxStream, decoder: &mut Decoder, input: &mut BytesMut) -> Result<Frame, End> {
    loop {
        if let Some(frame) = decoder.decode(input)? {
            return Ok(frame);
        }
        input.reserve(READ_MIN);
        if stream.read_buf(input).await? == 0 {
            return Err(End::Refused);
        }
    }
}

struct Connection<'a> {
    shared: &'a Arc<Shared>,
    stream: BoxStream,
    decoder: Decoder,
    input: BytesMut,
    told_home: bool,
    out: Outgoing,
    flush: bool,
    /// The handler is full until this is done.
    wait: Option<BoxFuture<'static, ()>>,
    /// A pong is waited for.
    pinged: bool,
    /// Bytes from the relay since the ping.
    since_ping: usize,
    /// When the relay is pinged, or has not answered for too long.
    silent_at: Instant,
    stuck_at: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl Connection<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        self.shared.queue.register(cx.waker());
        for _ in 0..ROUNDS {
            let read = match self.poll_read(cx) {
                Poll::Ready(Ok(Some(()))) => true,
                Poll::Ready(Ok(None)) => return Poll::Ready(Ok(())),
                Poll::Ready(Err(end)) => return Poll::Ready(Err(end)),
                Poll::Pending => false,
            };
            let written = match self.poll_write(cx) {
                Poll::Ready(Ok(())) => true,
                Poll::Ready(Err(end)) => return Poll::Ready(Err(end)),
                Poll::Pending => false,
            };
            let timer = match self.poll_timer(cx) {
                Poll::Ready(Ok(())) => true,
                Poll::Ready(Err(end)) => return Poll::Ready(Err(end)),
                Poll::Pending => false,
            };
            if !(read || written || timer) {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads what there is and delivers it; `None` when the relay has closed.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<()>, End>> {
        if let Some(wait) = &mut self.wait {
            if wait.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.wait = None;
        }
        let (mut got, mut closed) = (0, false);
        while got < READ_AT_ONCE {
            if self.input.capacity() - self.input.len() < READ_MIN {
                self.input.reserve(READ_AT_ONCE);
            }
            match poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input) {
                Poll::Pending => break,
                Poll::Ready(Ok(0)) => {
                    closed = true;
                    break;
                }
                Poll::Ready(Ok(n)) => got += n,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
            }
        }
        if got > 0 {
            self.since_ping += got;
            if self.pinged && self.since_ping >= BULK {
                self.since_ping = 0;
                self.silent_at = Instant::now() + PONG_WITHIN;
            }
            self.deliver()?;
        }
        if closed {
            return Poll::Ready(Ok(None));
        }
        // a wait that has just begun must be polled once to be able to wake us
        if got >= READ_AT_ONCE || self.wait.is_some() { Poll::Ready(Ok(Some(()))) } else { Poll::Pending }
    }

    /// Decodes all whole frames and hands the packets on as one batch.
    fn deliver(&mut self) -> Result<(), End> {
        let (mut batch, mut bytes) = (Batch::new(), 0);
        while let Some(frame) = self.decoder.decode(&mut self.input)? {
            match frame {
                Frame::RecvPacket { src, data } => {
                    bytes += data.len() as u64;
                    batch.push((src, data));
                }
                Frame::Ping(token) => {
                    if self.out.bytes() < PONG_LIMIT {
                        self.out.push(Frame::Pong(token).to_bytes());
                    }
                }
                Frame::Pong(token) => {
                    self.note_life();
                    if let Some((sent, reply)) = self.shared.pings().remove(&token) {
                        // whoever asked may have stopped waiting
                        let _ = reply.send(sent.elapsed());
                    }
                }
                Frame::PeerGone { peer, reason } => self.shared.event(RelayEvent::PeerGone { peer, reason }),
                Frame::Health(text) => {
                    self.shared.event(RelayEvent::Health((!text.is_empty()).then_some(text)));
                }
                Frame::Restarting { reconnect_in, .. } => {
                    self.shared.event(RelayEvent::Restarting { reconnect_in });
                }
                Frame::KeepAlive
                | Frame::Unknown { .. }
                | Frame::ServerKey(_)
                | Frame::ServerInfo(_)
                | Frame::ClientInfo { .. }
                | Frame::SendPacket { .. }
                | Frame::NotePreferred(_)
                | Frame::PeerPresent { .. }
                | Frame::ForwardPacket { .. }
                | Frame::WatchConns
                | Frame::ClosePeer(_) => {}
            }
        }
        if !batch.is_empty() {
            let counters = &self.shared.counters;
            counters.packets_received.fetch_add(batch.len() as u64, Ordering::Relaxed);
            counters.bytes_received.fetch_add(bytes, Ordering::Relaxed);
            self.wait = self.shared.handler.packets(self.shared.region, batch);
        }
        Ok(())
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let home = self.shared.home.load(Ordering::Acquire);
        if home != self.told_home {
            self.told_home = home;
            self.out.push(Frame::NotePreferred(home).to_bytes());
        }
        if self.out.is_empty() {
            self.shared.queue.take(&mut self.out, WRITE_AT_ONCE);
        }
        if !self.out.is_empty() {
            let mut slices = [IoSlice::new(&[]); WRITE_PARTS];
            let count = self.out.slices(&mut slices);
            let Poll::Ready(result) = Pin::new(&mut self.stream).poll_write_vectored(cx, &slices[..count])
            else {
                self.note_stuck();
                return Poll::Pending;
            };
            let written = result?;
            if written == 0 {
                return Poll::Ready(Err(End::Io(std::io::ErrorKind::WriteZero.into())));
            }
            self.out.advance(written);
            self.flush = true;
            // Room where there was none: the far side takes what is sent, and its answer may wait behind that.
            if self.stuck_at.take().is_some() && self.pinged {
                self.silent_at = Instant::now() + PONG_WITHIN;
            }
            return Poll::Ready(Ok(()));
        }
        if self.flush {
            let Poll::Ready(result) = Pin::new(&mut self.stream).poll_flush(cx) else {
                self.note_stuck();
                return Poll::Pending;
            };
            result?;
            self.flush = false;
            self.stuck_at = None;
        }
        Poll::Pending
    }

    /// The relay is there.
    fn note_life(&mut self) {
        self.pinged = false;
        self.silent_at = Instant::now() + PING_AFTER;
    }

    fn note_stuck(&mut self) {
        if self.stuck_at.is_none() {
            let at = Instant::now() + WRITE_TIMEOUT;
            self.stuck_at = Some(at);
            if at < self.timer.deadline() {
                self.timer.as_mut().reset(at);
            }
        }
    }

    /// One timer for both deadlines. It may fire early; then it is only set again.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if self.timer.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let now = Instant::now();
        // a handler that does not take what comes is no sign of the relay's silence
        if self.wait.is_some() {
            self.note_life();
        }
        if self.silent_at <= now {
            if self.pinged {
                return Poll::Ready(Err(End::Silent));
            }
            self.pinged = true;
            self.since_ping = 0;
            self.silent_at = now + PONG_WITHIN;
            self.out.push(Frame::Ping(derp::random_nonce()[..8].try_into().unwrap_or_default()).to_bytes());
        }
        if self.stuck_at.is_some_and(|at| at <= now) {
            return Poll::Ready(Err(End::Stuck));
        }
        self.timer.as_mut().reset(self.stuck_at.map_or(self.silent_at, |at| at.min(self.silent_at)));
        Poll::Ready(Ok(()))
    }
}
