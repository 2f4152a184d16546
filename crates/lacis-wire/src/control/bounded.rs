//! Values of requests and maps that come from others: each has a bound that it cannot pass while it is decoded.
//!
//! What is too long is cut, what cannot be read is absent: one node's odd member costs that member, never the request,
//! and never the map of those who are sent it.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Error, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::fold::Folded;

/// Characters of a text that a node sends of itself.
pub const MAX_TEXT: usize = 255;
/// Objects and lists inside each other, of a request and of a capability's value.
pub const MAX_NESTING: usize = 16;

/// The text without control characters, cut after `max` characters.
pub(super) fn clean(text: &str, max: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(max).collect()
}

/// Is a JSON text nested deeper than [`MAX_NESTING`]? For texts that are no JSON the answer means nothing.
pub(super) fn is_too_deep(text: &[u8]) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                if depth > MAX_NESTING {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// A text of at most `MAX` characters, none of them a control character.
pub(super) struct Text<const MAX: usize = MAX_TEXT>(pub(super) String);

impl<'de, const MAX: usize> Deserialize<'de> for Text<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Cleaned<const MAX: usize>;
        impl<const MAX: usize> Visitor<'_> for Cleaned<MAX> {
            type Value = Text<MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Text<MAX>, E> {
                Ok(Text(clean(text, MAX)))
            }
        }
        deserializer.deserialize_str(Cleaned)
    }
}

/// At most `MAX` elements; the rest is passed over without being decoded.
pub(super) struct List<T, const MAX: usize>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct First<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for First<T, MAX> {
            type Value = List<T, MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<List<T, MAX>, A::Error> {
                let mut items = Vec::new();
                while items.len() < MAX {
                    let Some(item) = access.next_element()? else { return Ok(List(items)) };
                    items.push(item);
                }
                while access.next_element::<IgnoredAny>()?.is_some() {}
                Ok(List(items))
            }
        }
        deserializer.deserialize_seq(First(PhantomData))
    }
}

/// Reads a member that is absent when it has another type than the protocol gives it.
pub(super) fn lossy<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + DeserializeOwned,
{
    Ok(read(deserializer)?.unwrap_or_default())
}

fn read<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let text = Box::<RawValue>::deserialize(deserializer)?;
    let mut inner = serde_json::Deserializer::from_str(text.get());
    Ok(Option::<T>::deserialize(Folded(&mut inner)).ok().flatten())
}

/// A text member.
pub(super) fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(read::<D, Text>(deserializer)?.map(|text| text.0).unwrap_or_default())
}

/// A list member of at most `MAX` elements.
pub(super) fn list<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    Ok(read::<D, List<T, MAX>>(deserializer)?.map(|list| list.0).unwrap_or_default())
}

/// A list member of at most `MAX` texts.
pub(super) fn texts<'de, D, const MAX: usize>(deserializer: D) -> Result<Vec<String>, D::Error>
where
    D: Deserializer<'de>,
{
    let list: Vec<Text> = list::<D, Text, MAX>(deserializer)?;
    Ok(list.into_iter().map(|text| text.0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_counted_outside_of_texts() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(!is_too_deep(nested(MAX_NESTING).as_bytes()));
        assert!(is_too_deep(nested(MAX_NESTING + 1).as_bytes()));
        assert!(!is_too_deep(format!("[{},{}]", "[],".repeat(99), r#""\"[[[[[[[[[[[[[[[[[[[[""#).as_bytes()));
        assert!(is_too_deep(format!(r#"{{"\\":{}}}"#, nested(MAX_NESTING)).as_bytes()));
    }

    #[test]
    fn a_list_ends_at_its_bound_and_reads_no_further() {
        let list: List<u8, 2> = serde_json::from_str(r#"[1, 2, "not a number"]"#).unwrap();
        assert_eq!(list.0, [1, 2]);
        assert!(serde_json::from_str::<List<u8, 2>>(r#"[1, "not a number"]"#).is_err());
        assert!(serde_json::from_str::<List<u8, 2>>("[1, 2, 3").is_err());
    }

    #[test]
    fn a_text_has_no_control_characters_and_ends_at_its_bound() {
        let text: Text<4> = serde_json::from_str(r#""a\u001bb\r\n\u0085cde""#).unwrap();
        assert_eq!(text.0, "abcd");
    }
}
