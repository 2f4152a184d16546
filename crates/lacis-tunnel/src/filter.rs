//! The packet filter: which packets of peers reach the host (`reference/client.md` section 6).
//!
//! A [`Filter`] is compiled once for each change of the rules and then only read. What a host has asked for itself
//! is remembered in [`Flows`], which outlive the rules. TCP needs no memory: everything but a connection's first
//! packet passes, and the kernel answers strays.

mod flows;
mod rules;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use lacis_wire::control::FilterRule;

use crate::packet::{Parsed, protocol};

pub use flows::Flows;
use rules::{IpSet, Match};

/// The cloud metadata address: the only link-local destination that may be used through a tunnel.
const METADATA: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 169, 254));

/// What the filter says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let it pass.
    Accept,
    /// Do not.
    Drop(DropReason),
}

/// Why a packet does not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// Not an IP packet, or cut short.
    Malformed,
    /// To a multicast group.
    Multicast,
    /// To a link-local address.
    LinkLocal,
    /// Not to an address or network of this node.
    NotLocal,
    /// No rule allows it.
    NoRule,
}

/// Compiled rules. The default lets nothing in but answers.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    matches: Vec<Match>,
    local: IpSet,
    peer_api: Vec<SocketAddr>,
    shields_up: bool,
}

impl Filter {
    /// Compiles the rules of the netmap. `local`: own addresses and what this node routes for others.
    /// Rules whose sources are capabilities match nobody; see [`Self::compile_with`].
    pub fn compile(rules: &[FilterRule], local: &[IpNet]) -> Self {
        Self::compile_with(rules, local, |_| Vec::new())
    }

    /// Like [`Self::compile`]; `holders` gives the addresses of the nodes that have a capability (`cap:NAME`).
    pub fn compile_with(rules: &[FilterRule], local: &[IpNet], holders: impl Fn(&str) -> Vec<IpNet>) -> Self {
        Self {
            matches: rules.iter().filter_map(|rule| Match::compile(rule, &holders)).collect(),
            local: IpSet::from_nets(local),
            peer_api: Vec::new(),
            shields_up: false,
        }
    }

    /// TCP connections to these own addresses pass whatever the rules say: the peer API asks its own questions.
    /// The port of the first entry of a family is also told in answers to TSMP pings.
    pub fn with_peer_api(mut self, addresses: Vec<SocketAddr>) -> Self {
        self.peer_api = addresses;
        self
    }

    /// Takes all rules away: nothing comes in but answers, and refusals say so.
    pub fn with_shields_up(mut self, shields_up: bool) -> Self {
        self.shields_up = shields_up;
        self
    }

    /// Whether shields are up.
    pub fn shields_up(&self) -> bool {
        self.shields_up
    }

    /// The port of the peer API for this family.
    pub(crate) fn peer_api_port(&self, ipv4: bool) -> Option<u16> {
        self.peer_api.iter().find(|addr| addr.is_ipv4() == ipv4).map(SocketAddr::port)
    }

    /// Judges a packet that was decrypted from a peer. A `jailed` peer may only answer.
    pub fn inbound(&self, packet: &Parsed, flows: &mut Flows, jailed: bool) -> Verdict {
        if let Some(reason) = bad_destination(packet.dst) {
            return Verdict::Drop(reason);
        }
        if packet.later_fragment {
            return Verdict::Accept;
        }
        if !self.local.contains(packet.dst) {
            return Verdict::Drop(DropReason::NotLocal);
        }
        let closed = jailed || self.shields_up;
        let accept = match packet.proto {
            protocol::ICMP | protocol::ICMP6 => {
                packet.is_echo_reply()
                    || packet.is_icmp_error()
                    || (!closed && self.matches.iter().any(|rule| rule.addresses(packet.src, packet.dst)))
            }
            protocol::TCP => {
                !packet.is_tcp_syn()
                    || (!closed && self.rule_for(packet))
                    || self.peer_api.contains(&SocketAddr::new(packet.dst, packet.dst_port))
            }
            protocol::UDP | protocol::SCTP => flows.answers(packet) || (!closed && self.rule_for(packet)),
            protocol::TSMP => true,
            _ => !closed && self.matches.iter().any(|rule| rule.whole_protocol(packet)),
        };
        if accept { Verdict::Accept } else { Verdict::Drop(DropReason::NoRule) }
    }

    /// Judges a packet that this host sends, and remembers what may be answered.
    pub fn outbound(&self, packet: &Parsed, flows: &mut Flows) -> Verdict {
        if let Some(reason) = bad_destination(packet.dst) {
            return Verdict::Drop(reason);
        }
        if matches!(packet.proto, protocol::UDP | protocol::SCTP) && !packet.later_fragment {
            flows.record(packet);
        }
        Verdict::Accept
    }

    fn rule_for(&self, packet: &Parsed) -> bool {
        self.matches.iter().any(|rule| rule.allows(packet))
    }
}

fn bad_destination(dst: IpAddr) -> Option<DropReason> {
    if dst.is_multicast() {
        return Some(DropReason::Multicast);
    }
    let link_local = match dst {
        IpAddr::V4(v4) => v4.is_link_local() && dst != METADATA,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    link_local.then_some(DropReason::LinkLocal)
}
