//! `lacis policy` as a program: what it prints and how it ends, on the example of the documentation and on small ones.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a run came to.
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

/// A folder with files to ask about.
struct Desk(tempfile::TempDir);

const NODES: &str = r#"{
  "users": [{"id": 1, "name": "alice@example.org"}, {"id": 2, "name": "bob@example.org"}],
  "nodes": [
    {"id": 1, "name": "alice-laptop", "user": 1, "v4": "100.64.0.1", "v6": "fd7a:115c:a1e0::1"},
    {"id": 2, "name": "alice-phone", "user": 1, "v4": "100.64.0.2", "v6": "fd7a:115c:a1e0::2"},
    {"id": 3, "name": "bob", "user": 2, "v4": "100.64.0.9", "v6": "fd7a:115c:a1e0::9"},
    {"id": 4, "name": "web", "tags": ["tag:web"], "v4": "100.64.0.4", "v6": "fd7a:115c:a1e0::4"},
    {"id": 5, "name": "gate", "tags": ["tag:gate"], "v4": "100.64.0.5", "advertised": ["10.0.0.0/24"]}
  ]
}"#;

const POLICY: &str = r#"{
  "tagOwners": {"tag:web": [], "tag:gate": []},
  "autoApprovers": {"routes": {"10.0.0.0/24": ["tag:gate"]}},
  "hosts": {"scope": "10.0.0.7"},
  // who may do what
  "acls": [
    {"action": "accept", "src": ["alice@example.org"], "dst": ["tag:web:443"]},
    {"action": "accept", "src": ["alice@example.org"], "dst": ["scope:5025"], "proto": "tcp"},
  ],
  "tests": [{"src": "alice@example.org", "accept": ["tag:web:443"]}],
}"#;

impl Desk {
    fn new() -> Self {
        let desk = Self(tempfile::tempdir().expect("a folder"));
        desk.file("nodes.json", NODES);
        desk.file("policy.hujson", POLICY);
        desk
    }

    fn file(&self, name: &str, text: &str) {
        std::fs::write(self.0.path().join(name), text).expect("a file");
    }

    fn run(&self, arguments: &str) -> Run {
        run(self.0.path(), arguments)
    }
}

fn run(folder: &Path, arguments: &str) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_lacis"))
        .arg("policy")
        .args(arguments.split_whitespace())
        .current_dir(folder)
        .output()
        .expect("lacis runs");
    Run {
        code: output.status.code().expect("it ended by itself"),
        stdout: String::from_utf8(output.stdout).expect("text"),
        stderr: String::from_utf8(output.stderr).expect("text"),
    }
}

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/policy")
}

#[test]
fn a_good_policy_is_fine_with_its_tests_or_without() {
    let desk = Desk::new();
    let run = desk.run("check policy.hujson --nodes nodes.json");
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert_eq!(run.stdout, "policy.hujson: fine, and its tests pass (5 nodes, 2 users)\n");
    let run = desk.run("check policy.hujson");
    assert_eq!(run.code, 0);
    assert!(run.stdout.contains("its tests were not run"), "{}", run.stdout);
}

#[test]
fn what_is_wrong_is_told_with_line_and_column_and_ends_with_1() {
    let desk = Desk::new();
    desk.file("syntax.hujson", "{\n  \"acls\": [1 2]\n}");
    let run = desk.run("check syntax.hujson");
    assert_eq!((run.code, run.stdout.as_str()), (1, ""));
    assert!(run.stderr.starts_with("syntax.hujson:2:"), "{}", run.stderr);

    desk.file(
        "name.hujson",
        &POLICY.replace(
            "\"src\": [\"alice@example.org\"], \"dst\": [\"tag:web:443\"]",
            "\"src\": [\"group:nobody\"], \"dst\": [\"tag:web:443\"]",
        ),
    );
    let run = desk.run("check name.hujson");
    assert_eq!(run.code, 1);
    assert!(
        run.stderr.starts_with("name.hujson:7:") && run.stderr.contains("group:nobody"),
        "{}",
        run.stderr
    );

    desk.file(
        "test.yaml",
        "acls: []\ntests:\n  - src: alice@example.org\n    accept: [\"100.64.0.4:443\"]\n",
    );
    assert_eq!(desk.run("check test.yaml").code, 0);
    let run = desk.run("check test.yaml --nodes nodes.json");
    assert_eq!((run.code, run.stdout.as_str()), (1, ""));
    assert!(run.stderr.starts_with("test.yaml:") && run.stderr.contains("test"), "{}", run.stderr);
}

#[test]
fn what_cannot_be_answered_ends_with_2() {
    let desk = Desk::new();
    desk.file("bad.yaml", "nodes: [{id: one}]\n");
    for arguments in [
        "check absent.hujson",
        "check policy.hujson --nodes absent.json",
        "check policy.hujson --nodes bad.yaml",
        "check policy.hujson --admin-socket absent.sock --tailnet x",
        "explain policy.hujson --nodes nodes.json --from nobody --to web --port 1",
        "explain policy.hujson --nodes nodes.json --from bob --to web",
        "show policy.hujson --nodes nodes.json --node absent",
    ] {
        let run = desk.run(arguments);
        assert_eq!((run.code, run.stdout.as_str()), (2, ""), "{arguments}");
        assert!(run.stderr.starts_with("lacis: "), "{}", run.stderr);
    }
}

#[test]
fn explain_names_the_rule_and_its_line_for_every_node_that_is_meant() {
    let run = Desk::new().run("explain policy.hujson --nodes nodes.json --from alice --to web --port 443");
    assert_eq!(run.code, 0, "{}", run.stderr);
    let rule = "  policy.hujson:7:5: acls[0]: alice@example.org -> tag:web:443: ";
    let lines: Vec<&str> = run.stdout.lines().collect();
    assert_eq!(lines.len(), 4, "{}", run.stdout);
    assert_eq!(lines[0], "alice-laptop -> web tcp/443: allowed");
    assert_eq!(lines[2], "alice-phone -> web tcp/443: allowed");
    assert!(lines[1].starts_with(rule) && lines[3].starts_with(rule), "{}", run.stdout);
}

#[test]
fn explain_says_why_nothing_does() {
    let desk = Desk::new();
    let run = desk.run("explain policy.hujson --nodes nodes.json --from alice-phone --to tag:web --port 80");
    assert_eq!(run.code, 0);
    assert!(
        run.stdout.starts_with("alice-phone -> web tcp/80: not allowed\n  policy.hujson:7:5: "),
        "{}",
        run.stdout
    );
    let run = desk.run("explain policy.hujson --nodes nodes.json --from bob --to web --port 443 --exit-code");
    assert_eq!(run.code, 1);
    assert_eq!(run.stdout, "bob -> web tcp/443: not allowed\n  no rule comes near it\n");
    let run =
        desk.run("explain policy.hujson --nodes nodes.json --from alice-phone --to scope --port 5025 --json");
    let answers: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!(answers[0]["allowed"], true);
    assert_eq!(answers[0]["because"][0]["line"], 8);
}

#[test]
fn explain_show_and_properties_agree_on_pings() {
    let desk = Desk::new();
    let explain = |what: &str| {
        desk.run(&format!("explain policy.hujson --nodes nodes.json --exit-code {what}")).code == 0
    };
    for to in ["web", "100.64.0.4", "fd7a:115c:a1e0::4", "tag:web"] {
        for proto in ["icmp", "ipv6-icmp", "1", "58"] {
            assert!(explain(&format!("--from alice-phone --to {to} --proto {proto}")), "{to} {proto}");
            assert!(!explain(&format!("--from bob --to {to} --proto {proto}")), "{to} {proto}");
        }
    }
    assert!(explain("--from alice-phone --to scope --proto icmp"));
    assert!(!explain("--from alice-phone --to web --proto gre"));
    assert!(!explain("--from alice-phone --to web --proto sctp --port 443"));
    let run = desk.run("show policy.hujson --nodes nodes.json --node gate");
    assert!(run.stdout.contains("10.0.0.7  tcp 5025; icmp\n"), "{}", run.stdout);
    for (property, fails) in [
        (r#""never": ["bob@example.org -> icmp tag:web:*"]"#, false),
        (r#""never": ["alice@example.org -> icmp tag:web:*"]"#, true),
        (r#""never": ["alice@example.org -> icmp scope:*"]"#, true),
        (r#""always": ["alice@example.org -> icmp tag:web:*"]"#, false),
        (r#""always": ["alice@example.org -> gre tag:web:*"]"#, true),
    ] {
        desk.file(
            "with.hujson",
            &POLICY.replace("\"tests\":", &format!("\"properties\": {{{property}}}, \"tests\":")),
        );
        let run = desk.run("check with.hujson --nodes nodes.json");
        assert_eq!(run.code == 1, fails, "{property}: {}{}", run.stdout, run.stderr);
    }
}

#[test]
fn explain_names_the_posture_that_is_missing() {
    let desk = Desk::new();
    let policy = r#"{
  "tagOwners": {"tag:web": []},
  "postures": {"posture:new": ["node:os == 'linux'", "node:tsVersion >= '1.80'"]},
  "ACLs": [
    {"action": "accept", "src": ["alice@example.org"], "srcPosture": ["posture:new"], "dst": ["tag:web:443"]},
  ],
}"#;
    desk.file("posture.hujson", policy);
    let posture = r#""posture": {"node:os": "linux", "node:tsVersion": "1.62"}, "v4": "100.64.0.2""#;
    desk.file("nodes.json", &NODES.replace(r#""v4": "100.64.0.2""#, posture));
    let explain = |from: &str| {
        desk.run(&format!("explain posture.hujson --nodes nodes.json --from {from} --to web --port 443"))
            .stdout
    };
    assert_eq!(
        explain("alice-phone"),
        "alice-phone -> web tcp/443: not allowed\n  posture.hujson:5:5: ACLs[0]: alice@example.org -> tag:web:443 \
         (posture:new): is about both; alice-phone does not fulfil posture:new (node:tsVersion >= '1.80')\n"
    );
    assert!(explain("bob").ends_with("  no rule comes near it\n"), "{}", explain("bob"));
    desk.file("nodes.json", &NODES.replace(r#""v4": "100.64.0.2""#, &posture.replace("1.62", "1.80.1")));
    assert!(explain("alice-phone").starts_with("alice-phone -> web tcp/443: allowed\n"));
}

#[test]
fn a_policy_without_rules_says_aloud_that_nothing_is_restricted() {
    let desk = Desk::new();
    for text in ["{}", r#"{"acls": null}"#, r#"{"ACLs": null, "grants": null}"#] {
        desk.file("open.hujson", text);
        let run = desk.run("check open.hujson");
        assert_eq!(run.code, 0);
        assert!(run.stderr.starts_with("open.hujson:1:1: warning: "), "{}", run.stderr);
        assert!(run.stderr.contains("everybody reaches everything"), "{}", run.stderr);
    }
    desk.file("closed.hujson", r#"{"acls": []}"#);
    assert_eq!(desk.run("check closed.hujson").stderr, "");
}

#[test]
fn diff_says_who_gains_and_who_loses() {
    let desk = Desk::new();
    let new = POLICY.replace("tag:web:443\"]},", "tag:web:80,443\"]},").replace(
        "\"src\": [\"alice@example.org\"], \"dst\": [\"scope:5025\"]",
        "\"src\": [\"bob@example.org\"], \"dst\": [\"10.0.0.0/29:5025\"]",
    );
    desk.file("new.hujson", &new);
    let run = desk.run("diff policy.hujson new.hujson --nodes nodes.json --exit-code");
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert_eq!(
        run.stdout,
        "gained:\n  \
           + alice-laptop, alice-phone -> web: tcp+udp 80\n  \
           + bob -> 10.0.0.0/29 (behind gate): tcp 5025; icmp\n\
         lost:\n  \
           - alice-laptop, alice-phone -> 10.0.0.7 (behind gate): tcp 5025; icmp\n"
    );
    let run = desk.run("diff policy.hujson new.hujson --nodes nodes.json --json");
    assert_eq!(run.code, 0);
    let answer: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
    let pairs = answer["pairs"].as_array().expect("a list");
    assert!(pairs.contains(&serde_json::json!({
        "from": "alice-phone", "to": "web", "gained": ["tcp:80", "udp:80"], "lost": []
    })));
    let run = desk.run("diff policy.hujson policy.hujson --nodes nodes.json --exit-code");
    assert_eq!((run.code, run.stdout.as_str()), (0, "nothing changes\n"));
}

#[test]
fn show_is_a_table_or_the_filter_itself() {
    let desk = Desk::new();
    let run = desk.run("show policy.hujson --nodes nodes.json --node web");
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stdout.contains("\nalice-laptop, alice-phone  web  tcp+udp 443; icmp\n"), "{}", run.stdout);
    assert!(run.stdout.contains("\nsees: alice-laptop, alice-phone\n"), "{}", run.stdout);
    let run = desk.run("show policy.hujson --nodes nodes.json --node 100.64.0.4 --json");
    let rules: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!(rules[0]["DstPorts"][0]["Ports"]["First"], 443);
    let run = desk.run("show policy.hujson --nodes nodes.json --node bob");
    assert!(run.stdout.contains("nobody may send it anything"), "{}", run.stdout);
}

/// A coordinator's administration socket with one network, for as many questions as a command has.
fn coordinator(desk: &Desk) {
    let listener = UnixListener::bind(desk.0.path().join("admin.sock")).expect("a socket");
    let policy = serde_json::json!({
        "source": "database", "text": POLICY, "format": "hujson", "warnings": [], "since": null,
    });
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut lines =
                BufReader::new(stream.try_clone().expect("a connection")).lines().map_while(Result::ok);
            let first = lines.next().unwrap_or_default();
            lines.take_while(|line| !line.is_empty()).for_each(drop);
            let body = match first.split(' ').nth(1) {
                Some("/admin/v1/tailnets") => {
                    r#"[{"name": "lab", "domain": "lab.test", "nodes": 5, "users": 2}]"#.to_owned()
                }
                Some("/admin/v1/tailnets/lab/population") => NODES.to_owned(),
                Some("/admin/v1/tailnets/lab/policy") => policy.to_string(),
                other => panic!("nobody should ask for {other:?}"),
            };
            let length = body.len();
            write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}").expect("an answer");
        }
    });
}

#[test]
fn a_running_coordinator_knows_who_there_is_and_what_is_in_force() {
    let desk = Desk::new();
    coordinator(&desk);
    let run = desk.run("check policy.hujson --admin-socket admin.sock");
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert!(run.stdout.ends_with("its tests pass (5 nodes, 2 users)\n"), "{}", run.stdout);
    let run =
        desk.run("explain --from alice-phone --to web --port 443 --admin-socket admin.sock --tailnet lab");
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert!(run.stdout.contains("\n  policy:7:5: acls[0]: "), "{}", run.stdout);
    let run = desk.run("show --node web --admin-socket admin.sock");
    assert!(run.stdout.contains("alice-laptop, alice-phone  web  tcp+udp 443"), "{}", run.stdout);
}

#[test]
fn one_spelling_says_the_same() {
    let desk = Desk::new();
    desk.file("again.yaml", &desk.run("fmt policy.hujson --yaml").stdout);
    desk.file("again.hujson", &desk.run("fmt again.yaml").stdout);
    for again in ["again.yaml", "again.hujson"] {
        let run = desk.run(&format!("diff policy.hujson {again} --nodes nodes.json --exit-code"));
        assert_eq!((run.code, run.stdout.as_str()), (0, "nothing changes\n"), "{}", run.stderr);
    }
}

#[test]
fn the_example_of_the_documentation_holds() {
    let run = run(&examples(), "check laboratory.hujson --nodes laboratory-nodes.yaml");
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert!(run.stdout.contains("its tests pass"), "{}", run.stdout);
}
