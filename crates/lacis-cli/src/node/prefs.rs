//! The flags behind which preferences are: what each changes, and how each is written.

use std::net::IpAddr;

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use lacis_wire::local::{ForwardingCheck, MaskedPrefs, Prefs, Status, netfilter_mode};

use super::{Daemon, meant};
use crate::output;

const DEFAULT_ROUTES: [&str; 2] = ["0.0.0.0/0", "::/0"];

/// Flags of `up` and `set` alike. What is not given is not changed by `set`, and checked by `up`.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct PrefFlags {
    /// Use the network's names on this host [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub accept_dns: Option<bool>,
    /// Use the routes of subnet routers
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub accept_routes: Option<bool>,
    /// Refuse connections of others
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub shields_up: Option<bool>,
    /// This node's name, in place of the host's
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Networks to route for others, with commas; empty for none
    #[arg(long, value_name = "PREFIXES")]
    pub advertise_routes: Option<String>,
    /// Offer to be an exit node
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub advertise_exit_node: Option<bool>,
    /// Tags to ask for, with commas
    #[arg(long, value_name = "TAGS")]
    pub advertise_tags: Option<String>,
    /// Send everything through this node (name or address); empty for none
    #[arg(long, value_name = "NODE")]
    pub exit_node: Option<String>,
    /// Reach the local network directly while an exit node is used
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub exit_node_allow_lan_access: Option<bool>,
    /// A local user who may use this command without being root
    #[arg(long, value_name = "USER")]
    pub operator: Option<String>,
    /// Hide the senders' addresses from networks that this node routes [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub snat_subnet_routes: Option<bool>,
    /// Filter forwarded packets by their connections
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub stateful_filtering: Option<bool>,
    /// Whose business the firewall is: on, nodivert or off
    #[arg(long, value_name = "MODE", value_parser = ["on", "nodivert", "off"])]
    pub netfilter_mode: Option<String>,
    /// Not supported: use the host's own SSH server
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true, hide = true)]
    pub ssh: Option<bool>,
}

fn mode_name(mode: u8) -> &'static str {
    match mode {
        netfilter_mode::OFF => "off",
        netfilter_mode::NO_DIVERT => "nodivert",
        _ => "on",
    }
}

fn mode_number(name: &str) -> u8 {
    match name {
        "off" => netfilter_mode::OFF,
        "nodivert" => netfilter_mode::NO_DIVERT,
        _ => netfilter_mode::ON,
    }
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(ToOwned::to_owned).collect()
}

/// The routes to offer: those named, with or without everything.
fn routes(subnets: &str, exit: bool) -> anyhow::Result<Vec<IpNet>> {
    let mut routes = Vec::new();
    for text in list(subnets) {
        let net: IpNet =
            text.parse().with_context(|| format!("{text:?} is no network such as 10.0.0.0/8"))?;
        if net.trunc() != net {
            bail!("{net} has bits set after its prefix; did you mean {}?", net.trunc());
        }
        routes.push(net);
    }
    let whole = |net: &IpNet| net.prefix_len() == 0;
    match routes.iter().filter(|net| whole(net)).count() {
        0 | 2 => {}
        _ => bail!("0.0.0.0/0 and ::/0 go together: use --advertise-exit-node"),
    }
    if exit {
        for text in DEFAULT_ROUTES {
            let net = text.parse()?;
            if !routes.contains(&net) {
                routes.push(net);
            }
        }
    }
    Ok(routes)
}

fn subnets_of(prefs: &Prefs) -> String {
    let subnets = prefs.advertise_routes.iter().filter(|net| net.prefix_len() != 0);
    subnets.map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn is_exit(prefs: &Prefs) -> bool {
    prefs.advertise_routes.iter().any(|net| net.prefix_len() == 0)
}

fn tags(text: &str) -> Vec<String> {
    let tagged = |tag: String| if tag.starts_with("tag:") { tag } else { format!("tag:{tag}") };
    list(text).into_iter().map(tagged).collect()
}

impl PrefFlags {
    /// Was anything given?
    pub(crate) fn is_empty(&self) -> bool {
        self.given().is_empty()
    }

    /// Names of the flags that were given.
    fn given(&self) -> Vec<&'static str> {
        let flags: [(&'static str, bool); 14] = [
            ("accept-dns", self.accept_dns.is_some()),
            ("accept-routes", self.accept_routes.is_some()),
            ("shields-up", self.shields_up.is_some()),
            ("hostname", self.hostname.is_some()),
            ("advertise-routes", self.advertise_routes.is_some()),
            ("advertise-exit-node", self.advertise_exit_node.is_some()),
            ("advertise-tags", self.advertise_tags.is_some()),
            ("exit-node", self.exit_node.is_some()),
            ("exit-node-allow-lan-access", self.exit_node_allow_lan_access.is_some()),
            ("operator", self.operator.is_some()),
            ("snat-subnet-routes", self.snat_subnet_routes.is_some()),
            ("stateful-filtering", self.stateful_filtering.is_some()),
            ("netfilter-mode", self.netfilter_mode.is_some()),
            ("ssh", self.ssh.is_some()),
        ];
        flags.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
    }

    /// The change that these flags wish, to preferences as they are.
    pub(crate) fn change(&self, prefs: &Prefs, status: &Status) -> anyhow::Result<MaskedPrefs> {
        if self.ssh == Some(true) {
            bail!("SSH is not served by lacisd; use the host's own SSH server over the mesh");
        }
        let mut change = MaskedPrefs::default();
        let flags = [
            ("CorpDNS", self.accept_dns),
            ("RouteAll", self.accept_routes),
            ("ShieldsUp", self.shields_up),
            ("ExitNodeAllowLANAccess", self.exit_node_allow_lan_access),
            ("NoSNAT", self.snat_subnet_routes.map(|on| !on)),
            ("NoStatefulFiltering", self.stateful_filtering.map(|on| !on)),
        ];
        for (field, value) in flags {
            if let Some(value) = value {
                change = change.set(field, value);
            }
        }
        if let Some(name) = &self.hostname {
            change = change.set("Hostname", name.as_str());
        }
        if let Some(user) = &self.operator {
            change = change.set("OperatorUser", user.as_str());
        }
        if let Some(mode) = &self.netfilter_mode {
            change = change.set("NetfilterMode", mode_number(mode));
        }
        if let Some(text) = &self.advertise_tags {
            change = change.set("AdvertiseTags", tags(text));
        }
        if self.advertise_routes.is_some() || self.advertise_exit_node.is_some() {
            let subnets = self.advertise_routes.clone().unwrap_or_else(|| subnets_of(prefs));
            let routes = routes(&subnets, self.advertise_exit_node.unwrap_or_else(|| is_exit(prefs)))?;
            change =
                change.set("AdvertiseRoutes", routes.iter().map(ToString::to_string).collect::<Vec<_>>());
        }
        if let Some(exit) = &self.exit_node {
            let chosen = Exit::find(exit, status)?;
            let is = |field| if chosen.field == field { chosen.value.as_str() } else { "" };
            for field in ["ExitNodeID", "ExitNodeIP", "ExitNodeName"] {
                change = change.set(field, is(field));
            }
        }
        let keeps_exit = !exit_of(prefs).is_empty();
        let has_exit = self.exit_node.as_ref().map_or(keeps_exit, |exit| !exit.is_empty());
        if self.exit_node_allow_lan_access == Some(true) && !has_exit {
            bail!("--exit-node-allow-lan-access is of use only with --exit-node");
        }
        Ok(change)
    }

    /// Says what this host lacks to do what was asked for.
    pub(crate) async fn warn(&self, daemon: &Daemon) {
        if self.advertise_routes.is_none() && self.advertise_exit_node.is_none() {
            return;
        }
        let Ok(prefs) = daemon.prefs().await else { return };
        if prefs.advertise_routes.is_empty() {
            return;
        }
        let v6 = prefs.advertise_routes.iter().any(|net| net.addr().is_ipv6());
        let checked: Result<ForwardingCheck, _> = daemon.get(&format!("check-ip-forwarding?ipv6={v6}")).await;
        for line in checked.iter().flat_map(|check| check.warning.lines()) {
            output::note(format_args!("Warning: {line}"));
        }
    }

    /// `up` with some flags must name all settings that differ from their defaults, or they would be lost without
    /// notice. The flags that are missing, as they would have to be written.
    pub(crate) fn unmentioned(&self, prefs: &Prefs) -> Vec<String> {
        let given = self.given();
        settings(prefs)
            .into_iter()
            .filter(|(name, _)| !given.contains(name))
            .map(|(name, value)| format!("--{name}={value}"))
            .collect()
    }
}

/// Settings that differ from their defaults, as flags.
fn settings(prefs: &Prefs) -> Vec<(&'static str, String)> {
    let normal = Prefs::default();
    let mut flags = Vec::new();
    let mut flag = |name, differs: bool, value: String| {
        if differs {
            flags.push((name, value));
        }
    };
    flag("accept-dns", prefs.corp_dns != normal.corp_dns, prefs.corp_dns.to_string());
    flag("accept-routes", prefs.route_all != normal.route_all, prefs.route_all.to_string());
    flag("shields-up", prefs.shields_up, prefs.shields_up.to_string());
    flag("hostname", !prefs.hostname.is_empty(), prefs.hostname.clone());
    let subnets = subnets_of(prefs);
    flag("advertise-routes", !subnets.is_empty(), subnets.clone());
    flag("advertise-exit-node", is_exit(prefs), "true".to_owned());
    flag("advertise-tags", !prefs.advertise_tags.is_empty(), prefs.advertise_tags.join(","));
    let exit = exit_of(prefs);
    flag("exit-node", !exit.is_empty(), exit.to_owned());
    flag("exit-node-allow-lan-access", prefs.exit_node_allow_lan_access, "true".to_owned());
    let own_user = std::env::var("USER").is_ok_and(|user| user == prefs.operator_user);
    flag("operator", !prefs.operator_user.is_empty() && !own_user, prefs.operator_user.clone());
    flag("snat-subnet-routes", prefs.no_snat, "false".to_owned());
    flag("stateful-filtering", prefs.no_stateful_filtering == Some(false), "true".to_owned());
    let mode = mode_name(prefs.netfilter_mode);
    flag("netfilter-mode", prefs.netfilter_mode != normal.netfilter_mode, mode.to_owned());
    flags
}

/// The exit node in the preferences, however it is named there.
fn exit_of(prefs: &Prefs) -> &str {
    let named = [&prefs.exit_node_id, &prefs.exit_node_ip, &prefs.exit_node_name];
    named.into_iter().find(|text| !text.is_empty()).map_or("", String::as_str)
}

/// An exit node as the preferences name it.
#[derive(Debug, PartialEq, Eq)]
struct Exit {
    field: &'static str,
    value: String,
}

impl Exit {
    fn find(text: &str, status: &Status) -> anyhow::Result<Self> {
        let exit = |field, value: &str| Ok(Self { field, value: value.to_owned() });
        let Some(peers) = status.peer.as_ref().filter(|_| !text.is_empty()) else {
            // Before this node has joined, nobody knows who is meant: lacisd looks it up as soon as it can.
            let is_address = text.is_empty() || text.parse::<IpAddr>().is_ok();
            return exit(if is_address { "ExitNodeIP" } else { "ExitNodeName" }, text);
        };
        let by_id = peers.values().find(|node| node.id == text).map(|node| (node, false));
        let named = match by_id {
            Some(_) => None,
            None => meant(status, text)?,
        };
        // As for administrators: a number is an id, and a host may call itself by any.
        if let Some((node, _)) = named
            && text.bytes().all(|byte| byte.is_ascii_digit())
        {
            bail!("no peer has the id {text}: for the one of this name say {:?}", node.dns_name);
        }
        let Some((node, own)) = by_id.or(named) else {
            bail!("no peer is called {text:?}: see `lacis exit-node list`")
        };
        if own {
            bail!("this node cannot be its own exit node");
        }
        if !node.exit_node_option {
            bail!("{text} does not offer to be an exit node, or is not approved as one");
        }
        match node.tailscale_ips.first() {
            _ if !node.id.is_empty() => exit("ExitNodeID", &node.id),
            Some(ip) => exit("ExitNodeIP", &ip.to_string()),
            None => bail!("{text} has no address"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacis_wire::key::NodeKey;
    use lacis_wire::local::PeerStatus;

    #[test]
    fn settings_that_are_not_mentioned_are_listed_as_flags() {
        let prefs = Prefs {
            hostname: "bob".into(),
            corp_dns: false,
            advertise_routes: routes("10.0.0.0/8", true).unwrap(),
            ..Prefs::default()
        };
        let flags = PrefFlags { hostname: Some("x".into()), ..PrefFlags::default() };
        assert_eq!(
            flags.unmentioned(&prefs),
            ["--accept-dns=false", "--advertise-routes=10.0.0.0/8", "--advertise-exit-node=true"]
        );
        assert!(flags.unmentioned(&Prefs::default()).is_empty());
    }

    #[test]
    fn a_flag_changes_only_what_it_names() {
        let prefs = Prefs { advertise_routes: routes("10.0.0.0/8", false).unwrap(), ..Prefs::default() };
        let flags = PrefFlags {
            advertise_exit_node: Some(true),
            snat_subnet_routes: Some(false),
            advertise_tags: Some("web,tag:db".into()),
            ..PrefFlags::default()
        };
        let changed = flags.change(&prefs, &Status::default()).unwrap().apply(&prefs).unwrap();
        assert_eq!(changed.advertise_routes, routes("10.0.0.0/8", true).unwrap());
        assert!(changed.no_snat);
        assert_eq!(changed.advertise_tags, ["tag:web", "tag:db"]);
        assert!(changed.corp_dns);
    }

    #[test]
    fn an_exit_node_is_found_by_name_address_or_id_and_kept_for_later_before_joining() {
        let find =
            |text: &str, status: &Status| Exit::find(text, status).map(|exit| (exit.field, exit.value));
        let new = Status::default();
        assert_eq!(find("100.64.0.2", &new).unwrap(), ("ExitNodeIP", "100.64.0.2".into()));
        assert_eq!(find("gate", &new).unwrap(), ("ExitNodeName", "gate".into()));
        assert_eq!(find("", &new).unwrap().1, "");
        let peer = |id: &str, name: &str, last: u8, offers: bool| PeerStatus {
            id: id.into(),
            dns_name: format!("{name}.lab.example."),
            tailscale_ips: vec![[100, 64, 0, last].into()],
            exit_node_option: offers,
            ..PeerStatus::default()
        };
        let peers = [peer("n2", "gate", 2, true), peer("n3", "plain", 3, false), peer("n4", "12", 4, true)];
        let peers = peers.map(|peer| (NodeKey::from_bytes([peer.id.as_bytes()[1]; 32]), peer));
        let status = Status { self_status: peer("n1", "me", 1, true), peer: Some(peers.into()), ..new };
        for text in ["gate", "gate.lab.example.", "100.64.0.2", "n2"] {
            assert_eq!(find(text, &status).unwrap(), ("ExitNodeID", "n2".into()), "{text}");
        }
        assert_eq!(find("12.lab.example", &status).unwrap(), ("ExitNodeID", "n4".into()));
        for (text, why) in [
            ("plain", "does not offer"),
            ("me", "its own"),
            ("nobody", "no peer is called"),
            ("12", "no peer has the id 12"),
        ] {
            assert!(find(text, &status).unwrap_err().to_string().contains(why), "{text}");
        }
    }

    #[test]
    fn access_to_the_lan_goes_with_an_exit_node() {
        let flags = PrefFlags { exit_node_allow_lan_access: Some(true), ..PrefFlags::default() };
        assert!(flags.change(&Prefs::default(), &Status::default()).is_err());
        let using = Prefs { exit_node_id: "n2".into(), ..Prefs::default() };
        assert!(flags.change(&using, &Status::default()).is_ok());
        let flags = PrefFlags { exit_node: Some("gate".into()), ..flags };
        let changed = flags.change(&using, &Status::default()).unwrap().apply(&using).unwrap();
        assert_eq!((changed.exit_node_id.as_str(), changed.exit_node_name.as_str()), ("", "gate"));
        let none = PrefFlags { exit_node: Some(String::new()), ..PrefFlags::default() };
        let changed = none.change(&using, &Status::default()).unwrap().apply(&using).unwrap();
        assert_eq!(exit_of(&changed), "");
    }

    #[test]
    fn routes_that_cannot_be_meant_are_refused() {
        assert!(routes("10.0.0.1/8", false).unwrap_err().to_string().contains("10.0.0.0/8"));
        assert!(routes("0.0.0.0/0", false).unwrap_err().to_string().contains("--advertise-exit-node"));
        assert!(routes("here", false).unwrap_err().to_string().contains("here"));
        assert!(routes("", false).unwrap().is_empty());
    }
}
