//! Lists of a map whose elements are read one by one, and values that are kept as text.
//!
//! A peer that cannot be read costs that peer, and never the frame: else whoever brings one node's odd member into the
//! map would cut off all who see that node.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

use serde::de::{DeserializeOwned, IgnoredAny, SeqAccess, Visitor};
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use super::bounded::{Text, clean, is_too_deep};

/// Elements of one list of a map.
pub const MAX_ELEMENTS: usize = 1 << 16;
/// Bytes of the JSON of one capability value.
pub const MAX_CAPABILITY_VALUE: usize = 64 << 10;
/// Unreadable elements of which something is kept.
const MAX_UNREADABLE: usize = 256;
/// Characters of a name or an error that is kept of them.
const MAX_LABEL: usize = 200;

/// A list of at most [`MAX_ELEMENTS`], without those that cannot be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Lenient<T> {
    elements: Vec<T>,
    /// Something of the first of those that are missing.
    pub unreadable: Vec<Unreadable>,
}

/// An element that could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unreadable {
    /// Its `ID` (or `NodeID`), if that much can be read.
    pub id: Option<i64>,
    /// Its name, or nothing.
    pub name: String,
    /// What is wrong with it.
    pub error: String,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.id {
            Some(id) => write!(f, "{id} {:?}: {}", self.name, self.error),
            None => write!(f, "{:?}: {}", self.name, self.error),
        }
    }
}

impl Unreadable {
    fn of(element: &RawValue, error: &serde_json::Error) -> Self {
        #[derive(Deserialize)]
        struct Numbered {
            #[serde(rename = "ID", alias = "NodeID")]
            id: i64,
        }
        #[derive(Deserialize)]
        struct Named {
            #[serde(rename = "Name", alias = "LoginName")]
            name: Text<MAX_LABEL>,
        }
        Self {
            id: serde_json::from_str::<Numbered>(element.get()).ok().map(|numbered| numbered.id),
            name: serde_json::from_str::<Named>(element.get()).map(|named| named.name.0).unwrap_or_default(),
            error: clean(&error.to_string(), MAX_LABEL),
        }
    }
}

impl<T> Default for Lenient<T> {
    fn default() -> Self {
        Self { elements: Vec::new(), unreadable: Vec::new() }
    }
}

impl<T> Lenient<T> {
    /// Is there nothing, not even something that cannot be read?
    pub fn is_blank(&self) -> bool {
        self.elements.is_empty() && self.unreadable.is_empty()
    }
}

impl<T> Deref for Lenient<T> {
    type Target = Vec<T>;

    fn deref(&self) -> &Vec<T> {
        &self.elements
    }
}

impl<T> From<Vec<T>> for Lenient<T> {
    fn from(elements: Vec<T>) -> Self {
        Self { elements, unreadable: Vec::new() }
    }
}

impl<T> FromIterator<T> for Lenient<T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        Vec::from_iter(elements).into()
    }
}

impl<T> IntoIterator for Lenient<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.elements.into_iter()
    }
}

impl<'a, T> IntoIterator for &'a Lenient<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.elements.iter()
    }
}

impl<T: Serialize> Serialize for Lenient<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.elements.serialize(serializer)
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Lenient<T> {
    /// `null` is an empty list.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneByOne<T>(PhantomData<T>);
        impl<'de, T: DeserializeOwned> Visitor<'de> for OneByOne<T> {
            type Value = Lenient<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list or null")
            }
            fn visit_none<E>(self) -> Result<Lenient<T>, E> {
                Ok(Lenient::default())
            }
            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Lenient<T>, D::Error> {
                deserializer.deserialize_seq(self)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Lenient<T>, A::Error> {
                let mut list = Lenient::default();
                while list.elements.len() < MAX_ELEMENTS {
                    let Some(text) = access.next_element::<Box<RawValue>>()? else { return Ok(list) };
                    match serde_json::from_str(text.get()) {
                        Ok(element) => list.elements.push(element),
                        Err(error) if list.unreadable.len() < MAX_UNREADABLE => {
                            list.unreadable.push(Unreadable::of(&text, &error));
                        }
                        Err(_) => {}
                    }
                }
                while access.next_element::<IgnoredAny>()?.is_some() {}
                Ok(list)
            }
        }
        deserializer.deserialize_option(OneByOne(PhantomData))
    }
}

/// Lists by name.
type Named<T> = BTreeMap<String, Option<Lenient<T>>>;

/// Packet filters by name; an unreadable list allows nothing.
pub(super) fn filters<'de, D, T>(deserializer: D) -> Result<Option<Named<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let named = Option::<BTreeMap<String, Option<Box<RawValue>>>>::deserialize(deserializer)?;
    let read = |text: Box<RawValue>| {
        serde_json::from_str(text.get()).unwrap_or_else(|error| Lenient {
            elements: Vec::new(),
            unreadable: vec![Unreadable::of(&text, &error)],
        })
    };
    Ok(named.map(|named| named.into_iter().map(|(name, rules)| (name, rules.map(read))).collect()))
}

/// A value whose meaning is not ours, as its JSON text. Decoding it costs no more than its length.
#[derive(Clone, PartialEq, Eq)]
pub struct RawJson(Arc<str>);

impl RawJson {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Is it short and flat enough for a capability: at most [`MAX_CAPABILITY_VALUE`] bytes, nested at most
    /// [`MAX_NESTING`](super::MAX_NESTING) deep?
    pub fn is_bounded(&self) -> bool {
        self.0.len() <= MAX_CAPABILITY_VALUE && !is_too_deep(self.0.as_bytes())
    }
}

impl fmt::Debug for RawJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for RawJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&serde_json::Value> for RawJson {
    fn from(value: &serde_json::Value) -> Self {
        Self(value.to_string().into())
    }
}

impl Serialize for RawJson {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        RawValue::from_string(self.0.as_ref().to_owned()).map_err(S::Error::custom)?.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for RawJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Box::<RawValue>::deserialize(deserializer)?.get().into()))
    }
}

/// Capability name to its values; a flag has none.
pub type CapMap = BTreeMap<String, Option<Vec<RawJson>>>;

/// Reads capabilities, and leaves out those with a value beyond the bounds: fewer values could grant more.
pub(super) fn capabilities<'de, D: Deserializer<'de>>(deserializer: D) -> Result<CapMap, D::Error> {
    Ok(optional_capabilities(deserializer)?.unwrap_or_default())
}

/// The same where "absent" and "none" are two things.
pub(super) fn optional_capabilities<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<CapMap>, D::Error> {
    let mut capabilities = Option::<CapMap>::deserialize(deserializer)?;
    if let Some(capabilities) = &mut capabilities {
        capabilities.retain(|_, values| values.iter().flatten().all(RawJson::is_bounded));
    }
    Ok(capabilities)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Pair {
        #[serde(rename = "ID")]
        id: u8,
    }

    #[test]
    fn an_element_that_cannot_be_read_is_named_and_the_others_stay() {
        let deep = format!("{}{}", "[".repeat(2000), "]".repeat(2000));
        let text = format!(r#"[{{"ID":1}},{{"ID":300,"Name":"b\u001b.","X":{deep}}},7,{{"ID":2}}]"#);
        let list: Lenient<Pair> = serde_json::from_str(&text).unwrap();
        assert_eq!(*list, [Pair { id: 1 }, Pair { id: 2 }]);
        assert_eq!(list.unreadable.len(), 2);
        assert_eq!((list.unreadable[0].id, list.unreadable[0].name.as_str()), (Some(300), "b."));
        assert_eq!(list.unreadable[1].id, None);
        assert!(serde_json::from_str::<Lenient<Pair>>("null").unwrap().is_blank());
        assert_eq!(serde_json::to_string(&list).unwrap(), r#"[{"ID":1},{"ID":2}]"#);
    }

    #[test]
    fn a_list_has_a_last_element() {
        let text = format!("[{}{{}}]", r#"{"ID":1},"#.repeat(MAX_ELEMENTS + 5));
        let list: Lenient<Pair> = serde_json::from_str(&text).unwrap();
        assert_eq!((list.len(), list.unreadable.len()), (MAX_ELEMENTS, 0));
    }

    #[test]
    fn a_capability_beyond_the_bounds_is_left_out_and_keeps_no_value() {
        #[derive(Deserialize)]
        struct Has {
            #[serde(deserialize_with = "capabilities")]
            caps: CapMap,
        }
        let deep = format!("{}{}", "[".repeat(17), "]".repeat(17));
        let long = "x".repeat(MAX_CAPABILITY_VALUE);
        let text = format!(
            r#"{{"caps":{{"flag":null,"ok":[{{"a":[1]}}],"deep":["fine",{deep}],"long":["{long}"]}}}}"#
        );
        let has: Has = serde_json::from_str(&text).unwrap();
        assert_eq!(has.caps.keys().collect::<Vec<_>>(), ["flag", "ok"]);
        assert_eq!(serde_json::to_value(&has.caps["ok"]).unwrap(), json!([{"a": [1]}]));
    }
}
