//! Configurations that work, and the exact words for those that do not.

use super::*;
use crate::core::policy::PolicySource;

const SMALLEST: &str = r#"server_url: https://mesh.example.org
listen: ["0.0.0.0:8080"]
state_dir: /var/lib/lacis-coordinator
tailnets:
  lab: { domain: lab.example.org }
"#;

const FULL: &str = r#"
server_url: https://mesh.example.org:8443/
listen: ["0.0.0.0:8443", "[::]:8443"]
state_dir: /srv/lacis
tailnets:
  lab:
    domain: lab.example.org
    dns:
      magic_dns: true
      nameservers: [1.1.1.1, "[2606:4700:4700::1111]:53", "https://dns.example.org/dns-query"]
      override_local_dns: true
      split: { corp.example.org: [10.0.0.53], static.example.org: [] }
      search_domains: [corp.example.org]
      extra_records:
        - { name: printer.lab.example.org, address: 192.0.2.9 }
  home: { domain: home.example.org }
tls: { cert_file: /etc/tls/cert.pem, key_file: /etc/tls/key.pem }
trusted_proxies: [127.0.0.1, 10.0.0.0/8]
embedded_relay: { id: 901, code: mesh, name: Mesh, stun_listen: ["0.0.0.0:3479"], ipv4: 192.0.2.1 }
relays:
  far:
    id: 902
    name: Far away
    nodes:
      - { host_name: relay.example.org, port: 8443, stun_port: 0, ipv6: "2001:db8::1", insecure_for_tests: true }
metrics_listen: "off"
admin_socket: /run/lacis.sock
node_expiry: 180d
ephemeral_timeout: 5m
"#;

fn errors(text: &str) -> String {
    Config::parse("c.yaml", text).unwrap_err().to_string()
}

/// The smallest file with its line `number` (from 1) replaced.
fn with_line(number: usize, line: &str) -> String {
    let mut lines: Vec<&str> = SMALLEST.lines().collect();
    lines[number - 1] = line;
    lines.join("\n")
}

fn plus(more: &str) -> String {
    format!("{SMALLEST}{more}\n")
}

#[test]
fn the_smallest_file_has_good_defaults() {
    let config = Config::parse("c.yaml", SMALLEST).unwrap();
    assert_eq!(config.server_url.0.as_str(), "https://mesh.example.org");
    assert_eq!(config.listen[0].0.to_string(), "0.0.0.0:8080");
    assert_eq!(config.tailnets["lab"].domain.0, "lab.example.org");
    assert!(config.tailnets["lab"].dns.magic_dns);
    let relay = config.embedded().unwrap();
    assert_eq!((relay.id, relay.code.as_str()), (900, "home"));
    assert_eq!(relay.stun_listen[0].0.to_string(), "[::]:3478");
    assert_eq!(config.metrics().unwrap().0.to_string(), "127.0.0.1:9090");
    assert_eq!(config.admin_socket().to_str().unwrap(), "/run/lacis-coordinator/admin.sock");
    assert!(config.tls.is_none() && config.node_expiry.0.is_none());
    assert_eq!(config.ephemeral_timeout.0.as_secs(), 1800);
}

#[test]
fn the_full_file_is_understood_and_its_json_is_too() {
    let config = Config::parse("c.yaml", FULL).unwrap();
    assert_eq!(config.server_url.0.as_str(), "https://mesh.example.org:8443");
    assert_eq!(config.trusted_proxies[0].0.to_string(), "127.0.0.1/32");
    assert_eq!(config.embedded().unwrap().code, "mesh");
    assert!(config.metrics().is_none());
    let node = &config.relays["far"].nodes[0];
    assert!(node.insecure_for_tests && node.port == 8443 && node.stun_port == 0);
    assert_eq!(config.admin_socket().to_str().unwrap(), "/run/lacis.sock");
    let json = serde_json::to_string_pretty(&config).unwrap();
    let again = Config::parse("c.json", &json).unwrap();
    assert_eq!(serde_json::to_string_pretty(&again).unwrap(), json);
}

#[test]
fn the_admin_socket_stands_in_the_state_directory_of_an_unusual_place() {
    let config = Config::parse("c.yaml", &with_line(3, "state_dir: /srv/lacis")).unwrap();
    assert_eq!(config.admin_socket().to_str().unwrap(), "/srv/lacis/admin.sock");
}

#[test]
fn null_says_the_same_as_leaving_a_key_out_and_switches_metrics_off() {
    let text = plus("metrics_listen: null\ntls: ~\nadmin_socket:\nembedded_relay: null\nrelays: null");
    let config = Config::parse("c.yaml", &text).unwrap();
    assert!(config.metrics().is_none());
    assert!(config.tls.is_none() && config.embedded().is_some());
}

#[test]
fn anchors_and_merge_keys_work() {
    let text = SMALLEST.replace(
        "{ domain: lab.example.org }",
        "{ <<: &d { dns: { magic_dns: false } }, domain: a.example }",
    ) + "  two: { <<: *d, domain: b.example }\n";
    let config = Config::parse("c.yaml", &text).unwrap();
    assert!(!config.tailnets["two"].dns.magic_dns);
}

const URL: &str = "expected an https:// or http:// URL that ends after the host (and port), such as https://mesh.example.org";
const ADDRESS: &str = "an IP address and a port, such as 0.0.0.0:8080 or [::]:8080";
const TOP: &str = "admin_socket, embedded_relay, ephemeral_timeout, listen, metrics_listen, node_expiry, relays, server_url, state_dir, tailnets, tls, trusted_proxies";

#[test]
fn each_bad_file_is_told_where_and_what_in_one_line() {
    let table: &[(String, String)] = &[
        (with_line(5, "  lab: { domian: lab.example.org }"),
         "c.yaml:5:10: /tailnets/lab/domian: unknown key, did you mean \"domain\"?".into()),
        (with_line(2, "listen: \"0.0.0.0:8080\""),
         format!("c.yaml:2:9: /listen: expected a list, each item {ADDRESS}, found \"0.0.0.0:8080\"")),
        (with_line(2, "listen: [localhost]"),
         format!("c.yaml:2:10: /listen/0: expected {ADDRESS}, found \"localhost\"")),
        (with_line(2, "listen: []"),
         format!("c.yaml:2:9: /listen: expected a list, each item {ADDRESS}, found none")),
        (with_line(1, "server_url: mesh.example.org"),
         format!("c.yaml:1:13: /server_url: {URL}, found \"mesh.example.org\"")),
        (with_line(1, "server_url: http://mesh.example.org"),
         "c.yaml:1:13: /server_url: clients reach the embedded relay by TLS only: use https://, or embedded_relay: false with a relay of its own in relays".into()),
        (with_line(1, "server_url:"), format!("c.yaml:1:11: /server_url: {URL}, found nothing")),
        (with_line(1, ""), format!("c.yaml:2:1: the key \"server_url\" is missing: {URL}")),
        (with_line(3, "state_dir: state"),
         "c.yaml:3:12: /state_dir: expected an absolute path, such as /var/lib/lacis-coordinator, found \"state\"".into()),
        (with_line(5, "  lab: lab.example.org"),
         "c.yaml:5:8: /tailnets/lab: expected keys (dns, domain, policy), found \"lab.example.org\"".into()),
        (with_line(5, "  Lab: { domain: lab.example.org }"),
         "c.yaml:5:8: /tailnets/Lab: a network's name has lower-case letters, digits and hyphens only, such as lab".into()),
        (with_line(5, "  lab: { domain: example.org }"),
         "c.yaml:5:18: /tailnets/lab/domain: the server's own host \"mesh.example.org\" must not stand in a network's domain: clients would look for it inside the network".into()),
        (with_line(5, "  lab: { domain: lab_example.org }"),
         "c.yaml:5:18: /tailnets/lab/domain: expected a DNS name, such as lab.example.org, found \"lab_example.org\"".into()),
        (with_line(5, "\tlab: { domain: lab.example.org }"),
         "c.yaml:5:1: not valid YAML: found character that cannot start any token (YAML is indented with spaces, not tabs)".into()),
        (plus("listen: [\"0.0.0.0:1\"]"), "c.yaml:6:1: the key \"listen\" is given twice".into()),
        (plus("tls: { cert_file: /x }"),
         "c.yaml:6:6: /tls: the key \"key_file\" is missing: expected an absolute path, such as /var/lib/lacis-coordinator".into()),
        (plus("tls: { cert_file: /x, key_file: /y, ca: 3 }"),
         "c.yaml:6:37: /tls/ca: unknown key, expected one of: cert_file, key_file".into()),
        (plus("embedded_relay: { id: 0, cod: x }"),
         "c.yaml:6:23: /embedded_relay/id: expected a number of at least 1, found 0\nc.yaml:6:26: /embedded_relay/cod: unknown key, did you mean \"code\"?".into()),
        (plus("embedded_relay: yes please"),
         "c.yaml:6:17: /embedded_relay: expected true or false or keys (code, id, insecure_for_tests, ipv4, ipv6, name, stun_listen), found \"yes please\"".into()),
        (plus("embedded_relay: false"),
         "c.yaml:6:17: /embedded_relay: without the embedded relay at least one region is needed in relays: nodes could not reach each other".into()),
        (plus("relays: { far: { id: 900, nodes: [{ host_name: a }] } }"),
         "c.yaml:6:22: /relays/far/id: the region \"home\" has this id already".into()),
        (plus("relays: { far: { id: 901, nodes: [{ hostname: a, port: 70000 }] } }"),
         "c.yaml:6:37: /relays/far/nodes/0/hostname: unknown key, did you mean \"host_name\"?\nc.yaml:6:56: /relays/far/nodes/0/port: expected a number of at most 65535, found 70000".into()),
        (plus("metrics_listen: 9090"),
         "c.yaml:6:17: /metrics_listen: expected an IP address and a port, such as 127.0.0.1:9090, or off, found 9090".into()),
        (plus("node_expiry: soon"),
         "c.yaml:6:14: /node_expiry: expected a duration, such as 180d, or never, found \"soon\"".into()),
        (plus("trusted_proxies: [proxy.example.org]"),
         "c.yaml:6:19: /trusted_proxies/0: expected a network or an IP address, such as 10.0.0.0/8 or 192.0.2.1, found \"proxy.example.org\"".into()),
        (plus("wibble: 3"), format!("c.yaml:6:1: /wibble: unknown key, expected one of: {TOP}")),
        (with_line(5, "  lab: { domain: a.example, dns: { override_local_dns: true } }"),
         "c.yaml:5:56: /tailnets/lab/dns/override_local_dns: needs at least one entry in nameservers: clients could resolve nothing else".into()),
        (plus("relays: { far: { id: 901, nodes: [{ host_name: a }, { host_name: Relay.lab.example.org. }] } }"),
         "c.yaml:6:66: /relays/far/nodes/1/host_name: a relay must not stand in a network's domain, here lab.example.org of \"lab\": clients would look for it inside the network".into()),
        (with_line(5, "  lab: { domain: lab.example.org, dns: { extra_records: [{ name: Mesh.example.org, address: 192.0.2.9 }] } }"),
         "c.yaml:5:66: /tailnets/lab/dns/extra_records/0/name: this is the name of the coordinator: clients would look for it at this address".into()),
        (with_line(5, "  lab: { domain: lab.example.org, dns: { extra_records: [{ name: a.b, address: 192.0.2.9 }, { name: relay.example.org, address: 192.0.2.9 }] } }\nrelays: { far: { id: 901, nodes: [{ host_name: relay.example.org }] } }"),
         "c.yaml:5:101: /tailnets/lab/dns/extra_records/1/name: this is the name of a relay of the region \"far\": clients would look for it at this address".into()),
        (with_line(5, "  lab: { domain: lab.example.org, dns: { extra_records: [{ name: localhost.lab.example.org, address: 192.0.2.9 }] } }"),
         "c.yaml:5:66: /tailnets/lab/dns/extra_records/0/name: every host means itself by \"localhost\", so no other can have this name".into()),
        (with_line(5, "  lab: { domain: lab.example.org, dns: { split: { example.org: [] } } }"),
         "c.yaml:5:64: /tailnets/lab/dns/split/example.org: the name of the coordinator, \"mesh.example.org\", stands in this domain: without resolvers no client would find it".into()),
        (with_line(5, "  lab: { domain: mesh.localhost }"),
         "c.yaml:5:18: /tailnets/lab/domain: every host means itself by names that end in localhost, and sends no question about them".into()),
        (plus("  two: { domain: lab.example.org }"),
         "c.yaml:6:18: /tailnets/two/domain: the network \"lab\" has this domain already".into()),
        (String::new(), format!("c.yaml: expected keys ({TOP}), found nothing")),
        ("[]".into(), format!("c.yaml:1:1: expected keys ({TOP}), found a list")),
        ("hello".into(), format!("c.yaml:1:1: expected keys ({TOP}), found \"hello\"")),
        ("a: b: c".into(), "c.yaml:1:5: not valid YAML: mapping values are not allowed in this context".into()),
        ("\u{0}".into(), "c.yaml:1:1: not valid YAML: control characters are not allowed".into()),
    ];
    for (text, expected) in table {
        assert_eq!(&errors(text), expected, "for:\n{text}");
    }
}

#[test]
fn resolvers_that_clients_cannot_ask_are_refused_by_name_and_doubtful_ones_warned_of() {
    let with = |dns: &str| with_line(5, &format!("  lab: {{ domain: lab.example.org, dns: {{ {dns} }} }}"));
    let good = "nameservers: [1.1.1.1, \"[2001:db8::1]:5353\", \"https://dns.example.org/dns-query{?dns}\", \"tls://192.0.2.1\"]";
    assert!(Config::parse("c.yaml", &with(good)).unwrap().warnings().is_empty());
    for (server, why) in [
        ("dns.example.org", "it is neither an IP address nor a URL"),
        ("http://dns.example.org/dns-query", "without encryption"),
        ("quic://dns.example.org", "only https:// (DNS over HTTPS) and tls:// (DNS over TLS) are spoken"),
        ("tls://dns.example.org/dns-query", "DNS over TLS has no path"),
        ("0.0.0.0", "no host has this address"),
        ("100.100.100.100", "at this address each client answers itself"),
        ("https://[fd7a:115c:a1e0::53]/dns-query", "at this address each client answers itself"),
    ] {
        let said = errors(&with(&format!("nameservers: [1.1.1.1, \"{server}\"]")));
        assert!(said.contains("/tailnets/lab/dns/nameservers/1: the resolver "), "{said}");
        assert!(said.contains(server) && said.contains(why), "{said}");
        let said = errors(&with(&format!("split: {{ corp.example: [\"{server}\"] }}")));
        assert!(said.contains("/tailnets/lab/dns/split/corp.example/0: the resolver "), "{said}");
    }
    let warnings =
        Config::parse("c.yaml", &with("split: { corp.example: [127.0.0.53] }")).unwrap().warnings();
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].starts_with("/tailnets/lab/dns/split/corp.example/0: the resolver 127.0.0.53 is"));
}

#[test]
fn a_reverse_zone_of_the_mesh_may_have_resolvers_of_its_own() {
    let split = "split: { 64.100.in-addr.arpa: [10.0.0.53], 7.65.100.in-addr.arpa: [10.0.0.53] }";
    let text = with_line(5, &format!("  lab: {{ domain: lab.example.org, dns: {{ {split} }} }}"));
    let routes = Config::parse("c.yaml", &text).unwrap().core().tailnets[0].dns().routes;
    let resolvers = |zone: &str| routes[zone].len();
    assert_eq!((resolvers("64.100.in-addr.arpa"), resolvers("7.65.100.in-addr.arpa")), (1, 1));
    assert_eq!(resolvers("65.100.in-addr.arpa"), 0);
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load(Path::new("/nonexistent/c.yaml")).unwrap_err().to_string();
    assert!(error.starts_with("cannot read the configuration /nonexistent/c.yaml: No such file"), "{error}");
}

#[test]
fn every_key_of_the_schema_is_described() {
    fn walk(path: &str, node: &Value) {
        for branch in
            std::iter::once(node).chain(node.get("anyOf").and_then(Value::as_array).into_iter().flatten())
        {
            for (key, value) in branch.get("properties").and_then(Value::as_object).into_iter().flatten() {
                assert!(value.get("description").is_some(), "{path}/{key} has no description");
                walk(&format!("{path}/{key}"), value);
            }
            for key in ["items", "additionalProperties"] {
                if let Some(value) = branch.get(key) {
                    walk(path, value);
                }
            }
        }
    }
    let schema = schema();
    assert!(schema.to_string().contains("\"server_url\""));
    assert!(!schema.to_string().contains("$ref"));
    walk("", &schema);
}

#[test]
fn the_relay_map_has_the_embedded_relay_and_the_declared_ones() {
    let map = Config::parse("c.yaml", FULL).unwrap().derp_map();
    let json = serde_json::to_value(&map).unwrap();
    assert_eq!(
        json["Regions"]["901"]["Nodes"][0],
        serde_json::json!({
            "Name": "901a", "RegionID": 901, "HostName": "mesh.example.org", "DERPPort": 8443,
            "STUNPort": 3479, "IPv4": "192.0.2.1"
        })
    );
    assert_eq!(json["Regions"]["902"]["RegionName"], "Far away");
    assert_eq!(
        json["Regions"]["902"]["Nodes"][0],
        serde_json::json!({
            "Name": "902a", "RegionID": 902, "HostName": "relay.example.org", "DERPPort": 8443,
            "STUNPort": -1, "IPv6": "2001:db8::1", "InsecureForTests": true
        })
    );
}

#[test]
fn a_policy_is_here_or_in_a_file_and_its_problems_have_their_place() {
    let with =
        |policy: &str| with_line(5, &format!("  lab: {{ domain: lab.example.org, policy: {policy} }}"));
    let source =
        |policy: &str| Config::parse("c.yaml", &with(policy)).unwrap().core().tailnets[0].policy.clone();
    assert_eq!(source("{ path: /etc/p.yaml }"), PolicySource::File("/etc/p.yaml".into()));
    let PolicySource::Configuration(text) = source("{ acls: [] }") else { panic!("it is here") };
    assert_eq!(text, r#"{"acls":[]}"#);
    assert_eq!(
        errors(&with("{ path: p.yaml }")),
        "c.yaml:5:51: /tailnets/lab/policy/path: expected the policy file's absolute path"
    );
    assert!(
        errors(&with("{ path: /p, acls: [] }")).contains("/tailnets/lab/policy/acls: a policy is either")
    );
    let unknown = errors(&with("{ acls: [{ action: accept, src: [\"group:none\"], dst: [\"*:*\"] }] }"));
    assert!(unknown.starts_with("c.yaml:5:76: /tailnets/lab/policy/acls/0/src/0: "), "{unknown}");
    assert!(unknown.contains("group:none"), "{unknown}");
}
