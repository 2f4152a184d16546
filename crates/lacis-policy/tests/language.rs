//! The language as Tailscale takes it: what is taken, what is refused, and what is warned of by name.

use lacis_policy::{Endpoint, Invalid};
use lacis_policy::{Format, Network, Node, Policy, Population, Protocol, SshVerdict, User};
use lacis_wire::control::{NodeId, UserId};
use serde_json::{Value, json};

fn parse(text: &str) -> Result<Policy, Invalid> {
    Policy::parse(text, Format::HuJson)
}

#[track_caller]
fn taken(text: &str) -> Policy {
    parse(text).unwrap_or_else(|invalid| panic!("{text}\n{invalid}"))
}

/// Lines `LINE:COLUMN: PLACE: MESSAGE`.
#[track_caller]
fn refused(text: &str) -> Vec<String> {
    let Err(invalid) = parse(text) else { panic!("it should be refused: {text}") };
    assert!(invalid.problems.iter().all(|problem| problem.at.is_some()), "{invalid}");
    invalid.to_string().lines().map(ToOwned::to_owned).collect()
}

fn warnings(policy: &Policy) -> Vec<String> {
    let line = |problem: &lacis_policy::Problem| format!("{}: {problem}", problem.at.expect("a place"));
    policy.warnings().iter().map(line).collect()
}

fn population() -> Population {
    let user = |id, name: &str| User { id: UserId(id), name: name.to_owned(), ..User::default() };
    let node = |id: u8, user| Node {
        id: NodeId(id.into()),
        name: format!("n{id}"),
        user,
        tags: if user.is_none() { vec!["tag:web".to_owned()] } else { Vec::new() },
        v4: Some([100, 64, 0, id].into()),
        online: true,
        ..Node::default()
    };
    Population {
        users: vec![user(1, "alice@example.org"), user(2, "bob")],
        nodes: vec![node(1, Some(UserId(1))), node(2, Some(UserId(2))), node(3, None)],
        ..Population::default()
    }
}

const OLD: &str = r#"{"TagOwners": {"tag:web": []}, "ACLs": [
  {"Action": "accept", "Users": ["alice@example.org"], "PORTS": ["tag:web:443"], "Proto": "TCP"}],
  "TESTS": [{"User": "alice@example.org", "ALLOW": ["tag:web:443"], "deny": ["tag:web:22"]}]}"#;

#[test]
fn old_names_mean_the_same_whatever_their_capitals() {
    let new = r#"{"tagOwners": {"tag:web": []}, "acls": [
      {"action": "accept", "src": ["alice@example.org"], "dst": ["tag:web:443"], "proto": "tcp"}],
      "tests": [{"src": "alice@example.org", "accept": ["tag:web:443"], "deny": ["tag:web:22"]}]}"#;
    let old = taken(OLD);
    assert_eq!(old, taken(new));
    assert_eq!(Network::compile(&old, population()).test(), Ok(()));
    assert_eq!(taken(&old.to_json().to_string()), old);
    let failing = taken(&OLD.replace("\"ALLOW\": [\"tag:web:443\"]", "\"ALLOW\": [\"tag:web:444\"]"));
    assert!(Network::compile(&failing, population()).test().is_err());
}

#[test]
fn old_and_new_names_in_one_file_are_refused_with_both_places() {
    for (text, first, second) in [
        (
            "{\"acls\": [\n{\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"*:*\"]},\n{\"action\": \"accept\", \"users\": [\"*\"], \"ports\": [\"*:*\"]}]}",
            "acls[0].src (2:29)",
            "3:31: acls[1].users",
        ),
        (
            "{\"acls\": [\n{\"action\": \"accept\", \"users\": [\"*\"], \"dst\": [\"*:*\"]}]}",
            "acls[0].users (2:31)",
            "2:45: acls[0].dst",
        ),
        (
            "{\"acls\": [\n{\"action\": \"accept\", \"users\": [\"*\"], \"ports\": [\"*:*\"]}],\n\"tests\": [{\"src\": \"*\", \"deny\": [\"*:1\"]}]}",
            "acls[0].users (2:31)",
            "3:19: tests[0].src",
        ),
        (
            "{\"tests\": [{\"user\": \"*\", \"accept\": [\"*:1\"]}]}",
            "tests[0].user (1:21)",
            "1:36: tests[0].accept",
        ),
    ] {
        let lines = refused(text);
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].starts_with(second) && lines[0].contains(first), "{lines:?}");
    }
    // Other sections have only one name each.
    taken(
        r#"{"acls": [{"action": "accept", "users": ["*"], "ports": ["*:*"]}], "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]}"#,
    );
    taken(r#"{"acls": [{"action": "accept", "users": ["*"], "ports": ["*:*"], "src": null}]}"#);
    assert!(
        refused(r#"{"grants": [{"users": ["*"], "dst": ["*"], "ip": ["*"]}]}"#)[0]
            .contains("unknown field \"users\"")
    );
    assert!(
        refused(r#"{"acls": [{"action": "accept", "src": ["*"], "SRC": ["*"], "dst": ["*:*"]}]}"#)[0]
            .contains("twice")
    );
}

/// Every section and field, with something in it.
fn whole() -> Value {
    json!({
        "groups": {"group:a": ["alice@example.org"]},
        "hosts": {"h": "10.0.0.1"},
        "tagOwners": {"tag:web": ["group:a"]},
        "postures": {"posture:p": ["node:os == 'linux'"]},
        "defaultSrcPosture": ["posture:p"],
        "autoApprovers": {"routes": {"10.0.0.0/8": ["group:a"]}, "exitNode": ["group:a"], "services": {}},
        "acls": [{"action": "accept", "proto": "tcp", "src": ["*"], "srcPosture": ["posture:p"], "dst": ["*:*"]}],
        "grants": [{"src": ["*"], "srcPosture": ["posture:p"], "dst": ["10.0.0.0/8"], "ip": ["*"],
            "app": {"example.org/cap/x": [{}]}, "via": ["tag:web"]}],
        "ssh": [{"action": "check", "checkPeriod": "1h", "src": ["group:a"], "srcPosture": ["posture:p"],
            "dst": ["tag:web"], "users": ["root"], "acceptEnv": ["X"], "recorder": [], "enforceRecorder": false}],
        "nodeAttrs": [{"target": ["*"], "attr": ["x"], "app": {"example.org/cap/x": [1]}, "ipPool": ["100.81.0.0/16"]}],
        "tests": [{"src": "alice@example.org", "proto": "tcp", "accept": ["tag:web:1"], "deny": ["h:1"], "srcPostureAttrs": {}}],
        "sshTests": [{"src": "alice@example.org", "dst": ["tag:web"], "accept": ["a"], "deny": ["b"], "check": ["c"]}],
        "properties": {"never": ["tag:web -> h:1"], "always": ["tag:web -> h:2"]},
        "randomizeClientPort": true, "disableIPv4": false, "derpMap": {}, "OneCGNATRoute": "", "ipsets": {},
    })
}

/// Places of all members, deepest last.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                let at = format!("{at}/{}", name.replace('/', "~1"));
                found.push(at.clone());
                places(value, &at, found);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                places(item, &format!("{at}/{index}"), found);
            }
        }
        _ => {}
    }
}

#[test]
fn null_is_as_good_as_nothing_wherever_something_may_be_missing() {
    let whole = whole();
    taken(&whole.to_string());
    let mut all = Vec::new();
    places(&whole, "", &mut all);
    assert!(all.len() > 60, "{all:?}");
    for place in all {
        let mut with_null = whole.clone();
        *with_null.pointer_mut(&place).expect("a member") = Value::Null;
        let mut without = whole.clone();
        let (parent, name) = place.rsplit_once('/').expect("a place");
        let parent = without.pointer_mut(parent).and_then(Value::as_object_mut).expect("an object");
        parent.remove(&name.replace("~1", "/"));
        let (with_null, without) = (parse(&with_null.to_string()), parse(&without.to_string()));
        // Names that are declared with null are declared: groups, tags, postures, routes, capabilities.
        let declared = ["/groups/g", "/tagOwners/t", "/postures/p", "/autoApprovers/routes/1", "app/example"];
        if declared.iter().any(|name| place.contains(name)) {
            assert!(with_null.is_ok(), "{place}: {with_null:?}");
        } else if place == "/hosts/h" {
            assert!(with_null.is_err());
        } else {
            assert_eq!(with_null.is_ok(), without.is_ok(), "{place}: {with_null:?}");
            if let (Ok(with_null), Ok(without)) = (with_null, without) {
                assert_eq!(with_null, without, "{place}");
            }
        }
    }
}

#[test]
fn keys_that_begin_with_a_number_sign_are_an_interfaces_notes_in_rules() {
    let mut noted = whole();
    for section in ["acls", "grants", "ssh", "nodeAttrs", "tests", "sshTests"] {
        noted[section][0]["#ha-meta"] = json!({"name": "x", "open": [true]});
        noted[section][0]["#"] = Value::Null;
    }
    assert_eq!(taken(&noted.to_string()), taken(&whole().to_string()));
    for text in
        [r##"{"#x": 1}"##, r##"{"groups": {"#x": []}}"##, r#"{"acls": [{"action": "accept", "x#": 1}]}"#]
    {
        refused(text);
    }
}

#[test]
fn blanks_around_the_names_of_an_ssh_rule_do_not_count() {
    let rule = |action: &str, src: &str, dst: &str, user: &str| {
        format!(
            r#"{{"tagOwners": {{"tag:web": []}}, "ssh": [{{"action": "{action}", "src": ["{src}"], "dst": ["{dst}"], "users": ["{user}"]}}]}}"#
        )
    };
    let spaced = taken(&rule(" accept\\t", " alice@example.org ", "\\ntag:web", " root "));
    assert_eq!(spaced, taken(&rule("accept", "alice@example.org", "tag:web", "root")));
    let rules = Network::compile(&spaced, population()).ssh_rules(NodeId(3));
    assert_eq!(rules[0].users.get("root").map(String::as_str), Some("root"));
    assert!(refused(&rule("accept", "*", "tag:web", " "))[1].contains("user \"\" is not valid"));
    assert!(
        refused(&rule(" ", "alice@example.org", "tag:web", "root"))[0].contains("action must be specified")
    );
    taken(r#"{"acls": [{"action": "accept", "src": [" alice@example.org "], "dst": ["*:*"]}]}"#);
}

#[test]
fn a_check_period_of_nothing_asks_always() {
    for period in ["0s", "0", "always"] {
        let policy = taken(&format!(
            r#"{{"tagOwners": {{"tag:web": []}}, "ssh": [{{"action": "check", "checkPeriod": "{period}", "src": ["alice@example.org"], "dst": ["tag:web"], "users": ["root"]}}]}}"#
        ));
        let rules = Network::compile(&policy, population()).ssh_rules(NodeId(3));
        assert_eq!(rules[0].verdict, SshVerdict::Check { period: Some(0) }, "{period}");
    }
}

#[test]
fn tags_may_own_each_other_in_a_circle() {
    taken(r#"{"tagOwners": {"tag:a": ["tag:b"], "tag:b": ["tag:c"], "tag:c": ["tag:a", "tag:c"]}}"#);
}

#[test]
fn app_connectors_are_taken_in_node_attributes_and_warned_of() {
    let text = |section: &str| {
        format!(
            r#"{{"acls": [], {section}: {{"tailscale.com/app-connectors": [{{"name": "x", "domains": ["example.com"]}}]}}}}]}}"#
        )
    };
    let policy = taken(&text(r#""nodeAttrs": [{"target": ["*"], "app""#));
    let warned = warnings(&policy);
    assert!(
        warned.len() == 1 && warned[0].contains("\"tailscale.com/app-connectors\" is not honoured"),
        "{warned:?}"
    );
    assert!(refused(&text(r#""grants": [{"src": ["*"], "dst": ["*"], "app""#))[0].contains("tailscale.com"));
}

#[test]
fn what_is_no_json_string_is_refused() {
    let lines = refused("{\"groups\": {\n  \"group:a\": [\"alice\n@example.org\"]}}");
    assert!(lines[0].starts_with("2:21: "), "{lines:?}");
    for text in ["{\"groups\": {\"group:\na\": []}}", "{\"groups\": {\"group:a\": [\"a@b\t\"]}}"] {
        refused(text);
    }
}

#[test]
fn tags_are_letters_digits_and_dashes_wherever_they_stand() {
    for tag in ["tag:data_base", "tag:é", "tag:a:b", "tag:a.b", "tag:a b", "tag:1a", "tag:-a", "tag:"] {
        for text in [
            r#"{"tagOwners": {"TAG": []}}"#,
            r#"{"tagOwners": {"tag:x": ["TAG"]}}"#,
            r#"{"autoApprovers": {"routes": {"10.0.0.0/8": ["TAG"]}}}"#,
            r#"{"autoApprovers": {"exitNode": ["TAG"]}}"#,
            r#"{"acls": [{"action": "accept", "src": ["TAG"], "dst": ["*:*"]}]}"#,
            r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["TAG:*"]}]}"#,
            r#"{"grants": [{"src": ["TAG"], "dst": ["*"], "ip": ["*"]}]}"#,
            r#"{"grants": [{"src": ["*"], "dst": ["TAG"], "ip": ["*"]}]}"#,
            r#"{"grants": [{"src": ["*"], "dst": ["10.0.0.0/8"], "ip": ["*"], "via": ["TAG"]}]}"#,
            r#"{"ssh": [{"action": "accept", "src": ["TAG"], "dst": ["autogroup:tagged"], "users": ["root"]}]}"#,
            r#"{"ssh": [{"action": "accept", "src": ["autogroup:member"], "dst": ["TAG"], "users": ["root"]}]}"#,
            r#"{"nodeAttrs": [{"target": ["TAG"], "attr": ["x"]}]}"#,
            r#"{"properties": {"never": ["TAG -> *:1"]}}"#,
            r#"{"properties": {"always": ["* -> TAG:1"]}}"#,
        ] {
            let text = text.replace("TAG", tag);
            let named =
                refused(&text).iter().any(|line| line.contains("tag") || line.contains("is no property"));
            assert!(named, "{text}");
        }
    }
}

#[test]
fn ports_are_digits_and_protocols_stand_before_them() {
    for ports in ["+80", " 80", "80 ", "80-", "-80", "80-+90", "", "80,,90", "0", "70000", "icmp", "tcp"] {
        refused(&format!(r#"{{"acls": [{{"action": "accept", "src": ["*"], "dst": ["*:{ports}"]}}]}}"#));
        for protocol in ["", "tcp:"] {
            refused(&format!(
                r#"{{"grants": [{{"src": ["*"], "dst": ["*"], "ip": ["{protocol}{ports}"]}}]}}"#
            ));
        }
    }
    taken(r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:080,443,8000-8100"]}]}"#);
    taken(r#"{"grants": [{"src": ["*"], "dst": ["*"], "ip": ["tcp:080", "443", "*:22", "icmp:*", "*"]}]}"#);
}

#[test]
fn a_mail_domain_that_no_user_has_is_refused() {
    let failures = |text: &str| {
        let policy = taken(&text.replace("DOMAIN", "some.example"));
        let network = Network::compile(&policy, population());
        let lines = network.test().map_or_else(|invalid| invalid.to_string(), |()| String::new());
        let good = taken(&text.replace("DOMAIN", "example.org"));
        assert_eq!(Network::compile(&good, population()).test(), Ok(()), "{text}");
        lines
    };
    for text in [
        r#"{"acls": [{"action": "accept", "src": ["user:*@DOMAIN"], "dst": ["*:*"]}]}"#,
        r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["user:*@DOMAIN:*"]}]}"#,
        r#"{"grants": [{"src": ["user:*@DOMAIN"], "dst": ["*"], "ip": ["*"]}]}"#,
        r#"{"grants": [{"src": ["*"], "dst": ["user:*@DOMAIN"], "ip": ["*"]}]}"#,
        r#"{"ssh": [{"action": "accept", "src": ["user:*@DOMAIN"], "dst": ["autogroup:tagged"], "users": ["root"]}]}"#,
        r#"{"ssh": [{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:tagged"], "users": ["localpart:*@DOMAIN"]}]}"#,
        r#"{"nodeAttrs": [{"target": ["user:*@DOMAIN"], "attr": ["x"]}]}"#,
        r#"{"groups": {"group:a": ["user:*@DOMAIN"]}}"#,
        r#"{"tagOwners": {"tag:a": ["user:*@DOMAIN"]}}"#,
        r#"{"autoApprovers": {"routes": {"10.0.0.0/8": ["user:*@DOMAIN"]}}}"#,
        r#"{"autoApprovers": {"exitNode": ["user:*@DOMAIN"]}}"#,
        r#"{"acls": [], "properties": {"never": ["user:*@DOMAIN -> *:1"]}}"#,
    ] {
        let lines = failures(text);
        assert!(lines.contains("some.example is not associated with this tailnet"), "{text}: {lines}");
        assert!(lines.starts_with("1:"), "{lines}");
    }
    // A network that has no users yet has no domains to compare with.
    let policy = taken(r#"{"acls": [{"action": "accept", "src": ["user:*@some.example"], "dst": ["*:*"]}]}"#);
    assert_eq!(Network::compile(&policy, Population::default()).test(), Ok(()));
}

#[test]
fn an_alias_of_an_ipv6_address_of_the_mesh_is_warned_of_as_the_address_is() {
    let warned = |dst: &str| {
        let text = format!(
            r#"{{"hosts": {{"six": "fd7a:115c:a1e0::5", "net": "fd7a:115c:a1e0::/64", "site": "fd7a:115c:a1e0:b1a:0:7:a00:1"}},
               "acls": [{{"action": "accept", "src": ["*"], "dst": ["{dst}:*"]}}],
               "grants": [{{"src": ["*"], "dst": ["{}"], "ip": ["*"]}}]}}"#,
            dst.trim_matches(['[', ']'])
        );
        warnings(&taken(&text))
    };
    for dst in ["six", "[fd7a:115c:a1e0::5]", "fd7a:115c:a1e0::5/128"] {
        let lines = warned(dst);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].starts_with("2:") && lines[0].contains("means no node"), "{lines:?}");
        assert!(lines[1].starts_with("3:") && lines[1].contains("means no node"), "{lines:?}");
    }
    for dst in
        ["net", "site", "[fd7a:115c:a1e0:b1a:0:7:a00:1]", "[2001:db8::1]", "fd7a:115c:a1e0:b1a:0:7:a00:0/120"]
    {
        assert_eq!(warned(dst), Vec::<String>::new(), "{dst}");
    }
}

#[test]
fn all_mistakes_of_one_rule_are_reported() {
    for (text, count) in [
        (
            r#"{"acls": [{"action": "drop", "proto": "http", "src": ["tag:a_b", "group:x"], "dst": ["tag:c:+80", "[tag:d]:+1", "x"], "extra": 1, "srcPosture": ["p"]}]}"#,
            11,
        ),
        (
            r#"{"grants": [{"src": ["tag:a_b"], "dst": ["nobody"], "ip": [], "via": ["x", "tag:y"], "extra": 1}]}"#,
            6,
        ),
        (
            r#"{"ssh": [{"action": "deny", "checkPeriod": "x", "src": ["*"], "dst": ["tag:c", "*"], "users": [], "acceptEnv": [""], "recorder": ["tag:r"], "extra": 1}]}"#,
            9,
        ),
        (r#"{"ssh": [{"src": ["tag:x"], "dst": ["tag:y"], "users": ["*"]}]}"#, 4),
        (
            r#"{"nodeAttrs": [{"target": ["autogroup:self", "tag:x"], "app": {"x": []}, "ipPool": ["10.0.0.0/8"], "extra": 1}]}"#,
            5,
        ),
        (
            r#"{"groups": {"a": ["b", "group:c"]}, "hosts": {"*": "x"}, "tagOwners": {"a": ["x/y"]}, "postures": {"a": ["x"]}}"#,
            9,
        ),
        (r#"{"autoApprovers": {"routes": {"10.0.0.1/8": ["*", "tag:x"]}}}"#, 2),
    ] {
        let lines = refused(text);
        assert_eq!(lines.len(), count, "{lines:#?}");
    }
}

#[test]
fn a_policy_that_restricts_nothing_says_so() {
    for text in ["{}", r#"{"acls": null}"#, r#"{"ACLS": null, "grants": null}"#, r#"{"groups": {}}"#] {
        let policy = taken(text);
        assert_eq!(warnings(&policy).len(), 1, "{text}");
        assert!(
            warnings(&policy)[0]
                .starts_with("1:1: there are neither acls nor grants: everybody reaches everything")
        );
        let network = Network::compile(&policy, population());
        let (a, b) = (Endpoint::Node(NodeId(1)), Endpoint::Node(NodeId(3)));
        assert!(network.decide(a, b, Protocol::TCP, 1).allowed);
    }
    for text in [r#"{"acls": []}"#, r#"{"acls": null, "grants": []}"#] {
        assert_eq!(warnings(&taken(text)), Vec::<String>::new());
    }
}

#[test]
fn capabilities_are_bounded() {
    let with = |section: &str, app: &Value| match section {
        "grants" => json!({"grants": [{"src": ["*"], "dst": ["*"], "app": app}]}).to_string(),
        _ => json!({"acls": [], "nodeAttrs": [{"target": ["*"], "app": app}]}).to_string(),
    };
    let nested = |depth: usize| {
        (0..depth).fold(json!(1), |inner, at| if at % 2 == 0 { json!([inner]) } else { json!({"a": inner}) })
    };
    let values = |count: usize| Value::Array(vec![json!({}); count]);
    let names = |count: usize| {
        Value::Object((0..count).map(|at| (format!("example.org/cap/{at}"), json!([]))).collect())
    };
    let name = |length: usize| json!({format!("example.org/{}", "x".repeat(length - 12)): []});
    let one = |value: Value| json!({"example.org/cap/x": [value]});
    for section in ["grants", "nodeAttrs"] {
        for (good, bad, says) in [
            (one(nested(16)), one(nested(17)), "deeper than 16"),
            (one("x".repeat(65_534).into()), one("x".repeat(65_535).into()), "65536 bytes"),
            (
                json!({"example.org/cap/x": values(256)}),
                json!({"example.org/cap/x": values(257)}),
                "256 values",
            ),
            (names(256), names(257), "256 capabilities"),
            (name(255), name(256), "at most 255"),
            (json!({}), json!({"example.org/cap\u{7}": []}), "control character"),
        ] {
            if good != json!({}) {
                taken(&with(section, &good));
            }
            let lines = refused(&with(section, &bad));
            assert!(lines.len() == 1 && lines[0].starts_with("1:") && lines[0].contains(says), "{lines:?}");
        }
    }
    let yaml = format!(
        "grants:\n- src: ['*']\n  dst: ['*']\n  app:\n    example.org/cap/x:\n    - {}\n",
        nested(17)
    );
    let lines = Policy::parse(&yaml, Format::Yaml).expect_err("too deep").to_string();
    assert!(lines.starts_with("6:7: "), "{lines}");
}

#[test]
fn what_does_nothing_here_is_named() {
    let policy = taken(&whole().to_string());
    let all = warnings(&policy).join("\n");
    for name in ["derpMap", "OneCGNATRoute", "ipsets", "autoApprovers.services", "srcPostureAttrs"] {
        assert!(all.contains(name), "{name}: {all}");
    }
    for (text, says) in [
        (
            r#"{"ssh": [{"action": "accept", "src": ["a@"], "dst": ["a@"], "users": ["x"], "recorder": ["tag:r"]}]}"#,
            "recorder",
        ),
        (
            r#"{"ssh": [{"action": "accept", "src": ["a@"], "dst": ["a@"], "users": ["x"], "enforceRecorder": true}]}"#,
            "enforceRecorder",
        ),
        (r#"{"acls": [{"action": "accept", "src": ["ipset:x"], "dst": ["*:*"]}]}"#, "IP sets"),
        (r#"{"postures": {"posture:x": ["custom:tier == 'prod'"]}}"#, "custom:tier"),
    ] {
        assert!(refused(text)[0].contains(says), "{text}");
    }
}
