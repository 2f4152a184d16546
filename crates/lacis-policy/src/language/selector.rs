//! What a policy names people and machines by: `*`, `tag:web`, `group:staff`, `autogroup:member`, `alice@example.com`,
//! a host's alias, an address or a network; and ports and protocols beside them.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use lacis_wire::control::PortRange;

use crate::population::Role;

/// Some nodes, or addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Selector {
    /// `*`: everybody in the network; as a destination everything.
    Any,
    /// `autogroup:member`: nodes of users.
    Member,
    /// `autogroup:tagged`: nodes with tags.
    Tagged,
    /// `autogroup:self`: the nodes of the source's own user.
    Own,
    /// `autogroup:internet`: what exit nodes lead to.
    Internet,
    /// `autogroup:danger-all`: every address there is.
    DangerAll,
    /// `autogroup:admin` and the like: nodes of users in that role.
    Role(Role),
    /// `autogroup:shared`: people of other networks; there are none here.
    Shared,
    /// `group:NAME`.
    Group(String),
    /// `tag:NAME`.
    Tag(String),
    /// A user, by email address or as `NAME@`.
    User(String),
    /// `user:*@DOMAIN`: all users of a mail domain.
    Domain(String),
    /// `posture:NAME`: nodes that fulfil its conditions; no policy can name it where people and machines are.
    Posture(String),
    /// An alias that `hosts` explains.
    Host(String),
    /// An address.
    Address(IpAddr),
    /// A network.
    Net(IpNet),
    /// From an address to another, both in it.
    Range(IpAddr, IpAddr),
}

/// Names after `autogroup:` that a selector may have, beside those of roles.
const AUTOGROUPS: [&str; 6] = ["member", "tagged", "self", "internet", "danger-all", "shared"];

/// Why a text is no selector: what is wrong, and what to do.
pub(crate) type Wrong = (String, Option<String>);

fn wrong<T>(message: impl Into<String>, help: impl Into<Option<&'static str>>) -> Result<T, Wrong> {
    Err((message.into(), help.into().map(str::to_owned)))
}

/// The one of `known` that was probably meant.
pub(crate) fn nearest<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&text.to_lowercase(), &name.to_lowercase()), name))
        .filter(|(distance, name)| *distance <= name.len().div_ceil(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

impl Selector {
    pub(crate) fn parse(text: &str) -> Result<Self, Wrong> {
        if text.is_empty() {
            return wrong("there must be a name or an address, not an empty text", None);
        }
        if text == "*" {
            return Ok(Self::Any);
        }
        if let Some(name) = text.strip_prefix("autogroup:") {
            return Self::autogroup(text, name);
        }
        if let Some(name) = text.strip_prefix("group:") {
            return if name.is_empty() {
                wrong("a group needs a name", None)
            } else {
                Ok(Self::Group(text.to_owned()))
            };
        }
        if let Some(name) = text.strip_prefix("tag:") {
            // As `tailcfg.CheckTag`.
            if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
                return wrong(format!("{text:?}: tag names must start with a letter, after 'tag:'"), None);
            }
            if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
                let message = format!("{text:?}: tag names can only contain letters, digits and dashes");
                return wrong(message, None);
            }
            return Ok(Self::Tag(text.to_owned()));
        }
        if let Some(domain) = text.strip_prefix("user:") {
            return match domain.strip_prefix("*@") {
                Some(domain) if !domain.is_empty() && !domain.contains('*') => {
                    Ok(Self::Domain(domain.to_owned()))
                }
                _ => wrong(format!("{text:?} is not understood"), "all users of a domain are user:*@DOMAIN"),
            };
        }
        if text.starts_with("posture:") {
            return wrong(format!("{text:?}: a posture is invalid here"), "it belongs in srcPosture");
        }
        for (prefix, what) in [("ipset:", "IP sets"), ("svc:", "services")] {
            if text.starts_with(prefix) {
                return wrong(format!("{text:?}: {what} are not supported here"), None);
            }
        }
        if text.contains('@') {
            return Ok(Self::User(text.to_owned()));
        }
        if let Some((first, last)) = text.split_once('-')
            && let (Ok(first), Ok(last)) = (first.parse::<IpAddr>(), last.parse::<IpAddr>())
        {
            return if first.is_ipv4() == last.is_ipv4() && first <= last {
                Ok(Self::Range(first, last))
            } else {
                wrong(format!("{text:?} is no range of addresses"), "the first comes before the last")
            };
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Address(address));
        }
        if text.contains('/') {
            return match text.parse::<IpNet>() {
                Ok(net) if net.trunc() == net => Ok(Self::Net(net)),
                Ok(net) => Err((
                    format!("{text:?} has bits set after its prefix"),
                    Some(format!("the network is {}", net.trunc())),
                )),
                Err(_) => wrong(format!("{text:?} is an invalid network"), "such as 10.0.0.0/8"),
            };
        }
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.chars().all(plain) && !text.chars().all(|c| c.is_ascii_digit() || c == '.') {
            return Ok(Self::Host(text.to_owned()));
        }
        wrong(format!("{text:?} is an invalid address"), "a user is written NAME@, or as an email address")
    }

    fn autogroup(text: &str, name: &str) -> Result<Self, Wrong> {
        if let Some(role) = Role::named(name) {
            return Ok(Self::Role(role));
        }
        Ok(match name {
            "member" | "members" => Self::Member,
            "tagged" => Self::Tagged,
            "self" => Self::Own,
            "internet" => Self::Internet,
            "danger-all" => Self::DangerAll,
            "shared" => Self::Shared,
            "nonroot" => {
                return wrong("autogroup:nonroot is only meaningful among the users of an ssh rule", None);
            }
            _ => {
                let known = AUTOGROUPS.into_iter().chain(Role::NAMES.map(|(name, _)| name));
                let help = nearest(name, known).map(|near| format!("did you mean autogroup:{near}?"));
                return Err((format!("unknown autogroup {text:?}"), help));
            }
        })
    }

    /// Names users, or groups of them.
    pub(crate) fn is_people(&self) -> bool {
        matches!(
            self,
            Self::Member | Self::Role(_) | Self::Shared | Self::Group(_) | Self::User(_) | Self::Domain(_)
        )
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Member => f.write_str("autogroup:member"),
            Self::Tagged => f.write_str("autogroup:tagged"),
            Self::Own => f.write_str("autogroup:self"),
            Self::Internet => f.write_str("autogroup:internet"),
            Self::DangerAll => f.write_str("autogroup:danger-all"),
            Self::Shared => f.write_str("autogroup:shared"),
            Self::Role(role) => write!(f, "autogroup:{}", role.name()),
            Self::Group(name)
            | Self::Tag(name)
            | Self::User(name)
            | Self::Posture(name)
            | Self::Host(name) => f.write_str(name),
            Self::Domain(domain) => write!(f, "user:*@{domain}"),
            Self::Address(address) => address.fmt(f),
            Self::Net(net) => net.fmt(f),
            Self::Range(first, last) => write!(f, "{first}-{last}"),
        }
    }
}

/// All ports there are.
pub(crate) const ALL_PORTS: PortRange = PortRange { first: 0, last: u16::MAX };

/// One port, in digits alone: `u16::from_str` takes a sign too.
fn port(text: &str, whole: &str, which: &str) -> Result<u16, Wrong> {
    let number = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u16>().ok()).flatten();
    match number {
        Some(0) => {
            wrong(format!("port range {whole:?}: {which} port must be >0, or use '*' for wildcard"), None)
        }
        Some(port) => Ok(port),
        None => wrong(
            format!("port range {whole:?}: invalid {which} integer"),
            "ports are written 22, 80,443, 8000-8100 or *, without blanks",
        ),
    }
}

/// `*`, `22`, `80,443`, `8000-8100`.
pub(crate) fn ports(text: &str) -> Result<Vec<PortRange>, Wrong> {
    if text == "*" {
        return Ok(vec![ALL_PORTS]);
    }
    let range = |part: &str| -> Result<PortRange, Wrong> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = PortRange { first: port(first, part, "first")?, last: port(last, part, "last")? };
        if range.first > range.last {
            return wrong(format!("port range {part:?}: the first port is greater than the last"), None);
        }
        Ok(range)
    };
    text.split(',').map(range).collect()
}

/// How ports are written.
pub(crate) fn show_ports(ports: &[PortRange]) -> String {
    let show = |range: &PortRange| match range {
        _ if *range == ALL_PORTS => "*".to_owned(),
        PortRange { first, last } if first == last => first.to_string(),
        PortRange { first, last } => format!("{first}-{last}"),
    };
    ports.iter().map(show).collect::<Vec<_>>().join(",")
}

/// Both parts of `HOST:PORTS`, each with what is wrong with it.
pub(crate) struct WithPorts {
    pub(crate) host: Result<Selector, Wrong>,
    pub(crate) ports: Result<Vec<PortRange>, Wrong>,
}

impl WithPorts {
    /// # Errors
    /// When there is nothing to take apart.
    pub(crate) fn parse(text: &str) -> Result<Self, Wrong> {
        match text.rsplit_once(':') {
            Some((host, range)) if !text.ends_with(']') => {
                Ok(Self { host: bare(host).and_then(|host| Selector::parse(&host)), ports: ports(range) })
            }
            _ => wrong(format!("{text:?} needs ports"), "such as tag:web:443 or *:*"),
        }
    }
}

/// A host without the brackets that an IPv6 address may have: `[fd7a::1]`, `[fd7a::]/48`, `[fd7a::/48]`.
fn bare(host: &str) -> Result<Cow<'_, str>, Wrong> {
    let Some(rest) = host.strip_prefix('[') else { return Ok(host.into()) };
    let refused = || {
        wrong(
            format!("{host:?}: square brackets are only valid around IPv6 addresses"),
            "write it without them",
        )
    };
    let Some((inside, after)) = rest.split_once(']') else { return refused() };
    let is_v6 = match Selector::parse(inside) {
        Ok(Selector::Address(address)) => address.is_ipv6(),
        Ok(Selector::Net(net)) => net.addr().is_ipv6() && after.is_empty(),
        _ => false,
    };
    if !is_v6 || !(after.is_empty() || after.starts_with('/')) {
        return refused();
    }
    Ok(format!("{inside}{after}").into())
}

/// `HOST:PORTS`.
pub(crate) fn with_ports(text: &str) -> Result<(Selector, Vec<PortRange>), Wrong> {
    let WithPorts { host, ports } = WithPorts::parse(text)?;
    let ports = ports?;
    Ok((host?, ports))
}

/// Protocols by name. A name is taken for the number, so that both compare equal.
const PROTOCOLS: [(&str, u8); 15] = [
    ("icmp", 1),
    ("igmp", 2),
    ("ipv4", 4),
    ("tcp", 6),
    ("egp", 8),
    ("igp", 9),
    ("udp", 17),
    ("dccp", 33),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", 58),
    ("tsmp", 99),
    ("sctp", 132),
    ("fc", 133),
];

/// Further names that are taken.
const PROTOCOL_ALIASES: [(&str, u8); 3] = [("ip-in-ip", 4), ("icmpv4", 1), ("icmpv6", 58)];

/// A protocol by name (`ipproto.Proto` in Tailscale, whatever its case) or number.
pub(crate) fn protocol(text: &str) -> Result<u8, Wrong> {
    let mut names = PROTOCOLS.iter().chain(&PROTOCOL_ALIASES);
    if let Some((_, number)) = names.find(|(name, _)| text.eq_ignore_ascii_case(name)) {
        return Ok(*number);
    }
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return wrong(
            format!("protocol {text:?} is not known"),
            "a number from 1 to 255 or a name: tcp, udp, icmp, sctp, …",
        );
    }
    if text.starts_with('0') {
        return wrong(format!("{text:?}: leading 0 not permitted in protocol number"), None);
    }
    match text.parse::<u8>() {
        Ok(number) => Ok(number),
        Err(_) => wrong(format!("protocol number {text} is out of range (1-255)"), None),
    }
}

/// The name of a protocol, or its number.
pub(crate) fn show_protocol(number: u8) -> String {
    let name = PROTOCOLS.iter().find(|(_, known)| *known == number).map(|(name, _)| (*name).to_owned());
    name.unwrap_or_else(|| number.to_string())
}

/// Ports mean something to it.
pub(crate) fn has_ports(protocol: u8) -> bool {
    matches!(protocol, 6 | 17 | 132)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_printed_as_they_are_read() {
        for text in [
            "*",
            "autogroup:member",
            "autogroup:self",
            "autogroup:network-admin",
            "group:staff",
            "tag:web",
            "alice@example.com",
            "alice@",
            "user:*@example.com",
            "printer",
            "10.0.0.0/8",
            "fd00::1",
            "10.0.0.1-10.0.0.9",
        ] {
            assert_eq!(Selector::parse(text).unwrap().to_string(), text);
        }
        for text in [
            "",
            "tag:",
            "tag:1",
            "tag:data_base",
            "tag:é",
            "tag:a:b",
            "tag:a.b",
            "tag:a ",
            "group:",
            "user:alice",
            "10.0.0.1/8",
            "10.0.0",
            "10.0.0.0/33",
            "autogroup:tag",
            "%x%",
            "svc:a",
        ] {
            assert!(Selector::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn destinations_have_ports() {
        let (selector, ports) = with_ports("[fd00::1]:80,8000-8100").unwrap();
        assert_eq!(
            (selector.to_string(), show_ports(&ports)),
            ("fd00::1".to_owned(), "80,8000-8100".to_owned())
        );
        assert_eq!(with_ports("tag:web:*").unwrap().1, [ALL_PORTS]);
        assert_eq!(with_ports("a:080").unwrap().1, [PortRange { first: 80, last: 80 }]);
        for text in [
            "tag",
            "a:0",
            "a:2-1",
            "a:70000",
            "a:-1",
            "a:",
            "a:+80",
            "a: 80",
            "a:80 ",
            "a:80-",
            "a:-80",
            "a:80-+90",
            "a:1-2-3",
            "a:80, 443",
            "a:80,",
            "a:٨٠",
            "a:tcp",
        ] {
            assert!(with_ports(text).is_err(), "{text}");
        }
    }

    #[test]
    fn brackets_are_for_ipv6_alone() {
        for text in ["[fd7a::1]:80", "[fd7a::]/48:80", "[fd7a::/48]:80", "fd7a::1:80", "fd7a::/48:*"] {
            assert!(with_ports(text).is_ok(), "{text}");
        }
        for text in [
            "[tag:db]:5432",
            "[10.0.0.1]:80",
            "[10.0.0.0/8]:80",
            "[*]:80",
            "[host]:80",
            "[autogroup:self]:*",
            "[alice@example.com]:80",
            "[group:a]:80",
            "[fd7a::1:80",
            "fd7a::1]:80",
            "[fd7a::1]x:80",
            "[fd7a::/48]/48:80",
            "[]:80",
            "[fd7a::1]",
        ] {
            assert!(with_ports(text).is_err(), "{text}");
        }
    }

    #[test]
    fn protocols_are_names_or_numbers() {
        for (text, number) in
            [("TCP", 6), ("Ip-In-Ip", 4), ("icmpv4", 1), ("ICMPv6", 58), ("dccp", 33), ("255", 255)]
        {
            assert_eq!(protocol(text), Ok(number), "{text}");
        }
        for text in ["", "0", "06", "+6", " tcp", "256", "-1", "*", "http"] {
            assert!(protocol(text).is_err(), "{text}");
        }
    }
}
