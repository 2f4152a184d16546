//! The addresses of this host at which others may find it: candidates for its endpoints.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use futures_util::TryStreamExt as _;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use tokio_util::task::AbortOnDropHandle;

use crate::netcheck::is_mesh_address;

/// Control servers cut long lists; ours stays far below.
const MOST: usize = 32;
/// Privacy extensions give an interface many addresses of one subnet.
const PER_V6_SUBNET: usize = 2;

/// Addresses of all interfaces, as far as they can be endpoints: not those of the mesh, not link-local, loopback
/// only if there is nothing else. None where netlink does not tell.
pub(crate) async fn addresses() -> Option<Vec<IpAddr>> {
    let connection = match rtnetlink::new_connection() {
        Ok((connection, handle, _)) => Ok((AbortOnDropHandle::new(tokio::spawn(connection)), handle)),
        Err(error) => Err(error.to_string()),
    };
    let messages = match connection {
        Ok((_task, handle)) => {
            let read = handle.address().get().execute().try_collect::<Vec<_>>().await;
            read.map_err(|error| error.to_string())
        }
        Err(error) => Err(error),
    };
    match messages {
        Ok(messages) => Some(usable(messages.iter().filter_map(address).collect())),
        Err(error) => {
            tracing::warn!(%error, "this host's addresses cannot be read");
            None
        }
    }
}

fn address(message: &AddressMessage) -> Option<IpAddr> {
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    find(|attribute| if let AddressAttribute::Local(ip) = attribute { Some(*ip) } else { None }).or_else(
        || find(|attribute| if let AddressAttribute::Address(ip) = attribute { Some(*ip) } else { None }),
    )
}

fn usable(all: Vec<IpAddr>) -> Vec<IpAddr> {
    let is_unique_local = |ip: &Ipv6Addr| ip.segments()[0] & 0xfe00 == 0xfc00;
    let is_v6_link_local = |ip: &Ipv6Addr| ip.segments()[0] & 0xffc0 == 0xfe80;
    let mut ordinary = Vec::new();
    let mut poor = Vec::new();
    let mut loopback = Vec::new();
    for ip in all {
        match ip {
            _ if is_mesh_address(ip) || ip.is_unspecified() || ip.is_multicast() => {}
            _ if ip.is_loopback() => loopback.push(ip),
            IpAddr::V4(v4) if v4.is_link_local() => poor.push(ip),
            IpAddr::V6(v6) if is_v6_link_local(&v6) => {}
            IpAddr::V6(v6) if is_unique_local(&v6) => poor.push(ip),
            IpAddr::V6(v6) => {
                let subnet = |other: &IpAddr| matches!(other, IpAddr::V6(o) if o.segments()[..4] == v6.segments()[..4]);
                if ordinary.iter().filter(|other| subnet(other)).count() < PER_V6_SUBNET {
                    ordinary.push(ip);
                }
            }
            IpAddr::V4(_) => ordinary.push(ip),
        }
    }
    let mut chosen = [ordinary, poor, loopback].into_iter().find(|some| !some.is_empty()).unwrap_or_default();
    chosen.truncate(MOST);
    chosen
}

/// The endpoints of this node and where each comes from: what relays saw of it first, then its own addresses.
pub(crate) fn endpoints(
    seen: &[SocketAddr],
    own: &[IpAddr],
    (port4, port6): (u16, u16),
) -> (Vec<SocketAddr>, Vec<u8>) {
    use lacis_wire::control::endpoint_type::{LOCAL, STUN};
    let local = own.iter().filter_map(|ip| {
        let port = if ip.is_ipv4() { port4 } else { port6 };
        (port != 0).then_some((SocketAddr::new(*ip, port), LOCAL))
    });
    let mut all: Vec<(SocketAddr, u8)> = Vec::new();
    for (address, kind) in seen.iter().map(|address| (*address, STUN)).chain(local) {
        if all.iter().all(|(known, _)| *known != address) {
            all.push((address, kind));
        }
    }
    all.into_iter().unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_meshes_own_and_link_local_addresses_are_no_endpoints() {
        let all = ips(&["127.0.0.1", "100.64.0.7", "192.168.1.2", "fe80::1", "fd7a:115c:a1e0::7", "fd00::1"]);
        assert_eq!(usable(all), ips(&["192.168.1.2"]));
    }

    #[test]
    fn poor_addresses_count_only_if_there_are_no_better_ones() {
        assert_eq!(usable(ips(&["127.0.0.1", "169.254.3.4"])), ips(&["169.254.3.4"]));
        assert_eq!(usable(ips(&["127.0.0.1", "::1"])), ips(&["127.0.0.1", "::1"]));
    }

    #[test]
    fn two_addresses_of_an_ipv6_subnet_are_enough() {
        let all = ips(&["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:1::1"]);
        assert_eq!(usable(all), ips(&["2001:db8::1", "2001:db8::2", "2001:db8:1::1"]));
    }

    #[test]
    fn an_endpoint_is_told_once() {
        let seen = ["192.0.2.1:41641".parse().unwrap()];
        let (all, kinds) = endpoints(&seen, &ips(&["192.0.2.1", "2001:db8::1"]), (41641, 0));
        assert_eq!(all, seen);
        assert_eq!(kinds, [2]);
    }
}
