//! The rules of the JSON, with the texts that clients really send and that they choke on.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::key::{DiscoPrivateKey, NodePrivateKey};

/// What the independent Rust client sends: its own spelling of many members.
#[test]
fn requests_are_understood_in_any_spelling() {
    let key = NodePrivateKey::generate().public();
    let text = json!({
        "version": 130, "nodekey": key, "Stream": true, "COMPRESS": "zstd",
        "HostInfo": {
            "Hostname": "a", "Os": "linux", "IpnVersion": "0.5", "BackendLogId": "x",
            "RoutableIps": ["10.0.0.0/8"], "SshHostKeys": ["k"],
            "NetInfo": {
                "PreferredDerp": 900, "WorkingUdp": true, "Upnp": null,
                "DerpLatency": { "900-v4": 0.5 }, "MappingVariesByDestIp": false
            }
        }
    });
    let request: MapRequest = decode_request(text.to_string().as_bytes()).unwrap();
    assert_eq!((request.version, request.node_key, request.stream), (130, key, true));
    assert_eq!(request.compress, "zstd");
    let hostinfo = request.hostinfo.unwrap();
    assert_eq!((hostinfo.os.as_str(), hostinfo.ipn_version.as_str()), ("linux", "0.5"));
    assert_eq!((hostinfo.routable_ips.len(), hostinfo.ssh_host_keys.len()), (1, 1));
    let net_info = hostinfo.net_info.unwrap();
    assert_eq!((net_info.preferred_derp, net_info.working_udp, net_info.upnp), (900, Some(true), None));
    assert_eq!(net_info.derp_latency, [("900-v4".to_owned(), 0.5)].into());
}

/// What Go sends when it joins, and when it leaves.
#[test]
fn zero_keys_zero_times_and_null_say_nothing() {
    let zero = format!("nodekey:{}", "0".repeat(64));
    let text = json!({
        "Version": 113, "NodeKey": NodePrivateKey::generate().public(), "OldNodeKey": zero,
        "NLKey": format!("nlpub:{}", "0".repeat(64)), "Auth": null, "Expiry": "0001-01-01T00:00:00Z",
        "Followup": "", "Hostinfo": null, "SignatureType": "signature-none", "Signature": null
    });
    let request: RegisterRequest = decode_request(text.to_string().as_bytes()).unwrap();
    assert!(request.old_node_key.is_zero() && request.nl_key.is_none());
    assert!(request.auth.is_none() && request.expiry.is_none() && request.hostinfo.is_none());
    let logout: RegisterRequest = decode_request(br#"{"Expiry":"1970-01-01T01:02:03+01:00"}"#).unwrap();
    assert_eq!(logout.expiry.unwrap().unix_timestamp(), 123);
}

#[test]
fn a_register_reply_has_every_member_and_no_secret_is_printed() {
    let reply: Value = serde_json::from_slice(&to_json(&RegisterResponse::default())).unwrap();
    let expected = json!({
        "User": { "ID": 0, "DisplayName": "" },
        "Login": { "ID": 0, "Provider": "", "LoginName": "", "DisplayName": "" },
        "NodeKeyExpired": false, "MachineAuthorized": false, "AuthURL": "", "NodeKeySignature": null, "Error": ""
    });
    assert_eq!(reply, expected);
    let auth = Some(RegisterAuth { auth_key: "secret".to_owned() });
    assert!(!format!("{:?}", RegisterRequest { auth, ..RegisterRequest::default() }).contains("secret"));
}

#[test]
fn an_endpoint_without_a_meaning_here_costs_only_itself() {
    let text = br#"{"Endpoints":["192.0.2.1:41641","[fe80::1%eth0]:41641","[2001:db8::1]:1"]}"#;
    let request: MapRequest = decode_request(text).unwrap();
    let endpoints: Vec<_> = request.endpoints.unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(endpoints, ["192.0.2.1:41641", "[2001:db8::1]:1"]);
    assert!(decode_request::<MapRequest>(br#"{"Endpoints":null}"#).unwrap().endpoints.is_none());
    assert!(decode_request::<MapRequest>(b"{}").unwrap().endpoints.is_none());
    let cleared: PeerChange = serde_json::from_str(r#"{"NodeID":1,"Endpoints":[]}"#).unwrap();
    assert_eq!(cleared.endpoints, Some(Vec::new()));
}

#[test]
fn a_patch_tells_an_expiry_that_is_taken_away_from_one_that_stays() {
    let unchanged = PeerChange { node_id: NodeId(1), ..PeerChange::default() };
    assert_eq!(to_json(&unchanged), br#"{"NodeID":1}"#);
    let never = PeerChange { key_expiry: Some(None), ..unchanged.clone() };
    assert_eq!(to_json(&never), br#"{"NodeID":1,"KeyExpiry":"0001-01-01T00:00:00Z"}"#);
    for patch in [unchanged, never] {
        assert_eq!(serde_json::from_slice::<PeerChange>(&to_json(&patch)).unwrap(), patch);
    }
}

/// Null stands for "empty" where we read, and is never written where one client would break on it.
#[test]
fn null_is_read_as_nothing_and_a_node_has_none() {
    let text = r#"{"ID":1,"Endpoints":null,"PrimaryRoutes":null,"CapMap":null,"Capabilities":null,"Tags":null,
        "Online":null,"LastSeen":null,"AllowedIPs":null,"Name":null,"Hostinfo":null}"#;
    let node: Node = serde_json::from_str(text).unwrap();
    assert_eq!(node, Node { id: NodeId(1), ..Node::default() });
    assert!(!String::from_utf8(to_json(&node)).unwrap().contains("null"));
    let map = r#"{"Peers":null,"PeersRemoved":null,"UserProfiles":null,"DNSConfig":{"Routes":{"a":null}},
        "DERPMap":{"Regions":{"1":null}}}"#;
    let map: MapResponse = serde_json::from_str(map).unwrap();
    assert_eq!(map.dns_config.unwrap().routes["a"], []);
    assert!(map.derp_map.unwrap().regions.is_empty());
}

/// As Go does: members of structs, and not the keys of maps.
#[test]
fn a_key_of_a_map_keeps_its_case() {
    let text = br#"{"hostinfo":{"NETINFO":{"derplatency":{"PreferredDERP":1.5},"preferredderp":7}}}"#;
    let info = decode_request::<MapRequest>(text).unwrap().hostinfo.unwrap().net_info.unwrap();
    assert_eq!(info.derp_latency, [("PreferredDERP".to_owned(), 1.5)].into());
    assert_eq!(info.preferred_derp, 7);
}

#[test]
fn a_request_that_is_nested_too_deep_is_refused_and_says_so() {
    let nested =
        |depth: usize| format!(r#"{{"Hostinfo":{{"X":{}{}}}}}"#, "[".repeat(depth), "]".repeat(depth));
    assert!(decode_request::<MapRequest>(nested(14).as_bytes()).is_ok());
    for depth in [15, 124, 5000] {
        let error = decode_request::<MapRequest>(nested(depth).as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "nested deeper than 16 objects and lists");
    }
}

#[test]
fn a_member_of_a_host_that_is_odd_costs_itself() {
    let text = json!({"Hostinfo": {
        "Hostname": "a", "OS": ["x"], "ShareeNode": "x", "Container": 1, "Location": "here", "TPM": {"a": 1},
        "RoutableIPs": ["10.0.0.0/8", "nonsense"], "Services": 7, "NetInfo": 7, "Future": {"a": [1]},
    }});
    let hostinfo = decode_request::<MapRequest>(text.to_string().as_bytes()).unwrap().hostinfo.unwrap();
    assert_eq!(hostinfo, Hostinfo { hostname: "a".to_owned(), ..Hostinfo::default() });
    assert_eq!(to_json(&hostinfo), br#"{"Hostname":"a"}"#);
}

#[test]
fn texts_for_people_need_no_escape() {
    assert_eq!(display_text("a\"b\\c\nd & <é>"), "abcd & <é>");
    assert_eq!(to_json(&display_text("& <é>")), "\"& <é>\"".as_bytes());
}

proptest! {
    #[test]
    fn a_map_request_comes_back_as_it_was(
        version in any::<u16>(),
        hostname in "\\PC{0,40}",
        region in any::<u16>(),
        endpoints in proptest::option::of(proptest::collection::vec(any::<(std::net::IpAddr, u16)>(), 0..4)),
        stream in any::<bool>(),
    ) {
        let net_info = Some(NetInfo { preferred_derp: region, ..NetInfo::default() });
        let request = MapRequest {
            version,
            node_key: NodePrivateKey::generate().public(),
            disco_key: Some(DiscoPrivateKey::generate().public()),
            hostinfo: Some(Hostinfo { hostname, net_info, ..Hostinfo::default() }),
            endpoints: endpoints.map(|all| all.into_iter().map(Into::into).collect()),
            stream,
            omit_peers: !stream,
            ..MapRequest::default()
        };
        let text = to_json(&request);
        prop_assert_eq!(&decode_request::<MapRequest>(&text).unwrap(), &request);
        // Cut short it is an error and no panic.
        prop_assert!(decode_request::<MapRequest>(&text[..text.len() - 1]).is_err());
    }

    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in "[\\[\\]{}:,\"a-zNK0-9]{0,80}") {
        let _ = decode_request::<MapRequest>(&bytes);
        let _ = decode_request::<RegisterRequest>(text.as_bytes());
        let _ = serde_json::from_slice::<MapResponse>(text.as_bytes());
    }
}
