//! Captive portals: whether somebody else answers plain HTTP in a relay's place, as hotels and trains do before one
//! has agreed to their terms (the NAT dossier, section 8).

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use lacis_relay::client::DialOptions;
use lacis_wire::control::DerpMap;
use lacis_wire::io::Proxies;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::marked;

/// Relays that are asked.
const MOST: usize = 5;
const LIMIT: Duration = Duration::from_secs(3);
const CHALLENGE: &str = "x-tailscale-challenge";
const ANSWER: &str = "x-tailscale-response";

/// Relays that can tell, those of the home region first: with plain HTTP, and an address that no resolver has to give.
/// Those that a proxy leads to are not asked: who answers in their place on the direct way is of no consequence.
fn relays(map: &DerpMap, home: u16, proxies: &Proxies) -> Vec<Ipv4Addr> {
    let usable = map.regions.values().filter(|region| !region.avoid && !region.no_measure_no_home);
    let mut regions: Vec<_> = usable.collect();
    regions.sort_by_key(|region| region.region_id != home);
    let nodes = regions.iter().flat_map(|region| &region.nodes).filter(|node| node.can_port80);
    let nodes = nodes.filter(|node| proxies.to(true, &node.host_name, node.port()).is_none());
    nodes.filter_map(|node| node.ipv4.parse().ok()).take(MOST).collect()
}

fn challenge(relay: Ipv4Addr) -> String {
    format!("ts_{relay}")
}

/// Does this answer come from somebody else than the relay?
fn is_strange<T>(answer: &Response<T>, relay: Ipv4Addr) -> bool {
    let expected = format!("response {}", challenge(relay));
    let told = answer.headers().get(ANSWER).and_then(|value| value.to_str().ok());
    answer.status() != StatusCode::NO_CONTENT || told != Some(expected.as_str())
}

async fn ask(relay: Ipv4Addr, fwmark: Option<u32>) -> Option<bool> {
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let request = Request::get(format!("/generate_204?t={now}"))
        .header(HOST, relay.to_string())
        .header(CHALLENGE, challenge(relay))
        .body(Full::new(Bytes::new()));
    let answer =
        timeout(LIMIT, marked::http(SocketAddrV4::new(relay, 80).into(), fwmark, request.ok()?)).await;
    match answer {
        Ok(Ok(answer)) => Some(is_strange(&answer, relay)),
        // No answer proves nothing.
        Ok(Err(error)) => {
            tracing::debug!(%relay, %error, "the relay's plain HTTP does not answer");
            None
        }
        Err(_) => None,
    }
}

/// Is this host behind a captive portal? `None` where no relay can tell.
pub(super) async fn check(map: &DerpMap, home: u16, dial: &DialOptions) -> Option<bool> {
    let fwmark = dial.fwmark;
    let mut asks: JoinSet<_> =
        relays(map, home, &dial.proxies).into_iter().map(|relay| ask(relay, fwmark)).collect();
    let mut found = None;
    while let Some(answer) = asks.join_next().await {
        match answer {
            Ok(Some(true)) => return Some(true),
            Ok(Some(false)) => found = Some(false),
            Ok(None) | Err(_) => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacis_wire::control::{DerpNode, DerpRegion};

    const RELAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

    #[test]
    fn relays_that_can_tell_are_asked_those_at_home_first() {
        let node = |ipv4: &str, can_port80| DerpNode { ipv4: ipv4.into(), can_port80, ..DerpNode::default() };
        let region =
            |id: u16, nodes: Vec<DerpNode>| DerpRegion { region_id: id, nodes, ..DerpRegion::default() };
        let mut map = DerpMap::default();
        map.regions.insert(1, region(1, vec![node("192.0.2.1", true), node("192.0.2.2", false)]));
        map.regions.insert(2, region(2, vec![node("", true), node("192.0.2.3", true)]));
        map.regions.insert(3, DerpRegion { avoid: true, ..region(3, vec![node("192.0.2.4", true)]) });
        let direct = Proxies::default();
        assert_eq!(relays(&map, 2, &direct), [Ipv4Addr::new(192, 0, 2, 3), RELAY]);
        assert_eq!(relays(&map, 0, &direct), [RELAY, Ipv4Addr::new(192, 0, 2, 3)]);
        let value = |name: &str| (name == "HTTPS_PROXY").then(|| "proxy.example:3128".to_owned());
        assert_eq!(relays(&map, 2, &Proxies::from_env(value).unwrap()), [Ipv4Addr::UNSPECIFIED; 0]);
    }

    #[test]
    fn only_the_relay_knows_the_answer() {
        let answer = |status: u16, told: Option<&str>| {
            let mut answer = Response::builder().status(status);
            if let Some(told) = told {
                answer = answer.header(ANSWER, told);
            }
            answer.body(()).unwrap()
        };
        assert!(!is_strange(&answer(204, Some("response ts_192.0.2.1")), RELAY));
        assert!(is_strange(&answer(204, None), RELAY));
        assert!(is_strange(&answer(204, Some("response ts_192.0.2.2")), RELAY));
        assert!(is_strange(&answer(302, None), RELAY));
        assert!(is_strange(&answer(200, Some("response ts_192.0.2.1")), RELAY));
    }
}
