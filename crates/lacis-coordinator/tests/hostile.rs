//! What a stranger and a hostile node send, over the real way in: the others keep their network.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{Machine, Server, get, of_alice};
use http::StatusCode;
use http_body_util::BodyExt as _;
use lacis_wire::control::{Hostinfo, RegisterResponse};
use lacis_wire::key::{DiscoPrivateKey, MachinePrivateKey, NodePrivateKey};
use serde_json::json;

async fn post(machine: &Machine, path: &str, body: String) -> (StatusCode, String) {
    let reply = machine.client.post(path, body.into_bytes()).await.unwrap();
    let status = reply.status();
    let text = reply.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8_lossy(&text).into_owned())
}

/// A lite map request with this for its host.
async fn report(machine: &Machine, hostinfo: &str) -> (StatusCode, String) {
    let key = machine.node_key;
    let text = format!(r#"{{"Version":113,"NodeKey":"{key}","OmitPeers":true,"Hostinfo":{hostinfo}}}"#);
    post(machine, "/machine/map", text).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_says_nonsense_costs_its_peers_nothing() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let (viewer, hostile) = (server.machine("viewer").await, server.machine("hostile").await);
    for machine in [&viewer, &hostile] {
        assert_eq!(machine.register(Some(&key)).await.error, "");
    }
    let mut stream = viewer.stream().await;
    assert_eq!(stream.next().await.unwrap().peers.len(), 1);
    let deep = format!(r#"{{"Hostname":"hostile","X":{}{}}}"#, "[".repeat(124), "]".repeat(124));
    let (status, text) = report(&hostile, &deep).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("nested deeper than 16"), "{text}");
    let odd =
        r#"{"Hostname":"hostile","ShareeNode":"x","TPM":[1],"OS":7,"X":{"y":1},"OSVersion":"1\u001b[31m"}"#;
    assert_eq!(report(&hostile, odd).await.0, StatusCode::OK);
    let frame = stream.until(|frame| !frame.peers_changed.is_empty()).await;
    let sent = serde_json::to_value(&frame.peers_changed[0].hostinfo).unwrap();
    assert_eq!(sent, json!({"Hostname": "hostile", "OSVersion": "1[31m"}));
    // And after a restart of the server, whoever comes new.
    drop(stream);
    let server = Server::start_in(server.end().await).await;
    let newcomer = server.machine("newcomer").await;
    newcomer.register(Some(&key)).await;
    let first = newcomer.stream().await.next().await.unwrap();
    assert_eq!((first.peers.len(), first.peers.unreadable.len()), (2, 0));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_end_at_their_bounds() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let a = server.machine("a").await;
    let body = |size: usize| {
        let head = format!(r#"{{"Version":113,"NodeKey":"{}","Hostinfo":{{"App":""#, a.node_key);
        format!("{head}{}\"}}}}", "x".repeat(size - head.len() - 3))
    };
    assert_eq!(post(&a, "/machine/register", body(64 << 10)).await.0, StatusCode::OK);
    let (status, _) = post(&a, "/machine/register", body((64 << 10) + 1)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(a.register(Some(&key)).await.error, "");
    assert_eq!(post(&a, "/machine/map", body(256 << 10)).await.0, StatusCode::OK);
    let (status, _) = post(&a, "/machine/map", body((256 << 10) + 1)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_a_node_can_say_of_itself_fits() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let mut router = server.machine("router").await;
    let network = |n: u16| format!("fd12:3456:789a:bcde:1234:5678:9abc:{n:x}/128").parse().unwrap();
    router.routes = (0..1024).map(network).collect();
    assert_eq!(router.register(Some(&key)).await.error, "");
    let mut request = router.map_request(false);
    request.endpoints = Some((0..64).map(|n| ([192, 0, 2, n], 41641).into()).collect());
    assert_eq!(router.lite(request).await, StatusCode::OK);
    let node = server.core.find(&router.node_key).unwrap().1;
    assert_eq!((node.hostinfo.routable_ips.len(), node.endpoints.len()), (1024, 64));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_of_one_session_push_nobody_else_out() {
    let server = Server::start().await;
    let honest = server.machine("honest").await;
    let url = honest.register(None).await.auth_url;
    let path = url.strip_prefix("http://mesh.example.org").unwrap().to_owned();
    let flooder = server.machine("flooder").await;
    for _ in 0..1100 {
        let mut request = flooder.register_request(None);
        request.node_key = NodePrivateKey::generate().public();
        assert!(!flooder.send(&request).await.auth_url.is_empty());
    }
    assert!(get(&server, &path).await.starts_with("HTTP/1.1 200"));
    assert!(server.core.list_registrations().len() <= 5);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_requests_that_wait_for_one_registration_the_latest_waits() {
    let server = Server::start().await;
    server.key("lab", of_alice(true)).await;
    let a = server.machine("a").await;
    let url = a.register(None).await.auth_url;
    let mut follow_up = a.register_request(None);
    follow_up.followup.clone_from(&url);
    // As many as a machine without a node may send at once.
    let waiting = futures_util::future::join_all((0..8).map(|_| a.send(&follow_up)));
    let approve = async {
        // All but one are answered with the same page before that.
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let lab = server.core.tailnet("lab").unwrap().clone();
        server.core.approve_registration(&url, &lab, "alice").await.unwrap();
    };
    let (replies, ()) = tokio::join!(waiting, approve);
    let joined = |reply: &&RegisterResponse| reply.machine_authorized && reply.auth_url.is_empty();
    assert_eq!(replies.iter().filter(joined).count(), 1);
    assert_eq!(replies.iter().filter(|reply| reply.auth_url == url).count(), 7);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_disco_key_is_not_believed() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let (viewer, owner, thief) =
        (server.machine("viewer").await, server.machine("owner").await, server.machine("thief").await);
    for machine in [&viewer, &owner, &thief] {
        machine.register(Some(&key)).await;
    }
    let disco = DiscoPrivateKey::generate().public();
    let announce = |machine: &Machine, disco, port| {
        let mut request = machine.map_request(false);
        request.disco_key = Some(disco);
        request.endpoints = Some(vec![([192, 0, 2, 1], port).into()]);
        request
    };
    assert_eq!(owner.lite(announce(&owner, disco, 1)).await, StatusCode::OK);
    assert_eq!(thief.lite(announce(&thief, disco, 2)).await, StatusCode::OK, "the rest of it counts");
    let first = viewer.stream().await.next().await.unwrap();
    let holders: Vec<_> = first.peers.iter().filter(|peer| peer.disco_key == Some(disco)).collect();
    assert_eq!(holders.len(), 1);
    assert!(holders[0].key == owner.node_key);
    // The owner comes back with another node key, and keeps it.
    let mut rotated = owner.register_request(Some(&key));
    rotated.old_node_key = owner.node_key;
    rotated.node_key = NodePrivateKey::generate().public();
    assert_eq!(owner.send(&rotated).await.error, "");
    let mut request = announce(&owner, disco, 3);
    request.node_key = rotated.node_key;
    assert_eq!(owner.lite(request).await, StatusCode::OK);
    let node = server.core.find(&rotated.node_key).unwrap().1;
    assert_eq!(node.disco_key, Some(disco));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_floods_is_followed_to_its_newest_state() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let (viewer, flooder) = (server.machine("viewer").await, server.machine("flooder").await);
    for machine in [&viewer, &flooder] {
        machine.register(Some(&key)).await;
    }
    let mut stream = viewer.stream().await;
    stream.next().await.unwrap();
    let before = server.core.tailnet("lab").unwrap().snapshot().head;
    for port in 1..=500 {
        let mut request = flooder.map_request(false);
        request.endpoints = Some(vec![([192, 0, 2, 1], port).into()]);
        assert_eq!(flooder.lite(request).await, StatusCode::OK);
    }
    let last = |frame: &lacis_wire::control::MapResponse| {
        let mut endpoints = frame.peers_changed_patch.iter().filter_map(|patch| patch.endpoints.as_ref());
        endpoints.any(|endpoints| endpoints[0].port() == 500)
    };
    stream.until(last).await;
    let changes = server.core.tailnet("lab").unwrap().snapshot().head - before;
    assert!(changes < 100, "{changes}");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_has_a_few_streams_and_the_newest_stay() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let a = server.machine("a").await;
    a.register(Some(&key)).await;
    let mut streams = Vec::new();
    for _ in 0..12 {
        let mut stream = a.stream().await;
        stream.next().await.unwrap();
        streams.push(stream);
    }
    for stream in &mut streams[..4] {
        assert!(stream.next().await.is_none(), "the oldest ends");
    }
    server.machine("b").await.register(Some(&key)).await;
    for stream in &mut streams[4..] {
        stream.until(|frame| !frame.peers_changed.is_empty()).await;
    }
    assert!(server.core.find(&a.node_key).unwrap().1.online);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_node_gets_a_name_that_programs_look_up_by_themselves() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    let a = server.machine("wpad").await;
    a.register(Some(&key)).await;
    let name = || server.core.find(&a.node_key).unwrap().1.name.clone();
    assert_eq!(name(), "node-wpad");
    let mut request = a.map_request(false);
    request.hostinfo = Some(Hostinfo { hostname: "ISATAP.local".to_owned(), ..Hostinfo::default() });
    assert_eq!(a.lite(request.clone()).await, StatusCode::OK);
    assert_eq!(name(), "node-isatap");
    // What the coordinator and its embedded relay are called by, in this configuration.
    request.hostinfo = Some(Hostinfo { hostname: "mesh".to_owned(), ..Hostinfo::default() });
    assert_eq!(a.lite(request).await, StatusCode::OK);
    assert_eq!(name(), "node-mesh");
    let node = server.core.find(&a.node_key).unwrap().1;
    for reserved in ["wpad", "LOCALHOST", "ip6-allnodes", "Mesh"] {
        let refused = server.core.rename_node(&lab, &node, reserved).await.unwrap_err().to_string();
        assert!(refused.contains("choose another"), "{refused}");
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_machine_does_not_wait_for_a_registration_that_it_has_seen() {
    let server = Server::start().await;
    let a = server.machine("a").await;
    let url = a.register(None).await.auth_url;
    let key = NodePrivateKey::generate().public();
    let other = Machine::dial(&server, MachinePrivateKey::generate(), key, "other").await;
    let mut follow_up = other.register_request(None);
    follow_up.followup = url.clone();
    let reply = other.send(&follow_up).await;
    assert!(!reply.auth_url.is_empty() && reply.auth_url != url);
    server.end().await;
}
