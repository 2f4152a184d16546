//! What runs on a host, as systemd says it: the project's own unit files, read for what the lab needs of them.
//!
//! A bare host has no systemd, so the driver starts what `ExecStart=` says and keeps to `Type=`, `Restart=` and the
//! directories. Our units are `packaging/systemd/`, the same files that packages install; strangers' are in `units/`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::topology::{Host, Service};

/// Where the lab puts programs on a host.
pub const PROGRAMS: &str = "/run/lab/bin";

/// One service, ready to be started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unit {
    /// Its name, without `.service`.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Commands that reload it, one after the other; one that is `kill -HUP` sends it that signal.
    pub reload: Vec<Vec<String>>,
    /// Whether it says when it is ready (`Type=notify`).
    pub notify: bool,
    /// `no`, `on-failure` or `always`.
    pub restart: String,
    /// Seconds before a restart.
    pub restart_delay: f64,
    /// Exit codes after which it is not started again.
    pub restart_prevent: Vec<i32>,
    /// Made below /var/lib.
    pub state: Vec<String>,
    /// Made below /run, removed on stop.
    pub runtime: Vec<String>,
    /// Variables.
    pub environment: BTreeMap<String, String>,
    /// Files with more of them, read when it starts; those that begin with `-` need not be there.
    pub environment_files: Vec<String>,
}

fn text_of(service: Service) -> &'static str {
    match service {
        Service::Coordinator => include_str!("../../../packaging/systemd/lacis-coordinator.service"),
        Service::Relay => include_str!("../../../packaging/systemd/lacis-relay.service"),
        Service::Lacisd => include_str!("../../../packaging/systemd/lacisd.service"),
        Service::Tailscaled => include_str!("../units/tailscaled.service"),
        Service::Headscale => include_str!("../units/headscale.service"),
        Service::Derper => include_str!("../units/derper.service"),
        Service::Miniupnpd => include_str!("../units/miniupnpd.service"),
    }
}

/// The configuration file of the service of a router: where it goes, and its text.
pub const MINIUPNPD: (&str, &str) =
    ("/etc/miniupnpd/miniupnpd.conf", include_str!("../units/miniupnpd.conf"));

/// The unit of a service, with further arguments.
pub fn of(service: Service, arguments: &[String]) -> Result<Unit> {
    let mut unit = parse(service.unit(), text_of(service))?;
    unit.command.extend_from_slice(arguments);
    Ok(unit)
}

/// Reads the parts of a unit file that a bare host keeps to.
pub fn parse(name: &str, text: &str) -> Result<Unit> {
    let mut unit = Unit {
        name: name.to_owned(),
        command: Vec::new(),
        reload: Vec::new(),
        notify: false,
        restart: "no".to_owned(),
        restart_delay: 0.1,
        restart_prevent: Vec::new(),
        state: Vec::new(),
        runtime: Vec::new(),
        environment: BTreeMap::new(),
        environment_files: Vec::new(),
    };
    let words = |value: &str| value.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    for line in text.lines() {
        let Some((key, value)) = line.split_once('=') else { continue };
        match key {
            "Type" => unit.notify = value.starts_with("notify"),
            "ExecStart" => unit.command = installed(words(value)),
            "ExecReload" => unit.reload.push(installed(words(value))),
            "Restart" => value.clone_into(&mut unit.restart),
            "RestartSec" => unit.restart_delay = seconds(value)?,
            "RestartPreventExitStatus" => {
                unit.restart_prevent =
                    words(value).iter().map(|code| code.parse()).collect::<Result<_, _>>()?;
            }
            "StateDirectory" => unit.state = words(value),
            "RuntimeDirectory" => unit.runtime = words(value),
            "Environment" => {
                let (variable, value) = value.split_once('=').context("Environment= without a value")?;
                unit.environment.insert(variable.to_owned(), value.to_owned());
            }
            "EnvironmentFile" => unit.environment_files.push(value.to_owned()),
            _ => {}
        }
    }
    if unit.command.is_empty() {
        bail!("the unit {name} has no ExecStart=");
    }
    Ok(unit)
}

/// A command whose program, if packages install it, is where the lab has it.
fn installed(mut command: Vec<String>) -> Vec<String> {
    if let Some(program) = command.first_mut()
        && let Some(base) = program.strip_prefix("/usr/bin/").or_else(|| program.strip_prefix("/usr/sbin/"))
    {
        *program = format!("{PROGRAMS}/{base}");
    }
    command
}

fn seconds(text: &str) -> Result<f64> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let number: f64 = number.parse().with_context(|| format!("{text:?} is not a time"))?;
    match unit {
        "" | "s" => Ok(number),
        "ms" => Ok(Duration::from_millis(number as u64).as_secs_f64()),
        "min" => Ok(number * 60.0),
        _ => bail!("{text:?} is not a time"),
    }
}

/// The configuration file of a service: where it goes, and its text.
pub fn configuration(service: Service, host: &Host) -> Result<Option<(&'static str, String)>> {
    let (path, table, defaults): (_, _, &[(&str, &str)]) = match service {
        Service::Coordinator => (
            "/etc/lacis/coordinator.yaml",
            &host.coordinator,
            &[
                ("state_dir", "/var/lib/lacis-coordinator"),
                ("admin_socket", "/run/lacis-coordinator/admin.sock"),
            ],
        ),
        Service::Relay => ("/etc/lacis/relay.yaml", &host.relay, &[("state_dir", "/var/lib/lacis-relay")]),
        Service::Headscale => ("/etc/headscale/config.yaml", &host.headscale, &[]),
        Service::Lacisd | Service::Tailscaled | Service::Derper | Service::Miniupnpd => return Ok(None),
    };
    let Some(table) = table else { return Ok(None) };
    let mut table = table.clone();
    for (key, value) in defaults {
        table.entry((*key).to_owned()).or_insert_with(|| toml::Value::String((*value).to_owned()));
    }
    Ok(Some((path, serde_yaml::to_string(&table).context("this configuration cannot be written as YAML")?)))
}

/// `/etc/hosts` of a host: itself, and every name of the topology.
pub fn hosts_file<'a>(own: &str, names: impl Iterator<Item = (&'a str, std::net::IpAddr)>) -> String {
    let mut text = format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {own}\n");
    for (name, address) in names {
        let _ = writeln!(text, "{address} {name}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_project_s_units_say_what_to_start() {
        let unit = of(Service::Lacisd, &["--verbose".to_owned()]).unwrap();
        assert_eq!(unit.command[0], "/run/lab/bin/lacisd");
        assert_eq!(unit.command.last().unwrap(), "--verbose");
        assert!(unit.notify && unit.restart == "always" && unit.restart_prevent == [78]);
        assert_eq!(unit.environment_files, ["-/etc/default/lacisd"]);
        assert_eq!(unit.state, ["lacis"]);
        assert_eq!(unit.runtime, ["lacis", "wireguard"]);
        let unit = of(Service::Coordinator, &[]).unwrap();
        assert_eq!(unit.reload[0], ["/bin/kill", "-HUP", "$MAINPID"]);
        assert_eq!(unit.reload[1], ["/run/lab/bin/lacis", "admin", "policy", "reload"]);
        for service in [
            Service::Coordinator,
            Service::Relay,
            Service::Tailscaled,
            Service::Headscale,
            Service::Derper,
            Service::Miniupnpd,
        ] {
            assert!(!of(service, &[]).unwrap().command.is_empty());
        }
    }

    #[test]
    fn a_configuration_is_yaml_with_the_usual_directories() {
        let host: Host = toml::from_str(
            "services = [\"coordinator\"]\n[coordinator]\nserver_url = \"https://x\"\nlisten = [\"0.0.0.0:443\"]\n",
        )
        .unwrap();
        let (path, text) = configuration(Service::Coordinator, &host).unwrap().unwrap();
        assert_eq!(path, "/etc/lacis/coordinator.yaml");
        assert!(
            text.contains("server_url: https://x") && text.contains("state_dir: /var/lib/lacis-coordinator")
        );
    }
}
