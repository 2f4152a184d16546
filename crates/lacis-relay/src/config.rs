//! The program's configuration: one YAML file, read once.
//!
//! ```yaml
//! listen: ["[::]:443"]
//! tls: { cert_file: /etc/lacis/relay.crt, key_file: /etc/lacis/relay.key }
//! hostname: relay.example.org
//! stun: ["[::]:3478"]
//! state_dir: /var/lib/lacis-relay
//! admission: { verify_url: https://mesh.example.org/verify }
//! verify_interval: 3m
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;

use crate::Error;
use crate::verify::VerifyUrl;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where DERP clients connect (TCP).
    #[serde(default = "default_listen", deserialize_with = "one_or_more")]
    pub listen: Vec<SocketAddr>,
    /// Certificate and key. Without it the relay speaks plain HTTP: for a proxy in front, or a lab.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// Proxies in front whose `X-Forwarded-For` is believed.
    #[serde(default)]
    pub trusted_proxies: Vec<IpNet>,
    /// The name in the DERP map; the certificate is checked to be for it.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Where STUN requests come (UDP); an empty list turns STUN off.
    #[serde(default = "default_stun", deserialize_with = "one_or_more")]
    pub stun: Vec<SocketAddr>,
    /// Where Prometheus may fetch `/metrics` (plain HTTP); nowhere by default.
    #[serde(default, deserialize_with = "one_or_more")]
    pub metrics: Vec<SocketAddr>,
    /// Holds the relay's key.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Who may relay: `open`, or `verify_url: URL` to ask a coordinator.
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub admission: AdmissionConfig,
    /// How often the coordinator is asked again about each client that is connected.
    #[serde(default = "default_verify_interval", deserialize_with = "interval")]
    pub verify_interval: Duration,
}

/// More often the coordinator would do little else.
const MIN_VERIFY_INTERVAL: Duration = Duration::from_secs(5);

/// Certificate and key files in PEM form, read again when they change.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The certificate and its intermediates.
    pub cert_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
}

/// Who may use the relay.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdmissionConfig {
    /// Everybody who can reach it.
    Open,
    /// Whom this URL answers for (`POST {"NodePublic", "Source"}` -> `{"Allow": true}`).
    VerifyUrl(String),
}

fn default_listen() -> Vec<SocketAddr> {
    vec![SocketAddr::from(([0_u16; 8], 443))]
}

fn default_stun() -> Vec<SocketAddr> {
    vec![SocketAddr::from(([0_u16; 8], lacis_wire::stun::DEFAULT_PORT))]
}

fn default_state_dir() -> PathBuf {
    "/var/lib/lacis-relay".into()
}

fn default_verify_interval() -> Duration {
    Duration::from_mins(3)
}

fn interval<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).ok().filter(|interval| *interval >= MIN_VERIFY_INTERVAL).ok_or_else(
        || {
            serde::de::Error::custom(format_args!(
                "verify_interval: {text:?} is no interval of at least 5s, such as \"3m\""
            ))
        },
    )
}

fn one_or_more<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<SocketAddr>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "an address such as \"0.0.0.0:443\", or a list of them")]
    enum OneOrMore {
        One(SocketAddr),
        More(Vec<SocketAddr>),
    }
    Ok(match OneOrMore::deserialize(deserializer)? {
        OneOrMore::One(address) => vec![address],
        OneOrMore::More(addresses) => addresses,
    })
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|message| Error::Config { path: path.to_owned(), message })
    }

    /// Parses and checks a document. The error is one line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = serde_yaml::from_str(text).map_err(|error| {
            let text = error.to_string();
            if text.starts_with("missing field `admission`") {
                "admission is missing: write `admission: open`, or `admission: { verify_url: https://COORDINATOR/verify }`"
                    .to_owned()
            } else {
                text.replace('\n', " ")
            }
        })?;
        if config.listen.is_empty() {
            return Err("listen: the list is empty, no client could connect".to_owned());
        }
        if let AdmissionConfig::VerifyUrl(url) = &config.admission {
            VerifyUrl::check(url).map_err(|error| format!("admission.verify_url: {error}"))?;
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_file_says_only_who_may_relay() {
        let config = Config::parse("admission: open").unwrap();
        assert_eq!(config.listen, default_listen());
        assert_eq!(config.stun, ["[::]:3478".parse().unwrap()]);
        assert_eq!(config.admission, AdmissionConfig::Open);
        assert_eq!(config.tls, None);
        assert_eq!(config.verify_interval, Duration::from_mins(3));
    }

    #[test]
    fn everything_can_be_said() {
        let config = Config::parse(
            "listen: 127.0.0.1:8443\ntls: { cert_file: /c, key_file: /k }\nhostname: r.example\nstun: []\n\
             trusted_proxies: [127.0.0.1/32, \"::1/128\"]\nmetrics: [\"127.0.0.1:9091\"]\nstate_dir: /tmp/x\nadmission: { verify_url: https://m.example/verify }\n\
             verify_interval: 10s\n",
        )
        .unwrap();
        assert_eq!(config.listen, ["127.0.0.1:8443".parse().unwrap()]);
        assert!(config.stun.is_empty());
        assert_eq!(config.trusted_proxies.len(), 2);
        assert_eq!(config.admission, AdmissionConfig::VerifyUrl("https://m.example/verify".into()));
        assert_eq!(config.verify_interval, Duration::from_secs(10));
    }

    #[test]
    fn errors_are_one_line_and_say_where_and_what() {
        for (text, want) in [
            ("", "admission: open"),
            ("admission: open\nlisen: 1.2.3.4:5", "unknown field `lisen`"),
            ("admission: open\nlisten: nowhere", "an address such as"),
            ("admission: closed", "unknown variant `closed`"),
            ("admission: open\nlisten: []", "no client could connect"),
            ("admission: { verify_url: ftp://x }", "admission.verify_url"),
            ("admission: open\nverify_interval: 1s", "at least 5s"),
            ("admission: open\nverify_interval: often", "verify_interval"),
            ("admission: open\ntls: { cert_file: /c }", "missing field `key_file`"),
        ] {
            let error = Config::parse(text).unwrap_err();
            assert!(error.contains(want) && !error.contains('\n'), "{text:?}: {error}");
        }
    }
}
