//! What a hostile peer, or somebody who forges source addresses, can and cannot make a node do.

mod common;

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use common::{Alice, BOB, at, bob, local, pings};
use lacis_path::{Input, Local, Output, Path, Paths, Peer, Via, Way};
use lacis_wire::disco::traversal::{Allocator, Mapping, NatReport, ProbeFrom, Traversal};
use lacis_wire::disco::{Message, TxId};
use lacis_wire::key::NodeKey;

/// An address that is nobody's here.
const VICTIM: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// Where bob really is.
const BOBS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

fn key(n: u8) -> NodeKey {
    NodeKey::from_bytes([n; 32])
}

fn searching() -> Input {
    Input::Local(Local { stun: vec![at("192.0.2.53:3478")], low_ports: true, searches: true, ..local() })
}

fn probe(search: u32, from: ProbeFrom, ip: Ipv4Addr, last: u16) -> Message {
    Message::Traversal(Traversal::Probe { search, from, at: ip, ports: vec![1024..=last] })
}

/// How many datagrams go to this address.
fn sent_to(outputs: &[Output], ip: Ipv4Addr) -> usize {
    let to = |output: &&Output| matches!(output, Output::Send { way, .. } if way.addr.ip() == IpAddr::V4(ip));
    outputs.iter().filter(to).count()
}

/// Opens every socket that is asked for, and says where it is seen.
fn serve(alice: &mut Alice, outputs: Vec<Output>) -> Vec<Output> {
    let mut all = Vec::new();
    let mut todo = outputs;
    while !todo.is_empty() {
        let mut next = Vec::new();
        for output in &todo {
            match output {
                Output::OpenSocket { socket, .. } => {
                    next.extend(alice.give(Input::SocketOpened { socket: *socket, ok: true }));
                }
                Output::Reflect { tx, .. } => {
                    next.extend(alice.give(Input::Reflected { tx: *tx, seen: at("198.51.100.1:50001") }));
                }
                _ => {}
            }
        }
        all.extend(todo);
        todo = next;
    }
    all
}

fn refused(outputs: &[Output], of: NodeKey) -> bool {
    outputs.iter().any(|output| {
        matches!(output, Output::SendRelay { peer, message: Message::Traversal(Traversal::Missed { probes: 0, .. }), .. }
            if *peer == of)
    })
}

#[test]
fn a_pong_from_elsewhere_proves_nothing() {
    let mut alice = Alice::new(bob(&["198.51.100.2:41641"]));
    let sent = pings(&alice.give(Input::Sending(BOB)));
    let (pinged, elsewhere) = (sent[0].0, Way::main(at("203.0.113.9:7")));
    for (_, tx, _) in &sent {
        let answers = alice.hear(Via::Udp(elsewhere), Message::Pong { tx: *tx, src: pinged.addr });
        assert!(pings(&answers).iter().all(|(_, _, padding)| *padding == 0), "no way to be tried with data");
    }
    let why = alice.paths.why(alice.now, &BOB).unwrap();
    assert!(why.tried.iter().all(|tried| tried.answered.is_none()), "{:?}", why.tried);
    // The right answer still counts.
    let answers = alice.hear(Via::Udp(pinged), Message::Pong { tx: sent[0].1, src: pinged.addr });
    let (way, tx, _) = pings(&answers)[0];
    assert_eq!(way, pinged);
    alice.hear(Via::Udp(elsewhere), Message::Pong { tx, src: pinged.addr });
    assert_eq!(alice.paths.path(&BOB), Path::Relay);
    alice.hear(Via::Udp(pinged), Message::Pong { tx, src: pinged.addr });
    assert_eq!(alice.paths.path(&BOB), Path::Direct(pinged));
}

#[test]
fn a_direct_path_is_not_kept_by_pongs_from_elsewhere() {
    let mut alice = Alice::new(bob(&["198.51.100.2:41641"]));
    let way = Way::main(at("198.51.100.2:41641"));
    let mut source = way;
    for round in 0..60 {
        let mut sent = alice.give(Input::Sending(BOB));
        sent.extend(alice.pass(Duration::from_millis(500)));
        while !sent.is_empty() {
            let to_bob: Vec<_> = pings(&sent).into_iter().filter(|ping| ping.0 == way).collect();
            sent.clear();
            for (_, tx, _) in to_bob {
                sent.extend(alice.hear(Via::Udp(source), Message::Pong { tx, src: way.addr }));
            }
        }
        if round == 20 {
            assert_eq!(alice.paths.path(&BOB), Path::Direct(way));
            source = Way::main(at("203.0.113.9:7"));
        }
    }
    assert_eq!(alice.paths.path(&BOB), Path::Relay);
}

#[test]
fn ids_depend_on_every_byte_of_the_seed() {
    let ids = |seed: [u8; 32]| {
        let mut alice = Alice::new(bob(&["198.51.100.2:41641"]));
        alice.paths = Paths::new(key(1), 1280, seed);
        alice.give(Input::Local(local()));
        alice.give(Input::Peers(vec![bob(&["198.51.100.2:41641"])]));
        pings(&alice.give(Input::Sending(BOB)))[0].1
    };
    let first = ids([7; 32]);
    assert_eq!(first, ids([7; 32]));
    for at in 0..32 {
        let mut seed = [7; 32];
        seed[at] = 8;
        assert_ne!(first, ids(seed), "byte {at}");
    }
}

#[test]
fn ports_of_an_address_that_only_the_peer_claims_are_not_probed() {
    let claims = || Message::CallMeMaybe { endpoints: vec![(VICTIM, 41641).into()] };
    let nat = NatReport {
        udp: true,
        mapping: Mapping::Varies,
        allocator: Allocator::Random,
        low_ports: true,
        searches: true,
        seen: Some(std::net::SocketAddrV4::new(VICTIM, 41641)),
    };
    let mut alice = Alice::new(bob(&["198.51.100.2:41641"]));
    alice.give(searching());
    let mut sent = Vec::new();
    for search in 0..300 {
        for message in [
            claims(),
            Message::Traversal(Traversal::Nat { ask: true, nat }),
            Message::Traversal(Traversal::Fresh { search }),
            probe(search, ProbeFrom::Fresh, VICTIM, 2047),
            probe(search, ProbeFrom::Main, VICTIM, 2047),
            probe(search, ProbeFrom::Low(2), VICTIM, 2047),
            Message::Ping { tx: TxId([search as u8; 12]), node_key: Some(BOB), padding: 0 },
        ] {
            // A ping can come from any source that somebody forges.
            let forged = matches!(message, Message::Ping { .. });
            let way = Way::main((VICTIM, 41641).into());
            let outputs = alice.hear(if forged { Via::Udp(way) } else { Via::Relay(1) }, message);
            sent.extend(serve(&mut alice, outputs));
        }
        let outputs = alice.pass(Duration::from_millis(200));
        sent.extend(serve(&mut alice, outputs));
    }
    let (pings, pongs): (Vec<_>, Vec<_>) =
        sent.iter().partition(|output| matches!(output, Output::Send { message: Message::Ping { .. }, .. }));
    let pings: Vec<_> = pings.into_iter().cloned().collect();
    assert!(sent_to(&pings, VICTIM) < 600, "{} pings in a minute", sent_to(&pings, VICTIM));
    let ports = |output: &Output| match output {
        Output::Send { way, .. } if way.addr.ip() == IpAddr::V4(VICTIM) => Some(way.addr.port()),
        _ => None,
    };
    assert!(pings.iter().filter_map(ports).all(|port| port == 41641), "only what was claimed is pinged");
    assert!(pongs.len() < 10_000);
}

#[test]
fn ports_are_probed_where_the_control_server_lists_the_peer() {
    let mut alice = Alice::new(bob(&["198.51.100.2:41641"]));
    alice.give(searching());
    let outputs = alice.hear(Via::Relay(1), probe(1, ProbeFrom::Main, BOBS, 1123));
    let mut sent = serve(&mut alice, outputs);
    let outputs = alice.pass(Duration::from_secs(1));
    sent.extend(serve(&mut alice, outputs));
    assert_eq!(sent_to(&sent, BOBS), 100);
}

#[test]
fn addresses_inside_our_site_are_not_probed_for_a_peer_outside() {
    let mut alice = Alice::new(bob(&["192.168.1.1:41641", "127.0.0.1:41641", "198.51.100.1:41641"]));
    alice.give(searching());
    for ip in [[192, 168, 1, 1], [127, 0, 0, 1], [198, 51, 100, 1]] {
        let outputs = alice.hear(Via::Relay(1), probe(1, ProbeFrom::Main, ip.into(), 1123));
        assert!(refused(&outputs, BOB), "{ip:?}");
        let later = alice.pass(Duration::from_secs(1));
        assert!(sent_to(&later, ip.into()) < 10);
    }
}

#[test]
fn probes_for_all_peers_together_have_a_budget_and_leave_some_for_those_talked_to() {
    let peers = |from: u8, to: u8| {
        (from..to)
            .map(|n| Peer { key: key(n), ..bob(&[&format!("203.0.113.{n}:41641")]) })
            .collect::<Vec<_>>()
    };
    let mut alice = Alice::with_peers(peers(10, 110));
    alice.give(searching());
    let mut sent = 0;
    for _ in 0..60 {
        for n in 10..109 {
            let ip = Ipv4Addr::new(203, 0, 113, n);
            let outputs = alice.hear_of(key(n), Via::Relay(1), probe(1, ProbeFrom::Main, ip, 2047));
            sent += pings(&serve(&mut alice, outputs)).len();
            let outputs = alice.pass(Duration::from_millis(50));
            sent += pings(&serve(&mut alice, outputs)).len();
        }
    }
    // 8,750 at once and 29 a second, for five minutes.
    assert!((5000..20_000).contains(&sent), "{sent} probes");
    alice.pass(Duration::from_secs(6));
    alice.give(Input::Sending(key(109)));
    let outputs =
        alice.hear_of(key(109), Via::Relay(1), probe(1, ProbeFrom::Main, [203, 0, 113, 109].into(), 2047));
    assert!(!refused(&outputs, key(109)), "who is talked to has a share of its own");
}

#[test]
fn a_peer_that_searches_again_and_again_leaves_the_place_to_others() {
    let carol = Peer { key: key(3), ..bob(&["203.0.113.3:41641"]) };
    let mut alice = Alice::with_peers(vec![bob(&["198.51.100.2:41641"]), carol]);
    alice.give(searching());
    // Its answers by relay come late, so that much time is allowed for them.
    alice.give(Input::Sending(BOB));
    alice.pass(Duration::from_secs(40));
    let nat = NatReport { udp: true, mapping: Mapping::Varies, searches: true, ..NatReport::default() };
    alice.hear(Via::Relay(1), Message::Traversal(Traversal::Nat { ask: false, nat }));
    let mut waited = 0;
    for n in 0..400 {
        let outputs = alice.hear(Via::Relay(1), probe(n, ProbeFrom::Main, BOBS, 1024));
        serve(&mut alice, outputs);
        if n > 2 && n % 20 == 0 {
            let asks = probe(n, ProbeFrom::Main, [203, 0, 113, 3].into(), 1030);
            let outputs = alice.hear_of(key(3), Via::Relay(1), asks);
            if !refused(&outputs, key(3)) {
                return assert!(waited < 5, "{waited} times refused");
            }
            waited += 1;
        }
        let outputs = alice.pass(Duration::from_millis(100));
        serve(&mut alice, outputs);
    }
    panic!("never its turn");
}

#[test]
fn pongs_to_probes_count_only_from_the_address_that_was_probed() {
    // How many pings of full size follow when each port of an address answers the probes' id.
    let wide = |ip: Ipv4Addr| {
        let mut alice = Alice::new(bob(&["198.51.100.2:41641"]));
        alice.give(searching());
        let outputs = alice.hear(Via::Relay(1), probe(1, ProbeFrom::Main, BOBS, 1100));
        let (probed, tx, _) = pings(&serve(&mut alice, outputs))[0];
        let answers = (1..2000).flat_map(|port| {
            let from = Via::Udp(Way::main((ip, port).into()));
            pings(&alice.hear(from, Message::Pong { tx, src: probed.addr }))
        });
        answers.filter(|(_, _, padding)| *padding > 0).count()
    };
    assert_eq!(wide(VICTIM), 0);
    assert!((1..=100).contains(&wide(BOBS)), "as many as candidates are kept");
}

#[test]
fn pings_to_what_peers_claim_have_a_budget_for_all_of_them() {
    let peers = (0..200).map(|n| Peer { key: key(n + 10), ..bob(&[]) }).collect();
    let mut alice = Alice::with_peers(peers);
    let mut sent = 0;
    for second in 0..60_u16 {
        for n in 0..200 {
            let endpoints = (0..32).map(|port| (VICTIM, 1000 + port + 40 * second).into()).collect();
            let outputs = alice.hear_of(key(n + 10), Via::Relay(1), Message::CallMeMaybe { endpoints });
            sent += sent_to(&outputs, VICTIM);
        }
        sent += sent_to(&alice.pass(Duration::from_secs(1)), VICTIM);
    }
    assert!((400..7000).contains(&sent), "{sent} pings in a minute");
}

#[test]
fn sockets_that_peers_ask_for_are_few_and_closed_when_they_are_not_used() {
    let peers = (10..250).map(|n| Peer { key: key(n), ..bob(&[&format!("203.0.113.{n}:41641")]) }).collect();
    let mut alice = Alice::with_peers(peers);
    alice.give(searching());
    let (mut opened, mut closed) = (0, 0);
    let mut count = |outputs: &[Output]| {
        opened += outputs.iter().filter(|output| matches!(output, Output::OpenSocket { .. })).count();
        closed += outputs.iter().filter(|output| matches!(output, Output::CloseSocket { .. })).count();
    };
    for search in 0..20 {
        for n in 10..250 {
            let message = Message::Traversal(Traversal::Fresh { search });
            let outputs = alice.hear_of(key(n), Via::Relay(1), message);
            count(&serve(&mut alice, outputs));
        }
    }
    count(&alice.pass(Duration::from_secs(40)));
    assert!(opened > 0);
    assert_eq!(opened, closed);
}

#[test]
fn a_peer_that_claims_anothers_address_does_not_hide_it() {
    let mallory = Peer { key: key(1), ..bob(&["198.51.100.2:41641"]) };
    let mut alice = Alice::with_peers(vec![mallory, bob(&["198.51.100.2:41641"])]);
    alice.give(Input::Remembered(vec![(BOB, at("198.51.100.2:41641"))]));
    assert_eq!(alice.paths.peers_at(at("198.51.100.2:41641")), [BOB, key(1)]);
}

#[test]
fn a_pong_names_the_peer_by_its_transaction() {
    let mut alice = Alice::new(bob(&["198.51.100.2:41641"]));
    let (_, tx, _) = pings(&alice.give(Input::Sending(BOB)))[0];
    assert_eq!(alice.paths.pinged(tx), Some(BOB));
    assert_eq!(alice.paths.pinged(TxId([0; 12])), None);
}
