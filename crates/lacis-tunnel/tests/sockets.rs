//! Ways by UDP: auxiliary sockets, ways that fail, links with a small MTU. Says aloud that it is skipped where devices
//! or namespaces are not allowed.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use common::{COPY, Namespace, Side, cable, copy, pair, skip};
use lacis_tunnel::{Event, Path, SendFailure, SocketId, Way};

/// Opens an auxiliary socket and waits for its port.
fn open(side: &mut Side, id: SocketId, low: bool) -> u16 {
    assert!(side.tunnel.open_socket(id, low));
    side.expect("an open socket", |event| match event {
        Event::SocketOpened { socket, port } if *socket == id => Some(port.unwrap()),
        _ => None,
    })
}

#[test]
fn a_path_by_an_auxiliary_socket_carries_batches_until_it_is_closed() {
    if skip("a_path_by_an_auxiliary_socket_carries_batches_until_it_is_closed") {
        return;
    }
    let (mut a, mut b) = pair();
    let (a_addr, b_addr) = cable(&a, &b);
    let (a_key, b_key) = (a.key, b.key);
    let id = SocketId(41);
    let port = open(&mut a, id, true);
    assert!((512..=1023).contains(&port), "{port}");
    let way = Way { socket: id, addr: b_addr };
    let back = Way::main(SocketAddr::new(a_addr.ip(), port));
    a.tunnel.set_path(b_key, Path::Direct(way));
    b.tunnel.set_path(a_key, Path::Direct(back));
    copy(&a, &b, b.v4);
    copy(&b, &a, a.v6);
    for (side, key, seen) in [(&mut a, b_key, way), (&mut b, a_key, back)] {
        side.expect("the way of the peer", |event| {
            (*event == Event::AuthenticatedSource { key, way: seen }).then_some(())
        });
        let stats = side.tunnel.stats();
        assert!(stats.udp_sends * 4 < stats.udp_sent, "sent in batches: {stats:?}");
        assert!(stats.udp_receives * 4 < stats.udp_received, "received in batches: {stats:?}");
        assert_eq!(stats.udp_send_errors, 0);
    }
    a.tunnel.close_socket(id);
    a.tunnel.icmp_ping(b_key, b.v4, 1, 1);
    let failed = Event::SendFailed { key: b_key, way, kind: SendFailure::NoSocket };
    a.expect("a failed send", |event| (*event == failed).then_some(()));
    // The number can be used again.
    let port = open(&mut a, id, false);
    assert!(port > 1023, "{port}");
}

#[test]
fn a_burst_of_datagrams_leaves_by_the_sockets_it_names() {
    if skip("a_burst_of_datagrams_leaves_by_the_sockets_it_names") {
        return;
    }
    let (mut a, b) = pair();
    let (_, b_addr) = cable(&a, &b);
    let ids = [SocketId::MAIN, SocketId(1), SocketId(2)];
    let ports = [a.tunnel.udp_port().0, open(&mut a, ids[1], false), open(&mut a, ids[2], true)];
    let to = SocketAddr::new(b_addr.ip(), 7000);
    let receiver = b.namespace.run(move || UdpSocket::bind(to).unwrap());
    receiver.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let datagram = |id| (Way { socket: id, addr: to }, b"probe".to_vec(), Some(3));
    a.tunnel.send_udp_many(ids.map(datagram).to_vec());
    for port in ports {
        assert_eq!(receiver.recv_from(&mut [0; 16]).unwrap().1.port(), port);
    }
    // And back again: what comes tells by which socket it came.
    let mut pong = lacis_wire::disco::MAGIC.to_vec();
    pong.resize(lacis_wire::disco::MIN_PING_LEN, 7);
    receiver.send_to(&pong, (cable_address(&a), ports[2])).unwrap();
    let got = a.udp.blocking_recv().unwrap();
    assert_eq!((got.way, got.data.as_ref()), (Way { socket: ids[2], addr: to }, &pong[..]));
    assert_eq!(a.tunnel.stats().udp_send_errors, 0);
    a.tunnel.send_udp(Way { socket: SocketId(9), addr: to }, b"probe".to_vec(), None);
    wait("the failed send to be counted", || a.tunnel.stats().udp_send_errors == 1);
}

/// The address that [`cable`] gives to its first side.
fn cable_address(_: &Side) -> std::net::Ipv4Addr {
    [192, 0, 2, 1].into()
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_way_that_leads_nowhere_is_told_but_not_for_every_packet() {
    if skip("a_way_that_leads_nowhere_is_told_but_not_for_every_packet") {
        return;
    }
    let (mut a, b) = pair();
    let way = Way::main("198.51.100.1:9".parse().unwrap());
    a.tunnel.set_path(b.key, Path::Direct(way));
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(1200) {
        a.tunnel.reset_session(b.key);
        a.tunnel.icmp_ping(b.key, b.v4, 1, 1);
        std::thread::sleep(Duration::from_millis(10));
    }
    let failed = Event::SendFailed { key: b.key, way, kind: SendFailure::Unreachable };
    let mut told = 0;
    while let Ok(event) = a.events.try_recv() {
        told += usize::from(event == failed);
    }
    let most = begin.elapsed().as_millis() as usize / 500 + 1;
    assert!((2..=most).contains(&told), "{told} of at most {most}");
}

#[test]
fn full_packets_pass_links_with_a_small_mtu() {
    if skip("full_packets_pass_links_with_a_small_mtu") {
        return;
    }
    let (a, b) = pair();
    let router = Namespace::new().unwrap();
    for (side, net, mtu) in [(&a, 1, 1500), (&b, 2, 1280)] {
        router.ip(&format!("link add n{net} type veth peer name u0 netns {}", side.namespace.thread_id));
        router.ip(&format!("link set n{net} up mtu {mtu}"));
        router.ip(&format!("addr add 198.51.10{net}.1/24 dev n{net}"));
        side.namespace.ip(&format!("link set u0 up mtu {mtu}"));
        side.namespace.ip(&format!("addr add 198.51.10{net}.2/24 dev u0"));
        side.namespace.ip(&format!("route add default via 198.51.10{net}.1"));
    }
    router.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")).unwrap();
    let address =
        |side: &Side, net: u8| SocketAddr::from(([198, 51, 100 + net, 2], side.tunnel.udp_port().0));
    let (a_addr, b_addr) = (address(&a, 1), address(&b, 2));
    a.tunnel.set_path(b.key, Path::Direct(Way::main(b_addr)));
    b.tunnel.set_path(a.key, Path::Direct(Way::main(a_addr)));
    copy(&a, &b, b.v4);
    copy(&b, &a, a.v4);
    let packets = COPY as u64 / 1280;
    let (far, near) = (a.tunnel.stats(), b.tunnel.stats());
    // Batches cannot leave by the small link and are sent singly; nothing is lost by trying.
    assert!(near.udp_gso_fallbacks > 0 && near.udp_sent > packets, "{near:?}");
    assert_eq!((far.udp_send_errors, near.udp_send_errors), (0, 0));
    // It did not take an error from the router, which may be filtered in earnest.
    let route = a.namespace.command("ip", &format!("route get {}", b_addr.ip()));
    let route = String::from_utf8_lossy(&route.stdout).into_owned();
    assert!(route.contains("198.51.101.1") && !route.contains("mtu"), "{route}");
}
