//! First connections between nodes that learn of one another at different moments: nobody waits for WireGuard's timer
//! of five seconds. Says aloud that it is skipped where devices or namespaces are not allowed.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Side, by_relay, cable, glue, glue_if, pair, skip};
use lacis_tunnel::{Event, Path, PongKind, Way};

const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
/// Sooner than WireGuard's timer, with time to spare for a busy machine.
const SOON: Duration = Duration::from_secs(4);

/// Lets everything pass but the first `lost` messages of this kind.
fn all_but_first(lost: usize, kind: u8) -> impl FnMut(&Bytes) -> bool + Send + 'static {
    let mut seen = 0;
    move |packet| {
        seen += usize::from(packet[0] == kind);
        packet[0] != kind || seen > lost
    }
}

/// Glues the relay outputs of both; what `a` and `b` send must pass these.
fn relays(
    a: &mut Side,
    b: &mut Side,
    from_a: impl FnMut(&Bytes) -> bool + Send + 'static,
    from_b: impl FnMut(&Bytes) -> bool + Send + 'static,
) {
    glue_if(a.relay.take().unwrap(), a.key, &b.tunnel, b.key, from_a);
    glue_if(b.relay.take().unwrap(), b.key, &a.tunnel, a.key, from_b);
}

/// How long a ping from `a` to `b` takes.
fn ping(a: &mut Side, b: &Side) -> Duration {
    let begin = Instant::now();
    a.tunnel.icmp_ping(b.key, b.v4, 2, 2);
    answer(a);
    begin.elapsed()
}

fn answer(a: &mut Side) {
    a.expect("the answer to the ping", |event| {
        matches!(event, Event::Pong { kind: PongKind::Icmp { id: 2, sequence: 2 }, .. }).then_some(())
    });
}

#[test]
fn lost_initiations_are_repeated_soon() {
    if skip("lost_initiations_are_repeated_soon") {
        return;
    }
    for lost in [1, 3] {
        let (mut a, mut b) = pair();
        relays(&mut a, &mut b, all_but_first(lost, INITIATION), |_| true);
        a.tunnel.set_path(b.key, Path::Relay);
        b.tunnel.set_path(a.key, Path::Relay);
        let took = ping(&mut a, &b);
        assert!(took < SOON, "{lost} lost: {took:?}");
    }
}

#[test]
fn a_lost_response_is_asked_for_again_soon() {
    if skip("a_lost_response_is_asked_for_again_soon") {
        return;
    }
    let (mut a, mut b) = pair();
    relays(&mut a, &mut b, |_| true, all_but_first(1, RESPONSE));
    a.tunnel.set_path(b.key, Path::Relay);
    b.tunnel.set_path(a.key, Path::Relay);
    let took = ping(&mut a, &b);
    assert!(took < SOON, "{took:?}");
}

#[test]
fn a_peer_that_never_answers_is_left_to_wireguards_timer() {
    if skip("a_peer_that_never_answers_is_left_to_wireguards_timer") {
        return;
    }
    let (mut a, mut b) = pair();
    let seen = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&seen);
    let nothing = move |packet: &Bytes| {
        counter.fetch_add(usize::from(packet[0] == INITIATION), Ordering::Relaxed);
        false
    };
    relays(&mut a, &mut b, nothing, |_| true);
    a.tunnel.set_path(b.key, Path::Relay);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(4500) {
        a.tunnel.icmp_ping(b.key, b.v4, 2, 2);
        std::thread::sleep(Duration::from_millis(50));
    }
    // The first one and three repetitions.
    assert_eq!(seen.load(Ordering::Relaxed), 4);
}

#[test]
fn a_handshake_that_comes_before_its_peer_is_known_is_taken_up() {
    if skip("a_handshake_that_comes_before_its_peer_is_known_is_taken_up") {
        return;
    }
    let (mut a, mut b) = pair();
    by_relay(&mut a, &mut b);
    let a_key = a.key;
    b.tunnel.set_peers(Vec::new());
    let begin = Instant::now();
    a.tunnel.icmp_ping(b.key, b.v4, 2, 2);
    b.expect("a handshake of a stranger", |event| {
        (*event == Event::UnknownPeer { key: a_key, addr: None }).then_some(())
    });
    b.tunnel.set_peers(vec![a.peer()]);
    b.tunnel.set_path(a_key, Path::Relay);
    answer(&mut a);
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
}

#[test]
fn a_peer_without_a_path_is_answered_by_the_relay_it_came_by() {
    if skip("a_peer_without_a_path_is_answered_by_the_relay_it_came_by") {
        return;
    }
    let (mut a, mut b) = pair();
    by_relay(&mut a, &mut b);
    b.tunnel.set_path(a.key, Path::None);
    let took = ping(&mut a, &b);
    assert!(took < SOON, "{took:?}");
    let a_key = a.key;
    b.expect("that a path is wanted", |event| {
        (*event == Event::PeerActive { key: a_key, has_path: false }).then_some(())
    });
    // In the other direction, too, for as long as nothing else is said.
    let took = ping(&mut b, &a);
    assert!(took < SOON, "{took:?}");
}

#[test]
fn a_peer_without_a_path_is_answered_by_the_way_it_came_by() {
    if skip("a_peer_without_a_path_is_answered_by_the_way_it_came_by") {
        return;
    }
    let (mut a, b) = pair();
    let (_, b_addr) = cable(&a, &b);
    a.tunnel.set_path(b.key, Path::Direct(Way::main(b_addr)));
    let took = ping(&mut a, &b);
    assert!(took < SOON, "{took:?}");
    assert_eq!(b.tunnel.stats().relay_sent, 0);
}

#[test]
fn a_response_finds_a_peer_that_has_left_its_path() {
    if skip("a_response_finds_a_peer_that_has_left_its_path") {
        return;
    }
    let (mut a, mut b) = pair();
    let (a_addr, _) = cable(&a, &b);
    relays(&mut a, &mut b, |_| true, |_| true);
    a.tunnel.set_path(b.key, Path::Relay);
    let nobody = SocketAddr::new(a_addr.ip(), 9);
    b.tunnel.set_path(a.key, Path::Direct(Way::main(nobody)));
    let begin = Instant::now();
    a.tunnel.icmp_ping(b.key, b.v4, 2, 2);
    let b_key = b.key;
    a.expect("a session", |event| (*event == Event::HandshakeDone { key: b_key }).then_some(()));
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
}

#[test]
fn a_new_path_gets_an_initiation_at_once() {
    if skip("a_new_path_gets_an_initiation_at_once") {
        return;
    }
    let (mut a, mut b) = pair();
    let (a_addr, b_addr) = cable(&a, &b);
    glue_if(a.relay.take().unwrap(), a.key, &b.tunnel, b.key, |_| false);
    glue(b.relay.take().unwrap(), b.key, &a.tunnel, a.key);
    b.tunnel.set_path(a.key, Path::Direct(Way::main(a_addr)));
    a.tunnel.set_path(b.key, Path::Relay);
    a.tunnel.icmp_ping(b.key, b.v4, 2, 2);
    // All repetitions have been lost by then.
    std::thread::sleep(Duration::from_millis(2500));
    let begin = Instant::now();
    a.tunnel.set_path(b.key, Path::Direct(Way::main(b_addr)));
    answer(&mut a);
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

/// Counts the messages of this kind in what a filter of [`relays`] sees.
fn counted(kind: u8) -> (Arc<AtomicUsize>, impl FnMut(&Bytes) -> bool + Send + 'static) {
    let seen = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&seen);
    let count = move |packet: &Bytes| {
        counter.fetch_add(usize::from(packet[0] == kind), Ordering::Relaxed);
        true
    };
    (seen, count)
}

#[test]
fn a_handshake_stamped_earlier_than_one_before_is_answered_by_an_initiation() {
    if skip("a_handshake_stamped_earlier_than_one_before_is_answered_by_an_initiation") {
        return;
    }
    let (mut a, mut b) = pair();
    let stale = Arc::new(Mutex::new(None::<Bytes>));
    let lose = Arc::new(AtomicBool::new(false));
    let (first, losing) = (Arc::clone(&stale), Arc::clone(&lose));
    let from_a = move |packet: &Bytes| {
        if packet[0] != INITIATION {
            return true;
        }
        first.lock().unwrap().get_or_insert_with(|| packet.clone());
        !losing.load(Ordering::Relaxed)
    };
    let (initiations, from_b) = counted(INITIATION);
    relays(&mut a, &mut b, from_a, from_b);
    a.tunnel.set_path(b.key, Path::Relay);
    b.tunnel.set_path(a.key, Path::Relay);
    ping(&mut a, &b);
    assert_eq!(initiations.load(Ordering::Relaxed), 0);
    // The peer has restarted, and what it sends now carries an earlier time.
    lose.store(true, Ordering::Relaxed);
    a.tunnel.reset_session(b.key);
    a.tunnel.icmp_ping(b.key, b.v4, 2, 2);
    let stale = stale.lock().unwrap().clone().unwrap();
    b.tunnel.relay_in(vec![(a.key, stale)]);
    answer(&mut a);
    assert_eq!(initiations.load(Ordering::Relaxed), 1);
    assert_eq!(b.tunnel.stats().in_stale_handshake, 1);
}

#[test]
fn replayed_handshakes_make_no_session_and_leave_the_one_in_use() {
    if skip("replayed_handshakes_make_no_session_and_leave_the_one_in_use") {
        return;
    }
    let (mut a, mut b) = pair();
    let (a_addr, b_addr) = cable(&a, &b);
    let first = Arc::new(Mutex::new(None::<Bytes>));
    let kept = Arc::clone(&first);
    let from_a = move |packet: &Bytes| {
        kept.lock().unwrap().get_or_insert_with(|| packet.clone());
        true
    };
    let (responses, from_b) = counted(RESPONSE);
    relays(&mut a, &mut b, from_a, from_b);
    a.tunnel.set_path(b.key, Path::Relay);
    b.tunnel.set_path(a.key, Path::Relay);
    ping(&mut a, &b);
    let replay = first.lock().unwrap().clone().unwrap();
    // By somebody else, again and again: the answer is an initiation at most twice a second, which only the peer can
    // make a session of.
    let socket = a.namespace.run(move || UdpSocket::bind((a_addr.ip(), 0)).unwrap());
    for _ in 0..50 {
        socket.send_to(&replay, b_addr).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut kinds = Vec::new();
    let mut buffer = [0; 2000];
    while let Ok(len) = socket.recv(&mut buffer) {
        kinds.push((buffer[0], len));
    }
    assert!(kinds.iter().all(|kind| *kind == (INITIATION, 148)), "{kinds:?}");
    assert!(kinds.len() <= 3, "{kinds:?}");
    assert_eq!(responses.load(Ordering::Relaxed), 1, "of the first handshake alone");
    ping(&mut a, &b);
    ping(&mut b, &a);
}
