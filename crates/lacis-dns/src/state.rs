//! What the resolver knows: names, zones and upstreams, made from the network map and never changed.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use lacis_wire::control::ResolverAddr;
use lacis_wire::text;

use crate::known;
use crate::quad100::{QUAD100_V4, QUAD100_V6};

const DNS_PORT: u16 = 53;
/// Resolvers that one question goes to, each with a socket or two of its own. The C library knows three.
const MAX_UPSTREAMS: usize = 4;
/// Addresses that a URL's host is tried at.
const MAX_BOOTSTRAP: usize = 8;
/// How much of what a network map says is repeated in a problem.
const MAX_QUOTE: usize = 100;
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
    /// What the mesh's routes lead to: networks behind a router, or everything while an exit node is used.
    /// Addresses of the mesh itself need not be named.
    pub inside: Inside,
    /// Names that the mesh itself hangs on: while it is being built up, only resolvers outside can be asked for them.
    pub outside: Vec<String>,
    /// Search domains, the tailnet's own first.
    pub search: Vec<String>,
    /// The families this node has in the mesh.
    pub has_ipv4: bool,
    pub has_ipv6: bool,
}

/// Which addresses are reached through the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// Networks that are routed into the mesh.
    pub device: Vec<IpNet>,
    /// Networks that are not, though a wider one is.
    pub thrown: Vec<IpNet>,
    /// Addresses of this host's own surroundings, which mean something else where an exit node is.
    pub nearby: Vec<IpAddr>,
}

impl Inside {
    pub fn contains(&self, ip: IpAddr) -> bool {
        let longest =
            |nets: &[IpNet]| nets.iter().filter(|net| net.contains(&ip)).map(|net| net.prefix_len()).max();
        let Some(device) = longest(&self.device) else { return false };
        let by_exit_node = device == 0;
        longest(&self.thrown).is_none_or(|thrown| thrown < device)
            && !(by_exit_node && self.nearby.contains(&ip))
    }
}

/// A resolver to ask.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Upstream {
    Plain(SocketAddr),
    /// Over HTTPS or TLS.
    Secure(Arc<SecureUpstream>),
    /// Something that cannot be asked, and why.
    Unusable {
        text: String,
        why: &'static str,
    },
}

/// A resolver that is asked over HTTPS or TLS.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SecureUpstream {
    /// As the network map has it.
    pub(crate) url: String,
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Of DNS over HTTPS; DNS over TLS has none.
    pub(crate) path: Option<String>,
    /// Where the host is; empty where its name must be resolved first.
    pub(crate) addresses: Vec<IpAddr>,
}

impl Upstream {
    /// From the network map: an address or a URL, and addresses of the URL's host where they are given.
    pub fn new(text: &str, bootstrap: &[IpAddr]) -> Self {
        let (host, port, path) = match text.parse() {
            Ok(ResolverAddr::Plain(address)) => return Self::Plain(address),
            Ok(ResolverAddr::Https { host, port, path }) => (host, port, Some(path)),
            Ok(ResolverAddr::Tls { host, port }) => (host, port, None),
            Err(why) => return Self::Unusable { text: text.to_owned(), why },
        };
        let addresses = match host.parse() {
            Ok(ip) => vec![ip],
            Err(_) if bootstrap.is_empty() => known::addresses(&host, path.as_deref().unwrap_or_default()),
            Err(_) => bootstrap.iter().take(MAX_BOOTSTRAP).copied().collect(),
        };
        Self::Secure(Arc::new(SecureUpstream { url: text.to_owned(), host, port, path, addresses }))
    }

    /// Why it is not asked, if that is so.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        let ips = match self {
            Self::Plain(address) => &[address.ip()],
            Self::Secure(secure) => secure.addresses.as_slice(),
            Self::Unusable { why, .. } => return Some(why),
        };
        ips.iter().any(|ip| is_quad100(*ip)).then_some("this host would ask itself")
    }

    /// The address of plain DNS that can be asked.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Plain(address) if self.problem().is_none() => Some(*address),
            _ => None,
        }
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(address) if address.port() == DNS_PORT => address.ip().fmt(f),
            Self::Plain(address) => address.fmt(f),
            Self::Secure(secure) => f.write_str(&secure.url),
            Self::Unusable { text, .. } => {
                let text: String = text.chars().take(MAX_QUOTE).collect();
                f.write_str(&text::plain(&text))
            }
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
pub fn is_mesh(ip: IpAddr) -> bool {
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
        is_mesh(resolver) || self.inside.contains(resolver) && !self.is_outside(name)
    }

    /// Is this a name that the mesh itself hangs on?
    pub(crate) fn is_outside(&self, name: &str) -> bool {
        self.outside.iter().any(|known| known == name)
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
    pub(crate) fn upstreams(&self, name: &str) -> Vec<Upstream> {
        let usable = |some: &[Upstream]| -> Vec<_> {
            let usable = some.iter().filter(|upstream| upstream.problem().is_none());
            usable.take(MAX_UPSTREAMS).cloned().collect()
        };
        if let Some((_, own)) = self.route_of(name) {
            // A suffix that has resolvers of its own is never asked elsewhere.
            return usable(own);
        }
        if !self.resolvers.is_empty() {
            // Nor is anything where the network's resolvers replace the host's, even if none of them can be used.
            return usable(&self.resolvers);
        }
        let choices = [&self.base, &self.fallback].map(|some| usable(some));
        choices.into_iter().find(|some| !some.is_empty()).unwrap_or_default()
    }

    /// The resolvers for the host of a resolver's URL: the host's own, or else others with an address.
    pub(crate) fn bootstrap(&self) -> Vec<Upstream> {
        let plain = |some: &[Upstream]| -> Vec<_> {
            some.iter().filter_map(Upstream::address).take(MAX_UPSTREAMS).map(Upstream::Plain).collect()
        };
        let choices = [&self.base, &self.resolvers, &self.fallback].map(|some| plain(some));
        choices.into_iter().find(|some| !some.is_empty()).unwrap_or_default()
    }

    /// The resolvers that the network names.
    fn given(&self) -> impl Iterator<Item = &Upstream> {
        self.routes.iter().flat_map(|(_, to)| to).chain(&self.resolvers).chain(&self.fallback)
    }

    /// Is this resolver one of those that may be asked?
    pub(crate) fn has(&self, upstream: &Upstream) -> bool {
        self.given().chain(&self.base).any(|known| known == upstream)
    }

    /// Resolvers of the network that cannot be asked, and why.
    pub(crate) fn problems(&self) -> BTreeSet<String> {
        let problem = |upstream: &Upstream| {
            let why = upstream.problem()?;
            Some(format!("the network's resolver {upstream} cannot be used: {why}"))
        };
        self.given().filter_map(problem).collect()
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
        Upstream::new(text, &[])
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
                ("doh.example".into(), vec![plain("gopher://dns.example")]),
            ],
            resolvers: vec![plain("192.0.2.53:5353")],
            base: vec![plain("192.0.2.9")],
            ..DnsState::default()
        };
        assert_eq!(state.upstreams("a.corp.example"), [plain("192.0.2.2")]);
        assert_eq!(state.upstreams("x.example"), [plain("192.0.2.1")]);
        assert_eq!(state.upstreams("a.doh.example"), []);
        assert_eq!(state.upstreams("org"), [plain("192.0.2.53:5353")]);
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
        let problems = state.problems();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(
            problems.iter().any(|line| line.contains("gopher://dns.example cannot be used: only https://"))
        );
        assert!(problems.iter().any(|line| line.contains("100.100.100.100 cannot be used: this host would")));
        assert!(DnsState { resolvers: Vec::new(), ..state }.problems().is_empty());
    }

    #[test]
    fn a_url_s_host_is_at_its_own_the_given_or_a_known_address_and_else_asked_of_others() {
        let addresses = |upstream: Upstream| match upstream {
            Upstream::Secure(secure) => secure.addresses.clone(),
            other => panic!("{other}"),
        };
        let given: [IpAddr; 1] = ["192.0.2.7".parse().unwrap()];
        let at = |url: &str, given: &[IpAddr]| addresses(Upstream::new(url, given));
        assert_eq!(at("https://[2001:db8::1]/x", &given), ["2001:db8::1".parse::<IpAddr>().unwrap()]);
        assert_eq!(at("https://dns.google/dns-query", &given), given);
        assert!(at("tls://dns.google", &[]).contains(&"8.8.8.8".parse().unwrap()));
        assert!(at("tls://dns.example", &[]).is_empty());
        assert!(Upstream::new("https://[fd7a:115c:a1e0::53]/", &[]).problem().is_some());
        let state = DnsState {
            resolvers: vec![plain("https://dns.example/"), plain("192.0.2.1")],
            base: vec![plain("100.100.100.100")],
            ..DnsState::default()
        };
        assert_eq!(state.bootstrap(), [plain("192.0.2.1")]);
        let state = DnsState { base: vec![plain("192.0.2.9")], ..state };
        assert_eq!(state.bootstrap(), [plain("192.0.2.9")]);
    }

    #[test]
    fn the_longest_route_decides_which_addresses_are_inside() {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let inside = Inside {
            device: nets(&["0.0.0.0/0", "10.1.0.0/16"]),
            thrown: nets(&["10.0.0.0/8", "203.0.113.0/24"]),
            nearby: vec!["192.168.1.1".parse().unwrap(), "10.1.0.53".parse().unwrap()],
        };
        for (ip, expected) in [
            ("10.1.0.53", true),
            ("10.2.0.53", false),
            ("192.168.1.1", false),
            ("192.168.1.2", true),
            ("203.0.113.9", false),
            ("2001:db8::1", false),
        ] {
            assert_eq!(inside.contains(ip.parse().unwrap()), expected, "{ip}");
        }
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
        assert_eq!(state.upstreams("org"), [plain("192.0.2.9")]);
        let state = DnsState { base: vec![plain("100.100.100.100")], ..state };
        assert_eq!(state.upstreams("org"), [plain("192.0.2.8")]);
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
