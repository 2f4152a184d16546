//! How this host is connected to the internet: which relays are near, whether UDP works, what addresses others see.
//!
//! All relays are measured at once, by STUN from the sockets that WireGuard uses (so the address seen is the one
//! peers need) and by HTTPS, which works where UDP is blocked. [`choose_home`] picks the home region from reports
//! (the NAT dossier, section 13).

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lacis_relay::client::{DialOptions, RelayNode, latency_check};
use lacis_tunnel::Tunnel;
use lacis_wire::control::{DerpMap, DerpNode, NetInfo};
use lacis_wire::local::NetcheckReport;
use lacis_wire::stun::{self, TxId};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// A probe is sent again after these times; the answer to the first may be lost.
const STUN_REPEATS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(200), Duration::from_millis(600)];
/// A whole measurement.
const LIMIT: Duration = Duration::from_secs(3);
/// Once some region has answered, the others have as long again as the first needed, and at least this.
const GRACE: Duration = Duration::from_millis(50);
/// A new home must be better by this much and by a third: moving has a price.
const BETTER_BY: Duration = Duration::from_millis(10);

/// STUN requests that wait for their answers, which come through the tunnel's sockets.
#[derive(Clone, Debug, Default)]
pub(crate) struct StunProbes(Arc<Mutex<HashMap<TxId, oneshot::Sender<Answer>>>>);

/// The address that the server saw, and when its answer came.
type Answer = (SocketAddr, Instant);

impl StunProbes {
    fn expect(&self, id: TxId) -> oneshot::Receiver<Answer> {
        let (tx, rx) = oneshot::channel();
        let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pending.retain(|_, waiting| !waiting.is_closed());
        pending.insert(id, tx);
        rx
    }

    /// A datagram that looks like STUN came in.
    pub(crate) fn answer(&self, datagram: &[u8]) {
        let Ok((id, seen)) = stun::parse_response(datagram) else { return };
        let waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some(waiting) = waiting {
            // Nobody waits any more: late answers are of no use.
            let _ = waiting.send((seen, Instant::now()));
        }
    }
}

/// One answer of one relay.
#[derive(Debug)]
enum Measured {
    Stun { region: u16, seen: SocketAddr, took: Duration },
    Https { region: u16, took: Duration },
}

/// Measures all regions of the map. Returns as soon as `enough` says so, or after [`LIMIT`].
pub(crate) async fn measure(
    map: &DerpMap,
    tunnel: &Tunnel,
    probes: &StunProbes,
    dial: &DialOptions,
    whole: bool,
) -> NetcheckReport {
    let started = Instant::now();
    let (tx, mut rx) = mpsc::channel(64);
    let mut tasks = JoinSet::new();
    let regions: Vec<_> = map.regions.iter().filter(|(_, region)| !region.no_measure_no_home).collect();
    let mut stun_targets = 0;
    for (id, region) in &regions {
        for node in region.nodes.iter().filter(|node| node.stun().is_some()).take(2) {
            for v6 in [false, true] {
                stun_targets += 1;
                tasks.spawn(stun_probe(**id, node.clone(), v6, tunnel.clone(), probes.clone(), tx.clone()));
            }
        }
        if let Some(node) = region.nodes.iter().find(|node| !node.stun_only) {
            let (id, node, dial, tx) = (**id, RelayNode::from(node), dial.clone(), tx.clone());
            tasks.spawn(async move {
                match latency_check(&node, dial).await {
                    Ok(took) => drop(tx.send(Measured::Https { region: id, took }).await),
                    Err(error) => tracing::debug!(region = id, %error, "no answer to the latency check"),
                }
            });
        }
    }
    drop(tx);
    let mut report = NetcheckReport { now: Some(OffsetDateTime::now_utc()), ..NetcheckReport::default() };
    report.os_has_ipv6 = std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    let mut seen: Vec<(u16, SocketAddr)> = Vec::new();
    let mut deadline = started + LIMIT;
    loop {
        tokio::select! {
            measured = rx.recv() => match measured {
                None => break,
                Some(Measured::Stun { region, seen: address, took }) => {
                    report.udp = true;
                    seen.push((region, address));
                    add(&mut report, region, took, Some(address));
                }
                Some(Measured::Https { region, took }) => add_https(&mut report, region, took),
            },
            () = tokio::time::sleep_until(deadline) => break,
        }
        let all_known = report.region_latency.len() == regions.len();
        let udp_known = report.udp || stun_targets == 0;
        if all_known && (udp_known || !whole) {
            // Everything that matters is here; stragglers (the other family) have a moment.
            deadline = deadline.min(Instant::now() + if whole { GRACE * 2 } else { Duration::ZERO });
        } else if !whole && !report.region_latency.is_empty() {
            deadline = deadline.min(Instant::now() + started.elapsed().max(GRACE));
        }
    }
    tasks.abort_all();
    summarise(&mut report, &seen);
    report
}

async fn stun_probe(
    region: u16,
    node: DerpNode,
    v6: bool,
    tunnel: Tunnel,
    probes: StunProbes,
    tx: mpsc::Sender<Measured>,
) {
    let Some(address) = stun_address(&node, v6).await else { return };
    let (port4, port6) = tunnel.udp_port();
    if (if v6 { port6 } else { port4 }) == 0 {
        return;
    }
    let mut waits = JoinSet::new();
    for pause in STUN_REPEATS {
        let (tunnel, probes) = (tunnel.clone(), probes.clone());
        waits.spawn(async move {
            sleep(pause).await;
            let id = TxId::random();
            let answer = probes.expect(id);
            let sent = Instant::now();
            tunnel.send_udp(address, stun::request(id).to_vec());
            let (seen, at) = timeout(LIMIT, answer).await.ok()?.ok()?;
            Some((seen, at - sent))
        });
    }
    while let Some(answer) = waits.join_next().await {
        if let Ok(Some((seen, took))) = answer {
            // The measurement may be over.
            let _ = tx.send(Measured::Stun { region, seen, took }).await;
            return;
        }
    }
}

/// Where a node's STUN server is in one family.
async fn stun_address(node: &DerpNode, v6: bool) -> Option<SocketAddr> {
    let port = node.stun()?;
    let text = if v6 { &node.ipv6 } else { &node.ipv4 };
    let right = |ip: IpAddr| ip.is_ipv6() == v6;
    if !text.is_empty() {
        return text.parse().ok().filter(|ip| right(*ip)).map(|ip| SocketAddr::new(ip, port));
    }
    let mut found = tokio::net::lookup_host((node.host_name.as_str(), port)).await.ok()?;
    found.find(|address| right(address.ip()))
}

fn nanos(took: Duration) -> u64 {
    u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)
}

fn keep_least(latencies: &mut BTreeMap<u16, u64>, region: u16, took: Duration) {
    let latency = latencies.entry(region).or_insert(u64::MAX);
    *latency = (*latency).min(nanos(took));
}

fn add(report: &mut NetcheckReport, region: u16, took: Duration, seen: Option<SocketAddr>) {
    keep_least(&mut report.region_latency, region, took);
    match seen {
        Some(SocketAddr::V4(address)) => {
            keep_least(&mut report.region_v4_latency, region, took);
            report.ipv4 = true;
            report.ipv4_can_send = true;
            if report.global_v4.is_empty() {
                report.global_v4 = address.to_string();
            }
        }
        Some(SocketAddr::V6(address)) => {
            keep_least(&mut report.region_v6_latency, region, took);
            report.ipv6 = true;
            report.ipv6_can_send = true;
            if report.global_v6.is_empty() {
                report.global_v6 = address.to_string();
            }
        }
        None => {}
    }
}

/// HTTPS says how far a region is only where UDP does not.
fn add_https(report: &mut NetcheckReport, region: u16, took: Duration) {
    if !report.region_v4_latency.contains_key(&region) && !report.region_v6_latency.contains_key(&region) {
        keep_least(&mut report.region_latency, region, took);
    }
    report.ipv4_can_send = true;
}

fn summarise(report: &mut NetcheckReport, seen: &[(u16, SocketAddr)]) {
    let v4: Vec<_> = seen.iter().filter(|(_, address)| address.is_ipv4()).collect();
    if let [(first_region, first), rest @ ..] = v4.as_slice() {
        let differs = rest.iter().any(|(_, address)| address != first);
        let several = rest.iter().any(|(region, _)| region != first_region);
        if differs || several {
            report.mapping_varies_by_dest_ip = Some(differs);
        }
    }
}

/// The home region after this report: the nearest, unless the present one is hardly worse. `None` when nothing is
/// known and there is none.
pub(crate) fn choose_home(report: &NetcheckReport, map: &DerpMap, present: u16) -> Option<u16> {
    let score = |region: u16| {
        map.home_params
            .as_ref()
            .and_then(|params| params.region_score.as_ref()?.get(&region).copied())
            .filter(|score| *score > 0.0)
            .unwrap_or(1.0)
    };
    let usable = |region: &u16| {
        map.regions.get(region).is_some_and(|region| !region.avoid && !region.no_measure_no_home)
    };
    let weighed = |region: u16, latency: u64| latency as f64 * score(region);
    let best = report
        .region_latency
        .iter()
        .filter(|(region, _)| usable(region))
        .map(|(region, latency)| (*region, weighed(*region, *latency)))
        .min_by(|a, b| a.1.total_cmp(&b.1));
    let still_there = map.regions.contains_key(&present);
    let Some((best, best_latency)) = best else {
        // Nothing answers: stay, or try the first there is.
        let first = map.regions.iter().find(|(id, region)| usable(id) && !region.nodes.is_empty());
        return if still_there { Some(present) } else { first.map(|(id, _)| *id) };
    };
    if !still_there || best == present {
        return Some(best);
    }
    match report.region_latency.get(&present) {
        Some(latency) => {
            let present_latency = weighed(present, *latency);
            let hardly_better = present_latency - best_latency < BETTER_BY.as_nanos() as f64
                || best_latency > present_latency * 2.0 / 3.0;
            Some(if hardly_better { present } else { best })
        }
        None => Some(best),
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
        preferred_derp: home,
        derp_latency,
        ..NetInfo::default()
    }
}

/// The address others see this host's socket at.
pub(crate) fn reflexive(report: &NetcheckReport) -> Vec<SocketAddr> {
    [&report.global_v4, &report.global_v6].into_iter().filter_map(|text| text.parse().ok()).collect()
}

/// Is this a private address of the mesh itself, which is no way to reach anybody?
pub(crate) fn is_mesh_address(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => u32::from(ip) & 0xffc0_0000 == u32::from(Ipv4Addr::new(100, 64, 0, 0)),
        IpAddr::V6(ip) => ip.segments()[..3] == [0xfd7a, 0x115c, 0xa1e0],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacis_wire::control::DerpRegion;

    fn map(ids: &[u16]) -> DerpMap {
        let region = |id: &u16| {
            (*id, DerpRegion { region_id: *id, nodes: vec![DerpNode::default()], ..DerpRegion::default() })
        };
        DerpMap { regions: ids.iter().map(region).collect(), ..DerpMap::default() }
    }

    fn report(latencies: &[(u16, u64)]) -> NetcheckReport {
        let ms = |(region, ms): &(u16, u64)| (*region, ms * 1_000_000);
        NetcheckReport { region_latency: latencies.iter().map(ms).collect(), ..NetcheckReport::default() }
    }

    #[test]
    fn home_is_the_nearest_region() {
        assert_eq!(choose_home(&report(&[(1, 30), (2, 20)]), &map(&[1, 2]), 0), Some(2));
    }

    #[test]
    fn home_moves_only_for_a_clear_gain() {
        let map = map(&[1, 2]);
        assert_eq!(choose_home(&report(&[(1, 30), (2, 22)]), &map, 1), Some(1));
        assert_eq!(choose_home(&report(&[(1, 90), (2, 70)]), &map, 1), Some(1));
        assert_eq!(choose_home(&report(&[(1, 90), (2, 30)]), &map, 1), Some(2));
        assert_eq!(choose_home(&report(&[(2, 30)]), &map, 1), Some(2), "home does not answer");
    }

    #[test]
    fn without_any_answer_home_stays_or_is_the_first_there_is() {
        assert_eq!(choose_home(&report(&[]), &map(&[1, 2]), 2), Some(2));
        assert_eq!(choose_home(&report(&[]), &map(&[1, 2]), 9), Some(1));
        assert_eq!(choose_home(&report(&[]), &map(&[]), 9), None);
    }

    #[test]
    fn a_mapping_varies_when_two_relays_see_different_ports() {
        let at = |port: u16| SocketAddr::from(([192, 0, 2, 1], port));
        let mut one = NetcheckReport::default();
        summarise(&mut one, &[(1, at(1))]);
        assert_eq!(one.mapping_varies_by_dest_ip, None);
        let mut easy = NetcheckReport::default();
        summarise(&mut easy, &[(1, at(1)), (2, at(1))]);
        assert_eq!(easy.mapping_varies_by_dest_ip, Some(false));
        let mut hard = NetcheckReport::default();
        summarise(&mut hard, &[(1, at(1)), (2, at(2))]);
        assert_eq!(hard.mapping_varies_by_dest_ip, Some(true));
    }
}
