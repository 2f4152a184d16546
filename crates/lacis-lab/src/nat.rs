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
    /// Another port for every destination.
    Symmetric,
    /// Endpoint-independent mapping, filters by address only.
    Restricted,
    /// Endpoint-independent mapping and filtering.
    FullCone,
}

/// What a site's router refuses to forward. In a topology: `block = ["udp"]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Block {
    /// All UDP but DNS.
    Udp,
    /// All but TCP to port 443, and DNS.
    ButTcp443,
}

impl NatKind {
    /// Whether hosts behind it have addresses of their own on the internet.
    pub fn is_routed(self) -> bool {
        matches!(self, Self::Open | Self::Firewall)
    }

    /// A few words for the drawing.
    pub fn words(self) -> &'static str {
        match self {
            Self::Open => "routed, open",
            Self::Firewall => "routed, stateful firewall",
            Self::Cone => "port-restricted cone NAT",
            Self::ConeOpenInput => "port-restricted cone NAT, open input",
            Self::Symmetric => "symmetric NAT",
            Self::Restricted => "restricted cone NAT",
            Self::FullCone => "full cone NAT",
        }
    }

    /// The router's rules, with a line `# blocked` where those of [`Block`] belong.
    fn template(self) -> &'static str {
        match self {
            Self::Open => include_str!("../nat/open.nft"),
            Self::Firewall => include_str!("../nat/firewall.nft"),
            Self::Cone => include_str!("../nat/cone.nft"),
            Self::ConeOpenInput => include_str!("../nat/cone-open-input.nft"),
            Self::Symmetric => include_str!("../nat/symmetric.nft"),
            Self::Restricted => include_str!("../nat/restricted.nft"),
            Self::FullCone => include_str!("../nat/full-cone.nft"),
        }
    }
}

impl Block {
    /// A few words for the drawing.
    pub fn words(self) -> &'static str {
        match self {
            Self::Udp => "UDP blocked",
            Self::ButTcp443 => "all but TCP 443 blocked",
        }
    }

    fn rules(self) -> &'static str {
        match self {
            Self::Udp => include_str!("../nat/block-udp.nft"),
            Self::ButTcp443 => include_str!("../nat/block-but-tcp443.nft"),
        }
    }
}

/// The whole rule set of one router, in nft's language.
pub fn ruleset(kind: NatKind, block: &[Block]) -> String {
    let blocked: String = block.iter().map(|block| block.rules()).collect();
    kind.template().replace("# blocked\n", &blocked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cone_drops_strangers_on_its_own_address_and_forwards_only_answers() {
        let text = ruleset(NatKind::Cone, &[]);
        assert!(text.contains("masquerade\n"));
        assert!(text.contains("hook input") && text.contains("policy drop"));
    }

    #[test]
    fn blocking_udp_comes_before_anything_is_accepted() {
        let text = ruleset(NatKind::Symmetric, &[Block::Udp]);
        assert!(text.find("udp dport != 53").unwrap() < text.find("established").unwrap());
    }

    #[test]
    fn an_open_router_translates_nothing() {
        let text = ruleset(NatKind::Open, &[]);
        assert!(!text.contains("table ip nat") && text.contains("policy accept"));
    }
}
