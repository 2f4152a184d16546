//! STUN from the sockets that WireGuard uses, so that the address seen is the one peers need.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lacis_tunnel::{Tunnel, Way};
use lacis_wire::control::DerpNode;
use lacis_wire::stun::{self, TxId};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::LIMIT;
use crate::marked;

/// A probe is sent again after these times; the answer to the first may be lost.
const REPEATS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(200), Duration::from_millis(600)];
/// Addresses of one server and family that are asked. Two tell whether the mapping depends on the destination.
const PER_NODE: usize = 2;
/// A datagram that the router turns round is back within this time.
const HAIRPIN: Duration = Duration::from_millis(400);

/// STUN messages that are waited for and come through the tunnel's sockets.
#[derive(Clone, Debug, Default)]
pub(crate) struct StunProbes(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    answers: HashMap<TxId, oneshot::Sender<Answer>>,
    /// Requests of our own that should come back to us.
    hairpins: HashMap<TxId, oneshot::Sender<()>>,
}

/// The address that the server saw, and when its answer came.
type Answer = (SocketAddr, Instant);

impl StunProbes {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect(&self, id: TxId) -> oneshot::Receiver<Answer> {
        let (tx, rx) = oneshot::channel();
        let mut waiting = self.waiting();
        waiting.answers.retain(|_, waiting| !waiting.is_closed());
        waiting.answers.insert(id, tx);
        rx
    }

    fn expect_hairpin(&self, id: TxId) -> oneshot::Receiver<()> {
        let (tx, rx) = oneshot::channel();
        let mut waiting = self.waiting();
        waiting.hairpins.retain(|_, waiting| !waiting.is_closed());
        waiting.hairpins.insert(id, tx);
        rx
    }

    /// A datagram that looks like STUN came in. Late ones are of no use, and others' are nobody's business here.
    pub(crate) fn answer(&self, datagram: &[u8]) {
        if let Ok((id, seen)) = stun::parse_response(datagram) {
            if let Some(waiting) = self.waiting().answers.remove(&id) {
                let _ = waiting.send((seen, Instant::now()));
            }
        } else if let Ok(id) = stun::parse_request(datagram)
            && let Some(waiting) = self.waiting().hairpins.remove(&id)
        {
            let _ = waiting.send(());
        }
    }
}

/// One answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Who was asked.
    pub(super) server: SocketAddr,
    /// Our own address as the server sees it.
    pub(super) address: SocketAddr,
    pub(super) took: Duration,
}

/// Asks one server; the first answer counts. None if the tunnel has no socket for it.
pub(super) async fn probe(server: SocketAddr, tunnel: &Tunnel, probes: &StunProbes) -> Option<Seen> {
    let (port4, port6) = tunnel.udp_port();
    if (if server.is_ipv4() { port4 } else { port6 }) == 0 {
        return None;
    }
    let mut tries = JoinSet::new();
    for pause in REPEATS {
        let (tunnel, probes) = (tunnel.clone(), probes.clone());
        tries.spawn(async move {
            sleep(pause).await;
            let id = TxId::random();
            let answer = probes.expect(id);
            let sent = Instant::now();
            tunnel.send_udp(Way::main(server), stun::request(id).to_vec(), None);
            let (address, at) = timeout(LIMIT, answer).await.ok()?.ok()?;
            Some(Seen { server, address, took: at - sent })
        });
    }
    while let Some(answer) = tries.join_next().await {
        if let Ok(Some(seen)) = answer {
            return Some(seen);
        }
    }
    None
}

/// Does the router turn round what one socket of this host sends to the address that another has outside? `None` if
/// there is no router that could, because that address is this host's own.
pub(super) async fn hairpin(outside: SocketAddrV4, fwmark: Option<u32>, probes: &StunProbes) -> Option<bool> {
    if marked::is_own(IpAddr::V4(*outside.ip())) {
        return None;
    }
    let socket = marked::udp(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0).into(), fwmark).ok()?;
    let id = TxId::random();
    let mut back = probes.expect_hairpin(id);
    for _ in 0..2 {
        socket.send_to(&stun::request(id), outside).await.ok()?;
        if timeout(HAIRPIN / 2, &mut back).await.is_ok() {
            return Some(true);
        }
    }
    Some(false)
}

/// Where a node's STUN server is in one family.
pub(super) async fn addresses(node: &DerpNode, v6: bool) -> Vec<SocketAddr> {
    let Some(port) = node.stun() else { return Vec::new() };
    let text = if v6 { &node.ipv6 } else { &node.ipv4 };
    let right = |ip: IpAddr| ip.is_ipv6() == v6;
    if !text.is_empty() {
        let ip = text.parse().ok().filter(|ip| right(*ip));
        return ip.map(|ip| SocketAddr::new(ip, port)).into_iter().collect();
    }
    match tokio::net::lookup_host((node.host_name.as_str(), port)).await {
        Ok(found) => found.filter(|address| right(address.ip())).take(PER_NODE).collect(),
        Err(error) => {
            tracing::debug!(host = %node.host_name, %error, "a STUN server is not found");
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: TxId = TxId([3; 12]);

    #[tokio::test]
    async fn an_answer_reaches_who_waits_for_it() {
        let probes = StunProbes::default();
        let seen = SocketAddr::from(([192, 0, 2, 1], 7));
        let waiting = probes.expect(ID);
        // A request with the same id is no answer.
        probes.answer(&stun::request(ID));
        probes.answer(stun::Response::new(TxId([4; 12]), seen).as_bytes());
        probes.answer(stun::Response::new(ID, seen).as_bytes());
        assert_eq!(waiting.await.unwrap().0, seen);
    }

    #[tokio::test]
    async fn a_request_of_our_own_that_comes_back_is_noticed() {
        let probes = StunProbes::default();
        let mut waiting = probes.expect_hairpin(ID);
        probes.answer(stun::Response::new(ID, SocketAddr::from(([192, 0, 2, 1], 7))).as_bytes());
        probes.answer(&stun::request(TxId([4; 12])));
        assert!(waiting.try_recv().is_err());
        probes.answer(&stun::request(ID));
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn an_address_of_this_host_has_no_router_before_it() {
        let outside = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9);
        assert_eq!(hairpin(outside, None, &StunProbes::default()).await, None);
    }

    #[tokio::test]
    async fn literal_addresses_need_no_resolver() {
        let node = DerpNode { ipv4: "192.0.2.1".into(), ipv6: "none".into(), ..DerpNode::default() };
        assert_eq!(addresses(&node, false).await, ["192.0.2.1:3478".parse().unwrap()]);
        assert_eq!(addresses(&node, true).await, []);
    }
}
