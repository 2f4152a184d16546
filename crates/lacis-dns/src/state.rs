//! What the resolver knows: names, zones and upstreams, made from the network map and never changed.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use crate::quad100::{QUAD100_V4, QUAD100_V6};

const DNS_PORT: u16 = 53;
/// Resolvers that one question goes to, each with a socket or two of its own. The C library knows three.
const MAX_UPSTREAMS: usize = 4;
/// Addresses in one answer: none is longer than a message of DNS can be.
const MAX_ADDRESSES: usize = 1000;

/// Plain configuration. All names are lower case and without a trailing dot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsState {
    /// Full names of nodes.
    pub hosts: HashMap<String, Vec<IpAddr>>,
    /// Zones in which a name that is not known does not exist, unless a route that is as long or longer has it.
    pub authoritative: Vec<String>,
    /// Names beside those of nodes.
    pub extra_records: Vec<(String, IpAddr)>,
    /// Suffixes with resolvers of their own. The longest that matches counts.
    pub routes: Vec<(String, Vec<Upstream>)>,
    /// For everything else, in place of the host's own.
    pub resolvers: Vec<Upstream>,
    /// For everything else, if the host has none of its own.
    pub fallback: Vec<Upstream>,
    /// What the host had before us.
    pub base: Vec<Upstream>,
    /// Resolvers to which the mesh's routes lead: of networks behind a router, or all while an exit node is used.
    /// Those with addresses of the mesh need not be named.
    pub inside: HashSet<IpAddr>,
    /// Names that the mesh itself hangs on: while it is being built up, only resolvers outside can be asked for them.
    pub outside: Vec<String>,
    /// Search domains, the tailnet's own first.
    pub search: Vec<String>,
    /// The families this node has in the mesh.
    pub has_ipv4: bool,
    pub has_ipv6: bool,
}

/// A resolver to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upstream {
    Plain(SocketAddr),
    /// A URL (DNS over HTTPS) or something else that is not spoken.
    Unsupported(String),
}

impl Upstream {
    /// From the network map: an address, an address and port, or something that is not supported.
    pub fn parse(text: &str) -> Self {
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Self::Plain(SocketAddr::new(ip, DNS_PORT));
        }
        text.parse().map_or_else(|_| Self::Unsupported(text.to_owned()), Self::Plain)
    }

    pub(crate) fn address(&self) -> Option<SocketAddr> {
        match self {
            // Asking ourselves would go round in circles.
            Self::Plain(address) if is_quad100(address.ip()) => None,
            Self::Plain(address) => Some(*address),
            Self::Unsupported(_) => None,
        }
    }
}

impl From<SocketAddr> for Upstream {
    fn from(address: SocketAddr) -> Self {
        Self::Plain(address)
    }
}

pub(crate) fn is_quad100(ip: IpAddr) -> bool {
    ip == IpAddr::V4(QUAD100_V4) || ip == IpAddr::V6(QUAD100_V6)
}

/// Is this an address of a mesh, IPv4 or IPv6?
pub(crate) fn is_mesh(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.octets()[0] == 100 && v4.octets()[1] & 0xc0 == 64,
        IpAddr::V6(v6) => v6.segments()[..3] == [0xfd7a, 0x115c, 0xa1e0],
    }
}

/// Is `name` the zone itself or below it?
pub(crate) fn in_zone(name: &str, zone: &str) -> bool {
    name.strip_suffix(zone).is_some_and(|rest| rest.is_empty() || rest.ends_with('.') || zone.is_empty())
}

impl DnsState {
    /// The addresses of a name in the mesh.
    pub(crate) fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        let extra: Vec<_> = self
            .extra_records
            .iter()
            .filter(|(known, _)| known == name)
            .map(|(_, ip)| *ip)
            .take(MAX_ADDRESSES)
            .collect();
        if extra.is_empty() { self.hosts.get(name).cloned() } else { Some(extra) }
    }

    /// Is a resolver asked for this name through the mesh, and not past it?
    pub(crate) fn asks_inside(&self, name: &str, resolver: IpAddr) -> bool {
        is_mesh(resolver)
            || self.inside.contains(&resolver) && !self.outside.iter().any(|known| known == name)
    }

    pub(crate) fn name_of(&self, ip: IpAddr) -> Option<&str> {
        self.hosts.iter().find(|(_, ips)| ips.contains(&ip)).map(|(name, _)| name.as_str())
    }

    /// The zone in which a name is answered here. A route that is at least as long is for resolvers of its own.
    pub(crate) fn zone_of(&self, name: &str) -> Option<&str> {
        let zones = self.authoritative.iter().filter(|zone| in_zone(name, zone));
        let zone = zones.max_by_key(|zone| zone.len())?;
        let given_away = self.route_of(name).is_some_and(|(suffix, _)| suffix.len() >= zone.len());
        (!given_away).then_some(zone)
    }

    fn route_of(&self, name: &str) -> Option<&(String, Vec<Upstream>)> {
        self.routes.iter().filter(|(suffix, _)| in_zone(name, suffix)).max_by_key(|(suffix, _)| suffix.len())
    }

    /// The resolvers for a name that is not ours: [`MAX_UPSTREAMS`] at most.
    pub(crate) fn upstreams(&self, name: &str) -> Vec<SocketAddr> {
        let addresses = |some: &[Upstream]| -> Vec<_> {
            some.iter().filter_map(Upstream::address).take(MAX_UPSTREAMS).collect()
        };
        if let Some((_, own)) = self.route_of(name) {
            // A suffix that has resolvers of its own is never asked elsewhere.
            return addresses(own);
        }
        if !self.resolvers.is_empty() {
            // Nor is anything where the network's resolvers replace the host's, even if none of them can be used.
            return addresses(&self.resolvers);
        }
        let choices = [&self.base, &self.fallback].map(|some| addresses(some));
        choices.into_iter().find(|some| !some.is_empty()).unwrap_or_default()
    }
}

/// What the host's own resolver is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OsDns {
    /// Servers to ask.
    pub servers: Vec<IpAddr>,
    pub search: Vec<String>,
    /// Only names below these go to `servers`; empty: all names do. Hosts that cannot tell names apart send all,
    /// and what is not of the mesh is passed on from here.
    pub match_domains: Vec<String>,
}

/// Decides it. `None`: the host's resolver is left alone.
pub fn os_config(state: &DnsState) -> Option<OsDns> {
    let serves_names = !state.authoritative.is_empty() || !state.extra_records.is_empty();
    let plain = state.resolvers.iter().map(|upstream| upstream.address().filter(|to| to.port() == DNS_PORT));
    let plain: Option<Vec<IpAddr>> = plain.map(|to| to.map(|to| to.ip())).collect();
    let search = state.search.clone();
    if !serves_names && state.routes.is_empty() {
        return match plain {
            // Only resolvers: the host asks them itself.
            Some(servers) if !servers.is_empty() => {
                Some(OsDns { servers, search, match_domains: Vec::new() })
            }
            _ if state.resolvers.is_empty() && search.is_empty() => None,
            _ if state.resolvers.is_empty() => Some(OsDns { search, ..OsDns::default() }),
            _ => Some(OsDns { servers: quad100(state), search, match_domains: Vec::new() }),
        };
    }
    let mut match_domains = Vec::new();
    if state.resolvers.is_empty() {
        match_domains.extend(state.authoritative.iter().cloned());
        match_domains.extend(state.routes.iter().map(|(suffix, _)| suffix.clone()));
        let outside = |name: &&String| !state.authoritative.iter().any(|zone| in_zone(name, zone));
        match_domains.extend(state.extra_records.iter().map(|(name, _)| name).filter(outside).cloned());
        match_domains.sort();
        match_domains.dedup();
    }
    Some(OsDns { servers: quad100(state), search, match_domains })
}

fn quad100(state: &DnsState) -> Vec<IpAddr> {
    let v4 = state.has_ipv4.then_some(IpAddr::V4(QUAD100_V4));
    let v6 = state.has_ipv6.then_some(IpAddr::V6(QUAD100_V6));
    v4.into_iter().chain(v6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> Upstream {
        Upstream::parse(text)
    }

    #[test]
    fn zones_end_at_labels() {
        assert!(in_zone("a.lab.example", "lab.example"));
        assert!(in_zone("lab.example", "lab.example"));
        assert!(!in_zone("collab.example", "lab.example"));
        assert!(in_zone("anything", ""));
    }

    #[test]
    fn the_longest_route_wins_and_is_never_left_for_others() {
        let state = DnsState {
            routes: vec![
                ("example".into(), vec![plain("192.0.2.1")]),
                ("corp.example".into(), vec![plain("192.0.2.2")]),
                ("doh.example".into(), vec![plain("https://dns.example")]),
            ],
            resolvers: vec![plain("192.0.2.53:5353")],
            base: vec![plain("192.0.2.9")],
            ..DnsState::default()
        };
        assert_eq!(state.upstreams("a.corp.example"), ["192.0.2.2:53".parse().unwrap()]);
        assert_eq!(state.upstreams("x.example"), ["192.0.2.1:53".parse().unwrap()]);
        assert_eq!(state.upstreams("a.doh.example"), []);
        assert_eq!(state.upstreams("org"), ["192.0.2.53:5353".parse().unwrap()]);
    }

    #[test]
    fn resolvers_that_cannot_be_used_are_not_replaced_by_the_hosts_own() {
        let state = DnsState {
            resolvers: vec![plain("gopher://dns.example"), plain("100.100.100.100")],
            base: vec![plain("192.0.2.9")],
            fallback: vec![plain("192.0.2.8")],
            ..DnsState::default()
        };
        assert_eq!(state.upstreams("www.example"), []);
    }

    #[test]
    fn one_question_goes_to_few_resolvers_and_one_name_has_few_addresses() {
        let many: Vec<_> = (0..100).map(|n| plain(&format!("192.0.2.{n}"))).collect();
        let records =
            (0..100_u32).flat_map(|_| (0..200_u8).map(|n| ("x".to_owned(), IpAddr::from([192, 0, 2, n]))));
        let routes = vec![("corp".to_owned(), many.clone())];
        let state =
            DnsState { routes, resolvers: many, extra_records: records.collect(), ..DnsState::default() };
        for name in ["www.example", "a.corp"] {
            assert_eq!(state.upstreams(name).len(), MAX_UPSTREAMS, "{name}");
        }
        assert_eq!(state.addresses("x").unwrap().len(), MAX_ADDRESSES);
    }

    #[test]
    fn the_hosts_own_resolvers_are_asked_where_the_map_has_none_and_never_ourselves() {
        let state = DnsState {
            base: vec![plain("100.100.100.100"), plain("192.0.2.9")],
            fallback: vec![plain("192.0.2.8")],
            ..DnsState::default()
        };
        assert_eq!(state.upstreams("org"), ["192.0.2.9:53".parse().unwrap()]);
        let state = DnsState { base: vec![plain("100.100.100.100")], ..state };
        assert_eq!(state.upstreams("org"), ["192.0.2.8:53".parse().unwrap()]);
    }

    #[test]
    fn the_host_is_told_as_little_as_does_the_work() {
        assert_eq!(os_config(&DnsState::default()), None);
        let resolvers =
            DnsState { resolvers: vec![plain("192.0.2.1")], has_ipv4: true, ..DnsState::default() };
        assert_eq!(os_config(&resolvers).unwrap().servers, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        let names = DnsState {
            authoritative: vec!["lab.example".into()],
            search: vec!["lab.example".into()],
            extra_records: vec![
                ("a.lab.example".into(), [192, 0, 2, 1].into()),
                ("b.test".into(), [192, 0, 2, 1].into()),
            ],
            has_ipv4: true,
            ..DnsState::default()
        };
        let told = os_config(&names).unwrap();
        assert_eq!(told.servers, [IpAddr::V4(QUAD100_V4)]);
        assert_eq!(told.match_domains, ["b.test", "lab.example"]);
        let all = DnsState { resolvers: vec![plain("192.0.2.1")], ..names };
        assert!(os_config(&all).unwrap().match_domains.is_empty());
    }
}
