//! The life of nodes, over the real way in: Noise, HTTP/2, register, map streams.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::time::Duration;

use common::{Machine, PATIENCE, Server, get, of_alice};
use http::StatusCode;
use http_body_util::BodyExt as _;
use lacis_wire::admin::CreateKey;
use lacis_wire::control::{Hostinfo, MapRequest, NetInfo, RegisterRequest, to_json};
use lacis_wire::key::{DiscoPrivateKey, MachinePrivateKey, NodePrivateKey};
use time::OffsetDateTime;

#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins_and_its_first_frame_has_everything_a_client_needs() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let bob = server.machine("Bob's Laptop").await;
    let reply = bob.register(Some(&key)).await;
    assert_eq!((reply.error.as_str(), reply.machine_authorized), ("", true));
    assert_eq!(reply.login.login_name, "alice");
    let first = bob.stream().await.next().await.unwrap();
    let node = first.node.unwrap();
    assert_eq!(node.name, "bobs-laptop.lab.example.com.");
    let addresses: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"]);
    assert!(node.machine_authorized && node.key == bob.node_key);
    assert_eq!(first.derp_map.unwrap().regions.len(), 1);
    assert!(first.dns_config.unwrap().proxied);
    assert!(first.packet_filters.is_some() || first.packet_filter.is_some());
    assert_eq!(first.user_profiles[0].login_name, "alice");
    assert_eq!(first.domain, "lab.example.com");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_use_key_admits_one_of_a_hundred_who_come_at_once() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(false)).await;
    let mut machines = Vec::new();
    for n in 0..100 {
        machines.push(server.machine(&format!("host{n}")).await);
    }
    let replies =
        futures_util::future::join_all(machines.iter().map(|machine| machine.register(Some(&key)))).await;
    let joined = replies.iter().filter(|reply| reply.machine_authorized && reply.error.is_empty()).count();
    let refused = replies.iter().filter(|reply| reply.error == "authkey already used").count();
    assert_eq!((joined, refused), (1, 99));
    assert_eq!(server.core.tailnet("lab").unwrap().snapshot().nodes.len(), 1);
    // The winner comes back with the same key, as a container does at every start.
    let winner = replies.iter().position(|reply| reply.machine_authorized).unwrap();
    assert_eq!(machines[winner].register(Some(&key)).await.error, "");
    // And a restart of the server does not make the key good again.
    let state = server.end().await;
    let server = Server::start_in(state).await;
    assert_eq!(server.machine("late").await.register(Some(&key)).await.error, "authkey already used");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_unknown_revoked_or_expired_say_so() {
    let server = Server::start().await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    let machine = server.machine("x").await;
    assert_eq!(machine.register(Some("no-such-key")).await.error, "invalid pre auth key");
    let revoked = server.key("lab", of_alice(true)).await;
    let mut wrong = revoked.clone();
    let last = if wrong.ends_with('a') { 'b' } else { 'a' };
    wrong.pop();
    wrong.push(last);
    assert_eq!(machine.register(Some(&wrong)).await.error, "invalid pre auth key");
    server.core.expire_key(&lab, &revoked).await.unwrap();
    assert_eq!(machine.register(Some(&revoked)).await.error, "authkey revoked");
    let short = server.key("lab", CreateKey { expiry_seconds: Some(1), ..of_alice(true) }).await;
    let expired = async {
        while machine.register(Some(&short)).await.error != "authkey expired" {
            // It joined in time: leave, with the key it has then.
            tokio::time::sleep(Duration::from_millis(200)).await;
            let Some((tailnet, node)) = server.core.find(&machine.node_key) else { continue };
            server.core.delete_node(&tailnet, &node).await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, expired).await.unwrap();
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_hear_at_once_of_who_comes_moves_is_renamed_and_goes() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let (a, b) = (server.machine("a").await, server.machine("b").await);
    a.register(Some(&key)).await;
    let mut stream = a.stream().await;
    assert!(stream.next().await.unwrap().peers.is_empty());

    b.register(Some(&key)).await;
    let came = stream.until(|frame| !frame.peers_changed.is_empty()).await;
    let id = came.peers_changed[0].id;
    assert_eq!(came.peers_changed[0].key, b.node_key);

    let mut update = b.map_request(false);
    let disco = DiscoPrivateKey::generate().public();
    update.disco_key = Some(disco);
    update.endpoints = Some(vec!["192.0.2.9:41641".parse().unwrap()]);
    let net_info = NetInfo { preferred_derp: 7, ..NetInfo::default() };
    update.hostinfo = Some(Hostinfo { net_info: Some(net_info), ..b.hostinfo() });
    assert_eq!(b.lite(update).await, StatusCode::OK);
    let moved = stream.until(|frame| !frame.peers_changed_patch.is_empty()).await;
    let patch = &moved.peers_changed_patch[0];
    assert_eq!((patch.node_id, patch.derp_region, patch.disco_key), (id, 7, Some(disco)));
    assert_eq!(patch.endpoints.as_deref().unwrap()[0].port(), 41641);

    let lab = server.core.tailnet("lab").unwrap().clone();
    let node = server.core.node_meant(&lab, "b").unwrap();
    server.core.rename_node(&lab, &node, "printer").await.unwrap();
    let renamed = stream.until(|frame| !frame.peers_changed.is_empty()).await;
    assert_eq!(renamed.peers_changed[0].name, "printer.lab.example.com.");

    let node = server.core.node_meant(&lab, "printer").unwrap();
    server.core.delete_node(&lab, &node).await.unwrap();
    let gone = stream.until(|frame| !frame.peers_removed.is_empty()).await;
    assert_eq!(gone.peers_removed, [id]);
    assert_eq!(b.lite(b.map_request(false)).await, StatusCode::NOT_FOUND, "a deleted node is nobody");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_machine_cannot_use_a_node_key_that_it_has_seen() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let victim = server.machine("victim").await;
    victim.register(Some(&key)).await;
    let thief = Machine::dial(&server, MachinePrivateKey::generate(), victim.node_key, "thief").await;
    for auth in [None, Some(key.as_str())] {
        let reply = thief.register(auth).await;
        assert_eq!(reply.error, "node key is in use by another machine");
        assert!(!reply.machine_authorized);
    }
    let logout = RegisterRequest {
        expiry: OffsetDateTime::from_unix_timestamp(123).ok(),
        ..thief.register_request(None)
    };
    assert_eq!(thief.send(&logout).await.error, "node key is in use by another machine");
    assert_eq!(thief.lite(thief.map_request(false)).await, StatusCode::NOT_FOUND);
    assert_eq!(thief.lite(thief.map_request(true)).await, StatusCode::NOT_FOUND);
    let (_, node) = server.core.find(&victim.node_key).unwrap();
    assert_eq!((node.name.as_str(), node.expired), ("victim", false));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_do_not_see_each_other() {
    let server = Server::start().await;
    let lab_key = server.key("lab", of_alice(true)).await;
    let other_key = server.key("other", of_alice(true)).await;
    let (a, b) = (server.machine("a").await, server.machine("a").await);
    a.register(Some(&lab_key)).await;
    b.register(Some(&other_key)).await;
    let first = b.stream().await.next().await.unwrap();
    assert!(first.peers.is_empty());
    assert_eq!(first.node.unwrap().name, "a.other.example.com.");
    let lab = server.core.tailnet("lab").unwrap().clone();
    assert_eq!(server.core.list_nodes(&lab).len(), 1);
    assert!(server.core.node_meant(&lab, &b.node_key.to_string()).is_err());
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_logged_out_comes_back_as_itself_with_a_key_and_not_without() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let mut a = server.machine("a").await;
    a.register(Some(&key)).await;
    let before = server.core.find(&a.node_key).unwrap().1;
    let logout =
        RegisterRequest { expiry: OffsetDateTime::from_unix_timestamp(123).ok(), ..a.register_request(None) };
    assert!(a.send(&logout).await.node_key_expired);
    assert!(a.register(None).await.node_key_expired, "the old key alone is worth nothing");
    a.node_key = NodePrivateKey::generate().public();
    assert!(!a.register(None).await.auth_url.is_empty(), "a new key alone must sign in");
    assert_eq!(a.register(Some(&key)).await.error, "");
    let after = server.core.find(&a.node_key).unwrap().1;
    assert_eq!((after.id, after.v4), (before.id, before.v4));
    assert!(!after.expired);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_key_waits_until_an_administrator_approves_it() {
    let server = Server::start().await;
    server.key("lab", of_alice(true)).await;
    let a = server.machine("a").await;
    let url = a.register(None).await.auth_url;
    assert!(url.starts_with("http://mesh.example.org/register/"), "{url}");
    let path = url.strip_prefix("http://mesh.example.org").unwrap();
    let page = get(&server, path).await;
    let id = path.strip_prefix("/register/").unwrap();
    let command = format!("lacis admin registrations approve {id} --tailnet NETWORK --user NAME");
    assert!(page.starts_with("HTTP/1.1 200") && page.contains(&command), "{page}");
    assert!(get(&server, "/register/nobody").await.starts_with("HTTP/1.1 404"));
    let followup = RegisterRequest { followup: url.clone(), ..a.register_request(None) };
    let waiting = a.send(&followup);
    let approve = async {
        let lab = server.core.tailnet("lab").unwrap().clone();
        server.core.approve_registration(&url, &lab, "alice").await.unwrap()
    };
    let (reply, info) = tokio::join!(waiting, approve);
    assert!(reply.machine_authorized && reply.error.is_empty());
    assert_eq!(info.name, "a");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ephemeral_node_is_gone_some_time_after_it_left() {
    let server = Server::start().await;
    let key = server.key("lab", CreateKey { ephemeral: true, ..of_alice(true) }).await;
    let watcher_key = server.key("lab", of_alice(true)).await;
    let watcher = server.machine("watcher").await;
    watcher.register(Some(&watcher_key)).await;
    let mut stream = watcher.stream().await;
    let short_lived = server.machine("job").await;
    short_lived.register(Some(&key)).await;
    drop(short_lived.stream().await);
    stream.until(|frame| !frame.peers_removed.is_empty()).await;
    assert!(server.core.find(&short_lived.node_key).is_none());
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_stream_of_a_node_does_not_make_it_look_away_when_the_first_ends() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let a = server.machine("a").await;
    a.register(Some(&key)).await;
    let mut first = a.stream().await;
    first.next().await.unwrap();
    let again = Machine::dial(&server, a.machine.clone(), a.node_key, "a").await;
    let mut second = again.stream().await;
    second.next().await.unwrap();
    drop(first);
    let update = MapRequest { endpoints: Some(vec!["192.0.2.1:1".parse().unwrap()]), ..a.map_request(false) };
    assert_eq!(a.lite(update).await, StatusCode::OK);
    assert!(server.core.find(&a.node_key).unwrap().1.online);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_are_too_old_are_told_to_update() {
    let server = Server::start().await;
    let machine = server.machine("old").await;
    let request = RegisterRequest { version: 60, ..machine.register_request(None) };
    let reply = machine.client.post("/machine/register", to_json(&request)).await.unwrap();
    assert_eq!(reply.status(), StatusCode::BAD_REQUEST);
    let text = reply.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&text).contains("update the client"));
    server.end().await;
}

/// Whoever registers may be gone before the answer: what was written then is also known to the server.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_gives_up_while_it_registers_can_come_again_with_its_single_use_key() {
    let server = Server::start().await;
    for n in 0..20 {
        let key = server.key("lab", of_alice(false)).await;
        let machine = server.machine(&format!("hasty{n}")).await;
        let client = machine.client.clone();
        let request = to_json(&machine.register_request(Some(&key)));
        let given_up = tokio::spawn(async move { client.post("/machine/register", request).await.is_ok() });
        tokio::time::sleep(Duration::from_micros(300 * n)).await;
        given_up.abort();
        assert_eq!(machine.register(Some(&key)).await.error, "");
        assert_eq!(server.core.find(&machine.node_key).unwrap().1.name, format!("hasty{n}"));
    }
    assert_eq!(server.core.tailnet("lab").unwrap().snapshot().nodes.len(), 20);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_key_is_one_node_whoever_signs_in_with_it() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let mut a = server.machine("a").await;
    a.register(Some(&key)).await;
    let before = server.core.find(&a.node_key).unwrap().1;

    // Another user's key needs another node key, which stock clients make when they are told so.
    let bobs = server.key("lab", CreateKey { user: Some("bob".into()), ..of_alice(true) }).await;
    let reply = a.register(Some(&bobs)).await;
    assert_eq!((reply.node_key_expired, reply.machine_authorized), (true, false));
    let first_key = a.node_key;
    a.node_key = NodePrivateKey::generate().public();
    assert_eq!(a.register(Some(&bobs)).await.login.login_name, "bob");
    assert_ne!(server.core.find(&a.node_key).unwrap().1.id, before.id);

    // A key with tags takes the node over.
    a.node_key = first_key;
    let tagged = server.key("lab", CreateKey { tags: vec!["tag:web".into()], ..CreateKey::default() }).await;
    assert_eq!(a.register(Some(&tagged)).await.login.login_name, "tagged-devices");
    let after = server.core.find(&a.node_key).unwrap().1;
    assert_eq!((after.id, after.v4, after.user), (before.id, before.v4, None));
    assert_eq!(after.tags, ["tag:web"]);
    assert_eq!(a.register(Some(&tagged)).await.error, "", "it comes back with the same, spent key");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_signs_in_again_under_another_host_name_gets_that_name() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let mut a = server.machine("old").await;
    a.register(Some(&key)).await;
    a.node_key = NodePrivateKey::generate().public();
    a.hostname = "new".into();
    a.register(Some(&key)).await;
    let state = server.end().await;
    let server = Server::start_in(state).await;
    let node = server.core.find(&a.node_key).unwrap().1;
    assert_eq!(node.name, "new");
    // The name that it gave up is free again.
    let other = server.machine("old").await;
    other.register(Some(&key)).await;
    assert_eq!(server.core.find(&other.node_key).unwrap().1.name, "old");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn latencies_are_kept_and_told_nobody() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let (a, b) = (server.machine("a").await, server.machine("b").await);
    a.register(Some(&key)).await;
    b.register(Some(&key)).await;
    let mut stream = a.stream().await;
    stream.next().await.unwrap();
    let net_info = NetInfo { derp_latency: [("900-v4".to_owned(), 0.25)].into(), ..NetInfo::default() };
    let mut update = b.map_request(false);
    update.hostinfo = Some(Hostinfo { net_info: Some(net_info.clone()), ..b.hostinfo() });
    assert_eq!(b.lite(update.clone()).await, StatusCode::OK);
    assert_eq!(server.core.find(&b.node_key).unwrap().1.hostinfo.net_info, Some(net_info));
    update.endpoints = Some(vec!["192.0.2.9:1".parse().unwrap()]);
    assert_eq!(b.lite(update).await, StatusCode::OK);
    let frame = stream.next().await.unwrap();
    assert!(frame.peers_changed_patch.iter().any(|patch| patch.endpoints.is_some()), "{frame:?}");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_node_was_last_seen_survives_a_restart_of_the_server() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let a = server.machine("a").await;
    a.register(Some(&key)).await;
    let mut stream = a.stream().await;
    stream.next().await.unwrap();
    let server = Server::start_in(server.end().await).await;
    let node = server.core.find(&a.node_key).unwrap().1;
    assert!(!node.online && node.last_seen.is_some());
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_renews_its_own_key_with_the_single_use_key_that_it_joined_with() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(false)).await;
    let mut a = server.machine("a").await;
    a.register(Some(&key)).await;
    let before = server.core.find(&a.node_key).unwrap().1;
    a.node_key = NodePrivateKey::generate().public();
    assert_eq!(a.register(Some(&key)).await.error, "authkey already used");
    let renewal = RegisterRequest { old_node_key: before.node_key, ..a.register_request(Some(&key)) };
    assert_eq!(a.send(&renewal).await.error, "");
    assert_eq!(server.core.find(&a.node_key).unwrap().1.id, before.id);
    let thief = server.machine("thief").await;
    let stolen = RegisterRequest { old_node_key: a.node_key, ..thief.register_request(Some(&key)) };
    assert_eq!(thief.send(&stolen).await.error, "authkey already used");
    server.end().await;
}
