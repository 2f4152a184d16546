//! Whatever a node says of itself, what its peers are sent of it can be read by every client.

mod go;

use std::fmt::Write as _;
use std::time::Instant;

use lacis_wire::control::{
    Hostinfo, MAX_ENDPOINTS, MAX_NESTING, MAX_REQUEST_TAGS, MAX_ROUTES, MAX_SERVICES, MAX_TEXT, MapRequest,
    MapResponse, NodeId, decode_request,
};
use lacis_wire::mapframe::{Compression, Decoder};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::frames::{self, Whole};
use super::super::tailnet::tests::{network, node};
use super::super::update::Report;
use go::Go;

/// The first frame for another node of the network, where a node reported this.
fn frame_for_a_peer(request: MapRequest) -> Vec<u8> {
    let tailnet = network(vec![node(1, "hostile"), node(2, "viewer")]);
    let report = Report { hostinfo: request.hostinfo, endpoints: request.endpoints, ..Report::default() };
    tailnet.lock().report(NodeId(1), report, Instant::now());
    let snapshot = tailnet.snapshot();
    let viewer = snapshot.node(NodeId(2)).unwrap();
    let frame =
        frames::whole(&tailnet.settings, &snapshot, viewer, Whole::First, Compression::Plain).unwrap();
    let mut decoder = Decoder::new(Compression::Plain);
    decoder.push(&frame);
    decoder.next_message().unwrap().unwrap().to_vec()
}

/// Checks that frame as our client and as Go read it, and gives what peers are sent of the host.
fn check(request: MapRequest) -> Value {
    let text = frame_for_a_peer(request);
    let frame: MapResponse = serde_json::from_slice(&text).unwrap();
    assert_eq!(frame.peers.unreadable, []);
    assert_eq!(frame.peers.len(), 1);
    let frame: Value = serde_json::from_slice(&text).unwrap();
    let peer = &frame["Peers"][0];
    if let Err(error) = go::NODE.check(peer) {
        panic!("{error}: {peer}");
    }
    for (list, most) in [("Endpoints", MAX_ENDPOINTS), ("AllowedIPs", MAX_ROUTES + 2)] {
        assert!(peer[list].as_array().is_none_or(|list| list.len() <= most));
    }
    let host = &peer["Hostinfo"];
    let lists = [("RoutableIPs", MAX_ROUTES), ("Services", MAX_SERVICES), ("RequestTags", MAX_REQUEST_TAGS)];
    for (list, most) in lists {
        assert!(host[list].as_array().is_none_or(|list| list.len() <= most));
    }
    host.clone()
}

fn request(hostinfo: &str) -> Result<MapRequest, lacis_wire::control::RequestError> {
    decode_request(format!(r#"{{"Version":113,"Hostinfo":{hostinfo}}}"#).as_bytes())
}

/// Lists and objects inside each other.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(members) => 1 + members.values().map(depth).max().unwrap_or(0),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    }
}

/// Any JSON.
fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0..70_000_u32).prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
        "[a-z\u{0}-\u{1f}]{250,270}".prop_map(Value::from),
        Just(json!("10.0.0.0/8")),
        Just(json!("192.0.2.1:41641")),
        Just(json!("fe80::1%eth0/64")),
        Just(json!("2026-01-01T00:00:00Z")),
    ];
    leaf.prop_recursive(12, 60, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(key(), inner, 0..6)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// A known member's name in any case, or any other.
fn key() -> impl Strategy<Value = String> {
    let known = prop::sample::select(go::known_names());
    let spelt = (known, any::<u64>()).prop_map(|(name, upper)| {
        let spell = |(at, c): (usize, char)| {
            if upper >> (at % 64) & 1 == 1 { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() }
        };
        name.chars().enumerate().map(spell).collect::<String>()
    });
    prop_oneof![8 => prop::sample::select(go::known_names()).prop_map(str::to_owned), 4 => spelt, 1 => ".{0,8}"]
}

/// A member's value: of the type that Go gives it, or anything, or nested as deep as one likes.
fn member_value(name: &str) -> BoxedStrategy<String> {
    let right = go::sample(name);
    prop_oneof![
        3 => Just(right),
        4 => json_value().prop_map(|value| value.to_string()),
        1 => (0..20_usize).prop_map(|depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth)))
            .prop_map(|text| if text.is_empty() { "0".to_owned() } else { text }),
    ]
    .boxed()
}

fn hostinfo() -> impl Strategy<Value = String> {
    let member = key().prop_flat_map(|name| {
        let value = member_value(&name);
        (Just(name), value)
    });
    prop::collection::vec(member, 0..40).prop_map(|members| {
        let mut seen = std::collections::HashSet::new();
        let mut text = "{".to_owned();
        for (name, value) in members {
            if seen.insert(name.to_ascii_lowercase()) {
                let comma = if seen.len() == 1 { "" } else { "," };
                let _ = write!(text, "{comma}{}:{value}", Value::from(name));
            }
        }
        text + "}"
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn whatever_a_node_says_its_peers_can_read_what_they_are_sent(
        hostinfo in hostinfo(),
        endpoints in prop::collection::vec(".{0,10}|192\\.0\\.2\\.[0-9]{1,3}:[0-9]{1,5}|\\[fe80::1%[a-z0-9]{1,3}\\]:1", 0..70),
    ) {
        let nesting = 1 + depth(&serde_json::from_str(&hostinfo).unwrap());
        match request(&hostinfo) {
            Ok(mut request) => {
                let texts = Value::from(endpoints).to_string();
                let endpoints: MapRequest =
                    decode_request(format!(r#"{{"Endpoints":{texts}}}"#).as_bytes()).unwrap();
                request.endpoints = endpoints.endpoints;
                check(request);
            }
            Err(error) => prop_assert!(nesting > MAX_NESTING, "{error}: {hostinfo}"),
        }
    }
}

#[test]
fn every_member_that_go_knows_of_a_host_reaches_peers_as_it_was_said() {
    let mut text = "{".to_owned();
    for name in go::names(&go::HOSTINFO) {
        let _ = write!(text, "{}{name:?}:{}", if text.len() > 1 { "," } else { "" }, go::sample(name));
    }
    let said: Value = serde_json::from_str(&(text.clone() + "}")).unwrap();
    let host = check(request(&(text + "}")).unwrap());
    for (name, value) in said.as_object().unwrap() {
        let private = ["NetInfo", "FrontendLogID", "BackendLogID"].contains(&name.as_str());
        assert_eq!(host.get(name), (!private).then_some(value), "{name}");
    }
}

#[test]
fn lists_and_texts_end_at_their_bounds() {
    let many = |item: Value, count: usize| vec![item; count];
    let long = "x\u{1b}".repeat(500);
    let (key, long_key) = ("ssh-ed25519 AAAA", "k".repeat(4097));
    let hostinfo = json!({
        "OSVersion": long, "Hostname": long,
        "RoutableIPs": many(json!("10.0.0.0/8"), 100_000),
        "RequestTags": many(json!(long), 100),
        "Services": many(json!({"Proto": long, "Port": 1, "Description": long}), 100),
        "sshHostKeys": [long_key, key],
        "WoLMACs": many(json!("00:00:5e:00:53:01"), 100),
        "NetInfo": {"DERPLatency": (0..1000).map(|n| (format!("{n}-v4"), json!(0.1))).collect::<serde_json::Map<_, _>>()},
        "Unknown": many(json!({"": 0}), 1000),
    });
    let mut request = request(&hostinfo.to_string()).unwrap();
    let endpoints = json!({"Endpoints": many(json!("192.0.2.1:1"), 100_000)});
    request.endpoints = decode_request::<MapRequest>(endpoints.to_string().as_bytes()).unwrap().endpoints;
    let kept: Hostinfo = request.hostinfo.clone().unwrap();
    assert_eq!(kept.os_version, "x".repeat(MAX_TEXT));
    assert_eq!(kept.ssh_host_keys, [key], "half a key is none");
    assert_eq!(kept.net_info.unwrap().derp_latency.len(), 256);
    let host = check(request);
    assert_eq!(host["RoutableIPs"].as_array().unwrap().len(), MAX_ROUTES);
    assert_eq!(host["Services"].as_array().unwrap().len(), MAX_SERVICES);
    assert!(host.get("Unknown").is_none());
}

#[test]
fn rows_of_an_older_version_are_read_whatever_nodes_had_put_there() {
    let deep = format!("{}{}", "[".repeat(120), "]".repeat(120));
    let text = format!(
        r#"{{"hostinfo":{{"Hostname":"a","ShareeNode":"x","Location":7,"TPM":{deep},"Other":{deep},"WoLMACs":{{}}}},
            "endpoints":[{}"192.0.2.1:1"]}}"#,
        r#""192.0.2.1:1","#.repeat(999)
    );
    let facts: crate::store::NodeFacts = serde_json::from_str(&text).unwrap();
    let kept = Hostinfo { hostname: "a".to_owned(), ..Hostinfo::default() };
    assert_eq!(facts.hostinfo, kept);
    let row = crate::store::NodeRow { record: facts, ..node(1, "a").row("lab") };
    assert_eq!(super::NodeRecord::from_row(row).endpoints.len(), MAX_ENDPOINTS);
}

#[test]
fn the_checker_sees_what_go_would_refuse() {
    for (shape, bad) in [
        (Go::Bool, json!("x")),
        (Go::OptBool, json!(1)),
        (Go::Uint16, json!(-1)),
        (Go::Int, json!(1.5)),
        (Go::Prefix, json!("10.0.0.0")),
        (Go::Prefix, json!("fe80::1%eth0/64")),
        (Go::AddrPort, json!("10.0.0.1")),
        (Go::Time, json!("yesterday")),
        (Go::Key("nodekey:"), json!("nodekey:00")),
        (Go::List(&Go::Text(MAX_TEXT)), json!([1])),
        (Go::Struct(&[("A", Go::Bool)]), json!({"B": true})),
    ] {
        assert!(shape.check(&bad).is_err(), "{bad}");
    }
}
