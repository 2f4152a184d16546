//! What the filter remembers of packets: whom this host has asked (the last 512 flows of UDP and SCTP), whom the rules
//! have let in, and which fragmented packets have begun to come in. All of it is of fixed size.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::rules::Rules;
use crate::packet::{Parsed, protocol};

/// How many flows of this host are remembered; there is no time limit.
const ASKED: NonZeroUsize = NonZeroUsize::new(512).expect("not zero");
/// Flows of peers that are remembered: places for so many, and so many in a place. The older one makes room.
const ADMITTED: usize = 1024;
const WAYS: usize = 2;
/// Fragmented packets whose later fragments may come.
const FRAGMENTED: usize = 256;
/// A flow that the rules do not allow any more is the peer's for so long after its last packet: what the host still
/// answers does not make it the host's own.
const REFUSED: Duration = Duration::from_mins(2);

/// A flow as its packets to this host look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Flow {
    src: IpAddr,
    dst: IpAddr,
    src_port: u16,
    dst_port: u16,
    proto: u8,
}

impl Flow {
    fn of(packet: &Parsed) -> Self {
        Self {
            src: packet.src,
            dst: packet.dst,
            src_port: packet.src_port,
            dst_port: packet.dst_port,
            proto: packet.proto,
        }
    }

    /// The flow that a packet of this host belongs to.
    fn answering(packet: &Parsed) -> Self {
        Self {
            src: packet.dst,
            dst: packet.src,
            src_port: packet.dst_port,
            dst_port: packet.src_port,
            proto: packet.proto,
        }
    }

    fn place(&self) -> usize {
        let ports = u64::from(self.src_port) << 16 | u64::from(self.dst_port);
        place(self.src, self.dst, ports << 8 | u64::from(self.proto), ADMITTED)
    }
}

/// Where something between two hosts lies in a table of this size. Who makes two fall together only makes the rules be
/// asked again.
fn place(src: IpAddr, dst: IpAddr, more: u64, size: usize) -> usize {
    let fold = |addr: IpAddr| match addr {
        IpAddr::V4(v4) => u64::from(u32::from(v4)),
        IpAddr::V6(v6) => {
            let number = u128::from(v6);
            (number >> 64) as u64 ^ (number as u64).rotate_left(17)
        }
    };
    let mut hash = more;
    for part in [fold(src), fold(dst)] {
        hash = (hash.rotate_left(23) ^ part).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    // the high bits are the good ones
    ((u128::from(hash) * size as u128) >> 64) as usize
}

/// The protocols whose answers are known by what was asked.
fn has_answers(proto: u8) -> bool {
    matches!(proto, protocol::UDP | protocol::SCTP)
}

/// A flow that a peer began.
#[derive(Clone, Copy, Debug)]
struct Entry {
    flow: Flow,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// By the rules of this number.
    Admitted(u64),
    /// Since then; was admitted before.
    Refused(Instant),
}

/// A fragmented packet whose first fragment has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fragments {
    src: IpAddr,
    dst: IpAddr,
    id: u32,
    /// In IPv6 hosts do not look at it.
    proto: Option<u8>,
}

impl Fragments {
    fn of(packet: &Parsed) -> Self {
        let proto = packet.src.is_ipv4().then_some(packet.proto);
        Self { src: packet.src, dst: packet.dst, id: packet.fragment_id, proto }
    }

    fn place(&self) -> usize {
        place(self.src, self.dst, self.id.into(), FRAGMENTED)
    }
}

/// The memory of the filter. Shared by all filters, one after the other.
#[derive(Debug)]
pub struct Flows {
    asked: LruCache<Flow, ()>,
    /// The flow asked last, so that a stream does not touch the table for every packet.
    asked_last: Option<Flow>,
    answered_last: Option<Flow>,
    admitted: Box<[[Option<Entry>; WAYS]]>,
    /// The rules that admit now, and how many there have been.
    rules: Option<Arc<Rules>>,
    number: u64,
    fragmented: Box<[Option<Fragments>]>,
}

impl Default for Flows {
    fn default() -> Self {
        Self {
            asked: LruCache::new(ASKED),
            asked_last: None,
            answered_last: None,
            admitted: vec![[None; WAYS]; ADMITTED].into_boxed_slice(),
            rules: None,
            number: 0,
            fragmented: vec![None; FRAGMENTED].into_boxed_slice(),
        }
    }
}

impl Flows {
    /// This host sends: what comes back may pass, unless it is the peer that asks and the host that answers.
    pub(super) fn ask(&mut self, packet: &Parsed) {
        if packet.later_fragment || !has_answers(packet.proto) {
            return;
        }
        let flow = Flow::answering(packet);
        if self.asked_last == Some(flow) {
            return;
        }
        if let Some(entry) = self.entry(flow) {
            match entry.state {
                State::Refused(since) if since.elapsed() >= REFUSED => {}
                _ => return,
            }
        }
        self.asked.push(flow, ());
        self.asked_last = Some(flow);
        // the push may have pushed this one out
        self.answered_last = None;
    }

    /// Whether a packet to this host answers.
    pub(super) fn answers(&mut self, packet: &Parsed) -> bool {
        if !has_answers(packet.proto) {
            return false;
        }
        let flow = Flow::of(packet);
        if self.answered_last == Some(flow) {
            return true;
        }
        let known = self.asked.get(&flow).is_some();
        if known {
            self.answered_last = Some(flow);
        }
        known
    }

    /// From now on these rules admit; what others have admitted has to be judged again.
    pub(super) fn follow(&mut self, rules: &Arc<Rules>) {
        if self.rules.as_ref().is_none_or(|known| !Arc::ptr_eq(known, rules)) {
            self.rules = Some(Arc::clone(rules));
            self.number += 1;
        }
    }

    /// Whether the rules have let this flow in before.
    pub(super) fn is_admitted(&self, packet: &Parsed) -> bool {
        let flow = Flow::of(packet);
        let is_it = |entry: &Entry| entry.state == State::Admitted(self.number) && entry.flow == flow;
        self.admitted[flow.place()].iter().flatten().any(is_it)
    }

    /// The rules let this flow in.
    pub(super) fn admit(&mut self, packet: &Parsed) {
        let flow = Flow::of(packet);
        let state = State::Admitted(self.number);
        if let Some(entry) = self.entry(flow) {
            entry.state = state;
            return;
        }
        let place = &mut self.admitted[flow.place()];
        place.rotate_right(1);
        place[0] = Some(Entry { flow, state });
    }

    /// The rules do not let this flow in.
    pub(super) fn refuse(&mut self, packet: &Parsed) {
        if let Some(entry) = self.entry(Flow::of(packet)) {
            entry.state = State::Refused(Instant::now());
        }
    }

    fn entry(&mut self, flow: Flow) -> Option<&mut Entry> {
        self.admitted[flow.place()].iter_mut().flatten().find(|entry| entry.flow == flow)
    }

    /// A first fragment has passed or not: its others follow it.
    pub(super) fn first_fragment(&mut self, packet: &Parsed, passed: bool) {
        let fragments = Fragments::of(packet);
        let entry = &mut self.fragmented[fragments.place()];
        if passed {
            *entry = Some(fragments);
        } else if *entry == Some(fragments) {
            *entry = None;
        }
    }

    /// Whether the first fragment of the same packet has passed.
    pub(super) fn first_has_passed(&self, packet: &Parsed) -> bool {
        let fragments = Fragments::of(packet);
        self.fragmented[fragments.place()] == Some(fragments)
    }
}
