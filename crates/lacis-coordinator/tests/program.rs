//! The program itself: exit codes and what it prints.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_lacis-coordinator")).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

fn file(directory: &Path, text: &str) -> String {
    let path = directory.join("c.yaml");
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn check_says_yes_to_the_smallest_file() {
    let directory = tempfile::tempdir().unwrap();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/coordinator.yaml");
    let path = file(directory.path(), &std::fs::read_to_string(example).unwrap());
    assert_eq!(
        run(&["check", "--config", &path]),
        (0, format!("{path}: the configuration can be used\n"), String::new())
    );
}

#[test]
fn check_says_what_is_wrong_in_one_line_each_and_exits_78() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(
        directory.path(),
        "server_url: https://mesh.example.org\nlisten: [\"0.0.0.0:8080\"]\nstate_dir: /var/lib/x\n\
         tailnets:\n  lab: { domian: lab.example.org }\nmetrics: 3\n",
    );
    let (code, out, errors) = run(&["check", "--config", &path]);
    assert_eq!((code, out.as_str()), (78, ""));
    assert_eq!(
        errors.lines().next().unwrap(),
        format!(
            "lacis-coordinator: {path}:5:10: /tailnets/lab/domian: unknown key, did you mean \"domain\"?"
        )
    );
    assert_eq!(errors.lines().count(), 2, "{errors}");
    let (code, _, errors) = run(&["serve", "--config", "/nonexistent.yaml"]);
    assert_eq!(code, 78);
    assert!(
        errors.starts_with("lacis-coordinator: cannot read the configuration /nonexistent.yaml"),
        "{errors}"
    );
}

#[test]
fn the_schema_is_printed_as_json() {
    let (code, out, _) = run(&["schema"]);
    assert_eq!(code, 0);
    let schema: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(schema["type"], "object");
    assert!(schema["properties"]["tailnets"]["additionalProperties"]["properties"]["domain"].is_object());
}

#[test]
fn a_corrupt_database_and_a_taken_port_end_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let config = |listen: &str| {
        format!(
            "server_url: https://mesh.example.org\nlisten: [\"{listen}\"]\nstate_dir: {}\nmetrics_listen: \"off\"\n\
             embedded_relay: {{ stun_listen: [] }}\ntailnets: {{ lab: {{ domain: lab.example.com }} }}\n",
            state.display()
        )
    };
    std::fs::create_dir(&state).unwrap();
    std::fs::write(state.join("coordinator.db"), "this is not a database, however long it may be").unwrap();
    let path = file(directory.path(), &config("127.0.0.1:0"));
    let (code, _, errors) = run(&["serve", "--config", &path]);
    let last = errors.lines().last().unwrap();
    assert_eq!(code, 1, "{errors}");
    assert!(
        last.starts_with("lacis-coordinator: the database") && last.contains("coordinator.db"),
        "{errors}"
    );

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let path = file(directory.path(), &config(&taken.local_addr().unwrap().to_string()));
    let (code, _, errors) = run(&["serve", "--config", &path]);
    assert_eq!(code, 1);
    assert!(
        errors.lines().last().unwrap().starts_with("lacis-coordinator: cannot listen on 127.0.0.1:"),
        "{errors}"
    );
}

#[test]
fn files_that_the_configuration_names_may_come_later() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().display();
    let text = |more: &str| {
        format!(
            "server_url: https://mesh.example.org\nlisten: [\"127.0.0.1:0\"]\nstate_dir: {at}/state\nmetrics_listen: \"off\"\n\
             embedded_relay: {{ stun_listen: [] }}\n{more}\n"
        )
    };
    // The cause is said, and the service manager tries again: 78 would be final.
    let ends_with_1 = |config: &str, causes: &[&str]| {
        let (code, _, errors) = run(&["serve", "--config", &file(directory.path(), config)]);
        assert_eq!(code, 1, "{errors}");
        for cause in causes {
            assert!(errors.lines().any(|line| line.contains(cause)), "no {cause:?}: {errors}");
        }
    };
    let tls = text(&format!(
        "tls: {{ cert_file: {at}/cert.pem, key_file: {at}/key.pem }}\ntailnets: {{ lab: {{ domain: lab.example.com }} }}"
    ));
    ends_with_1(&tls, &["cert.pem: No such file"]);
    std::fs::write(directory.path().join("cert.pem"), "").unwrap();
    ends_with_1(&tls, &["cert.pem: it holds no certificate"]);
    let policy =
        format!("tailnets: {{ lab: {{ domain: lab.example.com, policy: {{ path: {at}/policy }} }} }}");
    ends_with_1(&text(&policy), &["policy: No such file"]);
    std::fs::write(directory.path().join("policy"), "{ \"acls\": 7 }").unwrap();
    let (code, _, errors) = run(&["serve", "--config", &file(directory.path(), &text(&policy))]);
    assert_eq!(code, 78, "what is in it does not heal: {errors}");
}
