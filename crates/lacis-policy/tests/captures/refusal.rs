//! Does our refusal say what the recorded one says? The wording is ours, so it is compared by what is named.
//!
//! Whatever the recorded message quotes must be in ours; so must the things of the language that it talks about
//! ([`SUBJECTS`]); and it must say the same of them ([`MEANINGS`]).

/// Words for things of the policy language, each with the words that do as well.
const SUBJECTS: &[(&str, &[&str])] = &[
    ("src", &["src", "source"]),
    ("dst", &["dst", "destination"]),
    ("port", &["port"]),
    ("proto", &["proto"]),
    ("action", &["action"]),
    ("user", &["user"]),
    ("users", &["user"]),
    ("group", &["group"]),
    ("tag", &["tag"]),
    ("checkperiod", &["checkperiod"]),
    ("capability", &["cap", "app"]),
    ("app", &["app"]),
    ("test(s)", &["test"]),
    ("tests", &["test"]),
    ("duration", &["duration", "time", "period"]),
    ("address", &["address", "selector"]),
];

/// What a recorded message says, and the words of which ours has one.
const MEANINGS: &[(&str, &[&str])] = &[
    ("not found", UNKNOWN),
    ("unknown", UNKNOWN),
    ("not valid", IMPOSSIBLE),
    ("not a valid", IMPOSSIBLE),
    ("invalid", IMPOSSIBLE),
    ("not supported", IMPOSSIBLE),
    ("cannot use", IMPOSSIBLE),
    ("disallowed", IMPOSSIBLE),
    ("can only be used", IMPOSSIBLE),
    ("must not be", IMPOSSIBLE),
    ("cannot be recursive", IMPOSSIBLE),
    ("must be a positive", IMPOSSIBLE),
    ("can not both be empty", MISSING),
    ("must be specified", MISSING),
    ("above the max", &["max", "most", "long", "above"]),
    ("not associated with this tailnet", &["domain", "network", "tailnet"]),
    ("to allow all ip addresses", &["autogroup:internet"]),
    ("failed", &["fail", "not allowed", "allowed", "must", "cannot", "not", "unknown"]),
];

const UNKNOWN: &[&str] = &[
    "not found",
    "unknown",
    "no such",
    "nobody",
    "not declared",
    "not defined",
    "does not exist",
    "there is no",
];
const IMPOSSIBLE: &[&str] = &[
    "not valid",
    "invalid",
    "cannot",
    "can only",
    "only",
    "must",
    "not a",
    "no address",
    "no port",
    "not allowed",
    "not supported",
    "nothing that",
    "is no ",
    "disallowed",
    "unknown",
    "never",
];
const MISSING: &[&str] =
    &["missing", "empty", "must", "need", "required", "without", "neither", "lacks", "no "];

/// What the message names: in quotes, or with a colon inside.
fn named(message: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = message;
    while let Some(start) = rest.find('"') {
        let after = &rest[start + 1..];
        let Some(end) = after.find('"') else { break };
        found.push(after[..end].to_owned());
        rest = &after[end + 1..];
    }
    let inside = |word: &&str| {
        !word.contains(['"', '<']) && word.split_once(':').is_some_and(|(_, rest)| !rest.is_empty())
    };
    found.extend(message.split_whitespace().filter(inside).map(ToOwned::to_owned));
    found.retain(|word| !word.is_empty());
    found
}

/// What ours does not say, if anything.
pub(crate) fn difference(theirs: &str, ours: &str) -> Option<String> {
    let (message, words) = (theirs.to_lowercase(), ours.to_lowercase());
    let has = |alternatives: &[&str]| alternatives.iter().any(|word| words.contains(word));
    let wrong = |what: String| Some(format!("the refusal should say {theirs:?} ({what}), and says {ours:?}"));
    if let Some(word) = named(&message).into_iter().find(|word| !words.contains(word.as_str())) {
        return wrong(format!("{word:?} is not named"));
    }
    let bare =
        |word: &str| word.trim_matches([',', ':', '.']).split('=').next().unwrap_or_default().to_owned();
    for word in message.split_whitespace().map(bare) {
        if let Some((_, alternatives)) = SUBJECTS.iter().find(|(subject, _)| *subject == word)
            && !has(alternatives)
        {
            return wrong(format!("nothing about {word}"));
        }
    }
    let meaning = MEANINGS.iter().find(|(phrase, words)| message.contains(phrase) && !has(words));
    meaning.and_then(|(phrase, _)| wrong(format!("nothing like {phrase:?}")))
}
