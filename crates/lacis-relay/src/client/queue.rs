//! What waits to be written to the relay: whole buffers of frames, bounded by bytes, filled from any thread.
//!
//! Full means that the oldest buffer is dropped: its packets are the ones that are of least use by then.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Buf, Bytes};
use futures_util::task::AtomicWaker;
use lacis_wire::derp::{HEADER_LEN, Header};
use tokio::time::Instant;

/// What the queue has seen.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct QueueStats {
    pub(super) packets_sent: u64,
    pub(super) bytes_sent: u64,
    pub(super) packets_dropped: u64,
}

#[derive(Debug)]
struct State {
    control: VecDeque<Bytes>,
    buffers: VecDeque<Bytes>,
    bytes: usize,
    online: bool,
    last_push: Instant,
    stats: QueueStats,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct SendQueue {
    limit: usize,
    offline_limit: usize,
    state: Mutex<State>,
    waker: AtomicWaker,
}

impl SendQueue {
    pub(super) fn new(limit: usize, offline_limit: usize) -> Self {
        let state = State {
            control: VecDeque::new(),
            buffers: VecDeque::new(),
            bytes: 0,
            online: false,
            last_push: Instant::now(),
            stats: QueueStats::default(),
        };
        Self { limit, offline_limit, state: Mutex::new(state), waker: AtomicWaker::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, frames: Bytes) {
        {
            let mut state = self.state();
            state.last_push = Instant::now();
            state.bytes += frames.len();
            state.buffers.push_back(frames);
            let limit = if state.online { self.limit } else { self.offline_limit };
            state.trim(limit);
        }
        self.waker.wake();
    }

    /// Frames of the protocol itself; there are never many.
    pub(super) fn push_control(&self, frame: Bytes) {
        self.state().control.push_back(frame);
        self.waker.wake();
    }

    pub(super) fn wake(&self) {
        self.waker.wake();
    }

    pub(super) fn register(&self, waker: &std::task::Waker) {
        self.waker.register(waker);
    }

    pub(super) fn set_online(&self, online: bool) {
        let mut state = self.state();
        state.online = online;
        if !online {
            state.control.clear();
            state.trim(self.offline_limit);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.state().bytes
    }

    pub(super) fn last_push(&self) -> Instant {
        self.state().last_push
    }

    pub(super) fn stats(&self) -> QueueStats {
        self.state().stats
    }

    /// Moves up to `bytes` bytes of whole buffers (but at least one buffer, if any) to `out`.
    pub(super) fn take(&self, out: &mut Outgoing, bytes: usize) {
        let mut state = self.state();
        while let Some(frame) = state.control.pop_front() {
            out.push(frame);
        }
        while out.left < bytes
            && let Some(buffer) = state.buffers.pop_front()
        {
            state.bytes -= buffer.len();
            state.stats.bytes_sent += buffer.len() as u64;
            state.stats.packets_sent += count_frames(&buffer);
            out.push(buffer);
        }
    }
}

impl State {
    fn trim(&mut self, limit: usize) {
        while self.bytes > limit
            && let Some(old) = self.buffers.pop_front()
        {
            self.bytes -= old.len();
            self.stats.packets_dropped += count_frames(&old);
        }
    }
}

fn count_frames(mut run: &[u8]) -> u64 {
    let mut count = 0;
    while let Some(header) = Header::parse(run) {
        count += 1;
        run = run.get(HEADER_LEN + header.len..).unwrap_or_default();
    }
    count
}

/// Buffers being written.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    buffers: VecDeque<Bytes>,
    left: usize,
}

impl Outgoing {
    pub(super) fn push(&mut self, buffer: Bytes) {
        self.left += buffer.len();
        self.buffers.push_back(buffer);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Bytes that wait.
    pub(super) fn bytes(&self) -> usize {
        self.left
    }

    /// The parts of the next write.
    pub(super) fn slices<'a>(&'a self, out: &mut [IoSlice<'a>]) -> usize {
        let mut count = 0;
        for (slot, buffer) in out.iter_mut().zip(self.buffers.iter().filter(|buffer| !buffer.is_empty())) {
            *slot = IoSlice::new(buffer);
            count += 1;
        }
        count
    }

    /// Forgets what has been written.
    pub(super) fn advance(&mut self, mut written: usize) {
        self.left -= written;
        while let Some(front) = self.buffers.front_mut() {
            if front.len() > written {
                front.advance(written);
                return;
            }
            written -= front.len();
            self.buffers.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacis_wire::derp::Frame;
    use lacis_wire::key::NodeKey;

    fn frames(count: usize, len: usize) -> Bytes {
        let frame =
            Frame::SendPacket { dst: NodeKey::from_bytes([1; 32]), data: vec![0; len].into() }.to_bytes();
        frame.repeat(count).into()
    }

    #[test]
    fn a_full_queue_drops_whole_buffers_from_the_front_and_counts_their_packets() {
        let queue = SendQueue::new(10_000, 3000);
        queue.set_online(true);
        for _ in 0..5 {
            queue.push(frames(3, 963));
        }
        assert_eq!(queue.stats().packets_dropped, 6);
        let mut out = Outgoing::default();
        queue.take(&mut out, usize::MAX);
        assert_eq!(out.left, 9000);
        assert_eq!(queue.stats().packets_sent, 9);
        queue.push(frames(9, 963));
        queue.set_online(false);
        assert_eq!(queue.stats().packets_dropped, 15, "offline less is kept");
    }

    #[test]
    fn a_partial_write_goes_on_where_it_stopped() {
        let mut out = Outgoing::default();
        out.push(Bytes::from_static(b"abc"));
        out.push(Bytes::new());
        out.push(Bytes::from_static(b"defg"));
        out.advance(4);
        let mut slices = [IoSlice::new(&[]); 4];
        assert_eq!(out.slices(&mut slices), 1);
        assert_eq!(&*slices[0], b"efg");
        out.advance(3);
        assert!(out.is_empty());
    }
}
