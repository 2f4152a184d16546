//! The flags behind which preferences are: what each changes, and how each is written.

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use lacis_wire::local::{MaskedPrefs, Prefs, Status, netfilter_mode};

use super::meant;

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
            change = change.set("ExitNodeID", "").set("ExitNodeIP", exit_address(exit, status)?);
        }
        Ok(change)
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
    let exit = if prefs.exit_node_ip.is_empty() { &prefs.exit_node_id } else { &prefs.exit_node_ip };
    flag("exit-node", !exit.is_empty(), exit.clone());
    flag("exit-node-allow-lan-access", prefs.exit_node_allow_lan_access, "true".to_owned());
    let own_user = std::env::var("USER").is_ok_and(|user| user == prefs.operator_user);
    flag("operator", !prefs.operator_user.is_empty() && !own_user, prefs.operator_user.clone());
    flag("snat-subnet-routes", prefs.no_snat, "false".to_owned());
    flag("stateful-filtering", prefs.no_stateful_filtering == Some(false), "true".to_owned());
    let mode = mode_name(prefs.netfilter_mode);
    flag("netfilter-mode", prefs.netfilter_mode != normal.netfilter_mode, mode.to_owned());
    flags
}

fn exit_address(text: &str, status: &Status) -> anyhow::Result<String> {
    if text.is_empty() {
        return Ok(String::new());
    }
    let Some((node, own)) = meant(status, text) else {
        // Before this node has joined, nobody knows the addresses.
        if status.peer.is_none() && text.parse::<std::net::IpAddr>().is_ok() {
            return Ok(text.to_owned());
        }
        bail!("no peer is called {text:?}: see `lacis status`")
    };
    if own {
        bail!("this node cannot be its own exit node");
    }
    if !node.exit_node_option {
        bail!("{text} does not offer to be an exit node");
    }
    match node.tailscale_ips.first() {
        Some(ip) => Ok(ip.to_string()),
        None => bail!("{text} has no address"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn routes_that_cannot_be_meant_are_refused() {
        assert!(routes("10.0.0.1/8", false).unwrap_err().to_string().contains("10.0.0.0/8"));
        assert!(routes("0.0.0.0/0", false).unwrap_err().to_string().contains("--advertise-exit-node"));
        assert!(routes("here", false).unwrap_err().to_string().contains("here"));
        assert!(routes("", false).unwrap().is_empty());
    }
}
