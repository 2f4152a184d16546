//! Which translated packets belong together, so that answers find the way back. A peer is, on the IPv4 side, its own
//! IPv4 address; where two of its flows would be one there (the same host and port at two sites, or a flow that is not
//! translated), the later one gets another source port. Each peer has a bounded table, whose oldest flow makes room.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::num::NonZeroUsize;

use lru::LruCache;

/// Flows of one IPv4 source.
const MAX_FLOWS: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// Ports that are tried where the flow's own is taken.
const MAX_TRIES: usize = 64;

/// A flow as its peer sees it. An echo's identifier is the source port, and its destination port 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Inner {
    pub(super) src: Ipv6Addr,
    pub(super) dst: Ipv6Addr,
    /// IPv4's number.
    pub(super) proto: u8,
    pub(super) src_port: u16,
    pub(super) dst_port: u16,
}

/// A flow as this host sees it, without its source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Outer {
    pub(super) dst: Ipv4Addr,
    pub(super) proto: u8,
    pub(super) src_port: u16,
    pub(super) dst_port: u16,
}

/// Both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(super) inner: Inner,
    pub(super) source: Ipv4Addr,
    pub(super) outer: Outer,
}

#[derive(Debug)]
struct Table {
    /// The source port outside.
    flows: LruCache<Inner, u16>,
    back: HashMap<Outer, Inner>,
}

/// The tables of all peers.
#[derive(Debug, Default)]
pub(super) struct Flows(HashMap<Ipv4Addr, Table>);

fn outer(inner: &Inner, dst: Ipv4Addr, src_port: u16) -> Outer {
    Outer { dst, proto: inner.proto, src_port, dst_port: inner.dst_port }
}

impl Flows {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets sources that no peer has any more.
    pub(super) fn retain(&mut self, mut known: impl FnMut(Ipv4Addr) -> bool) {
        self.0.retain(|source, _| known(*source));
    }

    /// The flow of a packet from a peer, which may be new; `None` when no port is free. `dst` is what the inner
    /// destination stands for.
    pub(super) fn outgoing(
        &mut self,
        inner: Inner,
        source: Ipv4Addr,
        dst: Ipv4Addr,
        random: impl FnMut() -> u16,
    ) -> Option<Flow> {
        let table = self
            .0
            .entry(source)
            .or_insert_with(|| Table { flows: LruCache::new(MAX_FLOWS), back: HashMap::new() });
        let port = match table.flows.get(&inner) {
            Some(port) => *port,
            None => table.open(inner, dst, Some(inner.src_port), random)?,
        };
        Some(Flow { inner, source, outer: outer(&inner, dst, port) })
    }

    /// A flow that is there.
    pub(super) fn find(&mut self, inner: Inner, source: Ipv4Addr, dst: Ipv4Addr) -> Option<Flow> {
        let port = *self.0.get_mut(&source)?.flows.get(&inner)?;
        Some(Flow { inner, source, outer: outer(&inner, dst, port) })
    }

    /// The flow that a packet of this host to `source` answers; `outer` is turned to the flow's direction.
    pub(super) fn answered(&mut self, source: Ipv4Addr, outer: Outer) -> Option<Flow> {
        let table = self.0.get_mut(&source)?;
        let inner = *table.back.get(&outer)?;
        table.flows.promote(&inner);
        Some(Flow { inner, source, outer })
    }

    /// A peer uses these addresses and ports itself, without translation: a translated flow that looks the same gets
    /// another port.
    pub(super) fn yield_to(&mut self, source: Ipv4Addr, plain: Outer, random: impl FnMut() -> u16) {
        let Some(table) = self.0.get_mut(&source) else { return };
        let Some(inner) = table.back.get(&plain).copied() else { return };
        // With its old port still taken, so that it is not the new one.
        table.open(inner, plain.dst, None, random);
        table.back.remove(&plain);
        if table.flows.peek(&inner) == Some(&plain.src_port) {
            table.flows.pop(&inner);
        }
    }
}

impl Table {
    fn open(
        &mut self,
        inner: Inner,
        dst: Ipv4Addr,
        wanted: Option<u16>,
        mut random: impl FnMut() -> u16,
    ) -> Option<u16> {
        let mut tries =
            wanted.into_iter().chain(std::iter::from_fn(|| Some(random().max(1024)))).take(MAX_TRIES);
        let port = tries.find(|port| !self.back.contains_key(&outer(&inner, dst, *port)))?;
        if let Some((old, old_port)) = self.flows.push(inner, port)
            && old != inner
            && let Some((_, old_dst)) = lacis_wire::via::split(old.dst)
        {
            self.back.remove(&outer(&old, old_dst, old_port));
        }
        self.back.insert(outer(&inner, dst, port), inner);
        Some(port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::protocol::UDP;

    const SOURCE: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
    const DST: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 1);

    fn inner(site: u32, src_port: u16) -> Inner {
        let src = "fd7a:115c:a1e0::2".parse().unwrap();
        Inner { src, dst: lacis_wire::via::address(site, DST), proto: UDP, src_port, dst_port: 53 }
    }

    fn counter() -> impl FnMut() -> u16 {
        let mut next = 40_000;
        move || {
            next += 1;
            next
        }
    }

    #[test]
    fn a_flow_keeps_its_port_and_answers_find_it() {
        let mut flows = Flows::default();
        let first = flows.outgoing(inner(1, 5000), SOURCE, DST, counter()).unwrap();
        assert_eq!(first.outer.src_port, 5000);
        assert_eq!(flows.outgoing(inner(1, 5000), SOURCE, DST, counter()), Some(first));
        assert_eq!(flows.answered(SOURCE, first.outer), Some(first));
        assert_eq!(flows.answered(SOURCE, Outer { dst_port: 54, ..first.outer }), None);
        assert_eq!(flows.answered(DST, first.outer), None);
    }

    #[test]
    fn the_same_address_at_two_sites_is_told_apart_by_ports() {
        let mut flows = Flows::default();
        let first = flows.outgoing(inner(1, 5000), SOURCE, DST, counter()).unwrap();
        let second = flows.outgoing(inner(2, 5000), SOURCE, DST, counter()).unwrap();
        assert_ne!(first.outer, second.outer);
        for flow in [first, second] {
            assert_eq!(flows.answered(SOURCE, flow.outer), Some(flow));
        }
    }

    #[test]
    fn a_flow_makes_way_for_one_that_is_not_translated() {
        let mut flows = Flows::default();
        let flow = flows.outgoing(inner(1, 5000), SOURCE, DST, counter()).unwrap();
        flows.yield_to(SOURCE, flow.outer, counter());
        assert_eq!(flows.answered(SOURCE, flow.outer), None);
        let moved = flows.outgoing(inner(1, 5000), SOURCE, DST, counter()).unwrap();
        assert_ne!(moved.outer.src_port, 5000);
        assert_eq!(flows.answered(SOURCE, moved.outer), Some(moved));
        flows.yield_to(SOURCE, flow.outer, counter());
        assert_eq!(flows.answered(SOURCE, moved.outer), Some(moved));
    }

    #[test]
    fn the_oldest_flow_makes_room_and_nothing_is_left_of_it() {
        let mut flows = Flows::default();
        for port in 0..10_000 {
            flows.outgoing(inner(1, port), SOURCE, DST, counter()).unwrap();
            flows.outgoing(inner(1, 1), SOURCE, DST, counter()).unwrap();
        }
        let table = &flows.0[&SOURCE];
        assert_eq!((table.flows.len(), table.back.len()), (MAX_FLOWS.get(), MAX_FLOWS.get()));
        let flow = flows.find(inner(1, 1), SOURCE, DST).unwrap();
        assert_eq!(flows.answered(SOURCE, flow.outer), Some(flow), "one in use stays");
        flows.retain(|_| false);
        assert!(flows.is_empty());
    }
}
