//! Names of nodes: from what a host calls itself to a DNS label that is free in its network.
//!
//! The rules are those the clients themselves use, so that both sides derive the same label (control-protocol
//! dossier, section 12.4).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use lacis_wire::control::{NodeId, display_text};

/// A DNS label's length.
const LABEL: usize = 63;
/// What a host without a usable name is called.
const FALLBACK: &str = "node";
/// This host and its neighbours, as hosts files have them: whose file lacks the line asks for the name, in the domains
/// that it searches too, and would take a node of that name for itself.
const THIS_HOST: [&str; 5] = ["localhost", "localhost4", "localhost6", "localdomain", "broadcasthost"];
/// `ip6-localhost`, `ip6-allnodes` and the others of hosts files.
const THIS_HOST_PREFIX: &str = "ip6-";
/// Names that programs look up by themselves, and in the domains they search: a node with such a name would be taken for
/// where a proxy, a gateway or a mailbox is configured.
const LOOKED_UP: [&str; 11] = [
    // What multicast DNS ends in.
    "local",
    // What Windows asks for (its DNS servers have a block list for the first two).
    "wpad",
    "isatap",
    "teredo",
    // Mail and telephony.
    "autodiscover",
    "autoconfig",
    "lyncdiscover",
    "lyncdiscoverinternal",
    "mta-sts",
    "openpgpkey",
    // Clouds' machines ask it for their secrets.
    "metadata",
];
/// Suffixes that machines carry at home and that say nothing.
const LOCAL_SUFFIXES: [&str; 3] = [".local", ".localdomain", ".lan"];

/// The label that a host name becomes.
pub fn label(hostname: &str) -> String {
    let mut name = hostname;
    for suffix in LOCAL_SUFFIXES {
        name = name.strip_suffix(suffix).unwrap_or(name);
    }
    let mut end = name.len().min(LABEL);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let kept = name[..end].trim_matches(|c: char| !c.is_ascii_alphanumeric());
    let label: String = kept
        .chars()
        .filter_map(|c| match c {
            ' ' | '.' | '@' | '_' => Some('-'),
            c if c.is_ascii_alphanumeric() || c == '-' => Some(c.to_ascii_lowercase()),
            _ => None,
        })
        .collect();
    if label.is_empty() { FALLBACK.to_owned() } else { label }
}

/// Does every host mean itself by this name (RFC 6761, section 6.3, and hosts files)?
pub fn means_this_host(label: &str) -> bool {
    label.starts_with(THIS_HOST_PREFIX) || THIS_HOST.contains(&label)
}

/// The names of a network's nodes, and those that none may have.
#[derive(Debug, Default)]
pub struct Names {
    taken: HashMap<String, NodeId>,
    /// The host names of the coordinator and the relays, by their first labels: who completes such a label in the
    /// network's domain must not reach a node.
    servers: BTreeMap<String, String>,
}

impl Names {
    /// Without nodes; `servers` are host names or addresses.
    pub fn new<'a>(servers: impl IntoIterator<Item = &'a str>) -> Self {
        let named =
            servers.into_iter().filter(|host| host.trim_matches(['[', ']']).parse::<IpAddr>().is_err());
        let labelled = named.filter_map(|host| {
            let host = host.to_ascii_lowercase();
            Some((host.split('.').next()?.to_owned(), host))
        });
        Self { taken: HashMap::new(), servers: labelled.collect() }
    }

    /// May no node have this name?
    pub fn is_reserved(&self, name: &str) -> bool {
        means_this_host(name) || LOOKED_UP.contains(&name) || self.servers.contains_key(name)
    }

    /// The node that has this name.
    pub fn holder(&self, name: &str) -> Option<NodeId> {
        self.taken.get(name).copied()
    }

    pub fn take(&mut self, name: String, node: NodeId) {
        self.taken.insert(name, node);
    }

    pub fn give_back(&mut self, name: &str) {
        self.taken.remove(name);
    }

    /// `label`, or with the first free number behind it. A reserved one gets another beginning.
    pub fn free(&self, label: &str) -> String {
        let label = if self.is_reserved(label) { format!("{FALLBACK}-{label}") } else { label.to_owned() };
        let cut = |suffix: &str| {
            format!("{}{suffix}", label[..label.len().min(LABEL - suffix.len())].trim_end_matches('-'))
        };
        let mut name = cut("");
        let mut number = 0_u32;
        while self.taken.contains_key(&name) || self.is_reserved(&name) {
            number += 1;
            name = cut(&format!("-{number}"));
        }
        name
    }

    /// Checks a chosen name. It may be taken.
    ///
    /// # Errors
    /// When it is no DNS label, reserved, or too long with the network's domain.
    pub fn check(&self, name: &str, domain: &str) -> Result<String, BadName> {
        let lower = name.to_ascii_lowercase();
        let inner = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let good = (1..=LABEL).contains(&lower.len())
            && lower.chars().all(inner)
            && !lower.starts_with('-')
            && !lower.ends_with('-');
        if !good {
            return Err(BadName::NoLabel { name: display_text(name) });
        }
        if let Some(host) = self.servers.get(&lower) {
            return Err(BadName::Server { name: lower, host: host.clone() });
        }
        if self.is_reserved(&lower) {
            return Err(BadName::Reserved { name: lower });
        }
        if lower.len() + domain.len() + 2 > 255 {
            return Err(BadName::TooLong { name: lower, domain: domain.to_owned() });
        }
        Ok(lower)
    }
}

/// Why an administrator's name for a node is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    #[error("{name:?} is not a DNS label: use letters, digits and inner hyphens, at most 63")]
    NoLabel { name: String },
    #[error("{name:?} is a name that programs look up by themselves, so no node can have it: choose another")]
    Reserved { name: String },
    #[error("{name:?} stands for {host}, the coordinator or a relay, so no node can have it: choose another")]
    Server { name: String, host: String },
    #[error("{name}.{domain} is longer than 255 characters")]
    TooLong { name: String, domain: String },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn host_names_become_labels() {
        for (hostname, expected) in [
            ("Bob", "bob"),
            ("bobs-mac.local", "bobs-mac"),
            ("Bob's MacBook Pro", "bobs-macbook-pro"),
            ("web.example.org", "web-example-org"),
            ("--x--", "x"),
            ("büro", "bro"),
            ("", "node"),
            ("!!!", "node"),
            ("my_host", "my-host"),
        ] {
            assert_eq!(label(hostname), expected, "{hostname}");
        }
    }

    fn taken(names: &[&str]) -> Names {
        let mut all =
            Names::new(["Mesh.example.org", "derp-1.example.org", "relay", "192.0.2.7", "[2001:db8::1]"]);
        for name in names {
            all.take((*name).to_owned(), NodeId(1));
        }
        all
    }

    #[test]
    fn a_taken_name_gets_the_first_free_number() {
        assert_eq!(taken(&["bob", "bob-1"]).free("bob"), "bob-2");
        let long = "a".repeat(63);
        assert_eq!(taken(&[&long]).free(&long), format!("{}-1", "a".repeat(61)));
    }

    #[test]
    fn a_name_that_programs_look_up_by_themselves_is_no_node() {
        for (hostname, expected) in [
            ("WPAD", "node-wpad"),
            ("localhost", "node-localhost"),
            ("localhost.localdomain", "node-localhost"),
            ("ip6-allnodes", "node-ip6-allnodes"),
            ("isatap.lan", "node-isatap"),
            ("_wpad", "node-wpad"),
            ("_dmarc", "dmarc"),
            ("wpad2", "wpad2"),
        ] {
            assert_eq!(taken(&[]).free(&label(hostname)), expected, "{hostname}");
        }
        assert_eq!(taken(&["node-wpad"]).free("wpad"), "node-wpad-1");
        for bad in ["wpad", "Localhost", "broadcasthost", "ip6-anything"] {
            let refused = taken(&[]).check(bad, "lab.example.org");
            assert!(matches!(refused, Err(BadName::Reserved { .. })), "{bad}");
        }
        for bad in ["_dmarc", "_wpad", "_"] {
            let refused = taken(&[]).check(bad, "lab.example.org");
            assert!(matches!(refused, Err(BadName::NoLabel { .. })), "{bad}");
        }
    }

    #[test]
    fn what_stands_for_the_coordinator_or_a_relay_is_no_node() {
        let names = taken(&[]);
        for (hostname, expected) in [
            ("mesh", "node-mesh"),
            ("Derp-1", "node-derp-1"),
            ("relay.lan", "node-relay"),
            ("example", "example"),
            ("192", "192"),
        ] {
            assert_eq!(names.free(&label(hostname)), expected, "{hostname}");
        }
        let error = names.check("MESH", "lab.example.org").unwrap_err().to_string();
        assert!(error.contains("mesh.example.org"), "{error}");
        // Also where they are called as a reserved name becomes, and as long as a name can be.
        let long = format!("{}x", "node-".repeat(13))[..63].to_owned();
        let names = Names::new(["node.example.org", "node-node.example.org", &long]);
        assert_eq!(names.free("node"), "node-node-1");
        assert_ne!(names.free(&long), long);
    }

    #[test]
    fn a_chosen_name_must_be_a_label() {
        assert_eq!(taken(&[]).check("Web", "lab.example.org").unwrap(), "web");
        for bad in ["", "-a", "a-", "a.b", "ä", &"a".repeat(64)] {
            assert!(taken(&[]).check(bad, "lab.example.org").is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_host_name_becomes_a_valid_label(hostname in "\\PC{0,100}") {
            let name = taken(&[]).free(&label(&hostname));
            prop_assert!(taken(&[]).check(&name, "lab.example.org").is_ok(), "{name}");
        }

        #[test]
        fn no_host_name_makes_a_reserved_one(which in 0..18_usize, prefix in "(ip6-)?", rest in "[a-zA-Z0-9 ._-]{0,70}") {
            let reserved = [&THIS_HOST[..], &LOOKED_UP[..], &["mesh", "relay"]].concat();
            for hostname in [format!("{prefix}{rest}"), format!("{prefix}{}{rest}", reserved[which])] {
                let name = taken(&[]).free(&label(&hostname));
                prop_assert!(taken(&[]).check(&name, "lab.example.org").is_ok(), "{name}");
            }
        }
    }
}
