//! Who is really asking, when trusted proxies stand in front.

use std::net::{IpAddr, SocketAddr};

use http::HeaderMap;
use ipnet::IpNet;

/// Whether an address is a proxy's whose word is taken.
pub fn is_trusted(address: IpAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|net| net.contains(&address))
}

/// The address of the client: the connection's own, or what trusted proxies say of it.
///
/// `X-Forwarded-For` is read from its end, where the nearest proxy wrote: the first address there that
/// is no trusted proxy is the client. What stands before it is the client's own claim.
pub fn client_address(peer: SocketAddr, headers: &HeaderMap, trusted: &[IpNet]) -> SocketAddr {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    if !is_trusted(peer.ip(), trusted) {
        return peer;
    }
    let mut client = peer;
    for value in headers.get_all("x-forwarded-for").iter().rev() {
        let Ok(text) = value.to_str() else { return client };
        for item in text.rsplit(',') {
            let Some(ip) = address(item.trim()) else { return client };
            client = SocketAddr::new(ip, 0);
            if !is_trusted(ip, trusted) {
                return client;
            }
        }
    }
    client
}

/// An address with or without a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = || text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
    let with_port = || text.parse::<SocketAddr>().ok().map(|address| address.ip());
    with_port().or_else(bare).map(|ip| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str, forwarded: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append("x-forwarded-for", value.parse().unwrap());
        }
        let trusted = ["127.0.0.1/32".parse().unwrap(), "10.0.0.0/8".parse().unwrap()];
        client_address(peer.parse().unwrap(), &headers, &trusted).ip().to_string()
    }

    #[test]
    fn a_stranger_cannot_claim_another_address() {
        assert_eq!(client("192.0.2.1:5", &["203.0.113.9"]), "192.0.2.1");
        assert_eq!(client("127.0.0.1:5", &["1.1.1.1, 203.0.113.9"]), "203.0.113.9");
    }

    #[test]
    fn a_chain_of_trusted_proxies_is_followed_to_the_client() {
        assert_eq!(client("127.0.0.1:5", &["203.0.113.9, 10.1.2.3"]), "203.0.113.9");
        assert_eq!(client("127.0.0.1:5", &["203.0.113.9", "10.1.2.3"]), "203.0.113.9");
        assert_eq!(client("[::ffff:127.0.0.1]:5", &["[2001:db8::1]:77"]), "2001:db8::1");
    }

    #[test]
    fn without_a_usable_header_it_is_the_nearest_known_hop() {
        assert_eq!(client("127.0.0.1:5", &[]), "127.0.0.1");
        assert_eq!(client("127.0.0.1:5", &["unknown"]), "127.0.0.1");
        assert_eq!(client("127.0.0.1:5", &["unknown, 10.0.0.9"]), "10.0.0.9");
    }
}
