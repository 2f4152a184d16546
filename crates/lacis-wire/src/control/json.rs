//! The JSON rules of the control protocol, in one place: who decodes leniently, what is left out, how times look.
//!
//! Go decodes keys without regard to case and writes them in its own spelling; the independent Rust client relies
//! on the first and breaks on `null` where a list is meant. So member names of requests are folded to the known spelling
//! while they are decoded ([`decode_request`]), `null` stands for "empty" wherever we read, and we never write it.

use std::fmt;
use std::net::SocketAddr;

use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::bounded::{List, MAX_NESTING, is_too_deep};
use super::fold::Folded;

/// Endpoints of one node; further ones are passed over.
pub const MAX_ENDPOINTS: usize = 64;

/// Decodes a client's request as Go would: member names in any case, unknown members ignored. What is decoded has the
/// bounds of its type; nothing else is allocated.
///
/// # Errors
/// When the text is no JSON, is nested deeper than [`MAX_NESTING`], or a member has another type than the protocol
/// gives it (members of [`Hostinfo`](super::Hostinfo) apart, which are absent then).
pub fn decode_request<T: DeserializeOwned>(text: &[u8]) -> Result<T, RequestError> {
    if is_too_deep(text) {
        return Err(RequestError::TooDeep);
    }
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let request = T::deserialize(Folded(&mut deserializer))?;
    deserializer.end()?;
    Ok(request)
}

/// Why a request cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("nested deeper than {MAX_NESTING} objects and lists")]
    TooDeep,
    #[error(transparent)]
    Json(#[from] serde_json::Error),
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
    let list = Option::<List<Endpoint, MAX_ENDPOINTS>>::deserialize(deserializer)?;
    Ok(list.map(|list| list.0.into_iter().filter_map(|endpoint| endpoint.0).collect()))
}

struct Endpoint(Option<SocketAddr>);

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Parsed;
        impl Visitor<'_> for Parsed {
            type Value = Endpoint;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address and a port")
            }
            fn visit_str<E>(self, text: &str) -> Result<Endpoint, E> {
                Ok(Endpoint(text.parse().ok()))
            }
        }
        deserializer.deserialize_str(Parsed)
    }
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
    K::Err: fmt::Display,
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
