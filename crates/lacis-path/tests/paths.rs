//! The state machine from outside, one rule at a time. Whole networks are in `networks.rs`.

mod common;

use std::time::Duration;

use common::{Alice, BOB, at, bob, pings};
use lacis_path::{Input, Output, Path, Peer, Via, Way};
use lacis_wire::disco::{Message, TxId};

#[test]
fn a_way_is_taken_once_datagrams_of_full_size_pass() {
    let mut alice = Alice::new(bob(&["198.51.100.2:41641"]));
    let way = Way::main(at("198.51.100.2:41641"));
    let first = pings(&alice.give(Input::Sending(BOB)));
    let pong = |tx| Message::Pong { tx, src: at("198.51.100.1:41641") };
    let whole = alice.hear(Via::Udp(way), pong(first[0].1));
    assert_eq!(alice.paths.path(&BOB), Path::Relay, "it answers, but is it wide enough?");
    let whole = pings(&whole);
    // 1280 bytes in the tunnel are 1312 in a datagram, of which a ping without padding has 124.
    assert_eq!(whole.iter().map(|ping| ping.2).collect::<Vec<_>>(), [1312 - 124]);
    alice.hear(Via::Udp(way), pong(whole[0].1));
    assert_eq!(alice.paths.path(&BOB), Path::Direct(way));
}

#[test]
fn a_narrow_way_is_not_taken_and_the_reason_is_told() {
    let mut alice = Alice::new(bob(&["198.51.100.2:41641"]));
    let way = Way::main(at("198.51.100.2:41641"));
    for _ in 0..20 {
        let mut sent = alice.give(Input::Sending(BOB));
        sent.extend(alice.pass(Duration::from_millis(500)));
        for (way, tx, _) in pings(&sent).into_iter().filter(|ping| ping.2 == 0) {
            alice.hear(Via::Udp(way), Message::Pong { tx, src: way.addr });
        }
    }
    assert_eq!(alice.paths.path(&BOB), Path::Relay);
    let why = alice.paths.why(alice.now, &BOB).unwrap();
    assert!(why.tried.iter().any(|tried| tried.addr == way.addr && tried.too_small));
    assert!(why.reasons.iter().any(|reason| reason.contains("full size")), "{:?}", why.reasons);
}

#[test]
fn the_first_round_only_opens_our_own_nat() {
    let mut alice = Alice::new(bob(&["198.51.100.2:41641", "192.168.1.9:41641", "[2001:db8::2]:41641"]));
    let first = alice.give(Input::Sending(BOB));
    for output in &first {
        if let Output::Send { way, ttl, .. } = output {
            let outside = way.addr == at("198.51.100.2:41641");
            assert_eq!(ttl.is_some(), outside, "{way:?}");
        }
    }
    let calls = |outputs: &[Output]| {
        outputs
            .iter()
            .filter(|output| matches!(output, Output::SendRelay { message: Message::CallMeMaybe { .. }, .. }))
            .count()
    };
    assert_eq!(calls(&first), 1);
    let later = alice.pass(Duration::from_millis(600));
    let normal = later.iter().any(|output| {
        matches!(output, Output::Send { way, ttl: None, .. } if way.addr == at("198.51.100.2:41641"))
    });
    assert!(normal, "then it is pinged");
}

#[test]
fn nobody_makes_us_ping_a_stranger_for_long() {
    let mut alice = Alice::new(bob(&[]));
    let mut sent = 0;
    for second in 0..60 {
        for call in 0..50 {
            let endpoints =
                (0..100).map(|n| at(&format!("203.0.113.{}:{}", n + 1, 1000 + call + second))).collect();
            sent += pings(&alice.hear(Via::Relay(1), Message::CallMeMaybe { endpoints })).len();
        }
        sent += pings(&alice.pass(Duration::from_secs(1))).len();
    }
    assert!((50..600).contains(&sent), "{sent} pings in a minute");
}

#[test]
fn endpoints_are_believed_only_by_relay_and_pings_are_answered_once() {
    let mut alice = Alice::new(bob(&[]));
    let way = Way::main(at("203.0.113.9:9"));
    let call = Message::CallMeMaybe { endpoints: vec![at("203.0.113.9:9")] };
    assert_eq!(alice.hear(Via::Udp(way), call), []);
    let ping = Message::Ping { tx: TxId([7; 12]), node_key: Some(BOB), padding: 0 };
    let pong = Message::Pong { tx: TxId([7; 12]), src: way.addr };
    let answer = alice.hear(Via::Udp(way), ping.clone());
    assert!(answer.iter().any(|output| matches!(output, Output::Send { message, .. } if *message == pong)));
    let again = alice.hear(Via::Udp(way), ping);
    assert!(!again.iter().any(|output| matches!(output, Output::Send { .. })), "a repeated ping is dropped");
}

#[test]
fn a_silent_way_is_doubted_and_then_given_up() {
    let mut alice = Alice::new(bob(&["198.51.100.2:41641"]));
    let way = Way::main(at("198.51.100.2:41641"));
    for _ in 0..3 {
        let mut sent = alice.give(Input::Sending(BOB));
        sent.extend(alice.pass(Duration::from_millis(600)));
        for (way, tx, _) in pings(&sent) {
            let answers = alice.hear(Via::Udp(way), Message::Pong { tx, src: way.addr });
            for (way, tx, _) in pings(&answers) {
                alice.hear(Via::Udp(way), Message::Pong { tx, src: way.addr });
            }
        }
    }
    assert_eq!(alice.paths.path(&BOB), Path::Direct(way));
    let mut seen = Vec::new();
    for _ in 0..100 {
        alice.give(Input::Sending(BOB));
        alice.pass(Duration::from_millis(100));
        let path = alice.paths.path(&BOB);
        if seen.last() != Some(&path) {
            seen.push(path);
        }
    }
    assert_eq!(seen, [Path::Direct(way), Path::Both(way), Path::Relay]);
}

#[test]
fn a_peer_that_speaks_only_wireguard_is_tried_at_one_endpoint_after_the_other() {
    let only =
        Peer { disco: false, home: 0, wireguard_only: true, ..bob(&["192.0.2.1:51820", "192.0.2.2:51820"]) };
    let mut alice = Alice::new(only);
    assert_eq!(alice.paths.path(&BOB), Path::Direct(Way::main(at("192.0.2.1:51820"))));
    alice.give(Input::Sending(BOB));
    alice.pass(Duration::from_secs(6));
    let second = Way::main(at("192.0.2.2:51820"));
    assert_eq!(alice.paths.path(&BOB), Path::Direct(second));
    for _ in 0..4 {
        alice.give(Input::Sending(BOB));
        alice.give(Input::Authenticated { peer: BOB, way: second });
        alice.pass(Duration::from_secs(3));
    }
    assert_eq!(alice.paths.path(&BOB), Path::Direct(second), "it answers");
}

#[test]
fn ways_of_the_last_run_are_tried_although_nobody_else_knows_them() {
    let mut alice = Alice::new(bob(&[]));
    alice.give(Input::Remembered(vec![(BOB, at("203.0.113.7:41641"))]));
    let mut sent = alice.give(Input::Sending(BOB));
    sent.extend(alice.pass(Duration::from_millis(600)));
    assert!(pings(&sent).iter().any(|ping| ping.0.addr == at("203.0.113.7:41641")));
}

#[test]
fn a_user_hears_which_way_answered() {
    let mut alice = Alice::new(bob(&[]));
    let sent = alice.give(Input::Ping { peer: BOB, token: 5 });
    let tx = sent.iter().find_map(|output| match output {
        Output::SendRelay { message: Message::Ping { tx, .. }, .. } => Some(*tx),
        _ => None,
    });
    alice.now += Duration::from_millis(30);
    let answer = alice.hear(Via::Relay(1), Message::Pong { tx: tx.unwrap(), src: at("127.3.3.40:1") });
    let pong = Output::Pong { token: 5, via: Via::Relay(1), latency: Duration::from_millis(30) };
    assert!(answer.contains(&pong), "{answer:?}");
}
