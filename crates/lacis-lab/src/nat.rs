//! What a site's router does to packets, as nftables rules: one table of NAT kinds for all scenarios.
//!
//! The recipes were measured kind by kind in network namespaces; the words are RFC 4787's. Every router has the
//! interfaces `wan` and `lan`. Used by [`crate::net`] when a site's router is set up.

use std::fmt::Write as _;

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

    /// Declarations and rules of the table `ip nat`, without the postrouting that all share.
    fn translation(self) -> &'static str {
        match self {
            Self::Open | Self::Firewall => "",
            Self::Cone | Self::ConeOpenInput => {
                "chain postrouting { type nat hook postrouting priority 100;\n oifname \"wan\" masquerade\n}\n"
            }
            Self::Symmetric => {
                "chain postrouting { type nat hook postrouting priority 100;\n oifname \"wan\" masquerade fully-random\n}\n"
            }
            Self::FullCone => {
                "map inner { type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 120s; size 65535; }\n\
                 chain prerouting { type nat hook prerouting priority -100;\n \
                 iifname \"wan\" meta l4proto udp dnat to udp dport map @inner\n}\n\
                 chain postrouting { type nat hook postrouting priority 100;\n \
                 oifname \"wan\" meta l4proto udp update @inner { udp sport : ip saddr . udp sport }\n \
                 oifname \"wan\" masquerade\n}\n"
            }
            Self::Restricted => {
                "map inner { type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 120s; size 65535; }\n\
                 set seen { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 120s; size 65535; }\n\
                 chain prerouting { type nat hook prerouting priority -100;\n \
                 iifname \"wan\" meta l4proto udp ip saddr . udp dport @seen dnat to udp dport map @inner\n}\n\
                 chain postrouting { type nat hook postrouting priority 100;\n \
                 oifname \"wan\" meta l4proto udp update @inner { udp sport : ip saddr . udp sport }\n \
                 oifname \"wan\" meta l4proto udp update @seen { ip daddr . udp sport }\n \
                 oifname \"wan\" masquerade\n}\n"
            }
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

    fn rule(self) -> &'static str {
        match self {
            // Two inequalities on neighbouring ports would be merged into one wrong comparison by nft 1.0.
            Self::Udp => "ct direction original udp dport != 53 counter drop",
            Self::ButTcp443 => {
                "iifname \"lan\" ct state new tcp dport != 443 counter drop\n  \
                 iifname \"lan\" udp dport != 53 counter drop\n  \
                 iifname \"lan\" meta l4proto icmp counter drop"
            }
        }
    }
}

/// The whole rule set of one router, in nft's language.
pub fn ruleset(kind: NatKind, block: &[Block]) -> String {
    let mut text = String::from("flush ruleset\n");
    let translation = kind.translation();
    if !translation.is_empty() {
        let _ = write!(text, "table ip nat {{\n{translation}}}\n");
    }
    let policy = if kind == NatKind::Open { "accept" } else { "drop" };
    text.push_str("table inet router {\n");
    let _ = writeln!(text, " chain forward {{ type filter hook forward priority 0; policy {policy};");
    for block in block {
        let _ = writeln!(text, "  {}", block.rule());
    }
    text.push_str(
        "  ct state established,related accept\n  iifname \"lan\" accept\n  ct status dnat accept\n }\n",
    );
    // A router drops what nobody asked for on its own address: an accepted stray packet would take
    // the port that an inner host is about to use towards the same peer.
    if !matches!(kind, NatKind::Open | NatKind::ConeOpenInput) {
        text.push_str(
            " chain input { type filter hook input priority 0;\n  \
             iifname \"wan\" meta l4proto { tcp, udp } ct state new drop\n }\n",
        );
    }
    text.push_str("}\n");
    text
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
