//! Routes: announced, approved by hand or by rule, withdrawn, and who is the router when others fail.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::time::{Duration, Instant};

use common::{Machine, PATIENCE, Server, Stream, of_alice};
use http::{Method, StatusCode};
use ipnet::IpNet;
use lacis_wire::admin::{Approval, NodeInfo, PolicyFormat, SetPolicy};
use lacis_wire::control::{MapResponse, Node};

const LAN: &str = "192.168.7.0/24";
/// As long as taking over may last.
const TAKEOVER: Duration = Duration::from_secs(5);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

async fn router(server: &Server, key: &str, hostname: &str, routes: &[&str]) -> Machine {
    let mut machine = server.machine(hostname).await;
    machine.routes = routes.iter().map(|route| net(route)).collect();
    assert_eq!(machine.register(Some(key)).await.error, "");
    machine
}

async fn approve(server: &Server, name: &str, routes: &[&str]) -> NodeInfo {
    let lab = server.core.tailnet("lab").unwrap();
    let node = server.core.node_meant(lab, name).unwrap();
    let routes: Vec<_> = routes.iter().map(|route| net(route)).collect();
    server.core.approve_routes(lab, &node, &routes).await.unwrap()
}

fn leads(node: &Node, route: &str) -> bool {
    node.allowed_ips().contains(&net(route))
}

/// The next frame that says of a peer what it is the way to.
async fn about(stream: &mut Stream, name: &str) -> (Node, MapResponse) {
    let named = |node: &Node| node.name.starts_with(&format!("{name}."));
    let frame = stream.until(|frame| frame.peers_changed.iter().any(named)).await;
    (frame.peers_changed.iter().find(|node| named(node)).unwrap().clone(), frame)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_is_used_while_it_is_announced_and_approved() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let mut r = router(&server, &key, "r", &[LAN]).await;
    let client = router(&server, &key, "c", &[]).await;
    let mut own = r.stream().await;
    own.next().await.unwrap();
    let mut stream = client.stream().await;
    let first = stream.next().await.unwrap();
    assert!(!leads(&first.peers[0], LAN), "nobody has approved it");

    let info = approve(&server, "r", &[LAN, "10.0.0.0/8"]).await;
    let states: Vec<_> =
        info.routes.iter().map(|route| (route.advertised, route.approved, route.primary)).collect();
    let hand = Some(Approval::Hand);
    assert_eq!(states, [(false, hand, false), (true, hand, true)]);
    let (node, _) = about(&mut stream, "r").await;
    assert!(leads(&node, LAN) && !leads(&node, "10.0.0.0/8"));
    assert_eq!(node.primary_routes, [net(LAN)]);
    let itself = own.until(|frame| frame.node.is_some()).await.node.unwrap();
    assert!(leads(&itself, LAN));

    // What was approved before is used when it is announced, and again after a restart.
    r.routes.push(net("10.0.0.0/8"));
    assert_eq!(r.lite(r.map_request(false)).await, StatusCode::OK);
    assert!(leads(&about(&mut stream, "r").await.0, "10.0.0.0/8"));
    let server = Server::start_in(server.end().await).await;
    let client = Machine::dial(&server, client.machine, client.node_key, "c").await;
    let mut stream = client.stream().await;
    let first = stream.next().await.unwrap();
    assert!(leads(&first.peers[0], LAN), "routers are waited for a moment");

    approve(&server, "r", &[]).await;
    let frame = stream.until(|frame| !frame.peers_changed.is_empty()).await;
    assert_eq!(frame.peers_changed[0].allowed_ips().len(), 2);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_routes_are_approved_as_a_pair_and_may_have_several_nodes() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    for name in ["e1", "e2"] {
        router(&server, &key, name, &["0.0.0.0/0", "::/0"]).await;
        assert_eq!(approve(&server, name, &["0.0.0.0/0"]).await.routes.len(), 2);
    }
    let client = router(&server, &key, "c", &[]).await;
    let first = client.stream().await.next().await.unwrap();
    for peer in &first.peers {
        assert!(leads(peer, "0.0.0.0/0") && leads(peer, "::/0") && peer.primary_routes.is_empty());
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_rule_approves_ends_with_the_rule() {
    let server = Server::start().await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    let key = server.key("lab", of_alice(true)).await;
    let set = async |text: &str| {
        let wish = SetPolicy { text: text.into(), format: PolicyFormat::Hujson, name: None };
        server.core.set_policy(&lab, &wish).await.unwrap();
    };
    let open = r#""acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]"#;
    set(&format!(r#"{{{open}, "autoApprovers": {{"routes": {{"192.168.0.0/16": ["alice@"]}}}}}}"#)).await;
    router(&server, &key, "r", &[LAN]).await;
    let client = router(&server, &key, "c", &[]).await;
    let mut stream = client.stream().await;
    assert!(leads(&stream.next().await.unwrap().peers[0], LAN));
    let node = server.core.node_meant(&lab, "r").unwrap();
    assert_eq!(server.core.node_info(&lab, &node).routes[0].approved, Some(Approval::Policy));
    set(&format!("{{{open}}}")).await;
    assert!(!leads(&about(&mut stream, "r").await.0, LAN));
    server.end().await;
}

struct Pair {
    server: Server,
    one: (Machine, Stream),
    two: (Machine, Stream),
    client: Stream,
    _client: Machine,
}

/// Two routers for one network, the first of which is primary, and a client that knows it.
async fn pair() -> Pair {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let mut routers = Vec::new();
    for name in ["r1", "r2"] {
        let machine = router(&server, &key, name, &[LAN]).await;
        let mut stream = machine.stream().await;
        stream.next().await.unwrap();
        approve(&server, name, &[LAN]).await;
        routers.push((machine, stream));
    }
    let machine = router(&server, &key, "c", &[]).await;
    let mut client = machine.stream().await;
    let first = client.next().await.unwrap();
    assert_eq!([leads(&first.peers[0], LAN), leads(&first.peers[1], LAN)], [true, false]);
    let two = routers.pop().unwrap();
    Pair { server, one: routers.pop().unwrap(), two, client, _client: machine }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_router_takes_over_when_the_first_ones_session_ends() {
    let Pair { server, one, two: _two, mut client, _client } = pair().await;
    let (machine, stream) = one;
    let ended = Instant::now();
    drop(stream);
    let (second, frame) = about(&mut client, "r2").await;
    assert!(leads(&second, LAN));
    assert!(ended.elapsed() < TAKEOVER, "{:?}", ended.elapsed());
    let first = frame.peers_changed.iter().find(|node| node.name.starts_with("r1.")).unwrap();
    assert!(!leads(first, LAN), "in the same frame: prefixes must not overlap");
    let mut stream = machine.stream().await;
    stream.next().await.unwrap();
    assert!(leads(&about(&mut client, "r1").await.0, LAN), "the choice is the same whatever came before");
    server.end().await;
}

/// Answers the questions of a stream until told to stop.
async fn answer(machine: &Machine, stream: &mut Stream) {
    loop {
        let frame = stream.until(|frame| frame.ping_request.is_some()).await;
        let url = frame.ping_request.unwrap().url;
        let path = url.strip_prefix("http://mesh.example.org").unwrap().to_owned();
        let reply = machine.client.request(Method::HEAD, &path, Vec::new()).await.unwrap();
        assert_eq!(reply.status(), StatusCode::OK);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_stops_answering_is_passed_over_as_long_as_another_answers() {
    let Pair { server, mut one, mut two, mut client, _client } = pair().await;
    let both = async { tokio::join!(answer(&one.0, &mut one.1), answer(&two.0, &mut two.1)) };
    assert!(tokio::time::timeout(Duration::from_secs(4), both).await.is_err(), "they answer on");
    let stopped = Instant::now();
    tokio::select! {
        // Only the second answers now; the first one's session is as open as before.
        () = answer(&two.0, &mut two.1) => {}
        (second, _) = about(&mut client, "r2") => assert!(leads(&second, LAN)),
    }
    assert!(stopped.elapsed() < TAKEOVER, "{:?}", stopped.elapsed());
    // Where nobody answers, the first is as good as any; and so it is when it answers again.
    let (first, _) = tokio::time::timeout(PATIENCE, about(&mut client, "r1")).await.unwrap();
    assert!(leads(&first, LAN));
    server.end().await;
}
