//! What is acknowledged is kept: two administrators at once, a kill between, a clean stop, and state directories in
//! which something is missing.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;
use std::time::Duration;

use common::program::{Api, Program, command};
use common::{Machine, PATIENCE, Server, of_alice};
use lacis_coordinator::store::{Loaded, NodeRow, Store};
use lacis_wire::control::MapRequest;
use lacis_wire::key::{MachinePrivateKey, NodePrivateKey};
use rustix::process::{Resource, Rlimit, prlimit};
use serde_json::{Value, json};

/// What a copy of these files of the database has.
async fn copied(state: &Path, files: &[&str]) -> Loaded {
    let copy = tempfile::tempdir().unwrap();
    for file in files {
        // There may be no write-ahead log.
        let _ = std::fs::copy(state.join(file), copy.path().join(file));
    }
    let (store, loaded) = Store::open(copy.path().join(files[0])).await.unwrap();
    store.close().await.unwrap();
    loaded
}

/// What the disk has, as a killed program would find it.
async fn on_disk(state: &Path) -> Loaded {
    copied(state, &["coordinator.db", "coordinator.db-wal"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_administrators_at_once_both_have_their_change_on_disk() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    for round in 0..5_u8 {
        let machine = server.machine(&format!("host{round}")).await;
        assert_eq!(machine.register(Some(&key)).await.error, "");
        let node = server.core.find(&machine.node_key).unwrap().1;
        let route = format!("10.{round}.0.0/16").parse().unwrap();
        let (name, tags, routes) = (format!("web{round}"), ["tag:web".to_owned()], [route]);
        let (renamed, tagged, routed, expired) = tokio::join!(
            server.core.rename_node(&lab, &node, &name),
            server.core.set_tags(&lab, &node, &tags),
            server.core.approve_routes(&lab, &node, &routes),
            server.core.expire(&lab, &node, 1),
        );
        renamed.unwrap();
        tagged.unwrap();
        routed.unwrap();
        expired.unwrap();
        let rows = on_disk(&server.state()).await.nodes;
        let row = rows.iter().find(|row| row.id == node.id.0).unwrap();
        assert_eq!((row.name.as_str(), row.name_is_given), (name.as_str(), true));
        assert_eq!((&row.record.tags[..], row.user), (&tags[..], None));
        assert_eq!(row.approved_routes, routes);
        assert_eq!(row.record.key_expiry, Some(1));
        assert_eq!(*row, server.core.find(&machine.node_key).unwrap().1.row("lab"));
    }
    server.end().await;
}

/// A node that signs in again while an administrator changes it: neither undoes the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_changes_its_key_keeps_what_an_administrator_changes_at_once() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    let mut machine = server.machine("host").await;
    machine.register(Some(&key)).await;
    for round in 0..10_u8 {
        let node = server.core.find(&machine.node_key).unwrap().1;
        machine.node_key = NodePrivateKey::generate().public();
        let routes = [format!("10.{round}.0.0/16").parse().unwrap()];
        let (reply, approved) =
            tokio::join!(machine.register(Some(&key)), server.core.approve_routes(&lab, &node, &routes),);
        assert_eq!(reply.error, "");
        approved.unwrap();
        let row = on_disk(&server.state()).await.nodes.remove(0);
        assert_eq!((row.node_key, &row.approved_routes[..]), (machine.node_key, &routes[..]));
        assert_eq!(server.core.find(&machine.node_key).unwrap().1.approved, routes);
    }
    server.end().await;
}

/// Makes a user, a key for any number of nodes, and this many nodes; returns the key and the nodes.
async fn fill(program: &Program, nodes: usize) -> (String, Vec<Machine>) {
    program.api.ok("POST", "/tailnets/lab/users", json!({ "name": "alice" })).await;
    let wish = json!({ "user": "alice", "reusable": true });
    let key = program.api.ok("POST", "/tailnets/lab/keys", wish).await;
    let key = key["key"].as_str().unwrap().to_owned();
    let mut machines = Vec::new();
    for number in 0..nodes {
        let node_key = NodePrivateKey::generate().public();
        let hostname = format!("host{number}");
        let machine =
            Machine::dial_to(program.address, MachinePrivateKey::generate(), node_key, &hostname).await;
        assert_eq!(machine.register(Some(&key)).await.error, "");
        machines.push(machine);
    }
    (key, machines)
}

/// The last value that was acknowledged, and the one that was asked for when the program was killed.
type Values = (Value, Value);

/// Asks for one value after another until the program is gone.
async fn keep_changing(
    api: Api,
    path: String,
    body: impl Fn(&Value) -> Value,
    value: impl Fn(u32) -> Value,
) -> Values {
    let mut acknowledged = Value::Null;
    for number in 0.. {
        let next = value(number);
        match api.send("POST", &path, body(&next)).await {
            Ok((200, _)) => acknowledged = next,
            Ok((status, answer)) => panic!("{path}: {status} {answer}"),
            Err(_) => return (acknowledged, next),
        }
    }
    unreachable!()
}

fn is_one_of(found: &Value, (acknowledged, asked): &Values) -> bool {
    found == acknowledged || found == asked
}

#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_change_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::start(folder.path()).await;
    fill(&program, 2).await;
    let mut running = Some(program);
    for round in 0..4_u64 {
        let program = match running.take() {
            Some(program) => program,
            None => Program::start(folder.path()).await,
        };
        let mut changes = Vec::new();
        for id in 1..=2 {
            let path = |rest: &str| format!("/tailnets/lab/nodes/{id}/{rest}");
            let api = || program.api.clone();
            changes.push((
                tokio::spawn(keep_changing(
                    api(),
                    path("tags"),
                    |tag| json!({ "tags": [tag] }),
                    move |n| json!(format!("tag:r{round}n{n}")),
                )),
                tokio::spawn(keep_changing(
                    api(),
                    path("approve-routes"),
                    |route| json!({ "routes": [route] }),
                    move |n| json!(format!("10.{}.{}.0/24", n / 256 % 256, n % 256)),
                )),
                tokio::spawn(keep_changing(
                    api(),
                    path("rename"),
                    |name| json!({ "name": name }),
                    move |n| json!(format!("node{id}-{round}-{n}")),
                )),
            ));
        }
        // At another moment each time.
        tokio::time::sleep(Duration::from_millis(250 + 37 * round)).await;
        program.kill();
        let rows = on_disk(&folder.path().join("state")).await.nodes;
        for (row, (tags, routes, names)) in rows.iter().zip(changes) {
            let found =
                |values: &Values, found: Value| assert!(is_one_of(&found, values), "{found}: {values:?}");
            found(&tags.await.unwrap(), json!(row.record.tags[0]));
            found(&routes.await.unwrap(), json!(row.approved_routes[0].to_string()));
            found(&names.await.unwrap(), json!(row.name));
        }
    }
    // And it starts from there.
    let program = Program::start(folder.path()).await;
    let nodes = program.api.ok("GET", "/tailnets/lab/nodes", Value::Null).await;
    let rows = on_disk(&folder.path().join("state")).await.nodes;
    let name = |row: &NodeRow| row.name.clone();
    let listed: Vec<_> =
        nodes.as_array().unwrap().iter().map(|node| node["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(listed, rows.iter().map(name).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_stop_with_connected_clients_the_one_file_has_everything() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::start(folder.path()).await;
    let (_, machines) = fill(&program, 3).await;
    let mut streams = Vec::new();
    for machine in &machines {
        let mut stream = machine.stream().await;
        stream.next().await.unwrap();
        streams.push(stream);
    }
    // What may be written later is written before the end.
    let endpoint = "192.0.2.9:41641".parse().unwrap();
    let update = MapRequest { endpoints: Some(vec![endpoint]), ..machines[0].map_request(false) };
    assert!(machines[0].lite(update).await.is_success());
    // A client without a key waits for somebody, and another says nothing at all.
    let waiting = Machine::dial_to(
        program.address,
        MachinePrivateKey::generate(),
        NodePrivateKey::generate().public(),
        "w",
    )
    .await;
    let followup = waiting.register(None).await.auth_url;
    let request = lacis_wire::control::RegisterRequest { followup, ..waiting.register_request(None) };
    let waits = tokio::spawn(async move {
        let request = lacis_wire::control::to_json(&request);
        let _ = waiting.client.post("/machine/register", request).await;
    });
    let _silent = tokio::net::TcpStream::connect(program.address).await.unwrap();

    let (status, took) = program.terminate().await;
    assert!(status.success(), "{status}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    for mut stream in streams {
        while stream.next().await.is_some() {}
    }
    waits.await.unwrap();
    let state = folder.path().join("state");
    let left = std::fs::metadata(state.join("coordinator.db-wal")).map_or(0, |log| log.len());
    assert_eq!(left, 0, "everything is in the file");
    let loaded = copied(&state, &["coordinator.db"]).await;
    assert_eq!((loaded.users.len(), loaded.keys.len(), loaded.nodes.len()), (1, 1, 3));
    assert_eq!(loaded.nodes[0].record.endpoints, [endpoint]);
    assert!(loaded.nodes.iter().all(|node| node.record.last_seen.is_some()));
}

/// Starts it where something is missing: it must end at once, in one line that says what.
fn refused(folder: &Path, words: &[&str]) {
    let output = command(folder).output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    let last = errors.lines().last().unwrap();
    assert_eq!(output.status.code(), Some(78), "{errors}");
    for word in words.iter().copied().chain(["lacis-coordinator: ", "backup", "--init"]) {
        assert!(last.contains(word), "{word} is missing: {errors}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_state_directory_is_begun_without_being_asked_and_may_stay_empty() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        assert!(Program::start(folder.path()).await.terminate().await.0.success());
    }
    // A first start that ended between the database and the key is begun again.
    std::fs::remove_file(folder.path().join("state/noise.key")).unwrap();
    std::fs::remove_file(folder.path().join("state/relay.key")).unwrap();
    assert!(Program::start(folder.path()).await.terminate().await.0.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_without_its_database_is_refused_unless_that_is_meant() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let database = state.join("coordinator.db");
    let program = Program::start(folder.path()).await;
    fill(&program, 1).await;
    program.kill();
    let whole = std::fs::read(&database).unwrap();
    let log = std::fs::read(state.join("coordinator.db-wal")).unwrap();
    let named = ["coordinator.db", "noise.key"];

    // The file alone, copied while the program ran: everything is in the log.
    assert_eq!(whole.len(), 4096);
    std::fs::remove_file(state.join("coordinator.db-wal")).unwrap();
    refused(folder.path(), &named);
    std::fs::write(&database, "").unwrap();
    refused(folder.path(), &named);
    std::fs::remove_file(&database).unwrap();
    refused(folder.path(), &named);
    assert!(!database.exists());

    // What was missing is put back.
    std::fs::write(&database, &whole).unwrap();
    std::fs::write(state.join("coordinator.db-wal"), &log).unwrap();
    let program = Program::start(folder.path()).await;
    let nodes = program.api.ok("GET", "/tailnets/lab/nodes", Value::Null).await;
    assert_eq!(nodes.as_array().unwrap().len(), 1);
    assert!(program.terminate().await.0.success());

    // Or the loss is meant.
    std::fs::remove_file(&database).unwrap();
    let key = std::fs::read(state.join("noise.key")).unwrap();
    let program = Program::start_with(folder.path(), &["--init"]).await;
    assert_eq!(program.api.ok("GET", "/tailnets/lab/nodes", Value::Null).await, json!([]));
    assert!(program.terminate().await.0.success());
    assert_eq!(std::fs::read(state.join("noise.key")).unwrap(), key);
    assert!(Program::start(folder.path()).await.terminate().await.0.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_nodes_and_without_the_control_key_is_refused_unless_that_is_meant() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("state/noise.key");
    let program = Program::start(folder.path()).await;
    fill(&program, 1).await;
    assert!(program.terminate().await.0.success());
    let before = std::fs::read(&key).unwrap();
    std::fs::remove_file(&key).unwrap();
    refused(folder.path(), &["noise.key", "1 nodes"]);
    assert!(!key.exists());
    let program = Program::start_with(folder.path(), &["--init"]).await;
    let nodes = program.api.ok("GET", "/tailnets/lab/nodes", Value::Null).await;
    assert_eq!(nodes.as_array().unwrap().len(), 1);
    assert!(program.terminate().await.0.success());
    assert_ne!(std::fs::read(&key).unwrap(), before);
}

/// Is it healthy, as a monitor asks?
async fn is_healthy(program: &Program) -> bool {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(program.address).await.unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer.starts_with("HTTP/1.1 200")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_takes_no_more_is_not_healthy_until_it_does_again() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::start(folder.path()).await;
    assert!(is_healthy(&program).await);
    let (key, _) = fill(&program, 0).await;
    // No page fits; what the program logs does.
    let page = 4096;
    let limit = |bytes| {
        prlimit(Some(program.pid()), Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
    };
    limit(Some(page));
    assert!(!is_healthy(&program).await);
    let user = || program.api.send("POST", "/tailnets/lab/users", json!({ "name": "bob" }));
    // Again and again: what is refused does not make the next be taken and forgotten.
    for _ in 0..3 {
        let (status, answer) = user().await.unwrap();
        assert_eq!(status, 500, "{answer}");
        assert!(!is_healthy(&program).await);
    }
    let node_key = NodePrivateKey::generate().public();
    let machine = Machine::dial_to(program.address, MachinePrivateKey::generate(), node_key, "host").await;
    let refused = machine.register(Some(&key)).await.error;
    assert!(refused.contains("the coordinator's log"), "{refused}");
    let url = machine.register(None).await.auth_url;
    let id = url.rsplit('/').next().unwrap();
    let approval = json!({ "tailnet": "lab", "user": "alice" });
    let (status, answer) =
        program.api.send("POST", &format!("/registrations/{id}/approve"), approval.clone()).await.unwrap();
    let cause = "the database refused a change: ";
    assert!(status == 500 && answer["error"].as_str().unwrap().starts_with(cause), "{status} {answer}");
    // Each has its cause in the log, where an administrator is sent to look.
    let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
    for what in [
        "registration failed",
        "path=\"/health\" status=500",
        "path=\"/admin/v1/tailnets/{tailnet}/users\" status=500",
        "path=\"/admin/v1/registrations/{id}/approve\" status=500",
    ] {
        let line = log.lines().find(|line| line.contains(what) && line.contains("ERROR"));
        assert!(line.is_some_and(|line| line.contains(cause)), "{what}: {log}");
    }
    assert!(!log.contains(&key), "{log}");
    limit(None);
    assert!(is_healthy(&program).await);
    assert_eq!(user().await.unwrap().0, 200);
    program.kill();
    assert_eq!(on_disk(&folder.path().join("state")).await.users.len(), 2);
}
