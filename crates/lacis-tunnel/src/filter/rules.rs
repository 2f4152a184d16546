//! Compiled rules: sets of addresses as sorted ranges, and ports.

use std::net::IpAddr;

use ipnet::IpNet;
use lacis_wire::control::{FilterRule, NetPortRange, PortRange};
use tracing::warn;

use crate::packet::{Parsed, protocol};

/// What a rule without protocols is about.
const DEFAULT_PROTOCOLS: [u8; 4] = [protocol::TCP, protocol::UDP, protocol::ICMP, protocol::ICMP6];

/// Addresses as sorted ranges that do not touch, for each family.
#[derive(Clone, Debug, Default)]
pub(super) struct IpSet {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

fn merge<T: Copy + Ord>(ranges: &mut Vec<(T, T)>) {
    ranges.sort_unstable();
    let mut merged: Vec<(T, T)> = Vec::with_capacity(ranges.len());
    for &(first, last) in ranges.iter() {
        match merged.last_mut() {
            Some(previous) if first <= previous.1 => previous.1 = previous.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    *ranges = merged;
}

fn within<T: Copy + Ord>(ranges: &[(T, T)], value: T) -> bool {
    let after = ranges.partition_point(|&(first, _)| first <= value);
    after > 0 && value <= ranges[after - 1].1
}

impl IpSet {
    pub(super) fn from_nets(nets: &[IpNet]) -> Self {
        let mut set = Self::default();
        for net in nets {
            set.add(net);
        }
        set.finish();
        set
    }

    fn add(&mut self, net: &IpNet) {
        self.add_range(net.network(), net.broadcast());
    }

    fn add_range(&mut self, first: IpAddr, last: IpAddr) -> bool {
        match (first, last) {
            (IpAddr::V4(first), IpAddr::V4(last)) if first <= last => {
                self.v4.push((first.into(), last.into()));
            }
            (IpAddr::V6(first), IpAddr::V6(last)) if first <= last => {
                self.v6.push((first.into(), last.into()));
            }
            _ => return false,
        }
        true
    }

    /// Adds a text of the protocol: `*`, address, prefix or range.
    fn add_text(&mut self, text: &str) -> bool {
        if text == "*" {
            self.v4.push((0, u32::MAX));
            self.v6.push((0, u128::MAX));
            return true;
        }
        if let Ok(net) = text.parse::<IpNet>() {
            self.add(&net);
            return true;
        }
        if let Ok(addr) = text.parse::<IpAddr>() {
            return self.add_range(addr, addr);
        }
        if let Some((first, last)) = text.split_once('-')
            && let (Ok(first), Ok(last)) = (first.parse(), last.parse())
        {
            return self.add_range(first, last);
        }
        false
    }

    fn finish(&mut self) {
        merge(&mut self.v4);
        merge(&mut self.v6);
    }

    fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    pub(super) fn contains(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(v4) => within(&self.v4, v4.into()),
            IpAddr::V6(v6) => within(&self.v6, v6.into()),
        }
    }
}

#[derive(Clone, Debug)]
struct Destination {
    addresses: IpSet,
    ports: PortRange,
}

/// One rule that is about network access.
#[derive(Clone, Debug)]
pub(super) struct Match {
    protocols: Vec<u8>,
    sources: IpSet,
    destinations: Vec<Destination>,
}

impl Match {
    /// `None` when the rule can match nothing (capability grants among them). Entries that cannot be read are left
    /// out, so that a rule never becomes wider than it was written.
    pub(super) fn compile(rule: &FilterRule, holders: &impl Fn(&str) -> Vec<IpNet>) -> Option<Self> {
        let mut sources = IpSet::default();
        for text in &rule.src_ips {
            if let Some(capability) = text.strip_prefix("cap:") {
                for net in holders(capability) {
                    sources.add(&net);
                }
            } else if !sources.add_text(text) {
                warn!(source = %text, "a source of a filter rule cannot be read and is ignored");
            }
        }
        sources.finish();
        let destinations: Vec<_> = rule.dst_ports.iter().filter_map(Self::destination).collect();
        let protocols = if rule.ip_proto.is_empty() {
            DEFAULT_PROTOCOLS.to_vec()
        } else {
            rule.ip_proto.iter().filter_map(|&proto| u8::try_from(proto).ok()).collect()
        };
        (!sources.is_empty() && !destinations.is_empty() && !protocols.is_empty()).then_some(Self {
            protocols,
            sources,
            destinations,
        })
    }

    fn destination(range: &NetPortRange) -> Option<Destination> {
        let mut addresses = IpSet::default();
        if !addresses.add_text(&range.ip) {
            warn!(destination = %range.ip, "a destination of a filter rule cannot be read and is ignored");
            return None;
        }
        addresses.finish();
        Some(Destination { addresses, ports: range.ports })
    }

    /// Source and destination address match, whatever protocol and ports.
    pub(super) fn addresses(&self, src: IpAddr, dst: IpAddr) -> bool {
        self.sources.contains(src) && self.destinations.iter().any(|to| to.addresses.contains(dst))
    }

    /// Protocol, addresses and destination port match.
    pub(super) fn allows(&self, packet: &Parsed) -> bool {
        self.protocols.contains(&packet.proto)
            && self.sources.contains(packet.src)
            && self.destinations.iter().any(|to| {
                (to.ports.first..=to.ports.last).contains(&packet.dst_port)
                    && to.addresses.contains(packet.dst)
            })
    }

    /// For protocols without ports: the rule names the protocol and means all ports.
    pub(super) fn whole_protocol(&self, packet: &Parsed) -> bool {
        self.protocols.contains(&packet.proto)
            && self.sources.contains(packet.src)
            && self.destinations.iter().any(|to| {
                to.ports.first == 0 && to.ports.last == u16::MAX && to.addresses.contains(packet.dst)
            })
    }
}
