//! The text of `/etc/resolv.conf` (resolv.conf(5)): what it says, and the one that lacisd writes.
//!
//! Ours has the file that was there before in its own last lines, as comments. So it is found by the next start
//! whatever its state directory is, goes where the file goes, and is replaced in the same moment. Who adds lines before
//! or after ours has them kept with the rest.

use std::ffi::OsStr;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use lacis_dns::{OsDns, QUAD100_V4, QUAD100_V6};

/// Our own file is known by the first words of its first line.
const MARKER: &[u8] = b"# Written by lacisd.";
const MARKER_REST: &[u8] = b" What was here before is kept below, and put back when it stops.\n";
/// Begins what was there before: this and then one of the words below.
const BEFORE: &[u8] = b"# before: ";
const NOTHING: &[u8] = b"nothing";
const FILE: &[u8] = b"a file";
const LINK: &[u8] = b"a link to ";
/// Before each line of the file that was there.
const LINE: &[u8] = b"#|";
const DNS_PORT: u16 = 53;
/// The C library reads no more.
const MAX_SERVERS: usize = 3;
/// Of a comment that is shown.
const MAX_COMMENT: usize = 80;

/// What was there before ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Before {
    /// The link that the file was.
    pub(super) link: Option<PathBuf>,
    /// The file's own text; beside a link, the lines that were added since.
    pub(super) text: Option<Vec<u8>>,
}

/// Text of ours.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ours {
    Complete(Before),
    /// What was there before is missing from it.
    Incomplete,
}

impl Before {
    /// From a text, if lacisd wrote it.
    pub(super) fn inside(text: &[u8]) -> Option<Ours> {
        let mut added: Vec<&[u8]> = Vec::new();
        let mut kept: Vec<&[u8]> = Vec::new();
        let mut lines = text.split_inclusive(|byte| *byte == b'\n');
        loop {
            let line = lines.next()?;
            if line.starts_with(MARKER) {
                break;
            }
            added.push(line);
        }
        let Some(what) = lines.find_map(|line| line.strip_prefix(BEFORE)) else {
            return Some(Ours::Incomplete);
        };
        let what = what.strip_suffix(b"\n").unwrap_or(what);
        for line in lines {
            match line.strip_prefix(LINE) {
                Some(line) => kept.push(line),
                None => added.push(line),
            }
        }
        let link = what.strip_prefix(LINK).map(|target| PathBuf::from(OsStr::from_bytes(target)));
        // Each line of it had an end, also what follows the last.
        let mut kept = kept.concat();
        kept.pop();
        let mut before = Vec::new();
        for line in added.into_iter().map(<[u8]>::trim_ascii) {
            let is_known = || kept.split(|byte| *byte == b'\n').any(|known| known.trim_ascii() == line);
            if !line.is_empty() && !line.starts_with(b"#") && !line.starts_with(b";") && !is_known() {
                before.extend([line, b"\n"].concat());
            }
        }
        before.extend(kept);
        let has_text = what == FILE || !before.is_empty();
        Some(Ours::Complete(Self { link, text: has_text.then_some(before) }))
    }

    /// The text that counts: the target's, as it is now, where the file was a link. `path` is the link's own.
    pub(super) fn in_force(&self, path: &Path) -> String {
        let mut text = self.text.clone().unwrap_or_default();
        if let Some(target) = self.target(path) {
            text.push(b'\n');
            text.extend(fs::read(target).unwrap_or_default());
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Where the link leads from `path`.
    pub(super) fn target(&self, path: &Path) -> Option<PathBuf> {
        self.link.as_ref().map(|link| path.parent().unwrap_or(Path::new("/")).join(link))
    }

    fn append_to(&self, ours: &mut Vec<u8>) {
        ours.extend_from_slice(BEFORE);
        match (&self.link, &self.text) {
            (Some(link), _) => ours.extend([LINK, link.as_os_str().as_bytes()].concat()),
            (None, Some(_)) => ours.extend_from_slice(FILE),
            (None, None) => ours.extend_from_slice(NOTHING),
        }
        ours.push(b'\n');
        for line in self.text.iter().flat_map(|text| text.split(|byte| *byte == b'\n')) {
            ours.extend([LINE, line, b"\n"].concat());
        }
    }
}

/// Our file. The host cannot tell names apart: all go to the first servers, and from there on. Whatever else the text in
/// force says stays in force.
pub(super) fn ours(dns: &OsDns, before: &Before, in_force: &str) -> Vec<u8> {
    let mut lines = Vec::new();
    if dns.servers.is_empty() {
        lines.extend(settings(in_force).filter(|(key, _)| *key == "nameserver").map(line));
    }
    lines.extend(dns.servers.iter().take(MAX_SERVERS).map(|server| format!("nameserver {server}\n")));
    let mut search: Vec<&str> = dns.search.iter().map(String::as_str).collect();
    for domain in searched(in_force) {
        if !search.contains(&domain) {
            search.push(domain);
        }
    }
    if !search.is_empty() {
        lines.push(format!("search {}\n", search.join(" ")));
    }
    lines.extend(settings(in_force).filter(|(key, _)| matches!(*key, "options" | "sortlist")).map(line));
    let mut text = [MARKER, MARKER_REST].concat();
    text.extend(lines.concat().into_bytes());
    before.append_to(&mut text);
    text
}

fn line((key, value): (&str, &str)) -> String {
    format!("{key} {value}\n")
}

/// Keywords and their values, as far as they have any.
fn settings(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
    lines
        .filter_map(|line| line.split_once(|c: char| c.is_ascii_whitespace()))
        .map(|(key, value)| (key, value.trim()))
}

/// The domains of the last `search` or `domain`, which alone counts.
fn searched(text: &str) -> impl Iterator<Item = &str> {
    let last = settings(text).filter(|(key, _)| matches!(*key, "search" | "domain")).last();
    last.into_iter().flat_map(|(_, domains)| domains.split_ascii_whitespace())
}

/// The first server of all that a text names, ours too.
pub(super) fn first_server(text: &str) -> Option<IpAddr> {
    named(text).next().map(|server| server.ip())
}

/// The servers that a text names, without our own.
pub(super) fn servers(text: &str) -> Vec<SocketAddr> {
    let own = |ip: IpAddr| ip == IpAddr::V4(QUAD100_V4) || ip == IpAddr::V6(QUAD100_V6);
    named(text).filter(|server| !own(server.ip())).collect()
}

fn named(text: &str) -> impl Iterator<Item = SocketAddr> {
    let values = settings(text).filter(|(key, _)| *key == "nameserver").map(|(_, value)| value);
    values.filter_map(|value| server(value.split_ascii_whitespace().next()?))
}

/// An address; of IPv6 also with a scope, the name or the index of a device (RFC 4007, section 11). One of a device that
/// is not there is none.
fn server(text: &str) -> Option<SocketAddr> {
    if let Ok(ip) = text.parse::<Ipv4Addr>() {
        return Some(SocketAddr::new(ip.into(), DNS_PORT));
    }
    let (ip, scope) = match text.split_once('%') {
        Some((ip, scope)) => (ip, device(scope)?),
        None => (text, 0),
    };
    let ip: Ipv6Addr = ip.parse().ok()?;
    Some(SocketAddrV6::new(ip, DNS_PORT, 0, scope).into())
}

/// The index of a device that is named so.
fn device(name: &str) -> Option<u32> {
    if let Ok(index) = name.parse() {
        return Some(index);
    }
    // What the kernel itself would not take for a name is none of its files either.
    let is_name = !name.is_empty() && !name.contains('/') && !name.starts_with('.');
    let index = is_name.then(|| fs::read_to_string(format!("/sys/class/net/{name}/ifindex")))?;
    index.ok()?.trim().parse().ok()
}

/// The program that says in the comments before the first setting that it makes the file.
pub(super) fn owner(text: &str) -> &'static str {
    let comments = comments(text).collect::<Vec<_>>().join("\n").to_ascii_lowercase();
    ["systemd-resolved", "resolvconf"].into_iter().find(|name| comments.contains(name)).unwrap_or("")
}

fn comments(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).take_while(|line| line.is_empty() || line.starts_with(['#', ';']))
}

/// What a file says of who wrote it: its first comment, or else its first line.
pub(super) fn written_by(text: &str) -> Option<String> {
    let bare = |line: &str| line.trim_matches(|c: char| c == '#' || c == ';' || c.is_whitespace()).to_owned();
    let first = comments(text).map(bare).find(|comment| !comment.is_empty());
    let first = first.or_else(|| text.lines().map(bare).find(|line| !line.is_empty()))?;
    Some(lacis_wire::text::plain(&first).chars().take(MAX_COMMENT).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dns() -> OsDns {
        OsDns {
            servers: vec![QUAD100_V4.into()],
            search: vec!["lab.example".into()],
            match_domains: vec!["lab.example".into()],
        }
    }

    fn file(text: &str) -> Before {
        Before { link: None, text: Some(text.into()) }
    }

    fn inside(text: &[u8]) -> Before {
        match Before::inside(text) {
            Some(Ours::Complete(before)) => before,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn servers_keep_their_scopes_and_what_is_none_costs_itself() {
        let text = "nameserver 192.0.2.1 # at home\nnameserver nonsense\n nameserver fe80::1%lo\nnameserver fe80::2%7\n\
                    nameserver fe80::3%nowhere0\nnameserver fe80::4%../lo\nnameserver 2001:db8::1\n# nameserver 192.0.2.9\n\
                    nameserver 100.100.100.100\nnameserver\nnameservers 192.0.2.8\n";
        // The name of the loopback device is the same everywhere, and so is its index.
        let expected = ["192.0.2.1:53", "[fe80::1%1]:53", "[fe80::2%7]:53", "[2001:db8::1]:53"];
        assert_eq!(servers(text), expected.map(|server| server.parse().unwrap()));
        assert_eq!(first_server("nameserver 100.100.100.100"), Some(QUAD100_V4.into()));
    }

    #[test]
    fn what_the_host_says_beside_its_servers_stays_in_force() {
        let before = "options timeout:1 attempts:2\nnameserver 192.0.2.1\nsortlist 130.155.160.0/255.255.240.0\n\
                      domain old.example\nsearch home.example lab.example\noptions rotate\n";
        let text = String::from_utf8(ours(&dns(), &file(before), before)).unwrap();
        let visible: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let expected = [
            "nameserver 100.100.100.100",
            "search lab.example home.example",
            "options timeout:1 attempts:2",
            "sortlist 130.155.160.0/255.255.240.0",
            "options rotate",
        ];
        assert_eq!(visible, expected);
        assert_eq!(owner(&text), "");
    }

    #[test]
    fn a_network_with_search_domains_alone_leaves_the_host_its_servers() {
        let before = "nameserver fe80::1%lo\nnameserver 192.0.2.1\n";
        let dns = OsDns { search: vec!["lab.example".into()], ..OsDns::default() };
        let text = String::from_utf8(ours(&dns, &file(before), before)).unwrap();
        assert!(text.contains("nameserver fe80::1%lo\nnameserver 192.0.2.1\nsearch lab.example\n"), "{text}");
    }

    #[test]
    fn a_link_and_nothing_come_back_as_they_were() {
        for before in [
            Before::default(),
            Before { link: Some("../run/theirs".into()), text: None },
            Before { link: Some("/run/theirs".into()), text: Some(b"nameserver 192.0.2.7\n".to_vec()) },
            file(""),
        ] {
            assert_eq!(inside(&ours(&dns(), &before, "")), before);
        }
    }

    #[test]
    fn lines_that_somebody_adds_to_ours_are_kept_and_those_that_go_are_gone() {
        let ours = ours(&dns(), &file("nameserver 192.0.2.1\n"), "");
        let mut edited = b"nameserver 192.0.2.7\n".to_vec();
        edited.extend(&ours);
        edited.extend(b"options timeout:1\n");
        let before = inside(&edited);
        let text = before.in_force(Path::new("/etc/resolv.conf"));
        assert_eq!(text, "nameserver 192.0.2.7\noptions timeout:1\nnameserver 192.0.2.1\n");
        let again = super::ours(&dns(), &before, &text);
        let less: Vec<u8> = again
            .split_inclusive(|byte| *byte == b'\n')
            .filter(|line| !line.ends_with(b"nameserver 192.0.2.7\n"))
            .flatten()
            .copied()
            .collect();
        assert_eq!(servers(&inside(&less).in_force(Path::new("/"))), ["192.0.2.1:53".parse().unwrap()]);
    }

    #[test]
    fn text_of_ours_that_lost_its_end_is_known() {
        assert_eq!(Before::inside(b"# Written by lacisd. The file\nnameserver x\n"), Some(Ours::Incomplete));
        assert_eq!(Before::inside(b"nameserver 192.0.2.1\n"), None);
        assert_eq!(Before::inside(b""), None);
    }

    #[test]
    fn the_first_comments_name_the_owner() {
        assert_eq!(
            owner("# This is /run/systemd/resolve/stub-resolv.conf managed by man:systemd-resolved(8)."),
            "systemd-resolved"
        );
        assert_eq!(owner("# Generated by resolvconf\nnameserver 192.0.2.1"), "resolvconf");
        assert_eq!(owner("nameserver 192.0.2.1\n# resolvconf"), "");
        assert_eq!(owner(""), "");
    }

    #[test]
    fn a_file_says_who_wrote_it() {
        let said = |text: &str| written_by(text).unwrap();
        assert_eq!(
            said("\n# Generated by NetworkManager\nnameserver 192.0.2.1\n"),
            "Generated by NetworkManager"
        );
        assert_eq!(said(";\n; dhclient-script\n"), "dhclient-script");
        assert_eq!(said("nameserver 192.0.2.1\x1b[2J\n"), "nameserver 192.0.2.1\u{fffd}[2J");
        assert_eq!(written_by("\n#\n"), None);
        assert_eq!(said(&"x".repeat(1000)).len(), MAX_COMMENT);
    }

    proptest! {
        #[test]
        fn what_was_there_comes_back_byte_for_byte(
            text in prop_oneof![proptest::collection::vec(any::<u8>(), 0..200),
                                "((#|nameserver|\\||before: |[a-z 0-9.]{0,9}|\r)*\n?){0,9}".prop_map(String::into_bytes)],
        ) {
            // A text of ours is never kept as somebody else's.
            prop_assume!(Before::inside(&text).is_none());
            let before = Before { link: None, text: Some(text) };
            let in_force = before.in_force(Path::new("/etc/resolv.conf"));
            let ours = ours(&dns(), &before, &in_force);
            prop_assert_eq!(inside(&ours), before);
            prop_assert!(!servers(&String::from_utf8_lossy(&ours)).iter().any(|to| to.ip() == IpAddr::V4(QUAD100_V4)));
        }
    }
}
