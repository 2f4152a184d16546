//! From a topology to a plan: every node has its addresses, links, rules, files and units.
//!
//! The plan is data, computed without touching the system. [`crate::net`] builds the network from it,
//! [`crate::boot`] the hosts, and the driver reads it as JSON.
//!
//! Addresses: the internet is a router (192.0.2.1, resolver 192.0.2.53) with a link of its own to every host and site;
//! open hosts are 198.51.100.10, .11, … (2001:db8:0:N::1 with IPv6), sites 203.0.113.10, .11, … (44.0.113.10, … for
//! `port-mapping`) in the order of their names; inside a site the router is .1 of 192.168.K.0/24 and hosts are .10,
//! .11, …; with IPv6 the same numbers in 2001:db8:100:K::/64.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::nat;
use crate::topology::{Host, Site, Topology, lan_prefix};
use crate::units::{self, Unit};

/// The namespace that forwards between all sites and open hosts.
pub const INTERNET: &str = "internet";
/// The internet's own address: the gateway of every link to it.
pub const INTERNET_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Where the internet's name server answers.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
/// What makes a default route of a second link wait until the first is gone.
const ROAMING: &str = "metric 2048";
/// The same gateway for IPv6, on every link.
const GATEWAY_V6: &str = "fe80::1";

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The forwarding core.
    Internet,
    /// A site's router.
    Router,
    /// A machine.
    Host,
}

/// A cable: this node's end and the other's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Link {
    /// This node's interface.
    pub device: String,
    /// Its addresses with prefix lengths.
    pub addresses: Vec<String>,
    /// Arguments of `ip route add` for this node.
    pub routes: Vec<String>,
    /// The node at the other end.
    pub other: String,
    /// The interface there.
    pub other_device: String,
    /// The bridge there that it is a port of.
    pub other_bridge: Option<String>,
    /// Its addresses there.
    pub other_addresses: Vec<String>,
    /// Arguments of `ip route replace` there.
    pub other_routes: Vec<String>,
}

/// A namespace of the scenario.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Node {
    /// What it is.
    pub role: Role,
    /// The site that it is in or is the router of.
    pub site: Option<String>,
    /// Its way out.
    pub uplink: Option<Link>,
    /// Another way out, used when the first is gone.
    pub also: Option<Link>,
    /// Addresses of the bridge `lan`, for a router.
    pub lan: Vec<String>,
    /// The biggest packet that its way out carries, for a router that has a limit.
    pub mtu: Option<u16>,
    /// Rules for nft, for a router.
    pub ruleset: Option<String>,
    /// A few words for the drawing.
    pub words: String,
    /// DNS names.
    pub names: Vec<String>,
    /// What runs on it.
    pub units: Vec<Unit>,
    /// Files to put there before anything starts.
    pub files: BTreeMap<String, String>,
}

/// The whole scenario, ready to be built.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The scenario's name.
    pub name: String,
    /// One line on what it shows.
    pub description: String,
    /// Seconds that the script may take.
    pub timeout: u32,
    /// All nodes by name.
    pub nodes: BTreeMap<String, Node>,
    /// What the internet's name server answers.
    pub names: BTreeMap<String, Vec<IpAddr>>,
    /// A line for each node, as a tree.
    pub drawing: String,
}

impl Node {
    /// The addresses that the outside knows it by, without prefix lengths.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.uplink
            .iter()
            .flat_map(|link| &link.addresses)
            .filter_map(|text| text.split('/').next()?.parse().ok())
            .collect()
    }
}

/// Where a site's inner network lies.
struct Inside {
    prefix: [u8; 3],
    v6: Option<u16>,
    routed: bool,
}

impl Inside {
    fn v4(&self, last: u8) -> Ipv4Addr {
        let [a, b, c] = self.prefix;
        Ipv4Addr::new(a, b, c, last)
    }

    fn v6(&self, last: u16) -> Option<Ipv6Addr> {
        self.v6.map(|number| Ipv6Addr::new(0x2001, 0xdb8, 0x100, number, 0, 0, 0, last))
    }
}

impl Plan {
    /// Gives everything an address.
    pub fn new(name: &str, topology: &Topology) -> Result<Self> {
        let mut nodes = BTreeMap::new();
        nodes.insert(INTERNET.to_owned(), internet());
        let inside = insides(topology)?;
        for (number, (site_name, site)) in topology.sites.iter().enumerate() {
            nodes.insert(site_name.clone(), router(number, site_name, site, &inside)?);
        }
        let mut in_site: BTreeMap<&str, u8> = BTreeMap::new();
        let mut taken: Vec<Ipv4Addr> = topology.hosts.values().filter_map(|host| host.address).collect();
        for (number, (host_name, host)) in topology.hosts.iter().enumerate() {
            let number = u8::try_from(number).context("too many hosts")?;
            let mut inner = |site| {
                let place = in_site.entry(site).or_insert(9);
                *place += 1;
                (lan_addresses(&inside[site], *place), Way::Lan(site))
            };
            let (addresses, way) = match &host.site {
                Some(site) => inner(site.as_str()),
                None => {
                    let address = host.address.unwrap_or_else(|| free_address(&mut taken));
                    let v6 =
                        host.ipv6.then(|| Ipv6Addr::new(0x2001, 0xdb8, 0, u16::from(number) + 1, 0, 0, 0, 1));
                    (single(address, v6), Way::Core)
                }
            };
            let gateway = |site: &String| gateways(&inside[site.as_str()]);
            let uplink =
                link("eth0", &format!("h{number}"), addresses, way, host.site.as_ref().map(gateway), &[]);
            let also = host.also.as_ref().map(|site| {
                let (addresses, way) = inner(site.as_str());
                let mut link = link("eth1", &format!("a{number}"), addresses, way, Some(gateway(site)), &[]);
                add_to_routes(&mut link, ROAMING);
                link
            });
            nodes.insert(host_name.clone(), machine(host_name, host, uplink, also)?);
        }
        let mut names: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for node in nodes.values() {
            for dns_name in &node.names {
                names.entry(dns_name.to_ascii_lowercase()).or_default().extend(node.addresses());
            }
        }
        let drawing = draw(&nodes);
        Ok(Self {
            name: name.to_owned(),
            description: topology.description.clone(),
            timeout: topology.timeout,
            nodes,
            names,
            drawing,
        })
    }
}

fn free_address(taken: &mut Vec<Ipv4Addr>) -> Ipv4Addr {
    let address =
        (10..=254).map(|last| Ipv4Addr::new(198, 51, 100, last)).find(|address| !taken.contains(address));
    let address = address.unwrap_or(Ipv4Addr::new(198, 51, 100, 9));
    taken.push(address);
    address
}

fn internet() -> Node {
    Node {
        role: Role::Internet,
        site: None,
        uplink: None,
        also: None,
        lan: Vec::new(),
        mtu: None,
        ruleset: None,
        words: "the routed core, name server 192.0.2.53".to_owned(),
        names: Vec::new(),
        units: Vec::new(),
        files: BTreeMap::new(),
    }
}

fn insides(topology: &Topology) -> Result<BTreeMap<&str, Inside>> {
    let mut inside = BTreeMap::new();
    for (number, (name, site)) in topology.sites.iter().enumerate() {
        let number = u8::try_from(number + 1).context("too many sites")?;
        let prefix = match &site.lan {
            Some(lan) => lan_prefix(lan)?,
            // A routed site's hosts have addresses that all the internet reaches.
            None if site.nat.is_routed() => [198, 18, number],
            None => [192, 168, number],
        };
        let v6 = site.ipv6.then_some(u16::from(number));
        inside.insert(name.as_str(), Inside { prefix, v6, routed: site.nat.is_routed() });
    }
    Ok(inside)
}

fn router(number: usize, name: &str, site: &Site, inside: &BTreeMap<&str, Inside>) -> Result<Node> {
    let number = u8::try_from(number).context("too many sites")?;
    let own = &inside[name];
    let mut beyond: Vec<String> = Vec::new();
    if own.routed {
        beyond.push(format!("{}/24", own.v4(0)));
    }
    if let Some(v6) = own.v6(0) {
        beyond.push(format!("{v6}/64"));
    }
    let (addresses, way, gateway) = match &site.behind {
        Some(outer) => {
            let outside = &inside[outer.as_str()];
            (lan_addresses(outside, 100 + number), Way::Lan(outer), Some(gateways(outside)))
        }
        None => {
            let v6 = site.ipv6.then(|| Ipv6Addr::new(0x2001, 0xdb8, 0xff, u16::from(number) + 1, 0, 0, 0, 1));
            let [a, b, c] = site.nat.outside();
            (single(Ipv4Addr::new(a, b, c, 10 + number), v6), Way::Core, None)
        }
    };
    let mut words = site.nat.words().to_owned();
    for block in &site.block {
        words = format!("{words}, {}", block.words());
    }
    let mut uplink = link("wan", &format!("s{number}"), addresses, way, gateway, &beyond);
    if let Some(mtu) = site.mtu {
        words = format!("{words}, MTU {mtu}");
        // The router says what is too big, not the core: so that its own rules decide whether anybody hears of it.
        add_to_routes(&mut uplink, &format!("mtu {mtu}"));
    }
    let mut files = BTreeMap::new();
    let mut services = Vec::new();
    if let Some(service) = site.service() {
        services.push(units::of(service, &[])?);
        let (path, text) = units::MINIUPNPD;
        files.insert(path.to_owned(), text.to_owned());
    }
    let mut lan = vec![format!("{}/24", own.v4(1))];
    lan.extend(own.v6(1).map(|v6| format!("{v6}/64")));
    Ok(Node {
        role: Role::Router,
        site: site.behind.clone(),
        uplink: Some(uplink),
        also: None,
        lan,
        mtu: site.mtu,
        ruleset: Some(nat::ruleset(site.nat, &site.block, site.mtu.is_some())),
        words,
        names: Vec::new(),
        units: services,
        files,
    })
}

fn machine(name: &str, host: &Host, uplink: Link, also: Option<Link>) -> Result<Node> {
    let mut files = host.files.clone();
    let mut services = Vec::new();
    for service in &host.services {
        let arguments = host.arguments.get(service).map(Vec::as_slice).unwrap_or_default();
        services.push(units::of(*service, arguments).with_context(|| format!("hosts.{name}"))?);
        if let Some((path, text)) = units::configuration(*service, host)? {
            files.insert(path.to_owned(), text);
        }
    }
    let mut words: Vec<String> = host.services.iter().map(|service| service.unit().to_owned()).collect();
    words.extend(host.also.iter().map(|site| format!("also in {site}")));
    Ok(Node {
        role: Role::Host,
        site: host.site.clone(),
        uplink: Some(uplink),
        also,
        lan: Vec::new(),
        mtu: None,
        ruleset: None,
        words: words.join(", "),
        names: host.names.clone(),
        units: services,
        files,
    })
}

/// Says more of every route that the node itself has by a link.
fn add_to_routes(link: &mut Link, words: &str) {
    for route in &mut link.routes {
        *route = format!("{route} {words}");
    }
}

enum Way<'a> {
    Core,
    Lan(&'a str),
}

fn single(v4: Ipv4Addr, v6: Option<Ipv6Addr>) -> Vec<String> {
    let mut addresses = vec![format!("{v4}/32")];
    addresses.extend(v6.map(|v6| format!("{v6}/128")));
    addresses
}

fn lan_addresses(inside: &Inside, last: u8) -> Vec<String> {
    let mut addresses = vec![format!("{}/24", inside.v4(last))];
    addresses.extend(inside.v6(u16::from(last)).map(|v6| format!("{v6}/64")));
    addresses
}

fn gateways(inside: &Inside) -> Vec<IpAddr> {
    let mut gateways = vec![IpAddr::V4(inside.v4(1))];
    gateways.extend(inside.v6(1).map(IpAddr::V6));
    gateways
}

fn link(
    device: &str,
    other_device: &str,
    addresses: Vec<String>,
    way: Way<'_>,
    gateways: Option<Vec<IpAddr>>,
    beyond: &[String],
) -> Link {
    let (other, other_bridge) = match way {
        Way::Core => (INTERNET.to_owned(), None),
        Way::Lan(site) => (site.to_owned(), Some("lan".to_owned())),
    };
    let mut routes = Vec::new();
    let mut other_addresses = Vec::new();
    let mut other_routes = Vec::new();
    match gateways {
        Some(gateways) => {
            routes.extend(gateways.iter().map(|gateway| format!("default via {gateway} dev {device}")));
        }
        None => {
            routes.push(format!("default via {INTERNET_ADDRESS} dev {device} onlink"));
            if addresses.len() > 1 {
                routes.push(format!("default via {GATEWAY_V6} dev {device} onlink"));
                other_addresses.push(format!("{GATEWAY_V6}/64"));
            }
        }
    }
    if other_bridge.is_none() {
        let own: Vec<&str> = addresses.iter().filter_map(|text| text.split('/').next()).collect();
        other_routes.extend(addresses.iter().map(|address| format!("{address} dev {other_device}")));
        for prefix in beyond {
            let through = own.iter().find(|address| address.contains(':') == prefix.contains(':'));
            if let Some(through) = through {
                other_routes.push(format!("{prefix} via {through} dev {other_device} onlink"));
            }
        }
    }
    Link {
        device: device.to_owned(),
        addresses,
        routes,
        other,
        other_device: other_device.to_owned(),
        other_bridge,
        other_addresses,
        other_routes,
    }
}

/// The nodes as a tree, in ASCII.
fn draw(nodes: &BTreeMap<String, Node>) -> String {
    let mut lines = vec![(INTERNET.to_owned(), String::new(), nodes[INTERNET].words.clone())];
    draw_below(nodes, None, "", &mut lines);
    let names = lines.iter().map(|(name, _, _)| name.len()).max().unwrap_or(0);
    let addresses = lines.iter().map(|(_, address, _)| address.len()).max().unwrap_or(0);
    lines
        .iter()
        .map(|(name, address, words)| {
            format!("{name:names$}  {address:addresses$}  {words}").trim_end().to_owned() + "\n"
        })
        .collect()
}

fn draw_below(
    nodes: &BTreeMap<String, Node>,
    site: Option<&str>,
    indent: &str,
    lines: &mut Vec<(String, String, String)>,
) {
    let mut below: Vec<(&String, &Node)> = nodes
        .iter()
        .filter(|(_, node)| node.role != Role::Internet && node.site.as_deref() == site)
        .collect();
    // Open hosts first, then the sites with what is in them.
    below.sort_by_key(|(_, node)| node.role == Role::Router);
    let count = below.len();
    for (number, (name, node)) in below.into_iter().enumerate() {
        let (branch, trunk) = if number + 1 == count { ("`-- ", "    ") } else { ("|-- ", "|   ") };
        let addresses: Vec<String> = node.addresses().iter().map(ToString::to_string).collect();
        let mut words = node.words.clone();
        if !node.names.is_empty() {
            words = format!("{words} ({})", node.names.join(", "));
        }
        lines.push((format!("{indent}{branch}{name}"), addresses.join(" "), words));
        if node.role == Role::Router {
            draw_below(nodes, Some(name), &format!("{indent}{trunk}"), lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Plan {
        Plan::new("t", &Topology::parse(&format!("description = \"x\"\n{text}")).unwrap()).unwrap()
    }

    #[test]
    fn every_site_and_open_host_has_a_link_of_its_own_to_the_internet() {
        let plan = plan("[sites.a]\n[sites.b]\n[hosts.x]\nsite = \"a\"\n[hosts.y]\n");
        let link = |name: &str| plan.nodes[name].uplink.clone().unwrap();
        assert_eq!(link("a").addresses, ["203.0.113.10/32"]);
        assert_eq!(link("b").addresses, ["203.0.113.11/32"]);
        assert_eq!(link("y").addresses, ["198.51.100.10/32"]);
        assert_eq!(link("y").routes, ["default via 192.0.2.1 dev eth0 onlink"]);
        assert_eq!(link("x").addresses, ["192.168.1.10/24"]);
        assert_eq!(link("x").routes, ["default via 192.168.1.1 dev eth0"]);
        assert_eq!(link("x").other_bridge.as_deref(), Some("lan"));
    }

    #[test]
    fn a_site_behind_another_hangs_on_its_network() {
        let plan = plan(
            "[sites.carrier]\nlan = \"100.64.0\"\n[sites.home]\nbehind = \"carrier\"\n[hosts.x]\nsite = \"home\"\n",
        );
        let home = plan.nodes["home"].uplink.clone().unwrap();
        assert_eq!(home.addresses, ["100.64.0.101/24"]);
        assert_eq!(home.other, "carrier");
        assert_eq!(plan.nodes["x"].addresses(), ["192.168.2.10".parse::<IpAddr>().unwrap()]);
        assert!(plan.drawing.contains("        `-- x"));
    }

    #[test]
    fn names_lead_to_all_addresses_of_their_host() {
        let plan = plan("[hosts.hub]\nipv6 = true\nnames = [\"Mesh.example.org\"]\n");
        assert_eq!(
            plan.names["mesh.example.org"],
            ["198.51.100.10".parse::<IpAddr>().unwrap(), "2001:db8:0:1::1".parse().unwrap()]
        );
    }

    #[test]
    fn every_scenario_of_the_project_can_be_planned() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for folder in ["tests", "benches"] {
            let mut planned = 0;
            for entry in std::fs::read_dir(root.join(folder)).unwrap() {
                let path = entry.unwrap().path();
                if path.join("topology.toml").is_file() {
                    Plan::new("t", &Topology::load(&path).unwrap()).unwrap();
                    assert!(path.join("test.py").is_file(), "{} has no script", path.display());
                    planned += 1;
                }
            }
            assert!(planned > 0, "{folder}");
        }
    }

    #[test]
    fn a_second_link_waits_with_its_default_route() {
        let plan =
            plan("[sites.a]\n[sites.b]\n[hosts.x]\nsite = \"a\"\nalso = \"b\"\n[hosts.y]\nsite = \"b\"\n");
        let also = plan.nodes["x"].also.clone().unwrap();
        assert_eq!((also.device.as_str(), also.other.as_str()), ("eth1", "b"));
        assert_eq!(also.addresses, ["192.168.2.10/24"]);
        assert_eq!(also.routes, ["default via 192.168.2.1 dev eth1 metric 2048"]);
        assert_eq!(plan.nodes["y"].addresses(), ["192.168.2.11".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_narrow_uplink_is_known_to_the_router_alone() {
        let plan = plan("[sites.a]\nmtu = 1420\n[hosts.x]\nsite = \"a\"\n");
        assert_eq!(plan.nodes["a"].mtu, Some(1420));
        assert_eq!(
            plan.nodes["a"].uplink.clone().unwrap().routes,
            ["default via 192.0.2.1 dev wan onlink mtu 1420"]
        );
        assert_eq!(plan.nodes["x"].uplink.clone().unwrap().routes, ["default via 192.168.1.1 dev eth0"]);
        assert!(plan.nodes["a"].ruleset.clone().unwrap().contains("maxseg size set rt mtu"));
    }

    #[test]
    fn a_router_that_maps_ports_runs_miniupnpd_at_a_global_address() {
        let plan = plan("[sites.a]\nnat = \"port-mapping\"\n[hosts.x]\nsite = \"a\"\n");
        let router = &plan.nodes["a"];
        assert_eq!(router.addresses(), ["44.0.113.10".parse::<IpAddr>().unwrap()]);
        assert_eq!(router.units[0].name, "miniupnpd");
        assert!(router.files["/etc/miniupnpd/miniupnpd.conf"].contains("ext_ifname=wan"));
    }

    #[test]
    fn a_routed_site_is_reached_through_its_router() {
        let plan = plan("[sites.lab]\nnat = \"open\"\nipv6 = true\n[hosts.x]\nsite = \"lab\"\n");
        let routes = plan.nodes["lab"].uplink.clone().unwrap().other_routes;
        assert!(routes.contains(&"198.18.1.0/24 via 203.0.113.10 dev s0 onlink".to_owned()), "{routes:?}");
        assert!(routes.iter().any(|route| route.starts_with("2001:db8:100:1::/64 via")), "{routes:?}");
    }
}
