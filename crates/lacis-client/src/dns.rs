//! From the network map to the resolver's state.

use std::collections::HashMap;
use std::net::SocketAddr;

use lacis_dns::{DnsState, Upstream};
use lacis_wire::control::DnsResolver;

use crate::netmap::NetMap;

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
    let mut authoritative: Vec<String> = local.into_iter().map(|(suffix, _)| name(suffix)).collect();
    if !suffix.is_empty() {
        authoritative.push(suffix.clone());
    }
    DnsState {
        domain: suffix,
        hosts: if config.proxied { hosts } else { HashMap::new() },
        authoritative,
        extra_records: config
            .extra_records
            .iter()
            .filter_map(|record| Some((name(&record.name), record.value.parse().ok()?)))
            .collect(),
        routes: routes.into_iter().map(|(suffix, to)| (name(suffix), upstreams(to))).collect(),
        resolvers: upstreams(&config.resolvers),
        fallback: upstreams(&config.fallback_resolvers),
        base: base.iter().copied().map(Upstream::from).collect(),
        search: config.domains.iter().map(|domain| name(domain)).collect(),
        has_ipv4: map.addresses().any(|ip| ip.is_ipv4()),
        has_ipv6: map.addresses().any(|ip| ip.is_ipv6()),
    }
}
