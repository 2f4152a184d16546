//! The packet filter: which packets of peers reach the host (`reference/client.md` section 6).
//!
//! A [`Filter`] is compiled once for each change of the rules and then only read. What has to be remembered of packets
//! is in [`Flows`], which outlive the rules. TCP needs no memory: everything but a connection's first packet passes, and
//! the kernel answers strays.
//!
//! Where this is stricter than the reference:
//!
//! - a later fragment passes when the first one of its packet has, or when a rule lets its sender reach its destination
//!   at all (they may come in any order); the reference lets all pass;
//! - an ICMP error has to be about a packet from the address that it is sent to;
//! - nobody speaks from addresses that have no place in a mesh: multicast, link-local, loopback and the like, which only
//!   a peer that stands for the whole internet could;
//! - a UDP flow that a peer began ends when the rules that let it in do. In the reference the host's answers keep it.

mod flows;
mod index;
mod local;
#[cfg(test)]
mod reference;
mod rules;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use lacis_wire::control::FilterRule;

use crate::packet::{Parsed, protocol};

pub use flows::Flows;
use index::Ask;
use local::Local;
use rules::Rules;

/// The cloud metadata address: the only link-local destination that may be used through a tunnel.
const METADATA: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));

/// What the filter says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let it pass.
    Accept,
    /// Do not.
    Drop(DropReason),
}

/// Why a packet does not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// From an address that nobody in a mesh can have: multicast, link-local, loopback, unspecified.
    BadSource,
    /// To a multicast group.
    Multicast,
    /// To a link-local address.
    LinkLocal,
    /// Not to an address or network of this node.
    NotLocal,
    /// A later fragment of a packet that was not let in.
    Fragment,
    /// An ICMP error about a packet that did not come from here.
    StrayError,
    /// No rule allows it.
    NoRule,
}

/// Compiled rules. The default lets nothing in.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    rules: Arc<Rules>,
    local: Local,
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
    ///
    /// A default route in `local` stands for the internet: private and other special networks do not belong to it,
    /// nor does what [`Self::with_not_local`] names.
    pub fn compile_with(rules: &[FilterRule], local: &[IpNet], holders: impl Fn(&str) -> Vec<IpNet>) -> Self {
        Self {
            rules: Arc::new(Rules::compile(rules, &holders)),
            local: Local::new(local),
            peer_api: Vec::new(),
            shields_up: false,
        }
    }

    /// Takes networks out of the default routes that this node offers: those at the host's other interfaces and its
    /// addresses there. A network that is offered by itself stays.
    pub fn with_not_local(mut self, nets: &[IpNet]) -> Self {
        self.local.set_not_internet(nets);
        self
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
        let verdict = self.judge(packet, flows, jailed || self.shields_up);
        if packet.fragment && !packet.later_fragment {
            flows.first_fragment(packet, verdict == Verdict::Accept);
        }
        verdict
    }

    fn judge(&self, packet: &Parsed, flows: &mut Flows, closed: bool) -> Verdict {
        if is_bad_source(packet.src) {
            return Verdict::Drop(DropReason::BadSource);
        }
        if let Some(reason) = bad_destination(packet.dst) {
            return Verdict::Drop(reason);
        }
        if !self.local.contains(packet.dst) {
            return Verdict::Drop(DropReason::NotLocal);
        }
        if packet.later_fragment {
            let accept = flows.first_has_passed(packet) || (!closed && self.allows(packet, Ask::Addresses));
            return if accept { Verdict::Accept } else { Verdict::Drop(DropReason::Fragment) };
        }
        let accept = match packet.proto {
            _ if packet.is_icmp() => {
                if packet.is_icmp_error() {
                    let ours = packet.quoted.is_some_and(|(src, _)| src == packet.dst);
                    return if ours { Verdict::Accept } else { Verdict::Drop(DropReason::StrayError) };
                }
                packet.is_echo_reply() || self.admits(packet, flows, closed, Ask::Addresses)
            }
            protocol::TCP => {
                !packet.is_tcp_syn()
                    || (!closed && self.allows(packet, Ask::Port(packet.proto, packet.dst_port)))
                    || self.peer_api.contains(&SocketAddr::new(packet.dst, packet.dst_port))
            }
            protocol::UDP | protocol::SCTP => {
                self.admits(packet, flows, closed, Ask::Port(packet.proto, packet.dst_port))
            }
            protocol::TSMP => true,
            proto => self.admits(packet, flows, closed, Ask::Whole(proto)),
        };
        if accept { Verdict::Accept } else { Verdict::Drop(DropReason::NoRule) }
    }

    /// Judges a packet that this host sends, and remembers what may be answered.
    pub fn outbound(&self, packet: &Parsed, flows: &mut Flows) -> Verdict {
        if let Some(reason) = bad_destination(packet.dst) {
            return Verdict::Drop(reason);
        }
        flows.ask(packet);
        Verdict::Accept
    }

    fn allows(&self, packet: &Parsed, ask: Ask) -> bool {
        self.rules.allow(packet.src, packet.dst, ask)
    }

    /// For what comes many times: the rules are asked once for a flow, and never for what the host has asked for.
    fn admits(&self, packet: &Parsed, flows: &mut Flows, closed: bool, ask: Ask) -> bool {
        flows.follow(&self.rules);
        if (!closed && flows.is_admitted(packet)) || flows.answers(packet) {
            return true;
        }
        let admits = !closed && self.allows(packet, ask);
        if admits {
            flows.admit(packet);
        } else {
            flows.refuse(packet);
        }
        admits
    }
}

fn is_link_local(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(v4) => v4.is_link_local() && addr != METADATA,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

fn is_bad_source(src: IpAddr) -> bool {
    let special = match src {
        // 0.0.0.0/8, and 240.0.0.0/4 with the broadcast address
        IpAddr::V4(v4) => matches!(v4.octets()[0], 0 | 240..),
        IpAddr::V6(v6) => v6.is_unspecified() || v6.to_ipv4_mapped().is_some(),
    };
    special || src.is_multicast() || src.is_loopback() || is_link_local(src)
}

fn bad_destination(dst: IpAddr) -> Option<DropReason> {
    if dst.is_multicast() {
        return Some(DropReason::Multicast);
    }
    is_link_local(dst).then_some(DropReason::LinkLocal)
}
