//! The shape of upstream's `tailcfg.Node` and `tailcfg.Hostinfo`, independent of our types: a member of another type
//! ends the map poll of every client that is sent it.

use lacis_wire::control::MAX_TEXT;
use serde_json::Value;

/// A Go type as JSON, with our bound of texts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Go {
    /// A `string` of at most so many characters.
    Text(usize),
    Bool,
    /// `opt.Bool`.
    OptBool,
    /// `int` as clients of 32 bits have it.
    Int,
    Int64,
    Uint16,
    Float,
    /// `time.Time`.
    Time,
    /// `netip.Prefix`.
    Prefix,
    /// `netip.AddrPort`.
    AddrPort,
    /// A key of `types/key` with this prefix.
    Key(&'static str),
    List(&'static Go),
    /// Values by name.
    Map(&'static Go),
    /// `tailcfg.RawMessage`.
    Any,
    Struct(&'static [(&'static str, Go)]),
}

const TEXT: Go = Go::Text(MAX_TEXT);

pub(super) const NODE: Go = Go::Struct(&[
    ("ID", Go::Int64),
    ("StableID", TEXT),
    ("Name", TEXT),
    ("User", Go::Int64),
    ("Key", Go::Key("nodekey:")),
    ("KeyExpiry", Go::Time),
    ("Machine", Go::Key("mkey:")),
    ("DiscoKey", Go::Key("discokey:")),
    ("Addresses", Go::List(&Go::Prefix)),
    ("AllowedIPs", Go::List(&Go::Prefix)),
    ("Endpoints", Go::List(&Go::AddrPort)),
    ("DERP", TEXT),
    ("HomeDERP", Go::Int),
    ("Hostinfo", HOSTINFO),
    ("Created", Go::Time),
    ("Cap", Go::Int),
    ("Tags", Go::List(&TEXT)),
    ("PrimaryRoutes", Go::List(&Go::Prefix)),
    ("LastSeen", Go::Time),
    ("Online", Go::Bool),
    ("MachineAuthorized", Go::Bool),
    ("Capabilities", Go::List(&TEXT)),
    ("CapMap", Go::Map(&Go::List(&Go::Any))),
    ("Expired", Go::Bool),
    ("IsWireGuardOnly", Go::Bool),
    ("IsJailed", Go::Bool),
]);

pub(super) const HOSTINFO: Go = Go::Struct(&[
    ("IPNVersion", TEXT),
    ("FrontendLogID", TEXT),
    ("BackendLogID", TEXT),
    ("OS", TEXT),
    ("OSVersion", TEXT),
    ("Container", Go::OptBool),
    ("Env", TEXT),
    ("Distro", TEXT),
    ("DistroVersion", TEXT),
    ("DistroCodeName", TEXT),
    ("App", TEXT),
    ("Desktop", Go::OptBool),
    ("Package", TEXT),
    ("DeviceModel", TEXT),
    ("Hostname", TEXT),
    ("ShieldsUp", Go::Bool),
    ("ShareeNode", Go::Bool),
    ("NoLogsNoSupport", Go::Bool),
    ("WireIngress", Go::Bool),
    ("IngressEnabled", Go::Bool),
    ("AllowsUpdate", Go::Bool),
    ("PeerRelay", Go::Bool),
    ("RemoteConfig", Go::Bool),
    ("Machine", TEXT),
    ("GoArch", TEXT),
    ("GoArchVar", TEXT),
    ("GoVersion", TEXT),
    ("RoutableIPs", Go::List(&Go::Prefix)),
    ("RequestTags", Go::List(&TEXT)),
    ("WoLMACs", Go::List(&TEXT)),
    ("Services", Go::List(&Go::Struct(&[("Proto", TEXT), ("Port", Go::Uint16), ("Description", TEXT)]))),
    ("ServicesHash", TEXT),
    (
        "NetInfo",
        Go::Struct(&[
            ("MappingVariesByDestIP", Go::OptBool),
            ("WorkingIPv6", Go::OptBool),
            ("OSHasIPv6", Go::OptBool),
            ("WorkingUDP", Go::OptBool),
            ("WorkingICMPv4", Go::OptBool),
            ("HavePortMap", Go::Bool),
            ("UPnP", Go::OptBool),
            ("PMP", Go::OptBool),
            ("PCP", Go::OptBool),
            ("PreferredDERP", Go::Int),
            ("LinkType", TEXT),
            ("DERPLatency", Go::Map(&Go::Float)),
            ("FirewallMode", TEXT),
        ]),
    ),
    ("sshHostKeys", Go::List(&Go::Text(4096))),
    ("Cloud", TEXT),
    ("Userspace", Go::OptBool),
    ("UserspaceRouter", Go::OptBool),
    ("AppConnector", Go::OptBool),
    ("StateEncrypted", Go::OptBool),
    ("ExitNodeID", TEXT),
    (
        "Location",
        Go::Struct(&[
            ("Country", TEXT),
            ("CountryCode", TEXT),
            ("City", TEXT),
            ("CityCode", TEXT),
            ("Latitude", Go::Float),
            ("Longitude", Go::Float),
            ("Priority", Go::Int),
        ]),
    ),
]);

impl Go {
    /// Would Go decode this, and is nothing in it that does not belong there?
    pub(super) fn check(&self, value: &Value) -> Result<(), String> {
        let text = || value.as_str().ok_or_else(|| format!("{value} is no text"));
        let good = match self {
            Self::Text(most) => {
                let text = text()?;
                text.chars().count() <= *most && !text.chars().any(char::is_control)
            }
            Self::Bool | Self::OptBool => value.is_boolean(),
            Self::Int => value.as_i64().is_some_and(|number| i32::try_from(number).is_ok()),
            Self::Int64 => value.is_i64(),
            Self::Uint16 => value.as_u64().is_some_and(|number| u16::try_from(number).is_ok()),
            Self::Float => value.is_number(),
            Self::Time => {
                time::OffsetDateTime::parse(text()?, &time::format_description::well_known::Rfc3339).is_ok()
            }
            Self::Prefix => is_prefix(text()?),
            Self::AddrPort => text()?.parse::<std::net::SocketAddr>().is_ok(),
            Self::Key(prefix) => text()?
                .strip_prefix(prefix)
                .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit())),
            Self::List(of) => {
                for item in value.as_array().ok_or_else(|| format!("{value} is no list"))? {
                    of.check(item)?;
                }
                true
            }
            Self::Map(of) => {
                for (name, item) in value.as_object().ok_or_else(|| format!("{value} is no map"))? {
                    TEXT.check(&Value::from(name.as_str()))?;
                    of.check(item)?;
                }
                true
            }
            Self::Any => true,
            Self::Struct(members) => {
                for (name, item) in value.as_object().ok_or_else(|| format!("{value} is no struct"))? {
                    let (_, shape) = members
                        .iter()
                        .find(|(member, _)| member == name)
                        .ok_or_else(|| format!("{name} is no member"))?;
                    shape.check(item).map_err(|error| format!("{name}: {error}"))?;
                }
                true
            }
        };
        if good { Ok(()) } else { Err(format!("{value} is no {self:?}")) }
    }

    fn sample(&self) -> String {
        match self {
            Self::Text(_) => "\"text\"".to_owned(),
            Self::Bool | Self::OptBool => "true".to_owned(),
            Self::Int | Self::Int64 | Self::Uint16 => "7".to_owned(),
            Self::Float => "1.5".to_owned(),
            Self::Time => "\"2026-01-01T00:00:00Z\"".to_owned(),
            Self::Prefix => "\"192.168.7.0/24\"".to_owned(),
            Self::AddrPort => "\"192.0.2.1:1\"".to_owned(),
            Self::Key(prefix) => format!("\"{prefix}{}\"", "1".repeat(64)),
            Self::List(of) => format!("[{}]", of.sample()),
            Self::Map(of) => format!("{{\"7-v4\":{}}}", of.sample()),
            Self::Any => "null".to_owned(),
            Self::Struct(members) => {
                let member = |(name, shape): &(&str, Self)| format!("{name:?}:{}", shape.sample());
                format!("{{{}}}", members.iter().map(member).collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// As `netip.ParsePrefix` has it: no zone, and a length without sign or leading zeros.
fn is_prefix(text: &str) -> bool {
    let Some((address, length)) = text.split_once('/') else { return false };
    let most = match address.parse() {
        Ok(std::net::IpAddr::V4(_)) => 32,
        Ok(std::net::IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    length.parse::<u8>().is_ok_and(|number| number <= most && number.to_string() == length)
}

/// The members of a struct.
pub(super) fn names(shape: &Go) -> Vec<&'static str> {
    match shape {
        Go::Struct(members) => members.iter().map(|(name, _)| *name).collect(),
        other => panic!("{other:?} has no members"),
    }
}

/// Members of a host, and of what is in it.
pub(super) fn known_names() -> Vec<&'static str> {
    let mut names = names(&HOSTINFO);
    names.extend([
        "Proto",
        "Port",
        "Description",
        "City",
        "Latitude",
        "Priority",
        "PreferredDERP",
        "DERPLatency",
    ]);
    names
}

/// A value of the type that a host's member has.
pub(super) fn sample(name: &str) -> String {
    let Go::Struct(members) = HOSTINFO else { panic!("it is a struct") };
    let member = members.iter().find(|(member, _)| member.eq_ignore_ascii_case(name));
    member.map_or_else(|| "0".to_owned(), |(_, shape)| shape.sample())
}
