//! The texts of the configuration that mean something: addresses, prefixes, durations, names.
//!
//! Each is a type that is parsed once, and a named format of the JSON Schema with the words that an
//! error message uses. The schema's validator and serde call the same parser.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use lacis_wire::io::ControlUrl;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A named format: what the schema calls it, what a person should write, and whether a text is one.
pub(super) struct Format {
    pub(super) name: &'static str,
    pub(super) expected: &'static str,
    pub(super) accepts: fn(&str) -> bool,
}

/// All formats, for the validator and for error messages.
pub(super) const FORMATS: &[Format] = &[
    ServerUrl::FORMAT,
    Address::FORMAT,
    AddressOrOff::FORMAT,
    Prefix::FORMAT,
    Ip::FORMAT,
    Span::FORMAT,
    Expiry::FORMAT,
    Domain::FORMAT,
    Nameserver::FORMAT,
    AbsolutePath::FORMAT,
];

macro_rules! scalar {
    ($name:ident, $format:literal, $expected:literal) => {
        impl $name {
            pub(super) const FORMAT: Format =
                Format { name: $format, expected: $expected, accepts: |text| text.parse::<$name>().is_ok() };
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(|()| serde::de::Error::custom(concat!("expected ", $expected)))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "format": $format })
            }
        }
    };
}

/// The URL that every client reaches the coordinator at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerUrl(pub ControlUrl);

impl FromStr for ServerUrl {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        ControlUrl::parse(text).map(Self).map_err(drop)
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

scalar!(
    ServerUrl,
    "server-url",
    "an https:// or http:// URL that ends after the host (and port), such as https://mesh.example.org"
);

/// An address to listen on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub SocketAddr);

impl FromStr for Address {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        text.parse().map(Self).map_err(drop)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

scalar!(Address, "socket-address", "an IP address and a port, such as 0.0.0.0:8080 or [::]:8080");

/// An address to listen on, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressOrOff(pub Option<SocketAddr>);

impl FromStr for AddressOrOff {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "off" {
            return Ok(Self(None));
        }
        text.parse().map(|address| Self(Some(address))).map_err(drop)
    }
}

impl fmt::Display for AddressOrOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => f.write_str("off"),
        }
    }
}

scalar!(AddressOrOff, "socket-address-or-off", "an IP address and a port, such as 127.0.0.1:9090, or off");

/// A network, or a single address as the network of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix(pub IpNet);

impl FromStr for Prefix {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.map(|net| Self(net.trunc())).map_err(drop)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

scalar!(Prefix, "ip-prefix", "a network or an IP address, such as 10.0.0.0/8 or 192.0.2.1");

/// An IP address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ip(pub IpAddr);

impl FromStr for Ip {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        text.parse().map(Self).map_err(drop)
    }
}

impl fmt::Display for Ip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

scalar!(Ip, "ip-address", "an IP address, such as 192.0.2.1 or 2001:db8::1");

/// A length of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match humantime::parse_duration(text) {
            Ok(span) if !span.is_zero() => Ok(Self(span)),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

scalar!(Span, "duration", "a duration, such as 30m or 24h");

/// A length of time, or `never`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expiry(pub Option<Duration>);

impl FromStr for Expiry {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "never" {
            return Ok(Self(None));
        }
        text.parse::<Span>().map(|span| Self(Some(span.0)))
    }
}

impl fmt::Display for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(span) => Span(span).fmt(f),
            None => f.write_str("never"),
        }
    }
}

scalar!(Expiry, "duration-or-never", "a duration, such as 180d, or never");

/// A DNS name in lower case, without a dot at the end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Domain(pub String);

/// Whether a text is a DNS label: letters, digits and inner hyphens.
pub(super) fn is_label(text: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

impl FromStr for Domain {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        if name.len() <= 253 && name.split('.').all(is_label) { Ok(Self(name)) } else { Err(()) }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Domain {
    /// Whether every host means itself by it (RFC 6761, section 6.3).
    pub fn is_local(&self) -> bool {
        self.0 == "localhost" || self.0.ends_with(".localhost")
    }

    /// Whether `name` is this domain or stands under it.
    pub fn contains(&self, name: &str) -> bool {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        name.strip_suffix(self.0.as_str()).is_some_and(|left| left.is_empty() || left.ends_with('.'))
    }
}

scalar!(Domain, "dns-name", "a DNS name, such as lab.example.org");

/// A resolver that clients ask. Which ones they can ask is checked with the rest, so that the reason is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nameserver(pub String);

impl FromStr for Nameserver {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Nameserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

scalar!(
    Nameserver,
    "nameserver",
    "an IP address, an address and port, or a URL of DNS over HTTPS or TLS, such as 1.1.1.1, https://dns.example.org/dns-query or tls://dns.example.org"
);

/// A path that means the same wherever the program is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AbsolutePath(pub PathBuf);

impl FromStr for AbsolutePath {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if Path::new(text).is_absolute() { Ok(Self(PathBuf::from(text))) } else { Err(()) }
    }
}

impl fmt::Display for AbsolutePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

scalar!(AbsolutePath, "absolute-path", "an absolute path, such as /var/lib/lacis-coordinator");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scalar_prints_what_it_reads() {
        for text in ["off", "127.0.0.1:9090"] {
            assert_eq!(text.parse::<AddressOrOff>().unwrap().to_string(), text);
        }
        for text in ["never", "30m", "24h"] {
            let expiry: Expiry = text.parse().unwrap();
            assert_eq!(expiry.to_string().parse::<Expiry>().unwrap(), expiry);
        }
        assert_eq!("192.0.2.1".parse::<Prefix>().unwrap().to_string(), "192.0.2.1/32");
        assert_eq!("Lab.Example.ORG.".parse::<Domain>().unwrap().to_string(), "lab.example.org");
    }

    #[test]
    fn a_domain_contains_itself_and_what_is_under_it() {
        let domain: Domain = "example.org".parse().unwrap();
        assert!(domain.contains("example.org") && domain.contains("mesh.Example.org."));
        assert!(!domain.contains("anexample.org") && !domain.contains("org"));
    }

    #[test]
    fn texts_that_mean_nothing_are_refused() {
        assert!("0s".parse::<Span>().is_err());
        assert!("soon".parse::<Span>().is_err());
        assert!("-a.example".parse::<Domain>().is_err());
        assert!("".parse::<Domain>().is_err());
        assert!("state".parse::<AbsolutePath>().is_err());
        assert!("localhost:80".parse::<Address>().is_err());
    }
}
