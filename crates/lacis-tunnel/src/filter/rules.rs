//! The server's rules, read: sets of addresses as sorted ranges, ports, protocols.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lacis_wire::control::FilterRule;
use tracing::warn;

use super::index::{Ask, Index};
use crate::packet::protocol;

/// What a rule without protocols is about.
const DEFAULT_PROTOCOLS: [u8; 4] = [protocol::TCP, protocol::UDP, protocol::ICMP, protocol::ICMP6];

/// Addresses as sorted ranges that do not overlap, for each family.
#[derive(Clone, Debug, Default)]
pub(super) struct IpSet {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

fn merge<T: Copy + Ord>(ranges: &mut Vec<(T, T)>) {
    ranges.sort_unstable();
    ranges.dedup_by(|next, previous| {
        let overlap = next.0 <= previous.1;
        if overlap {
            previous.1 = previous.1.max(next.1);
        }
        overlap
    });
}

fn within<T: Copy + Ord>(ranges: &[(T, T)], value: T) -> bool {
    let after = ranges.partition_point(|&(first, _)| first <= value);
    after > 0 && value <= ranges[after - 1].1
}

impl IpSet {
    pub(super) fn from_nets<'a>(nets: impl IntoIterator<Item = &'a IpNet>) -> Self {
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

    /// Adds a text of the protocol: `*`, address, prefix (without host bits) or range.
    fn add_text(&mut self, text: &str) -> bool {
        if text == "*" {
            self.v4.push((0, u32::MAX));
            self.v6.push((0, u128::MAX));
            return true;
        }
        if let Ok(net) = text.parse::<IpNet>() {
            let sound = net.addr() == net.network();
            if sound {
                self.add(&net);
            }
            return sound;
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

/// Which sources reach which ports of which destinations by which protocols: a part of a [`FilterRule`].
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) protocols: Arc<[u8]>,
    pub(super) sources: Arc<IpSet>,
    pub(super) destinations: IpSet,
    /// First and last.
    pub(super) ports: (u16, u16),
}

impl Rule {
    /// Reads one rule of the server, one part for each range of ports; none when it can match nothing (capability
    /// grants among them). Entries that cannot be read are left out, so that a rule never becomes wider than it was
    /// written.
    fn read(rule: &FilterRule, holders: &impl Fn(&str) -> Vec<IpNet>) -> impl Iterator<Item = Self> {
        let mut sources = IpSet::default();
        for text in rule.src_ips.iter() {
            if let Some(capability) = text.strip_prefix("cap:") {
                for net in holders(capability) {
                    sources.add(&net);
                }
            } else if !sources.add_text(text) {
                warn!(source = %text, "a source of a filter rule cannot be read and is ignored");
            }
        }
        sources.finish();
        let mut protocols: Vec<u8> = if rule.ip_proto.is_empty() {
            DEFAULT_PROTOCOLS.to_vec()
        } else {
            rule.ip_proto.iter().filter_map(|&proto| u8::try_from(proto).ok()).collect()
        };
        protocols.sort_unstable();
        protocols.dedup();
        let mut by_ports: BTreeMap<(u16, u16), IpSet> = BTreeMap::new();
        if !sources.is_empty() && !protocols.is_empty() {
            for range in &rule.dst_ports {
                let ports = (range.ports.first, range.ports.last);
                if ports.0 > ports.1 || !by_ports.entry(ports).or_default().add_text(&range.ip) {
                    warn!(destination = ?range, "a destination of a filter rule cannot be read and is ignored");
                }
            }
        }
        let (protocols, sources): (Arc<[u8]>, _) = (protocols.into(), Arc::new(sources));
        by_ports.into_iter().map(move |(ports, mut destinations)| {
            destinations.finish();
            Self { protocols: Arc::clone(&protocols), sources: Arc::clone(&sources), destinations, ports }
        })
    }
}

/// All rules of a filter, ready to be asked.
#[derive(Debug, Default)]
pub(super) struct Rules {
    v4: Index<u32>,
    v6: Index<u128>,
}

impl Rules {
    pub(super) fn compile(rules: &[FilterRule], holders: &impl Fn(&str) -> Vec<IpNet>) -> Self {
        let rules: Vec<Rule> = rules.iter().flat_map(|rule| Rule::read(rule, holders)).collect();
        Self { v4: Index::new(&rules, |set| &set.v4), v6: Index::new(&rules, |set| &set.v6) }
    }

    /// Whether some rule allows it.
    pub(super) fn allow(&self, src: IpAddr, dst: IpAddr, ask: Ask) -> bool {
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.v4.allows(src.into(), dst.into(), ask),
            (IpAddr::V6(src), IpAddr::V6(dst)) => self.v6.allows(src.into(), dst.into(), ask),
            _ => false,
        }
    }
}
