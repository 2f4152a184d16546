//! The configuration file: YAML (or JSON), checked against a JSON Schema made from the Rust types.
//!
//! [`Config::load`] reads a file and gives either a [`Config`] that is right in itself or a
//! [`ConfigError`] that says, line by line, where in the file what was expected. The schema is
//! [`schema`]; people's documentation and the NixOS module use the same one. Checking looks only at
//! the document, so that a configuration can be checked on another machine than its own.

mod check;
mod convert;
mod position;
mod problem;
mod scalars;
mod types;

#[cfg(test)]
mod tests;

use std::path::Path;

pub use problem::{ConfigError, Problem};
pub use scalars::{
    AbsolutePath, Address, AddressOrOff, Domain, Expiry, Ip, Nameserver, Prefix, ServerUrl, Span,
};
pub use types::{
    Config, Dns, EmbeddedRelay, EmbeddedRelaySettings, ExtraRecord, PolicySetting, Region, RelayNode,
    Tailnet, Tls,
};

use position::Positions;
use serde_json::Value;

/// The JSON Schema of the configuration, with every key described.
pub fn schema() -> Value {
    let settings = schemars::generate::SchemaSettings::draft2020_12().with(|settings| {
        // Without references a reader (and our own search for known keys) needs no second place.
        settings.inline_subschemas = true;
    });
    settings.into_generator().into_root_schema_for::<Config>().to_value()
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&name, &text),
            Err(source) => Err(ConfigError::Read { file: name, source }),
        }
    }

    /// What can be used and will hardly do what is wanted, a line each.
    pub fn warnings(&self) -> Vec<String> {
        check::warnings(self)
    }

    /// Checks a text; `name` is what error messages call it.
    pub fn parse(name: &str, text: &str) -> Result<Self, ConfigError> {
        let wrong = |problems| Err(ConfigError::Wrong { file: name.to_owned(), problems });
        let mut document = match read(text) {
            Ok(document) => document,
            Err(problem) => return wrong(vec![problem]),
        };
        let schema = schema();
        let problems = problem::find(&schema, &document, &Positions::of(text));
        if !problems.is_empty() {
            return wrong(problems);
        }
        drop_nulls(&mut document);
        let config: Self = match serde_json::from_value(document) {
            Ok(config) => config,
            // The schema and serde agree, so this is not expected; the text is still worth saying.
            Err(error) => return wrong(vec![Problem::general(error.to_string())]),
        };
        let problems = check::check(&config, &Positions::of(text));
        if problems.is_empty() { Ok(config) } else { wrong(problems) }
    }
}

/// Parses the text without looking at what it means.
fn read(text: &str) -> Result<Value, Problem> {
    let mut document: serde_yaml::Value =
        serde_yaml::from_str(text).map_err(|error| problem::syntax(text, &error))?;
    // `<<: *anchor` is how YAML files share settings.
    document.apply_merge().map_err(|error| problem::syntax(text, &error))?;
    serde_json::to_value(&document)
        .map_err(|_| Problem::general("keys must be texts, and numbers finite".to_owned()))
}

/// `key: null` says the same as leaving the key out, except for `metrics_listen`, where it says "off".
fn drop_nulls(document: &mut Value) {
    if let Some(metrics) = document.get_mut("metrics_listen").filter(|value| value.is_null()) {
        *metrics = Value::from("off");
    }
    fn walk(value: &mut Value) {
        match value {
            Value::Object(entries) => {
                entries.retain(|_, value| !value.is_null());
                entries.values_mut().for_each(walk);
            }
            Value::Array(items) => items.iter_mut().for_each(walk),
            _ => {}
        }
    }
    walk(document);
}
