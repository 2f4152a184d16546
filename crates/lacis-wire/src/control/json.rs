//! The JSON rules of the control protocol, in one place: who decodes leniently, what is left out, how times look.
//!
//! Go decodes keys without regard to case and writes them in its own spelling; the independent Rust client relies
//! on the first and breaks on `null` where a list is meant. So requests are folded to the known spelling before
//! they are decoded ([`decode_request`]), `null` stands for "empty" wherever we read, and we never write it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::LazyLock;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Member names of every request, in Go's spelling.
const REQUEST_KEYS: &[&str] = &[
    // RegisterRequest
    "Version",
    "NodeKey",
    "OldNodeKey",
    "NLKey",
    "Auth",
    "AuthKey",
    "Expiry",
    "Followup",
    "Hostinfo",
    "Ephemeral",
    "NodeKeySignature",
    "SignatureType",
    "Timestamp",
    "DeviceCert",
    "Signature",
    "Tailnet",
    // MapRequest
    "Compress",
    "KeepAlive",
    "DiscoKey",
    "Stream",
    "Endpoints",
    "EndpointTypes",
    "OmitPeers",
    "ReadOnly",
    "MapSessionHandle",
    "MapSessionSeq",
    "TKAHead",
    "DebugFlags",
    // Hostinfo
    "IPNVersion",
    "OS",
    "OSVersion",
    "Distro",
    "DistroVersion",
    "DistroCodeName",
    "DeviceModel",
    "Machine",
    "GoArch",
    "GoArchVar",
    "GoVersion",
    "Package",
    "App",
    "Env",
    "Cloud",
    "BackendLogID",
    "FrontendLogID",
    "Hostname",
    "Container",
    "Desktop",
    "Userspace",
    "UserspaceRouter",
    "AppConnector",
    "StateEncrypted",
    "ShieldsUp",
    "ShareeNode",
    "NoLogsNoSupport",
    "WireIngress",
    "IngressEnabled",
    "AllowsUpdate",
    "PeerRelay",
    "RemoteConfig",
    "RoutableIPs",
    "RequestTags",
    "Services",
    "Proto",
    "Port",
    "Description",
    "NetInfo",
    "sshHostKeys",
    "WoLMACs",
    "ServicesHash",
    "ExitNodeID",
    "PushDeviceToken",
    "Location",
    "TPM",
    // NetInfo
    "MappingVariesByDestIP",
    "WorkingIPv6",
    "OSHasIPv6",
    "WorkingUDP",
    "WorkingICMPv4",
    "UPnP",
    "PMP",
    "PCP",
    "HavePortMap",
    "PreferredDERP",
    "LinkType",
    "DERPLatency",
    "FirewallMode",
    // VerifyRequest
    "NodePublic",
    "Source",
];

static SPELLING: LazyLock<HashMap<String, &'static str>> =
    LazyLock::new(|| REQUEST_KEYS.iter().map(|key| (key.to_ascii_lowercase(), *key)).collect());

/// Members whose value is data keyed by anything, where no key may be touched.
const DATA_MAPS: &[&str] = &["DERPLatency", "TPM", "Location"];

fn fold(value: &mut Value) {
    match value {
        Value::Object(members) => {
            let taken = std::mem::take(members);
            for (key, mut inner) in taken {
                let key = match SPELLING.get(&key.to_ascii_lowercase()) {
                    Some(known) => (*known).to_owned(),
                    None => key,
                };
                if !DATA_MAPS.contains(&key.as_str()) {
                    fold(&mut inner);
                }
                members.insert(key, inner);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(fold),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Decodes a client's request as Go would: member names in any case, unknown members ignored.
///
/// # Errors
/// When the text is no JSON or a member has another type than the protocol gives it.
pub fn decode_request<T: DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    let mut value: Value = serde_json::from_slice(text)?;
    fold(&mut value);
    T::deserialize(value)
}

/// Encodes a message. The types of this module have no value that JSON cannot hold.
pub fn to_json<T: Serialize>(message: &T) -> Vec<u8> {
    serde_json::to_vec(message).unwrap_or_default()
}

/// A text for people, without the characters that JSON must escape: one client fails on any escape sequence.
pub fn display_text(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() && *c != '"' && *c != '\\').collect()
}

/// Reads `null` as the empty value.
pub(crate) fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Reads endpoints, and passes over those that have no [`SocketAddr`] (a zone that is a name, say): one of them must
/// not cost the whole message.
pub(crate) fn endpoints<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<SocketAddr>, D::Error> {
    Ok(optional_endpoints(deserializer)?.unwrap_or_default())
}

/// The same where "absent" and "none" are two things.
pub(crate) fn optional_endpoints<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<SocketAddr>>, D::Error> {
    let texts = Option::<Vec<String>>::deserialize(deserializer)?;
    Ok(texts.map(|texts| texts.iter().filter_map(|text| text.parse().ok()).collect()))
}

/// Go's zero time, which stands for "not set".
const ZERO_YEAR: i32 = 1;

/// An optional time: RFC 3339 on the wire; absent, `null`, empty and Go's zero time are all `None`.
pub(crate) mod optional_time {
    use super::{Deserialize, Deserializer, OffsetDateTime, Rfc3339, Serializer, ZERO_YEAR};

    pub(crate) fn serialize<S: Serializer>(time: &Option<OffsetDateTime>, s: S) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => s.serialize_str(&time.format(&Rfc3339).map_err(serde::ser::Error::custom)?),
            None => s.serialize_str("0001-01-01T00:00:00Z"),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<OffsetDateTime>, D::Error> {
        let text = Option::<String>::deserialize(d)?.unwrap_or_default();
        if text.is_empty() {
            return Ok(None);
        }
        let time = OffsetDateTime::parse(&text, &Rfc3339).map_err(serde::de::Error::custom)?;
        Ok((time.year() != ZERO_YEAR).then_some(time))
    }
}

/// A patch's time: absent means "unchanged", Go's zero time means "none".
pub(crate) mod patched_time {
    use super::{Deserializer, OffsetDateTime, Serializer, optional_time};

    #[allow(clippy::option_option)]
    pub(crate) fn serialize<S: Serializer>(
        time: &Option<Option<OffsetDateTime>>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        optional_time::serialize(&time.flatten(), s)
    }

    #[allow(clippy::option_option)]
    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<Option<OffsetDateTime>>, D::Error> {
        optional_time::deserialize(d).map(Some)
    }
}

/// A key that may be absent, `null`, empty or all zero: all `None`.
pub(crate) fn optional_key<'de, D, K>(deserializer: D) -> Result<Option<K>, D::Error>
where
    D: Deserializer<'de>,
    K: std::str::FromStr + Default + PartialEq,
    K::Err: std::fmt::Display,
{
    let text = Option::<String>::deserialize(deserializer)?.unwrap_or_default();
    if text.is_empty() {
        return Ok(None);
    }
    let key: K = text.parse().map_err(serde::de::Error::custom)?;
    Ok((key != K::default()).then_some(key))
}

/// Is this the value that is left out?
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
