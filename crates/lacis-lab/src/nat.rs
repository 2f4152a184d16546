//! What a site's router does to packets, as nftables rules: one table of NAT kinds for all scenarios.
//!
//! The recipes are files in `nat/`, which the virtual machines of `nix/vm-test.nix` read too. They were measured kind by
//! kind in network namespaces; the words are RFC 4787's. Every router has the interfaces `wan` and `lan`. Used by
//! [`crate::net`] when a site's router is set up.

use serde::Deserialize;

/// How a router maps and filters. In a topology: `nat = "symmetric"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NatKind {
    /// Routes a public prefix; translates and filters nothing.
    Open,
    /// Routes a public prefix behind a stateful firewall: no translation.
    Firewall,
    /// The common home router: endpoint-independent mapping, filters by address and port.
    #[default]
    Cone,
    /// The same, but the router accepts and remembers unsolicited packets to itself.
    ConeOpenInput,
    /// The same as a cone, but outside the port is another one (20000 to 20999).
    ConePorts,
    /// Another port for every destination, any one from 1024 up.
    Symmetric,
    /// Another port for every destination, out of 20000 to 20999.
    SymmetricRange,
    /// As symmetric, but the router accepts and remembers unsolicited packets to itself.
    SymmetricOpenInput,
    /// Endpoint-independent mapping, filters by address only.
    Restricted,
    /// Endpoint-independent mapping and filtering.
    FullCone,
    /// As full cone, and hosts inside reach each other by their addresses outside.
    Hairpin,
    /// A cone that opens ports when it is asked to, by PCP, NAT-PMP or UPnP (`miniupnpd`).
    PortMapping,
}

/// What a site's router refuses to forward. In a topology: `block = ["udp"]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Block {
    /// All UDP but DNS.
    Udp,
    /// The same over IPv4 only.
    UdpIpv4,
    /// All IPv4.
    Ipv4,
    /// All but TCP to port 443, and DNS.
    ButTcp443,
    /// What says that a packet was too big for a link (ICMP and ICMPv6), its own words included.
    IcmpTooBig,
    /// Fragments; it makes none itself.
    Fragments,
}

impl NatKind {
    /// Whether hosts behind it have addresses of their own on the internet.
    pub fn is_routed(self) -> bool {
        matches!(self, Self::Open | Self::Firewall)
    }

    /// The first three octets of its address on the internet. miniupnpd maps nothing where that is an address that
    /// only documentation uses, so it gets one of a range that is real, and inside the lab leads nowhere else.
    pub fn outside(self) -> [u8; 3] {
        if self == Self::PortMapping { [44, 0, 113] } else { [203, 0, 113] }
    }

    /// A few words for the drawing.
    pub fn words(self) -> &'static str {
        match self {
            Self::Open => "routed, open",
            Self::Firewall => "routed, stateful firewall",
            Self::Cone => "port-restricted cone NAT",
            Self::ConeOpenInput => "port-restricted cone NAT, open input",
            Self::ConePorts => "port-restricted cone NAT, other ports",
            Self::Symmetric => "symmetric NAT",
            Self::SymmetricRange => "symmetric NAT, 1000 ports",
            Self::SymmetricOpenInput => "symmetric NAT, open input",
            Self::Restricted => "restricted cone NAT",
            Self::FullCone => "full cone NAT",
            Self::Hairpin => "full cone NAT, hairpin",
            Self::PortMapping => "port-restricted cone NAT, maps ports on request",
        }
    }

    /// The router's rules.
    fn rules(self) -> &'static str {
        match self {
            Self::Open => include_str!("../nat/open.nft"),
            Self::Firewall => include_str!("../nat/firewall.nft"),
            Self::Cone => include_str!("../nat/cone.nft"),
            Self::ConeOpenInput => include_str!("../nat/cone-open-input.nft"),
            Self::ConePorts => include_str!("../nat/cone-ports.nft"),
            Self::Symmetric => include_str!("../nat/symmetric.nft"),
            Self::SymmetricRange => include_str!("../nat/symmetric-range.nft"),
            Self::SymmetricOpenInput => include_str!("../nat/symmetric-open-input.nft"),
            Self::Restricted => include_str!("../nat/restricted.nft"),
            Self::FullCone => include_str!("../nat/full-cone.nft"),
            Self::Hairpin => include_str!("../nat/hairpin.nft"),
            Self::PortMapping => include_str!("../nat/port-mapping.nft"),
        }
    }
}

impl Block {
    /// A few words for the drawing.
    pub fn words(self) -> &'static str {
        match self {
            Self::Udp => "UDP blocked",
            Self::UdpIpv4 => "UDP over IPv4 blocked",
            Self::Ipv4 => "IPv4 blocked",
            Self::ButTcp443 => "all but TCP 443 blocked",
            Self::IcmpTooBig => "ICMP too-big blocked",
            Self::Fragments => "fragments blocked",
        }
    }

    /// Tables of its own: what one chain drops no later one can accept.
    fn rules(self) -> &'static str {
        match self {
            Self::Udp => include_str!("../nat/block-udp.nft"),
            Self::UdpIpv4 => include_str!("../nat/block-udp-ipv4.nft"),
            Self::Ipv4 => include_str!("../nat/block-ipv4.nft"),
            Self::ButTcp443 => include_str!("../nat/block-but-tcp443.nft"),
            Self::IcmpTooBig => include_str!("../nat/block-icmp-too-big.nft"),
            Self::Fragments => include_str!("../nat/block-fragments.nft"),
        }
    }
}

/// The whole rule set of one router, in nft's language; one with a `narrow` uplink makes TCP fit it.
pub fn ruleset(kind: NatKind, block: &[Block], narrow: bool) -> String {
    let clamp = if narrow { include_str!("../nat/clamp-mss.nft") } else { "" };
    let blocked: String = block.iter().map(|block| block.rules()).collect();
    kind.rules().to_owned() + clamp + &blocked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cone_drops_strangers_on_its_own_address_and_forwards_only_answers() {
        let text = ruleset(NatKind::Cone, &[], false);
        assert!(text.contains("masquerade\n"));
        assert!(text.contains("hook input") && text.contains("policy drop"));
    }

    #[test]
    fn every_blocking_is_a_table_beside_the_router_s() {
        let text = ruleset(NatKind::Symmetric, &[Block::Udp, Block::Fragments], true);
        assert!(text.starts_with("flush ruleset\n"));
        for table in ["ip nat", "inet router", "inet clamp-mss", "inet block-udp", "inet block-fragments"] {
            assert!(text.contains(&format!("\ntable {table} {{\n")), "{table}");
        }
    }

    #[test]
    fn a_router_that_maps_ports_has_the_chains_that_its_service_is_told() {
        let text = ruleset(NatKind::PortMapping, &[], false);
        let config = include_str!("../units/miniupnpd.conf");
        for line in config.lines().filter(|line| line.starts_with("upnp_")) {
            let (key, name) = line.split_once('=').unwrap();
            let kind = if key.ends_with("table_name") { "table inet" } else { " chain" };
            assert!(text.contains(&format!("{kind} {name} {{")), "{line}");
        }
    }

    #[test]
    fn an_open_router_translates_nothing() {
        let text = ruleset(NatKind::Open, &[], false);
        assert!(!text.contains("table ip nat") && text.contains("policy accept"));
    }
}
