//! What waits to be written to one connection: three bounded queues of ready frames, filled by other
//! connections' tasks and drained by its own.
//!
//! Frames lie back to back in large chunks, so that a whole run of them goes in with one copy and out with
//! one write. A full data or disco queue drops its oldest frames: they are the least useful ones by then, and
//! a loss at the head is what the tunnelled streams notice soonest.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_util::task::AtomicWaker;
use lacis_wire::derp::{HEADER_LEN, Header};

/// Filled up to here a chunk is closed and the next one begun; also the size of one write.
pub(super) const CHUNK: usize = 64 << 10;
/// `PeerGone` notices are hints; this many bytes of them (about 1700) may wait.
const CONTROL_LIMIT: usize = 64 << 10;

/// Frames back to back, the oldest first.
#[derive(Debug, Default)]
struct FrameQueue {
    chunks: VecDeque<Vec<u8>>,
    /// How much of the first chunk has been dropped.
    start: usize,
    bytes: usize,
    frames: usize,
}

impl FrameQueue {
    /// Appends `count` whole frames.
    fn push(&mut self, run: &[u8], count: usize, spare: &mut Option<Vec<u8>>) {
        match self.chunks.back_mut() {
            Some(chunk) if chunk.len() + run.len() <= CHUNK => chunk.extend_from_slice(run),
            _ => {
                let mut chunk = spare.take().unwrap_or_default();
                chunk.extend_from_slice(run);
                self.chunks.push_back(chunk);
            }
        }
        self.bytes += run.len();
        self.frames += count;
    }

    /// Drops the oldest frame; `false` if there is none.
    fn drop_oldest(&mut self, spare: &mut Option<Vec<u8>>) -> bool {
        let Some(chunk) = self.chunks.front() else { return false };
        let Some(header) = chunk.get(self.start..).and_then(Header::parse) else { return false };
        let len = HEADER_LEN + header.len;
        self.start += len;
        self.bytes -= len;
        self.frames -= 1;
        if self.start >= chunk.len() {
            self.start = 0;
            recycle(spare, self.chunks.pop_front().unwrap_or_default());
        }
        true
    }

    /// Moves the first chunk to the end of `out`, by exchange if `out` is empty.
    fn pop_into(&mut self, out: &mut Vec<u8>, spare: &mut Option<Vec<u8>>) {
        let Some(mut chunk) = self.chunks.pop_front() else { return };
        let start = std::mem::take(&mut self.start);
        self.bytes -= chunk.len() - start;
        if self.chunks.is_empty() {
            self.frames = 0;
        } else {
            self.frames -= count_frames(&chunk[start..]);
        }
        if out.is_empty() && start == 0 {
            std::mem::swap(out, &mut chunk);
        } else {
            out.extend_from_slice(&chunk[start..]);
        }
        recycle(spare, chunk);
    }
}

fn count_frames(mut run: &[u8]) -> usize {
    let mut count = 0;
    while let Some(header) = Header::parse(run) {
        count += 1;
        run = run.get(HEADER_LEN + header.len..).unwrap_or_default();
    }
    count
}

/// Keeps one empty chunk for the next push.
fn recycle(spare: &mut Option<Vec<u8>>, mut chunk: Vec<u8>) {
    chunk.clear();
    if chunk.capacity() > 0 && chunk.capacity() <= 2 * CHUNK {
        *spare = Some(chunk);
    }
}

#[derive(Debug, Default)]
struct State {
    control: Vec<u8>,
    disco: FrameQueue,
    data: FrameQueue,
    spare: Option<Vec<u8>>,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Outbox {
    data_limit: usize,
    disco_limit: usize,
    state: Mutex<State>,
    /// Whether the owner knows that there is something: saves a wake-up for each push under load.
    signalled: AtomicBool,
    closed: AtomicBool,
    waker: AtomicWaker,
}

impl Outbox {
    pub(super) fn new(data_limit: usize, disco_limit: usize) -> Self {
        Self {
            data_limit,
            disco_limit,
            state: Mutex::default(),
            signalled: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self) {
        if !self.signalled.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// Appends a run of `count` packet frames; returns how many old ones were dropped for it.
    pub(super) fn push_data(&self, run: &[u8], count: usize) -> usize {
        let mut dropped = 0;
        {
            let State { data, spare, .. } = &mut *self.state();
            while data.bytes + run.len() > self.data_limit && data.drop_oldest(spare) {
                dropped += 1;
            }
            data.push(run, count, spare);
        }
        self.signal();
        dropped
    }

    /// Appends one disco frame; returns how many old ones were dropped for it.
    pub(super) fn push_disco(&self, frame: &[u8]) -> usize {
        let mut dropped = 0;
        {
            let mut state = self.state();
            while state.disco.frames >= self.disco_limit && state.disco.drop_oldest(&mut None) {
                dropped += 1;
            }
            state.disco.push(frame, 1, &mut None);
        }
        self.signal();
        dropped
    }

    /// Appends a frame of the relay's own; `false` if there is no room for it.
    pub(super) fn push_control(&self, frame: &[u8]) -> bool {
        {
            let mut state = self.state();
            if state.control.len() + frame.len() > CONTROL_LIMIT {
                return false;
            }
            state.control.extend_from_slice(frame);
        }
        self.signal();
        true
    }

    /// Asks the owner to end the connection.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.waker.wake();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// The owner is woken through this when something arrives or the connection is to end.
    pub(super) fn register(&self, waker: &std::task::Waker) {
        self.waker.register(waker);
    }

    /// Fills the empty buffer `out` with what goes next; it stays empty if there is nothing.
    pub(super) fn fill(&self, out: &mut Vec<u8>) {
        // before looking, so that a push after the look signals again
        if !self.signalled.swap(false, Ordering::AcqRel) {
            return;
        }
        let more = {
            let State { control, disco, data, spare } = &mut *self.state();
            out.append(control);
            while !disco.chunks.is_empty() {
                disco.pop_into(out, &mut None);
            }
            if out.len() < CHUNK {
                data.pop_into(out, spare);
            }
            !data.chunks.is_empty()
        };
        if more {
            self.signalled.store(true, Ordering::Release);
        }
    }

    /// Gives back the memory of a busier time.
    pub(super) fn shrink(&self) {
        let mut state = self.state();
        state.spare = None;
        if state.control.is_empty() {
            state.control = Vec::new();
        }
        state.disco.chunks.shrink_to_fit();
        state.data.chunks.shrink_to_fit();
    }

    /// Drops what waits when the connection is gone, since senders may hold its handle for long; returns how many
    /// packet and disco frames that were.
    pub(super) fn clear(&self) -> (usize, usize) {
        let State { data, disco, .. } = std::mem::take(&mut *self.state());
        (data.frames, disco.frames)
    }

    #[cfg(test)]
    fn left(&self) -> (usize, usize) {
        let state = self.state();
        (state.data.frames, state.disco.frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use lacis_wire::derp::Frame;
    use lacis_wire::key::NodeKey;
    use proptest::prelude::*;

    fn frame(n: u16, len: usize) -> Bytes {
        let mut data = n.to_be_bytes().to_vec();
        data.resize(2 + len, 0);
        Frame::RecvPacket { src: NodeKey::from_bytes([1; 32]), data: data.into() }.to_bytes()
    }

    fn drain(outbox: &Outbox) -> Vec<u16> {
        let (mut numbers, mut all) = (Vec::new(), Vec::new());
        loop {
            let mut out = Vec::new();
            outbox.fill(&mut out);
            if out.is_empty() {
                break;
            }
            all.extend(out);
        }
        let mut rest = &all[..];
        while let Some(header) = Header::parse(rest) {
            numbers.push(u16::from_be_bytes([rest[37], rest[38]]));
            rest = &rest[HEADER_LEN + header.len..];
        }
        numbers
    }

    #[test]
    fn a_full_queue_drops_the_oldest_and_says_how_many() {
        let outbox = Outbox::new(10 * frame(0, 100).len(), 3);
        let dropped: usize = (0..25).map(|n| outbox.push_data(&frame(n, 100), 1)).sum();
        assert_eq!(dropped, 15);
        assert_eq!(outbox.left(), (10, 0));
        assert_eq!(drain(&outbox), (15..25).collect::<Vec<_>>());
        assert_eq!(outbox.left(), (0, 0));
        outbox.push_data(&frame(25, 100), 1);
        assert_eq!(outbox.clear(), (1, 0));
        assert!(outbox.state().data.chunks.is_empty());
    }

    #[test]
    fn control_and_disco_overtake_data() {
        let outbox = Outbox::new(1 << 20, 3);
        outbox.push_data(&frame(1, 10), 1);
        for n in 10..15 {
            outbox.push_disco(&frame(n, 10));
        }
        assert!(outbox.push_control(&frame(20, 0)));
        assert_eq!(drain(&outbox), [20, 12, 13, 14, 1]);
    }

    #[test]
    fn control_frames_are_bounded() {
        let outbox = Outbox::new(1 << 20, 3);
        let accepted = (0..10_000).filter(|n| outbox.push_control(&frame(*n, 0))).count();
        assert_eq!(accepted, CONTROL_LIMIT / frame(0, 0).len());
    }

    #[test]
    fn an_idle_outbox_gives_its_memory_back() {
        let outbox = Outbox::new(1 << 20, 3);
        outbox.push_data(&frame(1, 10_000), 1);
        assert_eq!(drain(&outbox), [1]);
        outbox.shrink();
        let state = outbox.state();
        assert!(state.spare.is_none());
        assert_eq!(state.data.chunks.capacity(), 0);
    }

    proptest! {
        #[test]
        fn what_is_not_dropped_comes_out_once_and_in_order(
            ops in proptest::collection::vec((any::<bool>(), 0_usize..30_000, 1_u16..4), 1..60)
        ) {
            let limit = 100_000;
            let outbox = Outbox::new(limit, 3);
            let (mut next, mut model, mut got) = (0_u16, VecDeque::new(), Vec::new());
            let mut dropped_in_all = 0;
            for (push, len, count) in ops {
                if push {
                    let mut run = Vec::new();
                    let first = next;
                    for _ in 0..count {
                        run.extend_from_slice(&frame(next, len));
                        next += 1;
                    }
                    let dropped = outbox.push_data(&run, count.into());
                    dropped_in_all += dropped;
                    model.drain(..dropped);
                    model.extend(first..next);
                    prop_assert!(outbox.state().data.bytes <= limit.max(run.len()));
                } else {
                    let mut out = Vec::new();
                    outbox.fill(&mut out);
                    let mut rest = &out[..];
                    while let Some(header) = Header::parse(rest) {
                        let number = u16::from_be_bytes([rest[37], rest[38]]);
                        prop_assert_eq!(model.pop_front(), Some(number));
                        got.push(number);
                        rest = &rest[HEADER_LEN + header.len..];
                    }
                }
                prop_assert_eq!(outbox.left().0, model.len());
            }
            let rest = drain(&outbox);
            prop_assert_eq!(rest.len() + got.len() + dropped_in_all, usize::from(next));
            prop_assert_eq!(rest, Vec::from(model));
        }
    }
}
