//! What this host has sent, so that the answers pass: the last 512 flows of UDP and SCTP.

use std::net::IpAddr;
use std::num::NonZeroUsize;

use lru::LruCache;

use crate::packet::Parsed;

/// How many flows are remembered; there is no time limit.
const FLOWS: NonZeroUsize = NonZeroUsize::new(512).expect("not zero");

/// A flow as its answers look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Flow {
    src: IpAddr,
    dst: IpAddr,
    src_port: u16,
    dst_port: u16,
    proto: u8,
}

/// The flows that this host has begun. Shared by all filters, one after the other.
#[derive(Debug)]
pub struct Flows {
    table: LruCache<Flow, ()>,
    /// The flow recorded last, so that a stream does not touch the table for every packet.
    recorded: Option<Flow>,
    answered: Option<Flow>,
}

impl Default for Flows {
    fn default() -> Self {
        Self { table: LruCache::new(FLOWS), recorded: None, answered: None }
    }
}

impl Flows {
    pub(super) fn record(&mut self, packet: &Parsed) {
        let flow = Flow {
            src: packet.dst,
            dst: packet.src,
            src_port: packet.dst_port,
            dst_port: packet.src_port,
            proto: packet.proto,
        };
        if self.recorded == Some(flow) {
            return;
        }
        self.table.push(flow, ());
        self.recorded = Some(flow);
        // the push may have pushed this one out
        self.answered = None;
    }

    pub(super) fn answers(&mut self, packet: &Parsed) -> bool {
        let flow = Flow {
            src: packet.src,
            dst: packet.dst,
            src_port: packet.src_port,
            dst_port: packet.dst_port,
            proto: packet.proto,
        };
        if self.answered == Some(flow) {
            return true;
        }
        let known = self.table.get(&flow).is_some();
        if known {
            self.answered = Some(flow);
        }
        known
    }
}
