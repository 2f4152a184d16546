//! A scenario's `topology.toml`: which hosts there are, how they reach the internet, what runs on them.
//!
//! The file is plain data, so that Nix reads the very same one (`fromTOML`) for its virtual machines:
//!
//! ```toml
//! [sites.home1]              # a router with a network behind it
//! nat = "cone"               # see nat.rs for the kinds
//! block = ["udp"]
//!
//! [hosts.hub]                # without a site: on the internet, open
//! names = ["mesh.example.org"]
//! services = ["coordinator"]
//! coordinator = { server_url = "https://mesh.example.org", … }   # the program's configuration
//!
//! [hosts.alice]
//! site = "home1"
//! services = ["lacisd"]
//! ```
//!
//! [`Topology::load`] reads and checks it; [`crate::plan`] gives everything addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::expect::Expect;
use crate::nat::{Block, NatKind};

/// Names that a host or a site cannot have: the internet itself, and what scripts call by themselves.
const RESERVED: [&str; 6] = ["internet", "machine", "machines", "driver", "log", "os"];

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// One line on what the scenario shows.
    pub description: String,
    /// Seconds that the script may take.
    #[serde(default = "default_timeout")]
    pub timeout: u32,
    /// Routers with a network behind them.
    #[serde(default)]
    pub sites: BTreeMap<String, Site>,
    /// Machines.
    pub hosts: BTreeMap<String, Host>,
    /// Programs of the system that the script calls and not every machine has.
    #[serde(default)]
    pub needs: Vec<String>,
    /// Whether names are found only by the internet's name server, not in each host's /etc/hosts.
    #[serde(default)]
    pub names_by_dns: bool,
    /// Programs of the scenario's own, built before it starts.
    #[serde(default)]
    pub programs: BTreeMap<String, Program>,
    /// What pairs of sides come to, for a script that measures them.
    pub expect: Option<Expect>,
}

/// A router and the network behind it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// What the router does to packets.
    #[serde(default)]
    pub nat: NatKind,
    /// What it refuses to forward.
    #[serde(default)]
    pub block: Vec<Block>,
    /// Another site that it hangs behind (a carrier's NAT) instead of the internet.
    pub behind: Option<String>,
    /// Its first three octets of the network inside, such as "192.168.7" (a /24).
    pub lan: Option<String>,
    /// Whether hosts inside have IPv6 addresses too (behind a stateful firewall).
    #[serde(default)]
    pub ipv6: bool,
    /// The biggest packet that its uplink carries, in bytes, both ways; 1500 without it. TCP is made to fit.
    pub mtu: Option<u16>,
}

/// What a host is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostKind {
    /// A network namespace and processes in it.
    #[default]
    Bare,
}

/// A machine.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// What it is made of.
    #[serde(default)]
    pub kind: HostKind,
    /// Whether the scenario goes on without it where a program that it needs is missing.
    #[serde(default)]
    pub optional: bool,
    /// The site it is in; without one it is on the internet.
    pub site: Option<String>,
    /// A site that a second link (`eth1`) leads to, with a default route of a higher metric: what a machine roams to.
    pub also: Option<String>,
    /// Its address on the internet, if it matters.
    pub address: Option<Ipv4Addr>,
    /// Whether it has an IPv6 address on the internet too.
    #[serde(default)]
    pub ipv6: bool,
    /// Whether `lacis-lab hostile` runs on it, which bare hosts have anyway.
    #[serde(default)]
    pub attacks: bool,
    /// DNS names of the host besides its own; its certificate is for all of them.
    #[serde(default)]
    pub names: Vec<String>,
    /// What runs on it, started at boot.
    #[serde(default)]
    pub services: Vec<Service>,
    /// Configuration of the coordinator.
    pub coordinator: Option<toml::Table>,
    /// Configuration of the relay.
    pub relay: Option<toml::Table>,
    /// Configuration of headscale.
    pub headscale: Option<toml::Table>,
    /// Further arguments of a service's program.
    #[serde(default)]
    pub arguments: BTreeMap<Service, Vec<String>>,
    /// Further files: path and content.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
}

/// What a host can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// `lacis-coordinator`
    Coordinator,
    /// `lacis-relay`
    Relay,
    /// `lacisd`
    Lacisd,
    /// Tailscale's daemon (given by path)
    Tailscaled,
    /// Headscale (given by path)
    Headscale,
    /// Tailscale's relay (given by path)
    Derper,
    /// What routers of the kind `port-mapping` run; no host asks for it
    #[serde(skip)]
    Miniupnpd,
}

/// A program of the scenario's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// A shell command, run in the scenario's folder.
    pub build: String,
    /// What it makes, relative to the scenario's folder.
    pub path: String,
}

impl Site {
    /// What runs on the router.
    pub fn service(&self) -> Option<Service> {
        (self.nat == NatKind::PortMapping).then_some(Service::Miniupnpd)
    }
}

impl Service {
    /// The unit's name, without `.service`.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Coordinator => "lacis-coordinator",
            Self::Relay => "lacis-relay",
            Self::Lacisd => "lacisd",
            Self::Tailscaled => "tailscaled",
            Self::Headscale => "headscale",
            Self::Derper => "derper",
            Self::Miniupnpd => "miniupnpd",
        }
    }

    /// Programs of this project that the service and its users need.
    pub fn own_programs(self) -> &'static [&'static str] {
        match self {
            Self::Coordinator => &["lacis-coordinator", "lacis"],
            Self::Relay => &["lacis-relay"],
            Self::Lacisd => &["lacisd", "lacis"],
            Self::Tailscaled | Self::Headscale | Self::Derper | Self::Miniupnpd => &[],
        }
    }

    /// Strangers' programs that it needs.
    pub fn peer_programs(self) -> &'static [&'static str] {
        match self {
            Self::Tailscaled => &["tailscaled", "tailscale"],
            Self::Headscale => &["headscale"],
            Self::Derper => &["derper"],
            Self::Coordinator | Self::Relay | Self::Lacisd | Self::Miniupnpd => &[],
        }
    }

    /// Programs of the system that it needs and not every machine has, each with its Debian package.
    pub fn system_programs(self) -> &'static [(&'static str, &'static str)] {
        if self == Self::Miniupnpd { &[("miniupnpd", "miniupnpd-nftables")] } else { &[] }
    }
}

fn default_timeout() -> u32 {
    300
}

impl Topology {
    /// Reads `DIR/topology.toml`.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("topology.toml");
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("cannot read {}: is {} a scenario?", path.display(), folder.display())
        })?;
        Self::parse(&text).with_context(|| format!("{} is not a topology", path.display()))
    }

    /// Parses and checks a document.
    pub fn parse(text: &str) -> Result<Self> {
        let topology: Self = toml::from_str(text)?;
        topology.check()?;
        Ok(topology)
    }

    fn check(&self) -> Result<()> {
        let mut scripted = BTreeSet::new();
        for name in self.hosts.keys().chain(self.sites.keys()) {
            let word = !name.is_empty()
                && name.len() <= 15
                && name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
            ensure!(word, "{name}: a name is 1 to 15 of a-z, 0-9 and -, and begins with a letter");
            ensure!(!RESERVED.contains(&name.as_str()), "{name}: this name is taken by the lab itself");
            ensure!(scripted.insert(name.replace('-', "_")), "{name}: two hosts or sites have this name");
        }
        for (name, site) in &self.sites {
            self.check_way_out(name, site)?;
            if let Some(lan) = &site.lan {
                lan_prefix(lan).with_context(|| format!("sites.{name}.lan"))?;
            }
            let least = if site.ipv6 { 1280 } else { 576 };
            if let Some(mtu) = site.mtu {
                ensure!((least..=1500).contains(&mtu), "sites.{name}.mtu: {mtu} is not in {least} to 1500");
            }
            let outside = site.ipv6 || site.nat.is_routed() || site.nat == NatKind::PortMapping;
            ensure!(
                !outside || site.behind.is_none(),
                "sites.{name}: `ipv6` and the kinds open, firewall and port-mapping need addresses of the internet, \
                 so it cannot be behind another site"
            );
        }
        for (name, host) in &self.hosts {
            if let Some(site) = &host.site {
                ensure!(self.sites.contains_key(site), "hosts.{name}.site: there is no site {site}");
                ensure!(
                    host.address.is_none() && !host.ipv6,
                    "hosts.{name}: `address` and `ipv6` are for hosts on the internet; this one is in site {site}"
                );
            }
            let side = self.expect.as_ref().is_some_and(|expect| expect.hosts().any(|side| side == *name));
            ensure!(!host.optional || !side, "hosts.{name}: a side of `expect` cannot be optional");
            if let Some(also) = &host.also {
                ensure!(self.sites.contains_key(also), "hosts.{name}.also: there is no site {also}");
                ensure!(host.site.as_ref() != Some(also), "hosts.{name}.also: it is in {also} already");
            }
            for (service, config) in [
                (Service::Coordinator, &host.coordinator),
                (Service::Relay, &host.relay),
                (Service::Headscale, &host.headscale),
            ] {
                if host.services.contains(&service) != config.is_some() {
                    let word = service.unit().trim_start_matches("lacis-");
                    bail!(
                        "hosts.{name}: the service {word:?} and its configuration `{word} = {{ … }}` go together"
                    );
                }
            }
            for path in host.files.keys() {
                ensure!(path.starts_with('/'), "hosts.{name}.files: {path} must begin with /");
            }
        }
        if let Some(expect) = &self.expect {
            expect.check(&self.hosts.keys().map(String::as_str).collect()).context("expect")?;
        }
        Ok(())
    }

    fn check_way_out(&self, name: &str, site: &Site) -> Result<()> {
        let mut seen = BTreeSet::from([name]);
        let mut behind = site.behind.as_deref();
        while let Some(next) = behind {
            ensure!(seen.insert(next), "sites.{name}.behind: the way to the internet goes round in a circle");
            let Some(site) = self.sites.get(next) else {
                bail!("sites.{name}.behind: there is no site {next}")
            };
            behind = site.behind.as_deref();
        }
        Ok(())
    }

    /// Takes out the optional hosts with a service that is `lacking` something; their names.
    pub fn leave_out(&mut self, lacking: impl Fn(Service) -> bool) -> Vec<String> {
        let gone = self
            .hosts
            .extract_if(.., |_, host| host.optional && host.services.iter().any(|service| lacking(*service)));
        gone.map(|(name, _)| name).collect()
    }

    /// The services of all hosts and routers, each once.
    pub fn services(&self) -> BTreeSet<Service> {
        let hosts = self.hosts.values().flat_map(|host| host.services.iter().copied());
        hosts.chain(self.sites.values().filter_map(Site::service)).collect()
    }
}

/// Three octets of a /24, from text such as "192.168.7".
pub fn lan_prefix(text: &str) -> Result<[u8; 3]> {
    let octets: Vec<u8> = text
        .split('.')
        .map(str::parse)
        .collect::<Result<_, _>>()
        .context("it must look like \"192.168.7\"")?;
    octets.try_into().ok().context("it must look like \"192.168.7\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_router_that_maps_ports_needs_its_program() {
        let text = "description = \"x\"\n[sites.a]\nnat = \"port-mapping\"\n[hosts.h]\n";
        assert!(Topology::parse(text).unwrap().services().contains(&Service::Miniupnpd));
    }

    const SMALL: &str =
        "description = \"x\"\n[sites.home]\n[hosts.alice]\nsite = \"home\"\nservices = [\"lacisd\"]\n";

    #[test]
    fn a_small_file_is_enough() {
        let topology = Topology::parse(SMALL).unwrap();
        assert_eq!(topology.sites["home"].nat, NatKind::Cone);
        assert_eq!(topology.hosts["alice"].services, [Service::Lacisd]);
        assert_eq!(topology.hosts["alice"].kind, HostKind::Bare);
    }

    #[test]
    fn optional_hosts_go_when_a_program_of_theirs_is_missing() {
        let text = "description = \"x\"\n[hosts.a]\noptional = true\nservices = [\"tailscaled\"]\n\
            [hosts.b]\noptional = true\nservices = [\"lacisd\"]\n[hosts.c]\nservices = [\"tailscaled\"]\n";
        let mut topology = Topology::parse(text).unwrap();
        assert_eq!(topology.leave_out(|service| service == Service::Tailscaled), ["a"]);
        assert_eq!(topology.hosts.keys().collect::<Vec<_>>(), ["b", "c"]);
        assert!(topology.leave_out(|_| false).is_empty());
    }

    #[test]
    fn mistakes_are_named() {
        for (text, want) in [
            ("description = \"x\"\n[hosts.a]\nsite = \"b\"\n", "there is no site b"),
            ("description = \"x\"\n[hosts.Alice]\n", "a name is"),
            ("description = \"x\"\n[hosts.internet]\n", "taken by the lab"),
            ("description = \"x\"\n[hosts.a]\nservices = [\"coordinator\"]\n", "go together"),
            ("description = \"x\"\n[hosts.a]\nservices = [\"cordinator\"]\n", "unknown variant"),
            ("description = \"x\"\n[sites.a]\n[hosts.a]\n", "two hosts or sites"),
            (
                "description = \"x\"\n[sites.a]\nbehind = \"b\"\n[sites.b]\nbehind = \"a\"\n[hosts.h]\n",
                "circle",
            ),
            ("description = \"x\"\n[sites.a]\nlan = \"10.0\"\n[hosts.h]\n", "192.168.7"),
            ("description = \"x\"\n[sites.a]\nmtu = 100\n[hosts.h]\n", "576 to 1500"),
            ("description = \"x\"\n[sites.a]\nipv6 = true\nmtu = 1279\n[hosts.h]\n", "1280 to 1500"),
            ("description = \"x\"\n[hosts.h]\nalso = \"a\"\n", "there is no site a"),
            ("description = \"x\"\n[sites.a]\n[hosts.h]\nsite = \"a\"\nalso = \"a\"\n", "already"),
            ("description = \"x\"\n[hosts.h]\nservices = [\"miniupnpd\"]\n", "unknown variant"),
            (
                "description = \"x\"\n[sites.a]\n[sites.b]\nnat = \"port-mapping\"\nbehind = \"a\"\n[hosts.h]\n",
                "need addresses of the internet",
            ),
            (
                "description = \"x\"\n[hosts.a-a]\noptional = true\n[expect]\nsides = [\"a\"]\nlacisd = {}\n",
                "cannot be optional",
            ),
            ("description = \"x\"\n[hosts.a-a]\n[expect]\nsides = [\"a\"]\nlacisd = {}\n", "no host a-b"),
        ] {
            let error = format!("{:#}", Topology::parse(text).unwrap_err());
            assert!(error.contains(want), "{text:?}: {error}");
        }
    }
}
