//! What this node receives for: its own addresses, the networks that it routes, and as an exit node the internet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::rules::IpSet;

/// What is never meant by a default route: addresses that are the host's own or a private network's, which a node that
/// offers the internet does not offer with it. Who wants such a network advertises it.
const NOT_INTERNET: [IpNet; 15] = [
    v4([0, 0, 0, 0], 8),
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([172, 16, 0, 0], 12),
    v4([192, 168, 0, 0], 16),
    v4([224, 0, 0, 0], 3),
    v6([0, 0, 0, 0, 0, 0, 0, 0], 128),
    v6([0, 0, 0, 0, 0, 0, 0, 1], 128),
    // IPv4 addresses in disguise
    v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96),
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    // site-local addresses, the predecessors of fc00::/7
    v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];

const fn v4([a, b, c, d]: [u8; 4], len: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), len))
}

const fn v6([a, b, c, d, e, f, g, h]: [u16; 8], len: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), len))
}

/// The destinations that are this node's to receive for.
#[derive(Clone, Debug, Default)]
pub(super) struct Local {
    networks: IpSet,
    internet_v4: bool,
    internet_v6: bool,
    not_internet: IpSet,
}

impl Local {
    pub(super) fn new(nets: &[IpNet]) -> Self {
        let is_default = |net: &&IpNet| net.prefix_len() == 0;
        let offers = |ipv4: bool| nets.iter().filter(is_default).any(|net| net.addr().is_ipv4() == ipv4);
        Self {
            networks: IpSet::from_nets(nets.iter().filter(|net| !is_default(net))),
            internet_v4: offers(true),
            internet_v6: offers(false),
            not_internet: IpSet::from_nets(&NOT_INTERNET),
        }
    }

    /// Takes more out of the internet.
    pub(super) fn set_not_internet(&mut self, nets: &[IpNet]) {
        self.not_internet = IpSet::from_nets(NOT_INTERNET.iter().chain(nets));
    }

    pub(super) fn contains(&self, addr: IpAddr) -> bool {
        let internet = if addr.is_ipv4() { self.internet_v4 } else { self.internet_v6 };
        self.networks.contains(addr) || (internet && !self.not_internet.contains(addr))
    }
}
