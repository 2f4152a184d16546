//! The text of a policy.

use lacis_policy::{Format, Network, Node, Policy, Population, User};
use lacis_wire::control::{NodeId, UserId};

fn population() -> Population {
    let node = |id: u8, user: Option<i64>, tags: &[&str]| Node {
        id: NodeId(id.into()),
        name: format!("n{id}"),
        user: user.map(UserId),
        tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        v4: Some([100, 64, 0, id].into()),
        v6: Some([0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, id.into()].into()),
        advertised: vec!["10.0.0.0/8".parse().expect("a network"), "0.0.0.0/0".parse().expect("a network")],
        online: id.is_multiple_of(2),
        ..Node::default()
    };
    let user = |id, name: &str| User { id: UserId(id), name: name.to_owned(), ..User::default() };
    Population {
        users: vec![user(1, "a@b.c"), user(2, "d")],
        nodes: vec![
            node(1, Some(1), &[]),
            node(2, Some(2), &[]),
            node(3, None, &["tag:a"]),
            node(4, None, &["tag:b"]),
        ],
        ..Population::default()
    }
}

/// As HuJSON and as YAML: read, printed, read again, and applied to a small network.
pub fn policy(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    for format in [Format::HuJson, Format::Yaml] {
        let _ = Population::parse(text, format);
        let Ok(policy) = Policy::parse(text, format) else { continue };
        let again = Policy::parse(&policy.to_json().to_string(), Format::HuJson).expect("our own print");
        assert_eq!(again, policy);
        let network = Network::compile(&policy, population());
        let _ = network.test();
        let changed = network.with_node(Node { online: true, ..population().nodes.swap_remove(2) });
        let fresh = Network::compile(&policy, changed.population());
        for id in (1..=4).map(NodeId) {
            assert_eq!(changed.filter(id), fresh.filter(id));
            assert_eq!(changed.ssh_rules(id), fresh.ssh_rules(id));
            assert_eq!(changed.attributes(id), fresh.attributes(id));
            assert!(changed.peers(id).eq(fresh.peers(id)));
            for peer in changed.peers(id) {
                assert_eq!(changed.routes(id, peer), fresh.routes(id, peer));
            }
            let _ = changed.difference(&network, id);
        }
    }
}
