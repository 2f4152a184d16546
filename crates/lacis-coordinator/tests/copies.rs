//! Two machines with one copied state directory are one node: the log, both machines and administrators are informed.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::{Machine, PATIENCE, Server, Stream, of_alice};
use http::{Method, StatusCode};
use lacis_wire::control::MapResponse;
use lacis_wire::key::{MachinePrivateKey, NodePrivateKey};

/// Longer than it takes until two machines are seen.
const SEEN: Duration = Duration::from_secs(13);

/// Answers whatever a stream is asked until a frame says something of the node's health.
async fn health(machine: &Machine, stream: &mut Stream) -> Vec<String> {
    loop {
        let frame = next(machine, stream).await;
        if let Some(health) = frame.health {
            return health;
        }
    }
}

async fn next(machine: &Machine, stream: &mut Stream) -> MapResponse {
    let frame = stream.next().await.unwrap();
    if let Some(question) = &frame.ping_request {
        let path = question.url.strip_prefix("http://mesh.example.org").unwrap();
        let reply = machine.client.request(Method::HEAD, path, Vec::new()).await.unwrap();
        assert_eq!(reply.status(), StatusCode::OK);
    }
    frame
}

/// A session of `machine`, or of a copy of it: there is no difference.
async fn session(server: &Server, machine: &MachinePrivateKey, node: &NodePrivateKey) -> Machine {
    Machine::dial(server, machine.clone(), node.public(), "template").await
}

fn copies(server: &Server) -> Vec<IpAddr> {
    server.core.list_nodes(server.core.tailnet("lab").unwrap()).remove(0).copies
}

#[tokio::test(flavor = "multi_thread")]
async fn two_machines_with_one_state_learn_of_each_other_and_one_alone_is_well() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let (machine, node) = (MachinePrivateKey::generate(), NodePrivateKey::generate());
    let original = session(&server, &machine, &node).await;
    original.register(Some(&key)).await;
    let peer = server.machine("peer").await;
    peer.register(Some(&key)).await;
    let mut streams = (original.stream().await, peer.stream().await);
    assert_eq!(streams.0.next().await.unwrap().health, None);
    streams.1.next().await.unwrap();
    let copy = session(&server, &machine, &node).await;
    assert_eq!(copy.register(None).await.error, "");
    let mut of_copy = copy.stream().await;
    assert_eq!(of_copy.next().await.unwrap().health, None);

    let both = async { tokio::join!(health(&original, &mut streams.0), health(&copy, &mut of_copy)) };
    let (one, two) = tokio::time::timeout(SEEN, both).await.unwrap();
    assert_eq!(one, two);
    assert!(one[0].contains("two machines") && one[0].contains("(seen at 127.0.0.1)"), "{one:?}");
    assert_eq!(copies(&server), ["127.0.0.1".parse::<IpAddr>().unwrap()]);

    // A stream that begins meanwhile begins with it.
    drop(of_copy);
    let mut of_copy = copy.stream().await;
    assert_eq!(of_copy.next().await.unwrap().health, Some(one));

    drop((of_copy, copy));
    let health = tokio::time::timeout(PATIENCE, health(&original, &mut streams.0)).await.unwrap();
    assert!(health.is_empty() && copies(&server).is_empty(), "{health:?}");
    // Its peers are sent nothing of it.
    let sent = tokio::time::timeout(Duration::from_secs(1), streams.1.next()).await;
    assert!(sent.is_err(), "{sent:?}");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_came_back_before_its_old_session_ended_is_one_machine() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let (machine, node) = (MachinePrivateKey::generate(), NodePrivateKey::generate());
    let before = session(&server, &machine, &node).await;
    before.register(Some(&key)).await;
    // Nobody reads it any more, and it stays open.
    let _left = before.stream().await;
    let after = session(&server, &machine, &node).await;
    let mut stream = after.stream().await;
    stream.next().await.unwrap();
    let until = Instant::now() + SEEN;
    let mut asked = 0;
    while let Ok(frame) = tokio::time::timeout_at(until.into(), next(&after, &mut stream)).await {
        asked += u32::from(frame.ping_request.is_some());
        assert_eq!(frame.health, None);
    }
    assert!(asked > 0 && copies(&server).is_empty());
    server.end().await;
}
