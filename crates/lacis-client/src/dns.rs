//! From the network map to the resolver's state.

use std::collections::HashMap;
use std::net::SocketAddr;

use lacis_dns::{DnsState, Upstream};
use lacis_wire::control::DnsResolver;

use crate::netmap::NetMap;

/// The zones of 100.64.0.0/10 and fd7a:115c:a1e0::/48.
fn reverse_zones() -> impl Iterator<Item = String> {
    let v4 = (64..128).map(|octet| format!("{octet}.100.in-addr.arpa"));
    v4.chain(std::iter::once("0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa".to_owned()))
}

/// What MagicDNS answers, with the resolvers that the host had before us for the rest.
pub(crate) fn state(map: &NetMap, base: &[SocketAddr]) -> DnsState {
    let config = &map.dns;
    let upstreams = |resolvers: &[DnsResolver]| -> Vec<Upstream> {
        resolvers.iter().map(|resolver| Upstream::parse(&resolver.addr)).collect()
    };
    let name = |text: &str| text.trim_end_matches('.').to_ascii_lowercase();
    let suffix = if config.proxied { map.magic_dns_suffix().to_owned() } else { String::new() };
    let nodes = std::iter::once(&map.node).chain(map.peers.values());
    let hosts: HashMap<_, _> = nodes
        .filter(|node| !node.name.is_empty())
        .map(|node| (name(&node.name), node.addresses.iter().map(|net| net.addr()).collect()))
        .collect();
    let (local, routes): (Vec<_>, Vec<_>) =
        config.routes.iter().partition(|(_, resolvers)| resolvers.is_empty());
    let routes: Vec<_> = routes.into_iter().map(|(suffix, to)| (name(suffix), upstreams(to))).collect();
    let mut authoritative: Vec<String> = local.into_iter().map(|(suffix, _)| name(suffix)).collect();
    if !suffix.is_empty() {
        authoritative.push(suffix);
    }
    if config.proxied {
        // Who asks for names of the mesh's addresses must not be passed on to the world, whatever the server lists.
        // A zone is not ours where it gives resolvers for it or for a part of it.
        let given_away = |zone: &String| {
            let mut above = routes.iter().filter_map(|(suffix, _)| suffix.strip_suffix(zone.as_str()));
            above.any(|above| above.is_empty() || above.ends_with('.'))
        };
        authoritative.extend(reverse_zones().filter(|zone| !given_away(zone)));
    }
    authoritative.sort();
    authoritative.dedup();
    DnsState {
        hosts: if config.proxied { hosts } else { HashMap::new() },
        authoritative,
        extra_records: config
            .extra_records
            .iter()
            .filter_map(|record| Some((name(&record.name), record.value.parse().ok()?)))
            .collect(),
        routes,
        resolvers: upstreams(&config.resolvers),
        fallback: upstreams(&config.fallback_resolvers),
        base: base.iter().copied().map(Upstream::from).collect(),
        search: config.domains.iter().map(|domain| name(domain)).collect(),
        has_ipv4: map.addresses().any(|ip| ip.is_ipv4()),
        has_ipv6: map.addresses().any(|ip| ip.is_ipv6()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netmap::Session;
    use lacis_wire::control::{DnsConfig, MapResponse, Node};
    use time::OffsetDateTime;

    fn state_of(config: DnsConfig) -> DnsState {
        let node = Node { name: "alice.lab.example.".into(), ..Node::default() };
        let frame = MapResponse { node: Some(node), dns_config: Some(config), ..MapResponse::default() };
        let mut session = Session::default();
        session.apply(frame, OffsetDateTime::now_utc()).unwrap();
        state(session.map().unwrap(), &[])
    }

    #[test]
    fn reverse_zones_of_the_mesh_are_ours_unless_the_server_gives_them_away() {
        let resolver = || vec![DnsResolver { addr: "192.0.2.1".into(), ..DnsResolver::default() }];
        let routes = [
            ("64.100.in-addr.arpa.".into(), vec![]),
            ("65.100.in-addr.arpa.".into(), resolver()),
            ("7.66.100.in-addr.arpa.".into(), resolver()),
            ("167.100.in-addr.arpa.".into(), resolver()),
        ];
        let config = DnsConfig { proxied: true, routes: routes.into(), ..DnsConfig::default() };
        let zones = state_of(config.clone()).authoritative;
        let count = |zone: &str| zones.iter().filter(|known| *known == zone).count();
        for zone in ["lab.example", "64.100.in-addr.arpa", "67.100.in-addr.arpa", "127.100.in-addr.arpa"] {
            assert_eq!(count(zone), 1, "{zone}");
        }
        assert_eq!(count("0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa"), 1);
        for zone in ["65.100.in-addr.arpa", "66.100.in-addr.arpa", "128.100.in-addr.arpa"] {
            assert_eq!(count(zone), 0, "{zone}");
        }
        let off = state_of(DnsConfig { proxied: false, ..config });
        assert_eq!(off.authoritative, ["64.100.in-addr.arpa"]);
    }
}
