//! Policies: who sees whom, how a policy is set, refused, followed and remembered, and who gets which tags.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;
use std::time::Duration;

use common::{Machine, PATIENCE, Server};
use http::StatusCode;
use lacis_coordinator::store::{PolicyRow, Store, Write};
use lacis_policy::Role;
use lacis_wire::admin::{ChangeUser, CreateKey, PolicyFormat, SetPolicy};
use lacis_wire::control::{Lenient, MapResponse, Node, NodeId};

const APART: &str = r#"{
  // each to themselves
  "acls": [
    {"action": "accept", "src": ["alice@"], "dst": ["alice@:*"]},
    {"action": "accept", "src": ["bob@"], "dst": ["bob@:*"]},
  ],
}
"#;

fn hujson(text: &str) -> SetPolicy {
    SetPolicy { text: text.into(), format: PolicyFormat::Hujson, name: Some("p.hujson".into()) }
}

async fn set(server: &Server, text: &str) -> Result<(), String> {
    let lab = server.core.tailnet("lab").unwrap();
    server.core.set_policy(lab, &hujson(text)).await.map(drop).map_err(|error| error.to_string())
}

/// A machine of a user, joined.
async fn machine_of(server: &Server, user: &str, hostname: &str) -> Machine {
    let key = server.key("lab", CreateKey { user: Some(user.into()), ..CreateKey::default() }).await;
    let machine = server.machine(hostname).await;
    assert_eq!(machine.register(Some(&key)).await.error, "");
    machine
}

fn id(server: &Server, machine: &Machine) -> NodeId {
    server.core.find(&machine.node_key).unwrap().1.id
}

fn peers(frame: &MapResponse) -> Vec<&str> {
    frame.peers.iter().map(|peer| peer.name.split('.').next().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_takes_peers_away_and_gives_them_back_in_one_frame_each() {
    let server = Server::start().await;
    let (a, b) = (machine_of(&server, "alice", "a").await, machine_of(&server, "bob", "b").await);
    let mut stream = a.stream().await;
    let first = stream.next().await.unwrap();
    assert_eq!(peers(&first), ["b"]);
    assert_eq!(first.user_profiles.len(), 2);

    set(&server, APART).await.unwrap();
    let frame = stream.next().await.unwrap();
    assert_eq!(frame.peers_removed, [id(&server, &b)]);
    let rules = frame.packet_filters.unwrap()["base"].clone().unwrap();
    assert!(rules.iter().all(|rule| rule.src_ips.iter().all(|ip| ip != "*")), "{rules:?}");

    // What is not seen is not heard of either.
    let mut moved = b.map_request(false);
    moved.endpoints = Some(vec!["192.0.2.9:41641".parse().unwrap()]);
    assert_eq!(b.lite(moved).await, StatusCode::OK);
    let another = machine_of(&server, "alice", "c").await;
    let frame = stream.next().await.unwrap();
    assert_eq!(frame.peers_changed[0].id, id(&server, &another), "{frame:?}");
    assert!(frame.peers_changed_patch.is_empty());
    let whole = machine_of(&server, "alice", "d").await.stream().await.next().await.unwrap();
    assert_eq!(peers(&whole), ["a", "c"]);
    let profiles: Vec<_> = whole.user_profiles.iter().map(|user| user.login_name.as_str()).collect();
    assert_eq!(profiles, ["alice"]);

    let lab = server.core.tailnet("lab").unwrap().clone();
    server.core.delete_policy(&lab).await.unwrap();
    let is_b = |peer: &&Node| peer.key == b.node_key;
    let back = stream.until(|frame| frame.peers_changed.iter().any(|peer| is_b(&peer))).await;
    assert!(back.packet_filters.is_some());
    let back = back.peers_changed.iter().find(is_b).unwrap();
    assert_eq!(back.endpoints[0].port(), 41641, "as it is now");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_cannot_be_used_is_refused_whole_with_its_place() {
    let server = Server::start().await;
    let (a, b) = (machine_of(&server, "alice", "a").await, machine_of(&server, "bob", "b").await);
    let rules = || server.core.tailnet("lab").unwrap().snapshot().rules;
    let before = rules();
    let syntax = set(&server, "{\n  \"acls\": [\n    }\n").await.unwrap_err();
    assert!(syntax.starts_with("p.hujson:3:"), "{syntax}");
    let reference = APART.replace("\"src\": [\"bob@\"]", "\"src\": [\"group:nobody\"]");
    let reference = set(&server, &reference).await.unwrap_err();
    assert!(reference.starts_with("p.hujson:5:") && reference.contains("group:nobody"), "{reference}");
    // Its own tests hold it against the nodes that there are.
    let tests = r#", "tests": [{"src": "bob@", "accept": ["ADDRESS:22"]}]}"#;
    let address = server.core.find(&a.node_key).unwrap().1.v4.to_string();
    let tested = APART.trim_end().trim_end_matches('}').trim_end().trim_end_matches(',').to_owned()
        + &tests.replace("ADDRESS", &address);
    let refused = set(&server, &tested).await.unwrap_err();
    assert!(refused.starts_with("p.hujson:") && refused.contains(&address), "{refused}");
    assert_eq!(rules(), before, "nothing has changed");
    assert_eq!(peers(&b.stream().await.next().await.unwrap()), ["a"]);

    let lab = server.core.tailnet("lab").unwrap();
    assert!(server.core.check_policy(lab, &hujson(&tested)).is_err());
    assert!(server.core.check_policy(lab, &hujson(APART)).is_ok());
    assert_eq!(rules(), before, "checking sets nothing");
    assert!(server.core.policy(lab).text.is_none());
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_in_the_database_survives_a_restart_and_one_that_is_broken_there_closes_everything() {
    let server = Server::start().await;
    let (a, _b) = (machine_of(&server, "alice", "a").await, machine_of(&server, "bob", "b").await);
    set(&server, APART).await.unwrap();
    let state = server.end().await;
    let server = Server::start_in(state).await;
    let info = server.core.policy(server.core.tailnet("lab").unwrap());
    assert_eq!(info.text.as_deref(), Some(APART));
    let again = |server: &Server| {
        let address = server.address;
        let (machine, key) = (a.machine.clone(), a.node_key);
        async move { Machine::dial_to(address, machine, key, "a").await }
    };
    assert!(peers(&again(&server).await.stream().await.next().await.unwrap()).is_empty());

    let state = server.end().await;
    let (store, _) = Store::open(state.path().join("state/coordinator.db")).await.unwrap();
    let broken = PolicyRow {
        tailnet: "lab".into(),
        text: "{ \"acls\": 7 }".into(),
        format: "hujson".into(),
        changed: 1,
    };
    store.commit(vec![Write::SetPolicy(broken)]).await.unwrap();
    drop(store);
    let server = Server::start_in(state).await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    let info = server.core.policy(&lab);
    assert_eq!(info.text.as_deref(), Some("{ \"acls\": 7 }"), "it can be read to be mended");
    assert!(info.trouble.unwrap().starts_with("1:"));
    let first = again(&server).await.stream().await.next().await.unwrap();
    assert!(first.peers.is_empty());
    assert_eq!(first.packet_filters.unwrap()["base"], Some(Lenient::default()));
    server.core.delete_policy(&lab).await.unwrap();
    assert_eq!(peers(&again(&server).await.stream().await.next().await.unwrap()), ["b"]);
    server.end().await;
}

/// As editors do it.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_file_is_followed_and_one_that_breaks_leaves_the_old_one() {
    let state = tempfile::tempdir().unwrap();
    let file = state.path().join("policy.hujson");
    let members = format!(", policy: {{ path: {} }}", file.display());
    std::fs::write(&file, "{\"acls\": 7}").unwrap();
    let error = Server::start_with(state, &members).await.unwrap_err();
    assert!(error.is_config());
    assert!(error.to_string().contains("policy.hujson:1:"), "{error}");

    let state = tempfile::tempdir().unwrap();
    let file = state.path().join("policy.hujson");
    let members = format!(", policy: {{ path: {} }}", file.display());
    std::fs::write(&file, "{}").unwrap();
    let server = Server::start_with(state, &members).await.unwrap();
    let lab = server.core.tailnet("lab").unwrap().clone();
    let (a, b) = (machine_of(&server, "alice", "a").await, machine_of(&server, "bob", "b").await);
    let mut stream = a.stream().await;
    assert_eq!(peers(&stream.next().await.unwrap()), ["b"]);
    assert!(set(&server, APART).await.unwrap_err().contains("policy.hujson"), "the file decides");

    replace(&file, APART);
    let frame = tokio::time::timeout(PATIENCE, stream.until(|frame| !frame.peers_removed.is_empty()));
    assert_eq!(frame.await.unwrap().peers_removed, [id(&server, &b)]);

    replace(&file, "{\n\"acls\": [{\"action\": \"accept\", \"src\": [\"group:x\"], \"dst\": [\"*:*\"]}]}");
    let trouble = async {
        loop {
            if let Some(trouble) = server.core.policy(&lab).trouble {
                return trouble;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let trouble = tokio::time::timeout(PATIENCE, trouble).await.unwrap();
    assert!(trouble.contains("policy.hujson:2:") && trouble.contains("group:x"), "{trouble}");
    assert_eq!(server.core.policy(&lab).text.as_deref(), Some(APART));
    assert!(server.core.reload_policy(&lab).await.is_err());
    std::fs::write(&file, APART).unwrap();
    assert!(server.core.reload_policy(&lab).await.unwrap().trouble.is_none());
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_in_the_configuration_is_replaced_by_a_newer_one() {
    let apart = ", policy: { acls: [{ action: accept, src: [alice@], dst: ['alice@:*'] }] }";
    let server = Server::start_with(tempfile::tempdir().unwrap(), apart).await.unwrap();
    let (a, _b) = (machine_of(&server, "alice", "a").await, machine_of(&server, "bob", "b").await);
    let mut stream = a.stream().await;
    assert!(stream.next().await.unwrap().peers.is_empty());
    let lab = server.core.tailnet("lab").unwrap().clone();
    let written = std::sync::Arc::new(std::sync::Mutex::new(Err("c.yaml:3:1: no such key".to_owned())));
    server.core.read_configuration_by({
        let written = std::sync::Arc::clone(&written);
        move || written.lock().unwrap().clone()
    });
    let write = |policy: &str| {
        *written.lock().unwrap() = Ok(common::config(Path::new("/unused"), policy).core().tailnets);
    };
    let refused = server.core.reload_policy(&lab).await.unwrap_err().to_string();
    assert!(refused.contains("c.yaml:3:1"), "{refused}");
    write(
        ", policy: { acls: [{ action: accept, src: ['*'], dst: ['*:*'] }], tests: [{ src: bob@, deny: ['alice@:80'] }] }",
    );
    let refused = server.core.reload_policy(&lab).await.unwrap_err().to_string();
    assert!(refused.contains("alice@:80"), "{refused}");
    write(", policy: { acls: [{ action: accept, src: ['*'], dst: ['*:*'] }] }");
    server.core.reload_policies().await;
    let frame = stream.until(|frame| !frame.peers_changed.is_empty()).await;
    assert_eq!(frame.peers_changed[0].name, "b.lab.example.com.");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ssh_rules_reach_the_node_that_they_are_for() {
    let server = Server::start().await;
    let (a, b) = (machine_of(&server, "alice", "a").await, machine_of(&server, "bob", "b").await);
    let mut stream = b.stream().await;
    assert!(stream.next().await.unwrap().ssh_policy.is_none());
    let text = r#"{
      "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
      "ssh": [{"action": "accept", "src": ["bob@"], "dst": ["bob@"], "users": ["root"]}],
    }"#;
    set(&server, text).await.unwrap();
    let frame = stream.until(|frame| frame.ssh_policy.is_some()).await;
    assert_eq!(ssh_rules(&frame).len(), 1);
    let of_a = a.stream().await.next().await.unwrap();
    assert!(of_a.ssh_policy.is_none(), "{of_a:?}");
    set(&server, &text.replace("bob@", "alice@")).await.unwrap();
    let frame = stream.until(|frame| frame.ssh_policy.is_some()).await;
    assert_eq!(ssh_rules(&frame).len(), 0);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_are_given_to_whom_the_policy_lets_and_by_hand() {
    let server = Server::start().await;
    let mut web = machine_of(&server, "alice", "web").await;
    let mut bad = server.machine("bad").await;
    bad.tags = vec!["tag:web".into()];
    let alices = CreateKey { user: Some("alice".into()), reusable: true, ..CreateKey::default() };
    let alices = server.key("lab", alices).await;
    let refusal = "requested tags [tag:web] are invalid or not permitted";
    assert_eq!(bad.register(Some(&alices)).await.error, refusal, "without a policy nobody owns tags");
    let owners = r#"{"acls": [], "tagOwners": {"tag:web": ["alice@"], "tag:db": []}}"#;
    set(&server, owners).await.unwrap();
    let bobs = server.key("lab", CreateKey { user: Some("bob".into()), ..CreateKey::default() }).await;
    assert_eq!(bad.register(Some(&bobs)).await.error, refusal);
    bad.tags = vec!["tag:web".into(), "tag:db".into()];
    assert_eq!(
        bad.register(Some(&alices)).await.error,
        "requested tags [tag:db] are invalid or not permitted"
    );

    // A node of alice's becomes a tagged one, and stays the same node.
    let before = id(&server, &web);
    web.tags = vec!["tag:web".into()];
    assert_eq!(web.register(Some(&alices)).await.error, "");
    let node = server.core.find(&web.node_key).unwrap().1;
    assert_eq!((node.id, node.user, node.tags.as_slice()), (before, None, &["tag:web".to_owned()][..]));
    assert_eq!(web.register(Some(&alices)).await.error, "", "and comes back");

    // By an administrator's approval.
    let mut waiting = server.machine("waiting").await;
    waiting.tags = vec!["tag:web".into()];
    let lab = server.core.tailnet("lab").unwrap().clone();
    let url = waiting.register(None).await.auth_url;
    let error = server.core.approve_registration(&url, &lab, "bob").await.unwrap_err();
    assert_eq!(error.to_string(), refusal);
    assert_eq!(server.core.approve_registration(&url, &lab, "alice").await.unwrap().tags, ["tag:web"]);

    // By hand.
    let b = machine_of(&server, "bob", "b").await;
    let node = server.core.find(&b.node_key).unwrap().1;
    let error = server.core.set_tags(&lab, &node, &["tag:typo".into()]).await.unwrap_err();
    assert!(error.to_string().contains("tag:typo"), "{error}");
    let info = server.core.set_tags(&lab, &node, &["tag:db".into(), "tag:db".into()]).await.unwrap();
    assert_eq!((info.tags, info.user), (vec!["tag:db".to_owned()], None));
    let server = Server::start_in(server.end().await).await;
    assert_eq!(server.core.find(&b.node_key).unwrap().1.tags, ["tag:db"]);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_to_be_checked_waits_for_an_administrator() {
    let server = Server::start().await;
    let (a, b) = (machine_of(&server, "alice", "a").await, machine_of(&server, "alice", "b").await);
    let text = r#"{
      "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
      "ssh": [{"action": "check", "src": ["alice@"], "dst": ["alice@"], "users": ["root"]}],
    }"#;
    set(&server, text).await.unwrap();
    let first = b.stream().await.next().await.unwrap();
    let action = &ssh_rules(&first)[0]["action"];
    assert!(action["accept"].is_null(), "{action}");
    let expand = |action: &serde_json::Value| {
        let url = action["holdAndDelegate"].as_str().unwrap().replace("http://mesh.example.org", "");
        url.replace("$SRC_NODE_ID", &id(&server, &a).to_string())
            .replace("$DST_NODE_ID", &id(&server, &b).to_string())
            .replace("$LOCAL_USER", "root")
    };
    let path = expand(action);
    assert!(a.get_json(&path).await.is_none(), "only the destination may ask");
    let waits = b.get_json(&path).await.unwrap();
    assert!(waits["message"].as_str().unwrap().contains("lacis admin ssh-checks approve"));
    let follow = expand(&waits);
    let decide = async |approve| {
        let checks = server.core.list_ssh_checks();
        assert_eq!(
            (checks[0].from.as_str(), checks[0].to.as_str(), checks[0].user.as_str()),
            ("a", "b", "root")
        );
        server.core.decide_ssh_check(&checks[0].id, approve).unwrap();
    };
    let (refused, ()) = tokio::join!(b.get_json(&follow), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        decide(false).await;
    });
    assert_eq!(refused.unwrap()["reject"], true);

    let waits = b.get_json(&path).await.unwrap();
    let follow = expand(&waits);
    let (accepted, ()) = tokio::join!(b.get_json(&follow), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        decide(true).await;
    });
    assert_eq!(accepted.unwrap()["accept"], true);
    assert_eq!(b.get_json(&path).await.unwrap()["accept"], true, "for a while");
    set(&server, &text.replace("root", "admin")).await.unwrap();
    assert_eq!(b.get_json(&path).await.unwrap()["reject"], true, "and no longer than the rule");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn new_nodes_get_addresses_from_the_pool_that_the_policy_names_for_them() {
    let server = Server::start().await;
    let v4 = |machine: &Machine| server.core.find(&machine.node_key).unwrap().1.v4.to_string();
    let before = machine_of(&server, "alice", "before").await;
    let text = r#"{
      "acls": [],
      "nodeAttrs": [{"target": ["alice@"], "ipPool": ["100.81.0.0/30"]}],
    }"#;
    set(&server, text).await.unwrap();
    assert_eq!(v4(&before), "100.64.0.1", "who is there keeps what it has");
    assert_eq!(v4(&machine_of(&server, "alice", "a").await), "100.81.0.1");
    assert_eq!(v4(&machine_of(&server, "bob", "b").await), "100.64.0.2");
    let second = machine_of(&server, "alice", "c").await;
    assert_eq!(v4(&second), "100.81.0.2");

    let key = server.key("lab", common::of_alice(false)).await;
    let late = server.machine("late").await;
    let refusal = late.register(Some(&key)).await.error;
    assert_eq!(refusal, "the policy's ipPool 100.81.0.0/30 has no free address");
    let (lab, node) = server.core.find(&second.node_key).unwrap();
    server.core.delete_node(&lab, &node).await.unwrap();
    assert_eq!(late.register(Some(&key)).await.error, "", "the refusal has not spent the key");
    assert_eq!(v4(&late), "100.81.0.2");
    drop((lab, node));
    server.end().await;
}

/// What the administration API answers on its socket.
async fn ask(state: &Path, method: &str, path: &str, body: &str) -> (u16, serde_json::Value) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::UnixStream::connect(state.join("admin.sock")).await.unwrap();
    let request = format!(
        "{method} {}{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        lacis_wire::admin::PREFIX,
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_and_email_addresses_make_a_policy_mean_somebody_at_once() {
    let server = Server::start().await;
    let (a, b) = (machine_of(&server, "alice", "a").await, machine_of(&server, "bob@example.org", "b").await);
    let text = r#"{
      "tagOwners": {"tag:web": ["autogroup:admin"]},
      "acls": [
        {"action": "accept", "src": ["autogroup:admin"], "dst": ["*:22"]},
        {"action": "accept", "src": ["ada@example.org"], "dst": ["bob@example.org:80"]},
      ],
    }"#;
    set(&server, text).await.unwrap();
    let mut stream = b.stream().await;
    let first = stream.next().await.unwrap();
    assert!(first.peers.is_empty() && first.node.is_some_and(|node| is_admin(&node)), "nobody has a role");

    let lab = server.core.tailnet("lab").unwrap().clone();
    let mail = ChangeUser { email: Some("ada@example.org".into()), roles: None };
    server.core.change_user(&lab, "alice", &mail).await.unwrap();
    let frame = stream.next().await.unwrap();
    assert_eq!(frame.peers_changed[0].id, id(&server, &a));
    assert_eq!(ports(&frame), [80]);

    let alice = "/tailnets/lab/users/alice";
    let state = server.state();
    let (status, info) = ask(&state, "PATCH", alice, r#"{"roles": ["auditor", "admin"]}"#).await;
    assert_eq!((status, &info["email"]), (200, &"ada@example.org".into()), "{info}");
    assert_eq!(info["roles"], serde_json::json!(["admin", "auditor"]));
    let frame = stream.next().await.unwrap();
    assert_eq!(ports(&frame), [22, 80]);
    assert!(frame.node.is_some_and(|node| !is_admin(&node)), "now there is one, and it is another");
    let mut web = server.machine("web").await;
    web.tags = vec!["tag:web".into()];
    let key = server.key("lab", common::of_alice(false)).await;
    assert_eq!(web.register(Some(&key)).await.error, "");

    for (method, path, body, status, said) in [
        ("PATCH", alice, r#"{"roles": ["root"]}"#, 400, "owner, admin, network-admin"),
        ("PATCH", alice, r#"{"email": "Bob@Example.org"}"#, 409, "bob@example.org"),
        ("PATCH", alice, r#"{"email": "alice"}"#, 400, "email address"),
        ("PATCH", "/tailnets/lab/users/nobody", "{}", 404, "nobody"),
        ("POST", "/tailnets/lab/users", r#"{"name": "ADA@example.org"}"#, 409, "alice"),
        ("POST", "/tailnets/lab/users", r#"{"name": "c", "email": "ada@example.ORG"}"#, 409, "alice"),
    ] {
        let (code, answer) = ask(&state, method, path, body).await;
        assert_eq!(code, status, "{answer}");
        assert!(answer["error"].as_str().unwrap().contains(said), "{answer}");
    }

    let server = Server::start_in(server.end().await).await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    let users = server.core.population(&lab).users;
    assert_eq!(users[0].email.as_deref(), Some("ada@example.org"));
    assert_eq!(users[0].roles, [Role::Admin, Role::Auditor]);
    assert_eq!((&users[1].email, users[1].roles.as_slice()), (&None, &[][..]));
    let nothing = ChangeUser { email: Some(String::new()), roles: Some(Vec::new()) };
    let info = server.core.change_user(&lab, "alice", &nothing).await.unwrap();
    assert_eq!((info.email, info.roles), (None, Vec::new()));
    server.end().await;
}

fn is_admin(node: &Node) -> bool {
    node.cap_map.contains_key("https://tailscale.com/cap/is-admin")
}

fn ssh_rules(frame: &MapResponse) -> Vec<serde_json::Value> {
    let policy: serde_json::Value =
        serde_json::from_str(frame.ssh_policy.as_ref().unwrap().as_str()).unwrap();
    policy["rules"].as_array().unwrap().clone()
}

/// The ports that a frame's filter opens, in their order.
fn ports(frame: &MapResponse) -> Vec<u16> {
    let rules = frame.packet_filters.as_ref().unwrap()["base"].clone().unwrap();
    let mut ports: Vec<_> =
        rules.iter().flat_map(|rule| rule.dst_ports.iter().map(|dst| dst.ports.first)).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}
