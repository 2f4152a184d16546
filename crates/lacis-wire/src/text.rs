//! Text of others as text: what a peer, a relay or a server sends is shown to people and logged, and must neither drive
//! a terminal nor reorder what stands beside it (ECMA-48 control functions; Unicode TR 36, "Bidirectional Text
//! Spoofing").
//!
//! [`plain`] is for one value, [`plain_lines`] for output that has lines of its own, [`plain_json`] for a whole message
//! before it is decoded, so that no member is forgotten.

use std::borrow::Cow;

/// Objects in one message. The largest that are decoded (nodes) take about a kilobyte each.
pub const MAX_OBJECTS: usize = 1 << 18;
/// Items of arrays and members of objects in one message.
pub const MAX_VALUES: usize = 1 << 22;

/// A message that would take more memory than its length lets one expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {MAX_OBJECTS} objects or {MAX_VALUES} values in one message")]
pub struct TooManyValues;

/// Whether a terminal shows this character, and does nothing else for it.
pub fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(
            c,
            // Soft hyphen; marks, embeddings, overrides and isolates of directions; line and paragraph separators;
            // joiners, invisible operators, byte order mark, annotations, musical and shorthand controls, tags.
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{1bca0}'..='\u{1bca3}'
                | '\u{1d173}'..='\u{1d17a}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// What stands for a character; `None` if it stays.
fn replacement(c: char) -> Option<char> {
    match c {
        '\n' | '\r' | '\t' => Some(' '),
        c if is_plain(c) => None,
        _ => Some(char::REPLACEMENT_CHARACTER),
    }
}

fn replaced(text: &str, replacement: impl Fn(char) -> Option<char>) -> Cow<'_, str> {
    if text.chars().all(|c| replacement(c).is_none()) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().map(|c| replacement(c).unwrap_or(c)).collect())
}

/// One line of text: white space of other kinds becomes a space, other control and format characters U+FFFD.
pub fn plain(text: &str) -> Cow<'_, str> {
    replaced(text, replacement)
}

/// The same for text of several lines: line feeds and tabs stay.
pub fn plain_lines(text: &str) -> Cow<'_, str> {
    replaced(text, |c| if matches!(c, '\n' | '\t') { None } else { replacement(c) })
}

/// A JSON message in which every string is [`plain`], however its characters are written.
///
/// # Errors
/// When it has more values than any real message. Other errors are left to the decoder.
pub fn plain_json(message: &str) -> Result<Cow<'_, str>, TooManyValues> {
    let mut out = String::new();
    // What is before this place is in `out`, once that has anything.
    let mut copied = 0;
    let (mut objects, mut values) = (0_usize, 0_usize);
    let mut in_string = false;
    let mut at = 0;
    while let Some(byte) = message.as_bytes().get(at) {
        let (c, length) = match byte {
            b'"' => {
                in_string = !in_string;
                at += 1;
                continue;
            }
            _ if !in_string => {
                objects += usize::from(*byte == b'{');
                values += usize::from(matches!(byte, b',' | b'['));
                if objects > MAX_OBJECTS || values > MAX_VALUES {
                    return Err(TooManyValues);
                }
                at += 1;
                continue;
            }
            b'\\' => escape(&message.as_bytes()[at..]),
            b' '..=b'~' => (None, 1),
            _ => {
                let c = message.get(at..).and_then(|rest| rest.chars().next());
                (c, c.map_or(1, char::len_utf8))
            }
        };
        if let Some(replacement) = c.and_then(replacement) {
            out.push_str(&message[copied..at]);
            out.push(replacement);
            copied = at + length;
        }
        at += length;
    }
    if copied == 0 {
        return Ok(Cow::Borrowed(message));
    }
    out.push_str(&message[copied..]);
    Ok(Cow::Owned(out))
}

/// The character of the escape sequence (RFC 8259, section 7) at the beginning, and the sequence's length.
fn escape(bytes: &[u8]) -> (Option<char>, usize) {
    let unit = |at: usize| {
        let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
        let all = digits.iter().all(u8::is_ascii_hexdigit);
        u16::from_str_radix(std::str::from_utf8(digits).ok().filter(|_| all)?, 16).ok()
    };
    match bytes.get(1) {
        Some(b'n' | b'r' | b't') => (Some('\n'), 2),
        Some(b'b' | b'f') => (Some('\u{8}'), 2),
        Some(b'u') => {
            let Some(first) = unit(0) else { return (None, 1) };
            if let Some(c) = char::from_u32(first.into()) {
                return (Some(c), 6);
            }
            let pair = unit(6).and_then(|second| char::decode_utf16([first, second]).next()?.ok());
            (pair, if pair.is_some() { 12 } else { 6 })
        }
        Some(b'"' | b'\\' | b'/') => (None, 2),
        _ => (None, 1),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_drives_a_terminal_or_turns_text_round_is_replaced() {
        assert_eq!(plain("b\u{1b}[2Job\u{9b}m\u{7f}"), "b\u{fffd}[2Job\u{fffd}m\u{fffd}");
        assert_eq!(plain("a\u{202e}exe.\u{2066}\u{200b}\u{e0041}"), "a\u{fffd}exe.\u{fffd}\u{fffd}\u{fffd}");
        assert_eq!(plain("two\r\nlines\tand"), "two  lines and");
        assert_eq!(plain_lines("two\nlines\r\tand\u{1b}"), "two\nlines \tand\u{fffd}");
        assert!(matches!(plain("Zoë's Ταμπλέτα, 電話"), Cow::Borrowed(_)));
    }

    #[test]
    fn strings_of_a_message_are_plain_however_they_are_written() {
        let text = r#"{"a":["\u001b[2J\n","\uDB40\uDC41\u202E","\\u001b \"q\" \/"],"b":1}"#;
        let expected = "{\"a\":[\"\u{fffd}[2J \",\"\u{fffd}\u{fffd}\",\"\\\\u001b \\\"q\\\" \\/\"],\"b\":1}";
        assert_eq!(plain_json(text).unwrap(), expected);
        let raw = "{\"os\":\"\u{202e}\u{9b}\"}";
        assert_eq!(plain_json(raw).unwrap(), "{\"os\":\"\u{fffd}\u{fffd}\"}");
        assert!(matches!(plain_json("{\n\t\"os\": \"linux\" }"), Ok(Cow::Borrowed(_))));
        for broken in ["\"\\", "\"\\u", "\"\\u12", "\"\\ud800", "\"\\ud800\\u0041\"", "\"\\u+123\"", "é\"é\\"]
        {
            assert!(plain_json(broken).is_ok(), "{broken}");
        }
    }

    #[test]
    fn a_message_of_nothing_but_values_is_refused() {
        let objects = format!("[{}{{}}]", "{},".repeat(MAX_OBJECTS));
        assert_eq!(plain_json(&objects), Err(TooManyValues));
        let values = format!("[{}0]", "0,".repeat(MAX_VALUES));
        assert_eq!(plain_json(&values), Err(TooManyValues));
        assert!(plain_json(&format!("\"{}\"", "{,".repeat(MAX_VALUES))).is_ok(), "text is no structure");
    }

    fn is_plain_throughout(value: &serde_json::Value) -> bool {
        match value {
            serde_json::Value::String(text) => text.chars().all(is_plain),
            serde_json::Value::Array(items) => items.iter().all(is_plain_throughout),
            serde_json::Value::Object(members) => {
                members.iter().all(|(key, value)| key.chars().all(is_plain) && is_plain_throughout(value))
            }
            _ => true,
        }
    }

    proptest! {
        #[test]
        fn a_message_decodes_to_the_same_text_made_plain(texts in proptest::collection::vec(any::<String>(), 0..5)) {
            let message = serde_json::to_string(&texts).unwrap();
            let read: Vec<String> = serde_json::from_str(&plain_json(&message).unwrap()).unwrap();
            let expected: Vec<_> = texts.iter().map(|text| plain(text).into_owned()).collect();
            prop_assert_eq!(read, expected);
        }

        #[test]
        fn whatever_is_decoded_is_plain(message in "[\\[\\]{}:,\"\\\\ubn0-9a-f\\x00-\\x1f\u{80}-\u{ff}\u{2020}-\u{2070}]{0,80}") {
            if let Ok(value) = serde_json::from_str(&plain_json(&message).unwrap()) {
                prop_assert!(is_plain_throughout(&value));
            }
        }
    }
}
