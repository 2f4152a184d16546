//! From the network map to the resolver's state.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use lacis_dns::{DnsState, Inside, Upstream, is_mesh};
use lacis_wire::control::{DnsConfig, DnsResolver, Node};

use crate::host::Routes;
use crate::netmap::NetMap;

/// What of a map's configuration counts: bounds for lists that a query goes through, far above what networks have.
const MAX_SEARCH_DOMAINS: usize = 64;
const MAX_ROUTES: usize = 4096;
const MAX_RESOLVERS: usize = 16;
const MAX_EXTRA_RECORDS: usize = 16384;
/// Lengths of a name and of its labels (RFC 1035, section 2.3.4), without the trailing dot.
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// Is this a name that can stand in the host's configuration: letters, digits, hyphens and underscores between dots?
/// The underscore is no host's (RFC 1123, section 2.1), but services have it (RFC 8552).
fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= MAX_NAME && name.split('.').all(label)
}

fn without_dot(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

/// A node whose name is none has no name.
pub(crate) fn check_name(node: &mut Node) {
    if !node.name.is_empty() && !is_name(without_dot(&node.name)) {
        tracing::warn!(node = %node.id, name = %node.name, "this is not a name of the DNS, and is ignored");
        node.name.clear();
    }
}

/// A configuration as it came, without what is no name and what is too much. Its names go into files and to programs of
/// the host that take a line break for the beginning of the next setting.
pub(crate) fn checked(mut config: DnsConfig) -> DnsConfig {
    let is_good = |what: &str, name: &str| {
        let good = is_name(without_dot(name));
        if !good {
            tracing::warn!(%name, "the network's {what} is not a name of the DNS, and is ignored");
        }
        good
    };
    config.domains.retain(|name| is_good("search domain", name));
    config.extra_records.retain(|record| is_good("record", &record.name));
    // Everything, which no name stands for, may have resolvers of its own.
    config.routes.retain(|name, _| without_dot(name).is_empty() || is_good("route", name));
    let counts = [
        ("search domains", config.domains.len(), MAX_SEARCH_DOMAINS),
        ("records", config.extra_records.len(), MAX_EXTRA_RECORDS),
        ("routes", config.routes.len(), MAX_ROUTES),
    ];
    for (what, count, most) in counts.into_iter().filter(|(_, count, most)| count > most) {
        tracing::warn!(count, most, "the network has too many {what}: the first are used");
    }
    config.domains.truncate(MAX_SEARCH_DOMAINS);
    config.extra_records.truncate(MAX_EXTRA_RECORDS);
    config.routes = std::mem::take(&mut config.routes).into_iter().take(MAX_ROUTES).collect();
    for resolvers in config.routes.values_mut().chain([&mut config.resolvers, &mut config.fallback_resolvers])
    {
        resolvers.truncate(MAX_RESOLVERS);
    }
    config
}

/// The zones of 100.64.0.0/10 and fd7a:115c:a1e0::/48.
fn reverse_zones() -> impl Iterator<Item = String> {
    let v4 = (64..128).map(|octet| format!("{octet}.100.in-addr.arpa"));
    v4.chain(std::iter::once("0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa".to_owned()))
}

/// What of the host and its user counts for names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Surroundings<'a> {
    /// The resolvers that the host had before us.
    pub(crate) base: &'a [SocketAddr],
    pub(crate) routes: &'a Routes,
    /// Everything is sent through an exit node.
    pub(crate) exit: bool,
    /// The host name of the control server.
    pub(crate) control: &'a str,
}

/// Does an address mean something else in each network?
fn is_nearby(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

/// Which resolvers are reached through the mesh.
///
/// One at an address that only means something nearby, and that the host itself has named, is not by an exit node: there
/// is nobody at that address where that node is.
fn inside(around: &Surroundings<'_>) -> Inside {
    Inside {
        // The rest is the same however many nodes come and go.
        device: around.routes.device.iter().filter(|net| !is_mesh(net.addr())).copied().collect(),
        thrown: around.routes.thrown.clone(),
        nearby: around.base.iter().map(SocketAddr::ip).filter(is_nearby).collect(),
    }
}

/// What MagicDNS answers, with the resolvers that the host had before us for the rest.
pub(crate) fn state(map: &NetMap, around: &Surroundings<'_>) -> DnsState {
    let config = &map.dns;
    let upstreams = |resolvers: &[DnsResolver]| -> Vec<Upstream> {
        resolvers.iter().map(|to| Upstream::new(&to.addr, &to.bootstrap_resolution)).collect()
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
        // Questions for names of the mesh's addresses must not be passed on to the world, whatever the server lists.
        authoritative.extend(reverse_zones());
    }
    authoritative.sort();
    authoritative.dedup();
    let mut resolvers = upstreams(&config.resolvers);
    let fallback = upstreams(&config.fallback_resolvers);
    if resolvers.is_empty() && around.exit {
        // The host's own are nobody's business where the exit node is.
        resolvers.clone_from(&fallback);
    }
    let base: Vec<_> = around.base.iter().copied().map(Upstream::from).collect();
    let relays = map.derp_map.regions.values().flat_map(|region| &region.nodes);
    let mut outside: Vec<String> = relays.map(|node| name(&node.host_name)).collect();
    outside.push(name(around.control));
    DnsState {
        inside: inside(around),
        outside,
        hosts: if config.proxied { hosts } else { HashMap::new() },
        authoritative,
        extra_records: config
            .extra_records
            .iter()
            .filter_map(|record| Some((name(&record.name), record.value.parse().ok()?)))
            .collect(),
        routes,
        resolvers,
        fallback,
        base,
        search: config.domains.iter().map(|domain| name(domain)).collect(),
        has_ipv4: map.addresses().any(|ip| ip.is_ipv4()),
        has_ipv6: map.addresses().any(|ip| ip.is_ipv6()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netmap::Session;
    use lacis_wire::control::{DnsRecord, MapResponse};
    use time::OffsetDateTime;

    fn state_of(config: DnsConfig) -> DnsState {
        let around = Surroundings { base: &[], routes: &Routes::default(), exit: false, control: "" };
        state_in(config, &around)
    }

    fn state_in(config: DnsConfig, around: &Surroundings<'_>) -> DnsState {
        let node = Node { name: "alice.lab.example.".into(), ..Node::default() };
        let frame = MapResponse { node: Some(node), dns_config: Some(config), ..MapResponse::default() };
        let mut session = Session::default();
        session.apply(frame, OffsetDateTime::now_utc()).unwrap();
        state(session.map().unwrap(), around)
    }

    #[test]
    fn resolvers_are_asked_the_way_their_routes_lead_and_names_of_the_mesh_outside() {
        let at = |addr: &str| DnsResolver { addr: addr.into(), ..DnsResolver::default() };
        let config = || DnsConfig {
            routes: [("corp.example".into(), vec![at("10.1.0.53")])].into(),
            fallback_resolvers: vec![at("203.0.113.53")],
            ..DnsConfig::default()
        };
        let base: [SocketAddr; 2] = ["192.168.1.1:53".parse().unwrap(), "198.51.100.53:53".parse().unwrap()];
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
        let subnets = Routes { device: nets(&["10.1.0.0/16", "100.64.0.2/32"]), ..Routes::default() };
        let around = Surroundings { base: &base, routes: &subnets, exit: false, control: "Mesh.example.org" };
        let plain = state_in(config(), &around);
        let resolvers = ["10.1.0.53", "203.0.113.53", "192.168.1.1", "198.51.100.53"];
        let inside = |state: &DnsState| resolvers.map(|ip| state.inside.contains(ip.parse().unwrap()));
        assert_eq!(inside(&plain), [true, false, false, false]);
        assert_eq!(plain.outside, ["mesh.example.org"]);
        assert!(plain.resolvers.is_empty());

        let everything = Routes {
            device: nets(&["0.0.0.0/0", "10.1.0.0/16"]),
            thrown: nets(&["203.0.113.0/24"]),
            guard: true,
        };
        let exit = state_in(config(), &Surroundings { routes: &everything, exit: true, ..around });
        let expected = [true, false, false, true];
        assert_eq!(inside(&exit), expected, "neither a LAN's own resolver nor one past the table");
        assert_eq!(exit.resolvers, exit.fallback);
    }

    #[test]
    fn what_is_no_name_does_not_reach_the_hosts_configuration() {
        let record =
            |name: &str| DnsRecord { name: name.into(), value: "192.0.2.1".into(), ..DnsRecord::default() };
        let resolver = || vec![DnsResolver { addr: "192.0.2.1".into(), ..DnsResolver::default() }];
        let bad = [
            "x\nnameserver 6.6.6.6",
            "x nameserver",
            "a..b",
            ".",
            "-a.example",
            "x.example\0",
            "\u{202e}x",
            "é.example",
            &"a".repeat(64),
            &["a"; 130].join("."),
        ];
        let good = ["corp.example", "Corp2.example.", "_srv.a-b.example"];
        let mut config = DnsConfig { proxied: true, ..DnsConfig::default() };
        for name in bad.iter().chain(&good) {
            config.domains.push((*name).into());
            config.extra_records.push(record(name));
            config.routes.insert((*name).into(), resolver());
        }
        let state = state_of(config);
        assert_eq!(state.search, ["corp.example", "corp2.example", "_srv.a-b.example"]);
        let records: Vec<_> = state.extra_records.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(records, ["corp.example", "corp2.example", "_srv.a-b.example"]);
        let routes: std::collections::HashSet<_> =
            state.routes.iter().map(|(name, _)| name.as_str()).collect();
        // "." is the root.
        assert_eq!(routes, ["", "corp.example", "corp2.example", "_srv.a-b.example"].into());
        let os = lacis_dns::os_config(&state).unwrap();
        let all = os.search.iter().chain(&os.match_domains);
        assert!(all.clone().all(|name| name.is_empty() || is_name(name)), "{:?}", all.collect::<Vec<_>>());

        let mut node = Node { name: "x\nsearch evil.example.".into(), ..Node::default() };
        check_name(&mut node);
        assert_eq!(node.name, "");
    }

    #[test]
    fn lists_of_a_map_are_bounded() {
        let many = |count: usize| (0..count).map(|n| format!("n{n}.example"));
        let resolvers = vec![DnsResolver { addr: "192.0.2.1".into(), ..DnsResolver::default() }; 1000];
        let record = |name| DnsRecord { name, value: "192.0.2.1".into(), ..DnsRecord::default() };
        let config = DnsConfig {
            domains: many(1000).collect(),
            extra_records: many(20_000).map(record).collect(),
            routes: many(5000)
                .map(|name| (name, Vec::new()))
                .chain([("n1.example".into(), resolvers.clone())])
                .collect(),
            resolvers: resolvers.clone(),
            fallback_resolvers: resolvers,
            ..DnsConfig::default()
        };
        let config = checked(config);
        assert_eq!(
            (config.domains.len(), config.extra_records.len()),
            (MAX_SEARCH_DOMAINS, MAX_EXTRA_RECORDS)
        );
        assert_eq!((config.routes.len(), config.routes["n1.example"].len()), (MAX_ROUTES, MAX_RESOLVERS));
        assert_eq!((config.resolvers.len(), config.fallback_resolvers.len()), (MAX_RESOLVERS, MAX_RESOLVERS));
    }

    #[test]
    fn reverse_zones_of_the_mesh_are_ours_whether_the_server_lists_them_or_not() {
        let config = DnsConfig {
            proxied: true,
            routes: [("64.100.in-addr.arpa.".into(), vec![])].into(),
            ..DnsConfig::default()
        };
        let zones = state_of(config.clone()).authoritative;
        let count = |zone: &str| zones.iter().filter(|known| *known == zone).count();
        for zone in ["lab.example", "64.100.in-addr.arpa", "67.100.in-addr.arpa", "127.100.in-addr.arpa"] {
            assert_eq!(count(zone), 1, "{zone}");
        }
        assert_eq!(count("0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa"), 1);
        assert_eq!(count("128.100.in-addr.arpa"), 0);
        let off = state_of(DnsConfig { proxied: false, ..config });
        assert_eq!(off.authoritative, ["64.100.in-addr.arpa"]);
    }
}
