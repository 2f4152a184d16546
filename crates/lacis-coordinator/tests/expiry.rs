//! Ended is ended: a node whose key has expired is sent itself only, and no relay takes it.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::time::Duration;

use common::{Machine, PATIENCE, Server, of_alice};
use http::StatusCode;
use http_body_util::BodyExt as _;
use lacis_wire::admin::{CreateKey, PolicyFormat, SetPolicy};
use lacis_wire::control::{MapRequest, MapResponse, RegisterRequest, VerifyRequest, to_json};
use lacis_wire::key::NodeKey;
use lacis_wire::mapframe::{Compression, Decoder};
use time::OffsetDateTime;

/// Everybody reaches everybody, also by SSH.
const POLICY: &str = r#"{
    "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
    "ssh": [{"action": "accept", "src": ["alice@"], "dst": ["autogroup:self"], "users": ["root"]}]
}"#;

async fn server() -> (Server, String) {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    let policy = SetPolicy { text: POLICY.into(), format: PolicyFormat::Hujson, name: None };
    server.core.set_policy(&lab, &policy).await.unwrap();
    (server, key)
}

async fn member(server: &Server, key: &str, name: &str) -> Machine {
    let machine = server.machine(name).await;
    assert_eq!(machine.register(Some(key)).await.error, "");
    machine
}

/// Is this all that an expired node is sent: that it is expired, and no rule of any kind?
fn has_nothing(frame: &MapResponse) -> bool {
    let node = frame.node.as_ref().unwrap();
    let filters = frame.packet_filters.as_ref().unwrap();
    node.expired
        && frame.peers.is_empty()
        && frame.peers_changed.is_empty()
        && frame.peers_changed_patch.is_empty()
        && filters.values().flatten().all(|rules| rules.is_empty())
        && frame.user_profiles.len() == 1
        && frame.ssh_policy.as_ref().is_none_or(|policy| policy.as_str() == r#"{"rules":[]}"#)
}

/// One map without a stream.
async fn single_map(machine: &Machine) -> MapResponse {
    let request = MapRequest { omit_peers: false, read_only: true, ..machine.map_request(false) };
    let reply = machine.client.post("/machine/map", to_json(&request)).await.unwrap();
    assert_eq!(reply.status(), StatusCode::OK);
    let mut decoder = Decoder::new(Compression::Zstd);
    decoder.push(&reply.into_body().collect().await.unwrap().to_bytes());
    serde_json::from_slice(&decoder.next_message().unwrap().unwrap()).unwrap()
}

/// Lets relays have it, said to one of its own and to one elsewhere?
async fn relays_take(server: &Server, key: NodeKey) -> bool {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let body = to_json(&VerifyRequest { node_public: key, ..VerifyRequest::default() });
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST /verify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), &body].concat()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let verified = answer.contains("true");
    assert_eq!(verified, server.core.may_relay(&key), "{answer}");
    verified
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_moment_of_expiry_an_open_stream_loses_peers_and_rules() {
    let (server, key) = server().await;
    let (a, b) = (member(&server, &key, "a").await, member(&server, &key, "b").await);
    let mut stream = a.stream().await;
    let first = stream.next().await.unwrap();
    assert_eq!(first.peers.len(), 1);
    assert!(!has_nothing(&first));
    assert!(relays_take(&server, a.node_key).await);

    let lab = server.core.tailnet("lab").unwrap().clone();
    let node = server.core.find(&a.node_key).unwrap().1;
    server.core.expire(&lab, &node, 1).await.unwrap();
    let ended = stream.next().await.unwrap();
    assert!(has_nothing(&ended), "{ended:?}");
    assert_eq!(ended.peers_removed, [first.peers[0].id]);
    assert!(!relays_take(&server, a.node_key).await);
    assert!(relays_take(&server, b.node_key).await);

    // What happens to others afterwards is not for it; what happens to itself is.
    let update = MapRequest { endpoints: Some(vec!["192.0.2.9:1".parse().unwrap()]), ..b.map_request(false) };
    assert_eq!(b.lite(update).await, StatusCode::OK);
    member(&server, &key, "c").await;
    server.core.rename_node(&lab, &node, "ended").await.unwrap();
    let renamed = stream.next().await.unwrap();
    assert_eq!(renamed.node.unwrap().name, "ended.lab.example.com.");
    assert!(renamed.peers_changed.is_empty() && renamed.peers_changed_patch.is_empty());
    assert!(renamed.peers_removed.is_empty() && renamed.packet_filters.is_none());

    // Nor does it get more by asking again.
    assert!(has_nothing(&a.stream().await.next().await.unwrap()));
    assert!(has_nothing(&single_map(&a).await));

    // It signs in again with the same key: everything is there again.
    assert_eq!(a.register(Some(&key)).await.error, "");
    let again = stream.until(|frame| !frame.peers.is_empty()).await;
    assert_eq!(again.peers.len(), 2);
    assert!(!again.node.as_ref().unwrap().expired && !has_nothing(&again));
    assert!(again.ssh_policy.is_some());
    assert!(relays_take(&server, a.node_key).await);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_runs_out_by_itself_ends_the_same_way() {
    let (server, key) = server().await;
    member(&server, &key, "b").await;
    let a = server.machine("a").await;
    let soon = OffsetDateTime::now_utc() + Duration::from_secs(2);
    let request = RegisterRequest { expiry: Some(soon), ..a.register_request(Some(&key)) };
    assert_eq!(a.send(&request).await.error, "");
    let mut stream = a.stream().await;
    assert_eq!(stream.next().await.unwrap().peers.len(), 1);
    let ended = stream.until(|frame| frame.node.as_ref().is_some_and(|node| node.expired)).await;
    assert!(has_nothing(&ended) && ended.peers_removed.len() == 1, "{ended:?}");
    assert!(!relays_take(&server, a.node_key).await);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn relays_take_neither_who_logged_out_nor_who_was_deleted_nor_an_old_key() {
    let (server, key) = server().await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    let logout = |machine: &Machine| RegisterRequest {
        expiry: OffsetDateTime::from_unix_timestamp(123).ok(),
        ..machine.register_request(None)
    };
    let plain = member(&server, &key, "plain").await;
    assert!(plain.send(&logout(&plain)).await.node_key_expired);
    assert!(!relays_take(&server, plain.node_key).await);

    let short = server.key("lab", CreateKey { ephemeral: true, ..of_alice(true) }).await;
    let ephemeral = member(&server, &short, "ephemeral").await;
    let mut stream = ephemeral.stream().await;
    stream.next().await.unwrap();
    assert!(relays_take(&server, ephemeral.node_key).await);
    ephemeral.send(&logout(&ephemeral)).await;
    assert!(!relays_take(&server, ephemeral.node_key).await);
    let ended = async { while stream.next().await.is_some() {} };
    tokio::time::timeout(PATIENCE, ended).await.unwrap();

    let mut renewed = member(&server, &key, "renewed").await;
    let old = renewed.node_key;
    renewed.node_key = lacis_wire::key::NodePrivateKey::generate().public();
    renewed.register(Some(&key)).await;
    assert!(!relays_take(&server, old).await);
    assert!(relays_take(&server, renewed.node_key).await);
    // A logout with the old key, which came late, is not about the new one.
    let late = Machine { node_key: old, ..renewed };
    assert!(late.send(&logout(&late)).await.node_key_expired);
    let node = server.core.node_meant(&lab, "renewed").unwrap();
    assert!(!node.expired);
    server.core.delete_node(&lab, &node).await.unwrap();
    assert!(!relays_take(&server, node.node_key).await);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_inside_drops_a_node_when_its_key_ends() {
    let (server, key) = server().await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    for round in 0..2 {
        let node_key = lacis_wire::key::NodePrivateKey::generate();
        let machine =
            Machine { node_key: node_key.public(), ..server.machine(&format!("host{round}")).await };
        assert_eq!(machine.register(Some(&key)).await.error, "");
        let mut relay = common::relay(&server, &node_key).await.unwrap();
        let node = server.core.find(&machine.node_key).unwrap().1;
        if round == 0 {
            server.core.expire(&lab, &node, 1).await.unwrap();
        } else {
            server.core.delete_node(&lab, &node).await.unwrap();
        }
        tokio::time::timeout(PATIENCE, relay.ended()).await.unwrap();
        assert!(common::relay(&server, &node_key).await.is_none(), "it does not come in again");
    }
    server.end().await;
}
