//! Names of nodes: from what a host calls itself to a DNS label that is free in its network.
//!
//! The rules are those the clients themselves use, so that both sides derive the same label (control-protocol
//! dossier, section 12.4).

use lacis_wire::control::display_text;

/// A DNS label's length.
const LABEL: usize = 63;
/// What a host without a usable name is called.
const FALLBACK: &str = "node";
/// Names that programs look up by themselves, and in the domains they search: a node with such a name would be taken for
/// this host, or for where a proxy, a gateway or a mailbox is configured.
const RESERVED: [&str; 16] = [
    // This host and its neighbours, as hosts files have them.
    "localhost",
    "localhost4",
    "localhost6",
    "localdomain",
    "local",
    "broadcasthost",
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
/// `ip6-localhost`, `ip6-allnodes` and the others of hosts files.
const RESERVED_PREFIX: &str = "ip6-";
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

/// May no node have this name?
pub fn is_reserved(name: &str) -> bool {
    name.starts_with(RESERVED_PREFIX) || RESERVED.contains(&name)
}

/// `label`, or with the first free number behind it. A reserved one gets another beginning.
pub fn free(label: &str, taken: impl Fn(&str) -> bool) -> String {
    if is_reserved(label) {
        let label = format!("{FALLBACK}-{label}");
        return free(label[..label.len().min(LABEL)].trim_end_matches('-'), taken);
    }
    if !taken(label) {
        return label.to_owned();
    }
    let mut number = 1_u32;
    loop {
        let suffix = format!("-{number}");
        let name = format!("{}{suffix}", &label[..label.len().min(LABEL - suffix.len())]);
        if !taken(&name) {
            return name;
        }
        number += 1;
    }
}

/// Why an administrator's name for a node is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    #[error("{name:?} is not a DNS label: use letters, digits and inner hyphens, at most 63")]
    NoLabel { name: String },
    #[error("{name:?} is a name that programs look up by themselves, so no node can have it: choose another")]
    Reserved { name: String },
    #[error("{name}.{domain} is longer than 255 characters")]
    TooLong { name: String, domain: String },
}

/// Checks a name that somebody chose.
///
/// # Errors
/// When it is no DNS label, reserved, or too long with the network's domain.
pub fn check(name: &str, domain: &str) -> Result<String, BadName> {
    let lower = name.to_ascii_lowercase();
    let inner = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let good = (1..=LABEL).contains(&lower.len())
        && lower.chars().all(inner)
        && !lower.starts_with('-')
        && !lower.ends_with('-');
    if !good {
        return Err(BadName::NoLabel { name: display_text(name) });
    }
    if is_reserved(&lower) {
        return Err(BadName::Reserved { name: lower });
    }
    if lower.len() + domain.len() + 2 > 255 {
        return Err(BadName::TooLong { name: lower, domain: domain.to_owned() });
    }
    Ok(lower)
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

    #[test]
    fn a_taken_name_gets_the_first_free_number() {
        let taken = ["bob", "bob-1"];
        assert_eq!(free("bob", |name| taken.contains(&name)), "bob-2");
        let long = "a".repeat(63);
        assert_eq!(free(&long, |name| name == long), format!("{}-1", "a".repeat(61)));
    }

    #[test]
    fn a_name_that_programs_look_up_by_themselves_is_no_node() {
        for (hostname, expected) in [
            ("WPAD", "node-wpad"),
            ("localhost", "node-localhost"),
            ("localhost.localdomain", "node-localhost"),
            ("ip6-allnodes", "node-ip6-allnodes"),
            ("isatap.lan", "node-isatap"),
            ("wpad2", "wpad2"),
        ] {
            assert_eq!(free(&label(hostname), |_| false), expected, "{hostname}");
        }
        assert_eq!(free("wpad", |name| name == "node-wpad"), "node-wpad-1");
        for bad in ["wpad", "Localhost", "broadcasthost", "ip6-anything"] {
            assert!(matches!(check(bad, "lab.example.org"), Err(BadName::Reserved { .. })), "{bad}");
        }
    }

    #[test]
    fn a_chosen_name_must_be_a_label() {
        assert_eq!(check("Web", "lab.example.org").unwrap(), "web");
        for bad in ["", "-a", "a-", "a.b", "ä", &"a".repeat(64)] {
            assert!(check(bad, "lab.example.org").is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_host_name_becomes_a_valid_label(hostname in "\\PC{0,100}") {
            let name = free(&label(&hostname), |_| false);
            prop_assert!(check(&name, "lab.example.org").is_ok(), "{name}");
        }

        #[test]
        fn no_host_name_makes_a_reserved_one(which in 0..RESERVED.len(), prefix in "(ip6-)?", rest in "[a-zA-Z0-9 ._-]{0,70}") {
            for hostname in [format!("{prefix}{rest}"), format!("{prefix}{}{rest}", RESERVED[which])] {
                let name = free(&label(&hostname), |_| false);
                prop_assert!(check(&name, "lab.example.org").is_ok(), "{name}");
            }
        }
    }
}
