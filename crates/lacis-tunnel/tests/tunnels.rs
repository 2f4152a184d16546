//! Two real tunnels in network namespaces: handshake, pings, TCP, the filter, paths and the resolver's door.
//! Says aloud that it is skipped where devices or namespaces are not allowed.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use common::{AT_ONCE, COPY, Side, by_relay, cable, copy, pair, skip};
use lacis_tunnel::{Error, Event, Path, PongKind, RejectReason, Tunnel, TunnelConfig, Way};
use lacis_wire::control::FilterRule;

fn ping(a: &mut Side, b: &Side) {
    for (token, to) in [(7, b.v4), (8, b.v6)] {
        a.tunnel.tsmp_ping(b.key, to, token);
        let rtt = a.expect("the answer to a TSMP ping", |event| match event {
            Event::Pong { key, kind: PongKind::Tsmp { token: got, peer_api_port }, rtt }
                if *key == b.key && *got == token =>
            {
                assert_eq!(*peer_api_port, Some(0));
                Some(*rtt)
            }
            _ => None,
        });
        assert!(rtt < Duration::from_secs(10));
        a.tunnel.icmp_ping(b.key, to, 77, token as u16);
        a.expect("the answer to an ICMP ping", |event| match event {
            Event::Pong { kind: PongKind::Icmp { id: 77, sequence }, .. }
                if u64::from(*sequence) == token =>
            {
                Some(())
            }
            _ => None,
        });
    }
}

#[test]
fn two_nodes_ping_and_copy_through_the_relay() {
    if skip("two_nodes_ping_and_copy_through_the_relay") {
        return;
    }
    let (mut a, mut b) = pair();
    by_relay(&mut a, &mut b);
    ping(&mut a, &b);
    let key = b.key;
    let b_key = a.key;
    b.expect("a working session", |event| (*event == Event::HandshakeDone { key: b_key }).then_some(()));
    copy(&a, &b, b.v4);
    copy(&b, &a, a.v6);
    let stats = a.tunnel.peer_stats(&key).unwrap();
    assert!(stats.last_handshake.is_some());
    assert!(stats.tx_bytes > COPY as u64 && stats.rx_bytes > COPY as u64, "{stats:?}");
    assert_eq!(a.tunnel.stats().in_invalid, 0);
    assert_eq!(a.tunnel.stats().udp_sent, 0);
}

#[test]
fn packets_wait_for_a_path_and_a_direct_one_carries_them() {
    if skip("packets_wait_for_a_path_and_a_direct_one_carries_them") {
        return;
    }
    let (mut a, mut b) = pair();
    let (a_addr, b_addr) = cable(&a, &b);
    a.tunnel.icmp_ping(b.key, b.v4, 1, 1);
    let (a_key, b_key) = (a.key, b.key);
    // A packet of the host's own, so that the client hears that a path is wanted.
    let to = b.v4;
    a.namespace.run(move || UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"hello", (to, 9)).unwrap());
    a.expect("a peer in use", |event| {
        (*event == Event::PeerActive { key: b_key, has_path: false }).then_some(())
    });
    b.tunnel.set_path(a_key, Path::Direct(Way::main(a_addr)));
    a.tunnel.set_path(b_key, Path::DirectAndRelay(Way::main(b_addr)));
    a.expect("the answer to the ping that waited", |event| {
        matches!(event, Event::Pong { kind: PongKind::Icmp { id: 1, sequence: 1 }, .. }).then_some(())
    });
    let source = b.expect("the address of the peer", |event| match event {
        Event::AuthenticatedSource { key, way } if *key == a_key => Some(*way),
        _ => None,
    });
    assert_eq!(source, Way::main(a_addr));
    let copied = a.relay.as_mut().unwrap().try_recv().unwrap();
    assert!(!common::frames(copied.frames, &b_key).is_empty());
    a.tunnel.set_path(b_key, Path::Direct(Way::main(b_addr)));
    copy(&a, &b, b.v4);
    copy(&b, &a, a.v6);
    let stats = a.tunnel.stats();
    assert!(stats.udp_sends * 4 < stats.udp_sent, "sent in batches: {stats:?}");
    assert!(stats.tun_writes < stats.tun_written, "written in batches: {stats:?}");
    // Path discovery shares the sockets.
    let mut message = lacis_wire::disco::MAGIC.to_vec();
    message.resize(lacis_wire::disco::MIN_PING_LEN, b'a');
    a.tunnel.send_udp(Way::main(b_addr), message.clone(), None);
    let got = b.udp.blocking_recv().unwrap();
    assert_eq!((got.way, got.data.as_ref()), (Way::main(a_addr), &message[..]));
}

#[test]
fn a_peer_that_forgets_its_session_is_found_again() {
    if skip("a_peer_that_forgets_its_session_is_found_again") {
        return;
    }
    let (mut a, mut b) = pair();
    by_relay(&mut a, &mut b);
    ping(&mut a, &b);
    for side in 0..3 {
        if side != 0 {
            b.tunnel.reset_session(a.key);
        }
        if side != 1 {
            a.tunnel.reset_session(b.key);
        }
        found_again(&mut b, &a);
        ping(&mut a, &b);
    }
}

/// Pings until an answer comes: what was sealed for the lost session is lost with it. WireGuard by itself would need
/// 15 seconds to notice.
fn found_again(a: &mut Side, b: &Side) {
    let pinging = Instant::now();
    for token in 100.. {
        a.tunnel.tsmp_ping(b.key, b.v4, token);
        let next = Instant::now() + Duration::from_millis(200);
        while Instant::now() < next {
            if let Ok(Event::Pong { kind: PongKind::Tsmp { .. }, .. }) = a.events.try_recv() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(pinging.elapsed() < Duration::from_secs(10), "never found again; {:?}", a.tunnel.stats());
    }
}

#[test]
fn without_a_rule_connections_are_refused_and_answers_pass() {
    if skip("without_a_rule_connections_are_refused_and_answers_pass") {
        return;
    }
    let (mut a, mut b) = pair();
    by_relay(&mut a, &mut b);
    b.allow(&[]);
    let to = b.v4;
    let refused =
        a.namespace.spawn(move || TcpStream::connect_timeout(&(to, 80).into(), Duration::from_secs(5)));
    let reject = a.expect("a refusal", |event| match event {
        Event::Rejected { reject, .. } => Some(*reject),
        _ => None,
    });
    assert_eq!((reject.reason, reject.dst), (RejectReason::AccessRules, (b.v4, 80)));
    assert_eq!(reject.src.0, a.v4);
    // The other way round is allowed, answers included.
    copy(&b, &a, a.v4);
    let to = SocketAddr::new(a.v6, 5353);
    let echo = a.namespace.run(move || UdpSocket::bind(to).unwrap());
    let thread = std::thread::spawn(move || {
        let mut data = [0; 100];
        let (len, from) = echo.recv_from(&mut data).unwrap();
        echo.send_to(&data[..len], from).unwrap();
    });
    let answer = b.namespace.run(move || {
        let socket = UdpSocket::bind("[::]:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.send_to(b"question", to).unwrap();
        let mut data = [0; 100];
        let len = socket.recv(&mut data).unwrap();
        data[..len].to_vec()
    });
    assert_eq!(answer, b"question");
    thread.join().unwrap();
    assert!(b.tunnel.stats().in_filtered >= 1);
    b.allow(&[FilterRule::allow_all()]);
    drop(refused);
}

#[test]
fn the_resolver_gets_its_packets_and_answers() {
    if skip("the_resolver_gets_its_packets_and_answers") {
        return;
    }
    let mut a = Side::new(3);
    let v4 = a.v4;
    let client = a.namespace.spawn(move || {
        let socket = UdpSocket::bind((v4, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.send_to(b"who is bob", "100.100.100.100:53").unwrap();
        let mut data = [0; 100];
        let (len, from) = socket.recv_from(&mut data).unwrap();
        (data[..len].to_vec(), from)
    });
    let question = a.quad100.blocking_recv().unwrap();
    let parsed = etherparse::PacketHeaders::from_ip_slice(&question).unwrap();
    let udp = parsed.transport.unwrap().udp().unwrap();
    assert_eq!(parsed.payload.slice(), b"who is bob");
    let IpAddr::V4(addr) = v4 else { unreachable!() };
    let mut answer = Vec::new();
    etherparse::PacketBuilder::ipv4([100, 100, 100, 100], addr.octets(), 64)
        .udp(53, udp.source_port)
        .write(&mut answer, b"it is 100.64.0.2")
        .unwrap();
    a.tunnel.inject(answer.into());
    let (data, from) = client.join().unwrap();
    assert_eq!(data, b"it is 100.64.0.2");
    assert_eq!(from, "100.100.100.100:53".parse().unwrap());
}

#[test]
fn what_the_responder_answers_returns_at_once_and_does_not_leave() {
    if skip("what_the_responder_answers_returns_at_once_and_does_not_leave") {
        return;
    }
    const MANY: usize = 500;
    let mut a = Side::new(6);
    let v4 = a.v4;
    let client = a.namespace.spawn(move || {
        let socket = UdpSocket::bind((v4, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let question =
            |number: usize| [AT_ONCE, &vec![7; number % 100], number.to_string().as_bytes()].concat();
        let mut data = [0; 200];
        // Few at a time, so that no buffer overflows; equal lengths are merged, others are not.
        for first in (0..MANY).step_by(50) {
            for number in first..first + 50 {
                socket.send_to(&question(number), "100.100.100.100:53").unwrap();
            }
            for number in first..first + 50 {
                let (len, from) = socket.recv_from(&mut data).unwrap();
                assert_eq!(data[..len], question(number));
                assert_eq!(from, "100.100.100.100:53".parse().unwrap());
            }
        }
    });
    client.join().unwrap();
    assert_eq!(a.tunnel.stats().quad100_answered, MANY as u64);
    assert!(a.quad100.try_recv().is_err());
}

#[test]
fn a_name_in_use_is_an_error_and_shutdown_removes_the_device() {
    if skip("a_name_in_use_is_an_error_and_shutdown_removes_the_device") {
        return;
    }
    let mut a = Side::new(4);
    let config = TunnelConfig { tun_name: a.tunnel.tun_name().to_owned(), ..TunnelConfig::default() };
    let second = a.namespace.run(move || Tunnel::start(config, Box::new(|_, _| None)).map(|_| ()));
    assert!(matches!(second, Err(Error::NameInUse { .. })), "{second:?}");
    assert!(a.namespace.command("ip", "link show lt4").status.success());
    a.tunnel.shutdown();
    assert!(!a.namespace.command("ip", "link show lt4").status.success());
    assert!(a.relay.take().unwrap().blocking_recv().is_none());
}

#[test]
fn a_deleted_device_is_told() {
    if skip("a_deleted_device_is_told") {
        return;
    }
    let mut a = Side::new(5);
    a.namespace.ip("link delete lt5");
    a.expect("the loss of the device", |event| matches!(event, Event::TunLost { .. }).then_some(()));
    let begin = Instant::now();
    a.tunnel.shutdown();
    assert!(begin.elapsed() < Duration::from_secs(5));
}
