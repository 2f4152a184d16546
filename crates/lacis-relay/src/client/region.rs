//! Where a region's relays are and how to know them: the DERP map's entries, in a form that cannot be wrong.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The number of a region.
pub type RegionId = i64;

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
    fn the_host_header_has_a_port_only_if_it_is_not_443() {
        assert_eq!(RelayNode::new("relay.example", 443).authority(), "relay.example");
        assert_eq!(RelayNode::new("relay.example", 8443).authority(), "relay.example:8443");
        assert_eq!(RelayNode::new("::1", 8443).authority(), "[::1]:8443");
    }
}
