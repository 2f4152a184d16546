//! How a DNS resolver is written in network maps and configurations: an address, or the URL of one that is asked over
//! HTTPS (RFC 8484) or TLS (RFC 7858).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// Where every client answers names itself, and its twin.
pub const QUAD100_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 100);
pub const QUAD100_V6: Ipv6Addr = Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53);

/// Of plain DNS, of DNS over TLS (RFC 7858, section 3.1), and of HTTPS.
const DNS_PORT: u16 = 53;
const TLS_PORT: u16 = 853;
const HTTPS_PORT: u16 = 443;
/// What a URI template has where a request by GET has its question (RFC 8484, section 4.1). By POST it is empty.
const TEMPLATE: &str = "{?dns}";
const MAX_URL: usize = 1024;

/// Where a resolver is and how it is asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ResolverAddr {
    /// By UDP and TCP.
    Plain(SocketAddr),
    /// DNS over HTTPS.
    Https {
        /// A DNS name in lower case, or an IP address without brackets.
        host: String,
        port: u16,
        /// Path and query.
        path: String,
    },
    /// DNS over TLS.
    Tls {
        /// As above.
        host: String,
        port: u16,
    },
}

impl ResolverAddr {
    /// The resolver's address, where it is written as one.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Plain(address) => Some(address.ip()),
            Self::Https { host, .. } | Self::Tls { host, .. } => host.parse().ok(),
        }
    }
}

impl FromStr for ResolverAddr {
    /// What is wrong, in words.
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = text.parse().or_else(|_| text.parse().map(|ip| SocketAddr::new(ip, DNS_PORT)));
        let found = match (plain, text.split_once("://")) {
            (Ok(address), _) if address.port() == 0 => {
                return Err("its port is not a number from 1 to 65535");
            }
            (Ok(address), _) => Self::Plain(address),
            (Err(_), Some((scheme, rest))) => url(&scheme.to_ascii_lowercase(), rest)?,
            (Err(_), None) => return Err("it is neither an IP address nor a URL"),
        };
        if found.ip().is_some_and(|ip| !is_hosts(ip)) {
            return Err("no host has this address");
        }
        Ok(found)
    }
}

fn url(scheme: &str, rest: &str) -> Result<ResolverAddr, &'static str> {
    if rest.len() > MAX_URL || !rest.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("this is not a URL");
    }
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    if authority.contains('@') {
        return Err("a user name or password cannot be sent");
    }
    if path.contains('#') {
        return Err("a fragment (#) means nothing here");
    }
    match scheme {
        "https" => {
            let path = path.strip_suffix(TEMPLATE).unwrap_or(path);
            let slash = if path.starts_with('/') { "" } else { "/" };
            let (host, port) = host_and_port(authority, HTTPS_PORT)?;
            Ok(ResolverAddr::Https { host, port, path: format!("{slash}{path}") })
        }
        "tls" if !matches!(path, "" | "/") => Err("DNS over TLS has no path"),
        "tls" => {
            let (host, port) = host_and_port(authority, TLS_PORT)?;
            Ok(ResolverAddr::Tls { host, port })
        }
        "http" => Err("without encryption it can only be an address: DNS over HTTPS begins with https://"),
        _ => Err("only https:// (DNS over HTTPS) and tls:// (DNS over TLS) are spoken"),
    }
}

fn host_and_port(authority: &str, default: u16) -> Result<(String, u16), &'static str> {
    let bracketed = authority.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let (host, port) = match bracketed {
        Some((host, port)) => {
            host.parse::<Ipv6Addr>().map_err(|_| "what is in brackets is no IPv6 address")?;
            (host, port)
        }
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    if bracketed.is_none() && !is_host(host) {
        return Err("its host is neither a DNS name nor an IP address");
    }
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => default,
        Some(port) if port.bytes().all(|byte| byte.is_ascii_digit()) => port.parse().unwrap_or(0),
        _ => 0,
    };
    if port == 0 {
        return Err("its port is not a number from 1 to 65535");
    }
    Ok((host.trim_end_matches('.').to_ascii_lowercase(), port))
}

/// A name of a host (RFC 1123, section 2.1) or an IPv4 address.
fn is_host(host: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let name = host.strip_suffix('.').unwrap_or(host);
    // What ends in a number is an address or nothing (RFC 3696, section 2).
    let number = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    name.len() <= 253 && name.split('.').all(label) && (!number || name.parse::<Ipv4Addr>().is_ok())
}

/// Can a host have it?
fn is_hosts(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    !(ip.is_unspecified() || ip.is_multicast() || broadcast)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn https(host: &str, port: u16, path: &str) -> ResolverAddr {
        ResolverAddr::Https { host: host.into(), port, path: path.into() }
    }

    fn tls(host: &str, port: u16) -> ResolverAddr {
        ResolverAddr::Tls { host: host.into(), port }
    }

    #[test]
    fn addresses_and_urls_say_where_and_how_to_ask() {
        for (text, expected) in [
            ("192.0.2.1", ResolverAddr::Plain("192.0.2.1:53".parse().unwrap())),
            ("2001:db8::1", ResolverAddr::Plain("[2001:db8::1]:53".parse().unwrap())),
            ("[2001:db8::1]:5353", ResolverAddr::Plain("[2001:db8::1]:5353".parse().unwrap())),
            ("https://Dns.Example.org/dns-query", https("dns.example.org", 443, "/dns-query")),
            ("https://dns.example.org./q{?dns}", https("dns.example.org", 443, "/q")),
            ("HTTPS://dns.example.org:8443", https("dns.example.org", 8443, "/")),
            ("https://[2001:db8::1]:8443/a?b=c", https("2001:db8::1", 8443, "/a?b=c")),
            ("https://192.0.2.1?x", https("192.0.2.1", 443, "/?x")),
            ("tls://dns.example.org", tls("dns.example.org", 853)),
            ("tls://192.0.2.1:8853/", tls("192.0.2.1", 8853)),
            ("tls://[2001:db8::1]", tls("2001:db8::1", 853)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_asked_is_refused_with_its_reason() {
        for (text, word) in [
            ("dns.example.org", "neither"),
            ("", "neither"),
            ("192.0.2.1:0", "port"),
            ("0.0.0.0", "no host"),
            ("ff02::fb", "no host"),
            ("255.255.255.255:53", "no host"),
            ("tls://0.0.0.0", "no host"),
            ("http://dns.example.org/dns-query", "https://"),
            ("quic://dns.example.org", "only"),
            ("sdns://AgcAAAAAAAAA", "only"),
            ("https://", "host"),
            ("https://:443/", "host"),
            ("https://a..b/", "host"),
            ("https://1.2.3/", "host"),
            ("https://dns.example.org:/", "port"),
            ("https://dns.example.org:+53/", "port"),
            ("https://dns.example.org:70000/", "port"),
            ("https://[dns.example.org]/", "brackets"),
            ("https://user:word@dns.example.org/", "password"),
            ("https://dns.example.org/#x", "fragment"),
            ("https://dns.example.org/ x", "URL"),
            ("https://dns.example.org/\r\nHost: x", "URL"),
            ("tls://dns.example.org/dns-query", "path"),
            ("tls://1.1.1.1#cloudflare-dns.com", "fragment"),
        ] {
            let why = text.parse::<ResolverAddr>().expect_err(text);
            assert!(why.contains(word), "{text}: {why}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "\\PC{0,40}|(https|tls)://[-a-z0-9.:/?#@\\[\\]{}]{0,30}") {
            let _ = text.parse::<ResolverAddr>();
        }
    }
}
