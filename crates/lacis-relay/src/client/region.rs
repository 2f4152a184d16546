//! Where a region's relays are and how to know them: the DERP map's entries, in a form that cannot be wrong.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lacis_wire::control;

/// The number of a region.
pub type RegionId = u16;

/// The default HTTPS port of a relay.
pub(super) const DEFAULT_PORT: u16 = 443;
/// Prefix of a `CertName` that pins the relay's certificate.
const PIN_PREFIX: &str = "sha256-raw:";

/// A region: its nodes are tried in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayRegion {
    /// Its number.
    pub id: RegionId,
    /// Those that can be dialled.
    pub nodes: Vec<RelayNode>,
}

/// How one address family of a node is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family<T> {
    /// Resolve the host name.
    Resolve,
    /// This address.
    At(T),
    /// Not at all.
    Off,
}

impl<T: std::str::FromStr> Family<T> {
    /// From the map: "" resolves, an address is dialled, any other word (such as `none`) means off.
    pub fn parse(text: &str) -> Self {
        if text.is_empty() { Self::Resolve } else { text.parse().map_or(Self::Off, Self::At) }
    }
}

/// How a node proves who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertCheck {
    /// A certificate of its host name by a known authority.
    HostName,
    /// A certificate of this name by a known authority.
    Name(String),
    /// This very certificate (SHA-256 of its DER form).
    Pin([u8; 32]),
    /// Not at all: tests only.
    Insecure,
}

impl CertCheck {
    /// From the map's `CertName` and `InsecureForTests`. A pin that is damaged becomes a name that no certificate has.
    pub fn parse(cert_name: &str, insecure_for_tests: bool) -> Self {
        if insecure_for_tests {
            return Self::Insecure;
        }
        if cert_name.is_empty() {
            return Self::HostName;
        }
        cert_name
            .strip_prefix(PIN_PREFIX)
            .and_then(hex_32)
            .map_or_else(|| Self::Name(cert_name.to_owned()), Self::Pin)
    }
}

fn hex_32(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(digits.chunks(2)) {
        let digit = |d: u8| char::from(d).to_digit(16);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(out)
}

/// One relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayNode {
    /// Its name in the map, such as `900a`.
    pub name: String,
    /// For DNS, TLS and HTTP.
    pub host: String,
    /// How to reach it by IPv4.
    pub ipv4: Family<Ipv4Addr>,
    /// How to reach it by IPv6.
    pub ipv6: Family<Ipv6Addr>,
    /// TCP port.
    pub port: u16,
    /// How it proves who it is.
    pub cert: CertCheck,
    /// Cleartext HTTP instead of TLS: labs and tests only, never from a map.
    pub plain_http: bool,
}

impl RelayNode {
    /// A node found by its name, with a certificate for it.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        let host = host.into();
        let literal: Option<IpAddr> = host.trim_matches(['[', ']']).parse().ok();
        let (ipv4, ipv6) = match literal {
            Some(IpAddr::V4(ip)) => (Family::At(ip), Family::Off),
            Some(IpAddr::V6(ip)) => (Family::Off, Family::At(ip)),
            None => (Family::Resolve, Family::Resolve),
        };
        Self { name: host.clone(), host, ipv4, ipv6, port, cert: CertCheck::HostName, plain_http: false }
    }

    /// The value of the `Host` header.
    pub(super) fn authority(&self) -> String {
        let host = if self.host.parse::<Ipv6Addr>().is_ok() {
            format!("[{}]", self.host)
        } else {
            self.host.clone()
        };
        if self.port == DEFAULT_PORT { host } else { format!("{host}:{}", self.port) }
    }
}

impl From<&control::DerpNode> for RelayNode {
    fn from(node: &control::DerpNode) -> Self {
        let by_name = Self::new(node.host_name.clone(), node.port());
        // a host name that is an address needs no literal beside it
        let (ipv4, ipv6) = (Family::parse(&node.ipv4), Family::parse(&node.ipv6));
        Self {
            name: node.name.clone(),
            ipv4: if ipv4 == Family::Resolve { by_name.ipv4 } else { ipv4 },
            ipv6: if ipv6 == Family::Resolve { by_name.ipv6 } else { ipv6 },
            cert: CertCheck::parse(&node.cert_name, node.insecure_for_tests),
            ..by_name
        }
    }
}

impl From<&control::DerpRegion> for RelayRegion {
    fn from(region: &control::DerpRegion) -> Self {
        let dialled = region.nodes.iter().filter(|node| !node.stun_only);
        Self { id: region.region_id, nodes: dialled.map(RelayNode::from).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_field_resolves_names_dials_literals_and_turns_families_off() {
        assert_eq!(Family::<Ipv4Addr>::parse(""), Family::Resolve);
        assert_eq!(Family::parse("192.0.2.1"), Family::At(Ipv4Addr::new(192, 0, 2, 1)));
        assert_eq!(Family::<Ipv6Addr>::parse("none"), Family::Off);
    }

    #[test]
    fn a_cert_name_is_a_name_or_a_pin() {
        assert_eq!(CertCheck::parse("", false), CertCheck::HostName);
        assert_eq!(CertCheck::parse("x.example", false), CertCheck::Name("x.example".into()));
        assert_eq!(
            CertCheck::parse(&format!("sha256-raw:{}", "0f".repeat(32)), false),
            CertCheck::Pin([15; 32])
        );
        assert_eq!(CertCheck::parse("sha256-raw:zz", false), CertCheck::Name("sha256-raw:zz".into()));
        assert_eq!(CertCheck::parse("x.example", true), CertCheck::Insecure);
    }

    #[test]
    fn a_region_of_the_map_keeps_what_can_be_dialled() {
        let node = control::DerpNode {
            name: "900a".into(),
            region_id: 900,
            host_name: "192.0.2.9".into(),
            ipv6: "2001:db8::9".into(),
            derp_port: 8443,
            ..control::DerpNode::default()
        };
        let stun = control::DerpNode { stun_only: true, ..node.clone() };
        let region = control::DerpRegion { region_id: 900, nodes: vec![stun, node], ..Default::default() };
        let region = RelayRegion::from(&region);
        assert_eq!((region.id, region.nodes.len()), (900, 1));
        assert_eq!(region.nodes[0].ipv4, Family::At(Ipv4Addr::new(192, 0, 2, 9)));
        assert_eq!(region.nodes[0].ipv6, Family::parse("2001:db8::9"));
        assert_eq!(region.nodes[0].port, 8443);
    }

    #[test]
    fn the_host_header_has_a_port_only_if_it_is_not_443() {
        assert_eq!(RelayNode::new("relay.example", 443).authority(), "relay.example");
        assert_eq!(RelayNode::new("relay.example", 8443).authority(), "relay.example:8443");
        assert_eq!(RelayNode::new("::1", 8443).authority(), "[::1]:8443");
    }
}
