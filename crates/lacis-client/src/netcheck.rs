//! How this host is connected to the internet: which relays are near, whether UDP works, what addresses others see,
//! what kind of router is in between.
//!
//! All relays are measured at once, by STUN ([`stun`]) and by HTTPS, which works where UDP is blocked.
//! [`choose_home`] picks the home region from reports, [`Nat`] tells what they mean for paths to peers (the NAT
//! dossier, section 13).

mod home;
mod portal;
mod stun;

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use lacis_relay::client::{ConnectError, DialOptions, RelayNode, latency_check};
use lacis_tunnel::Tunnel;
use lacis_wire::control::{DerpMap, DerpNode, DerpRegion, NetInfo};
use lacis_wire::disco::traversal::Mapping;
use lacis_wire::local::NetcheckReport;
use lacis_wire::text;
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::marked;
use crate::portmap::Found;
pub(crate) use home::{choose_home, relays};
use stun::Seen;
pub(crate) use stun::StunProbes;

/// A whole measurement.
const LIMIT: Duration = Duration::from_secs(3);
/// Once some region has answered, the others have as long again as the first needed, and at least this.
const GRACE: Duration = Duration::from_millis(50);
/// Relays that are down do not hold up for longer what peers must know.
/// Long enough to find out that TCP to a relay is dropped.
const ENOUGH: Duration = Duration::from_millis(1800);
/// Regions that are measured, the ones with the lowest numbers: more are no network's.
const MAX_REGIONS: usize = 256;
/// Nodes of one region that are asked.
const PER_REGION: usize = 2;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Which region is near: as fast as can be.
    Home,
    /// What peers need to know as well: the addresses others see.
    Usual,
    /// Everything. What takes longer or sends more (hairpin, captive portal, the router's protocols) is found out only
    /// here; [`keep_unmeasured`] carries it over to the reports between.
    Full,
}

/// What a measurement is made with.
pub(crate) struct Means<'a> {
    pub(crate) map: &'a Arc<DerpMap>,
    pub(crate) tunnel: &'a Tunnel,
    pub(crate) probes: &'a StunProbes,
    pub(crate) dial: &'a DialOptions,
    /// The present home region, or 0.
    pub(crate) home: u16,
    /// What [`crate::portmap::PortMap::probe`] gave, for a full report.
    pub(crate) router: Option<oneshot::Receiver<Found>>,
    /// Whoever cannot wait for the report hears of each address as soon as a server has told it.
    pub(crate) early: Option<mpsc::Sender<SocketAddr>>,
}

/// One finding.
#[derive(Debug)]
enum Measured {
    CanSend {
        v6: bool,
    },
    Stun {
        region: u16,
        seen: Seen,
    },
    Https {
        region: u16,
        took: Result<Duration, ConnectError>,
    },
    Hairpin(Option<bool>),
    Portal(Option<bool>),
    /// `None`: there is no router, or nobody may ask it.
    Router(Option<Found>),
}

/// What a measurement gives.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) report: NetcheckReport,
    /// The STUN servers that have answered, the nearest first.
    pub(crate) servers: Vec<SocketAddr>,
    /// Whether the regions' relays answer by HTTPS, and why not; those that took too long are left out.
    pub(crate) https: BTreeMap<u16, Result<(), String>>,
}

/// Measures all regions of the map. Returns as soon as it knows what `depth` says, or after [`LIMIT`].
pub(crate) async fn measure(means: Means<'_>, depth: Depth) -> Findings {
    let Means { map, tunnel, probes, dial, home, router, early } = means;
    let started = Instant::now();
    let (findings, mut inbox) = mpsc::channel(64);
    let mut tasks = JoinSet::new();
    let measured = map.regions.iter().filter(|(_, region)| !region.no_measure_no_home);
    let regions: Vec<_> = measured.take(MAX_REGIONS).collect();
    let (mut asks_stun, mut https_asked) = (false, 0);
    let mut https = BTreeMap::new();
    for (id, region) in &regions {
        for node in region.nodes.iter().filter(|node| node.stun().is_some()).take(PER_REGION) {
            asks_stun = true;
            for v6 in [false, true] {
                let asking = ask_stun(
                    **id,
                    node.clone(),
                    v6,
                    tunnel.clone(),
                    probes.clone(),
                    dial.fwmark,
                    findings.clone(),
                );
                tasks.spawn(asking);
            }
        }
        if let Some(node) = region.nodes.iter().find(|node| !node.stun_only) {
            let (id, node, dial, findings) = (**id, RelayNode::from(node), dial.clone(), findings.clone());
            https_asked += 1;
            tasks.spawn(async move {
                let took = latency_check(&node, dial).await;
                drop(findings.send(Measured::Https { region: id, took }).await);
            });
        }
    }
    // Findings of a full report that are still to come.
    let mut awaited = 0;
    if depth == Depth::Full {
        awaited += 1;
        let (map, dial, out) = (Arc::clone(map), dial.clone(), findings.clone());
        tasks.spawn(async move {
            drop(out.send(Measured::Portal(portal::check(&map, home, &dial).await)).await);
        });
        if let Some(router) = router {
            awaited += 1;
            let out = findings.clone();
            tasks.spawn(async move { drop(out.send(Measured::Router(router.await.ok())).await) });
        }
    }
    // The hairpin waits until an address is known.
    let mut for_hairpin = (depth == Depth::Full).then_some(findings);

    let mut report = NetcheckReport { now: Some(OffsetDateTime::now_utc()), ..NetcheckReport::default() };
    report.proxy = proxy(&regions, dial);
    report.os_has_ipv6 = std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    let mut answers: Vec<Seen> = Vec::new();
    let mut deadline = started + LIMIT;
    loop {
        let measured = tokio::select! {
            measured = inbox.recv() => measured,
            () = sleep_until(deadline) => None,
        };
        match measured {
            None => break,
            Some(Measured::CanSend { v6: false }) => report.ipv4_can_send = true,
            Some(Measured::CanSend { v6: true }) => report.ipv6_can_send = true,
            Some(Measured::Stun { region, seen }) => {
                answers.push(seen);
                add_stun(&mut report, region, &seen);
                if let Some(early) = &early {
                    // One that is not taken is in the report.
                    let _ = early.try_send(seen.address);
                }
                if let (SocketAddr::V4(outside), Some(out)) = (seen.address, &for_hairpin) {
                    awaited += 1;
                    let (fwmark, probes, out) = (dial.fwmark, probes.clone(), out.clone());
                    tasks.spawn(async move {
                        let works = stun::hairpin(outside, fwmark, &probes).await;
                        drop(out.send(Measured::Hairpin(works)).await);
                    });
                    for_hairpin = None;
                }
            }
            Some(Measured::Https { region, took }) => {
                https.insert(region, answered(&took));
                match took {
                    Ok(took) => add_https(&mut report, region, took),
                    Err(error) => tracing::debug!(region, %error, "no answer to the latency check"),
                }
            }
            Some(Measured::Hairpin(works)) => {
                awaited -= 1;
                report.hair_pinning = works;
            }
            Some(Measured::Portal(found)) => {
                awaited -= 1;
                report.captive_portal = found;
            }
            Some(Measured::Router(found)) => {
                awaited -= 1;
                report.upnp = found.map(|found| found.upnp);
                report.pmp = found.map(|found| found.pmp);
                report.pcp = found.map(|found| found.pcp);
            }
        }
        let all = report.region_latency.len() == regions.len();
        let https_known = https.len() == https_asked;
        let udp_known = report.udp || !asks_stun;
        let elapsed = started.elapsed();
        let patience = match depth {
            Depth::Home if all => Some(Duration::ZERO),
            Depth::Home if !report.region_latency.is_empty() => Some(elapsed.max(GRACE)),
            // Everything that matters is here; stragglers (the other family) have a moment.
            Depth::Usual | Depth::Full if all && https_known && udp_known && awaited == 0 => Some(GRACE * 2),
            Depth::Usual if report.udp => Some(ENOUGH.saturating_sub(elapsed)),
            _ => None,
        };
        deadline = patience.map_or(deadline, |patience| deadline.min(Instant::now() + patience));
    }
    tasks.abort_all();
    report.mapping_varies_by_dest_ip = varies(&answers);
    answers.sort_by_key(|seen| seen.took);
    let mut servers: Vec<_> = answers.iter().map(|seen| seen.server).collect();
    // One server may have been asked in both families, and more than once.
    let mut told = HashSet::new();
    servers.retain(|server| told.insert(*server));
    Findings { report, servers, https }
}

/// Does the region's relay answer? One that has no latency check is there all the same.
fn answered(took: &Result<Duration, ConnectError>) -> Result<(), String> {
    match took {
        Ok(_) | Err(ConnectError::NotRelay { .. }) => Ok(()),
        Err(error) => Err(text::plain(&lacis_serve::log::chain(error)).into_owned()),
    }
}

/// The proxy that leads to the relays, or to some of them.
fn proxy(regions: &[(&u16, &DerpRegion)], dial: &DialOptions) -> String {
    let mut nodes = regions.iter().flat_map(|(_, region)| &region.nodes).filter(|node| !node.stun_only);
    let proxy = nodes.find_map(|node| dial.proxies.to(true, &node.host_name, node.port()));
    proxy.map(ToString::to_string).unwrap_or_default()
}

/// All addresses of a node's STUN server in one family, at once.
async fn ask_stun(
    region: u16,
    node: DerpNode,
    v6: bool,
    tunnel: Tunnel,
    probes: StunProbes,
    fwmark: Option<u32>,
    findings: mpsc::Sender<Measured>,
) {
    let mut asks = JoinSet::new();
    for server in stun::addresses(&node, v6).await {
        if !marked::has_way(server, fwmark) {
            continue;
        }
        // The measurement may be over, here and below.
        let _ = findings.send(Measured::CanSend { v6 }).await;
        let (tunnel, probes, findings) = (tunnel.clone(), probes.clone(), findings.clone());
        asks.spawn(async move {
            if let Some(seen) = stun::probe(server, &tunnel, &probes).await {
                let _ = findings.send(Measured::Stun { region, seen }).await;
            }
        });
    }
    asks.join_all().await;
}

fn nanos(took: Duration) -> u64 {
    u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)
}

fn keep_least(latencies: &mut BTreeMap<u16, u64>, region: u16, took: Duration) {
    let latency = latencies.entry(region).or_insert(u64::MAX);
    *latency = (*latency).min(nanos(took));
}

fn add_stun(report: &mut NetcheckReport, region: u16, seen: &Seen) {
    report.udp = true;
    // HTTPS says how far a region is only where UDP does not.
    if !report.region_v4_latency.contains_key(&region) && !report.region_v6_latency.contains_key(&region) {
        report.region_latency.remove(&region);
    }
    keep_least(&mut report.region_latency, region, seen.took);
    let (latencies, works, global, counters) = if seen.address.is_ipv4() {
        report.ipv4_can_send = true;
        let NetcheckReport { region_v4_latency, ipv4, global_v4, global_v4_counters, .. } = report;
        (region_v4_latency, ipv4, global_v4, global_v4_counters)
    } else {
        report.ipv6_can_send = true;
        let NetcheckReport { region_v6_latency, ipv6, global_v6, global_v6_counters, .. } = report;
        (region_v6_latency, ipv6, global_v6, global_v6_counters)
    };
    keep_least(latencies, region, seen.took);
    *works = true;
    if global.is_empty() {
        *global = seen.address.to_string();
    }
    *counters.entry(seen.address).or_insert(0) += 1;
}

fn add_https(report: &mut NetcheckReport, region: u16, took: Duration) {
    if !report.region_v4_latency.contains_key(&region) && !report.region_v6_latency.contains_key(&region) {
        keep_least(&mut report.region_latency, region, took);
    }
    // Which family it was is known only if there is but one.
    match (report.ipv4_can_send, report.ipv6_can_send) {
        (true, false) => report.ipv4 = true,
        (false, true) => report.ipv6 = true,
        _ => {}
    }
}

/// Does the IPv4 address that others see depend on whom one sends to? Unknown while only one server has answered: that
/// it sees two addresses one after the other says nothing, and that two ports of one host see the same says little.
fn varies(answers: &[Seen]) -> Option<bool> {
    let v4: Vec<_> = answers.iter().filter(|seen| seen.address.is_ipv4()).collect();
    let mut same = None;
    for (at, one) in v4.iter().enumerate() {
        for other in &v4[at + 1..] {
            if one.server != other.server && one.address != other.address {
                return Some(true);
            }
            if one.server.ip() != other.server.ip() {
                same = Some(false);
            }
        }
    }
    same
}

/// Carries what only full reports find out from the last report over to a lesser one.
pub(crate) fn keep_unmeasured(report: &mut NetcheckReport, last: &NetcheckReport) {
    for (new, old) in [
        (&mut report.hair_pinning, last.hair_pinning),
        (&mut report.upnp, last.upnp),
        (&mut report.pmp, last.pmp),
        (&mut report.pcp, last.pcp),
        (&mut report.captive_portal, last.captive_portal),
    ] {
        *new = new.or(old);
    }
}

/// What is between this host and the internet, as far as paths to peers are concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Nat {
    /// Others see the very address that this host has.
    pub(crate) public_v4: bool,
    pub(crate) public_v6: bool,
    /// Of IPv4, as far as servers have shown it.
    pub(crate) mapping: Mapping,
}

impl Nat {
    /// From a report and this host's own addresses.
    pub(crate) fn new(report: &NetcheckReport, own: &[IpAddr]) -> Self {
        let is_own =
            |seen: &str| seen.parse().is_ok_and(|seen: SocketAddr| own.contains(&seen.ip().to_canonical()));
        let public_v4 = is_own(&report.global_v4);
        let mapping = match report.mapping_varies_by_dest_ip {
            Some(true) => Mapping::Varies,
            Some(false) => Mapping::Independent,
            None if public_v4 => Mapping::Independent,
            None => Mapping::Unknown,
        };
        Self { public_v4, public_v6: is_own(&report.global_v6), mapping }
    }
}

/// What the control server is told of it.
pub(crate) fn net_info(report: &NetcheckReport, home: u16) -> NetInfo {
    let seconds = |nanos: u64| Duration::from_nanos(nanos).as_secs_f64();
    let named = |latencies: &BTreeMap<u16, u64>, family: &'static str| -> Vec<(String, f64)> {
        latencies.iter().map(|(region, latency)| (format!("{region}-{family}"), seconds(*latency))).collect()
    };
    let mut derp_latency: BTreeMap<_, _> = named(&report.region_latency, "v4").into_iter().collect();
    derp_latency.extend(named(&report.region_v4_latency, "v4"));
    derp_latency.extend(named(&report.region_v6_latency, "v6"));
    NetInfo {
        mapping_varies_by_dest_ip: report.mapping_varies_by_dest_ip,
        working_ipv6: Some(report.ipv6),
        os_has_ipv6: Some(report.os_has_ipv6),
        working_udp: Some(report.udp),
        working_icmpv4: None,
        upnp: report.upnp,
        pmp: report.pmp,
        pcp: report.pcp,
        preferred_derp: home,
        derp_latency,
        ..NetInfo::default()
    }
}

/// The addresses others see this host's sockets at: the first of each family, and whatever several servers agree on.
pub(crate) fn reflexive(report: &NetcheckReport) -> Vec<SocketAddr> {
    let first = [&report.global_v4, &report.global_v6].into_iter().filter_map(|text| text.parse().ok());
    let counted = report.global_v4_counters.iter().chain(&report.global_v6_counters);
    let agreed = counted.filter(|(_, times)| **times > 1).map(|(address, _)| *address);
    let mut all: Vec<SocketAddr> = Vec::new();
    for address in first.chain(agreed) {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// The IPv4 address others see, with the port that is configured here (0: none is). Where the mapping varies, somebody
/// who chose a port may have told the router to forward it.
pub(crate) fn forwarded(report: &NetcheckReport, configured_port: u16) -> Option<SocketAddr> {
    if report.mapping_varies_by_dest_ip != Some(true) || configured_port == 0 {
        return None;
    }
    let seen: SocketAddr = report.global_v4.parse().ok()?;
    Some(SocketAddr::new(seen.ip(), configured_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn seen(server: &str, address: &str) -> Seen {
        Seen { server: at(server), address: at(address), took: Duration::from_millis(20) }
    }

    #[test]
    fn a_mapping_varies_when_two_servers_see_different_addresses() {
        let one = seen("198.51.100.1:3478", "192.0.2.1:1");
        assert_eq!(varies(&[]), None);
        assert_eq!(varies(&[one]), None);
        assert_eq!(varies(&[one, seen("198.51.100.1:3478", "192.0.2.1:2")]), None, "it changed meanwhile");
        assert_eq!(varies(&[one, seen("198.51.100.1:3479", "192.0.2.1:1")]), None, "the same host");
        assert_eq!(varies(&[one, seen("198.51.100.1:3479", "192.0.2.1:2")]), Some(true));
        assert_eq!(varies(&[one, seen("198.51.100.2:3478", "192.0.2.1:1")]), Some(false));
        assert_eq!(varies(&[one, seen("198.51.100.2:3478", "192.0.2.1:2")]), Some(true));
        assert_eq!(varies(&[one, seen("[2001:db8::1]:3478", "[2001:db8::7]:1")]), None, "the other family");
    }

    #[test]
    fn https_counts_only_where_udp_does_not_answer() {
        let mut report = NetcheckReport { ipv4_can_send: true, ..NetcheckReport::default() };
        add_https(&mut report, 1, Duration::from_millis(5));
        assert_eq!(report.region_latency[&1], 5_000_000);
        assert!(report.ipv4 && !report.udp);
        add_stun(&mut report, 1, &seen("198.51.100.1:3478", "192.0.2.1:1"));
        add_https(&mut report, 1, Duration::from_millis(1));
        assert_eq!(report.region_latency[&1], 20_000_000);
        assert!(report.udp);
    }

    #[test]
    fn addresses_that_servers_agree_on_are_endpoints() {
        let mut report = NetcheckReport::default();
        add_stun(&mut report, 1, &seen("198.51.100.1:3478", "192.0.2.1:1"));
        add_stun(&mut report, 2, &seen("198.51.100.2:3478", "192.0.2.1:2"));
        add_stun(&mut report, 2, &seen("[2001:db8::2]:3478", "[2001:db8::7]:1"));
        assert_eq!(reflexive(&report), [at("192.0.2.1:1"), at("[2001:db8::7]:1")]);
        add_stun(&mut report, 3, &seen("198.51.100.3:3478", "192.0.2.1:2"));
        assert_eq!(reflexive(&report), [at("192.0.2.1:1"), at("[2001:db8::7]:1"), at("192.0.2.1:2")]);
    }

    #[test]
    fn a_configured_port_may_be_forwarded_where_the_mapping_varies() {
        let mut report = NetcheckReport { global_v4: "192.0.2.1:1".into(), ..NetcheckReport::default() };
        assert_eq!(forwarded(&report, 41641), None);
        report.mapping_varies_by_dest_ip = Some(true);
        assert_eq!(forwarded(&report, 41641), Some(at("192.0.2.1:41641")));
        assert_eq!(forwarded(&report, 0), None);
    }

    #[test]
    fn a_relay_without_a_latency_check_is_there_and_one_without_tcp_is_not() {
        let host = "relay.example".to_owned();
        assert!(answered(&Ok(Duration::ZERO)).is_ok());
        assert!(answered(&Err(ConnectError::NotRelay { host: host.clone(), answer: "404".into() })).is_ok());
        let dropped = ConnectError::Tcp {
            host,
            address: at("192.0.2.1:443"),
            source: std::io::ErrorKind::TimedOut.into(),
        };
        assert_eq!(
            answered(&Err(dropped)),
            Err("cannot connect to relay.example at 192.0.2.1:443: timed out".to_owned())
        );
    }

    #[test]
    fn the_kind_of_router_follows_from_the_report() {
        let own: [IpAddr; 2] = ["192.0.2.1".parse().unwrap(), "2001:db8::7".parse().unwrap()];
        let mut report = NetcheckReport {
            global_v4: "192.0.2.1:1".into(),
            global_v6: "[2001:db8::7]:1".into(),
            ..NetcheckReport::default()
        };
        let open = Nat { public_v4: true, public_v6: true, mapping: Mapping::Independent };
        assert_eq!(Nat::new(&report, &own), open);
        report.global_v4 = "198.51.100.1:1".into();
        report.global_v6.clear();
        assert_eq!(Nat::new(&report, &own), Nat::default());
        report.mapping_varies_by_dest_ip = Some(true);
        assert_eq!(Nat::new(&report, &own).mapping, Mapping::Varies);
    }

    #[test]
    fn a_lesser_report_forgets_nothing() {
        let full = NetcheckReport { pcp: Some(true), hair_pinning: Some(false), ..NetcheckReport::default() };
        let mut usual = NetcheckReport { hair_pinning: Some(true), ..NetcheckReport::default() };
        keep_unmeasured(&mut usual, &full);
        assert_eq!((usual.pcp, usual.hair_pinning, usual.upnp), (Some(true), Some(true), None));
    }
}
