//! What a schema cannot say: things that must fit together.

use std::collections::BTreeMap;

use lacis_policy::{Format, Policy, Problem};
use lacis_wire::control::{QUAD100_V4, QUAD100_V6, ResolverAddr};

use super::Nameserver;
use super::position::Positions;
use super::problem;
use super::scalars::is_label;
use super::types::{Config, Dns, PolicySetting, Tailnet};
use crate::core::names::means_this_host;

/// A DNS name has 253 characters at most, and a node's label 63 and a dot.
const MAX_DOMAIN: usize = 253 - 64;

pub(super) fn check(config: &Config, positions: &Positions<'_>) -> Vec<problem::Problem> {
    let mut problems = Vec::new();
    let mut wrong =
        |path: &[&str], message: String| problems.push(problem::Problem::at(positions, path, message));

    let host = config.server_url.0.host();
    let servers = servers(config);
    let mut domains: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, tailnet) in &config.tailnets {
        if !is_label(name) {
            let message = "a network's name has lower-case letters, digits and hyphens only, such as lab";
            wrong(&["tailnets", name], message.to_owned());
        }
        let domain = &tailnet.domain;
        if domain.contains(host) {
            let message = format!(
                "the server's own host {host:?} must not stand in a network's domain: clients would look for it inside the network"
            );
            wrong(&["tailnets", name, "domain"], message);
        }
        if domain.is_local() {
            let message =
                "every host means itself by names that end in localhost, and sends no question about them";
            wrong(&["tailnets", name, "domain"], message.to_owned());
        }
        if domain.0.len() > MAX_DOMAIN {
            let message = format!("at most {MAX_DOMAIN} characters: a node's name stands in front of it");
            wrong(&["tailnets", name, "domain"], message);
        }
        if let Some(other) = domains.insert(&domain.0, name) {
            wrong(&["tailnets", name, "domain"], format!("the network {other:?} has this domain already"));
        }
        let dns = &tailnet.dns;
        if dns.override_local_dns && dns.nameservers.is_empty() {
            let message = "needs at least one entry in nameservers: clients could resolve nothing else";
            wrong(&["tailnets", name, "dns", "override_local_dns"], message.to_owned());
        }
        for (place, server) in nameservers(dns) {
            if let Err(why) = resolver(server) {
                let path = ["tailnets", name, "dns"].into_iter().chain(place.iter().map(String::as_str));
                wrong(&path.collect::<Vec<_>>(), format!("the resolver {server} cannot be used: {why}"));
            }
        }
        for (split, resolvers) in &dns.split {
            let path = ["tailnets", name, "dns", "split", split];
            let Ok(split) = split.parse::<super::Domain>() else {
                wrong(&path, "expected a DNS name, such as corp.example.org".to_owned());
                continue;
            };
            let hidden = servers.iter().find(|server| split.contains(&server.host));
            if let Some(Server { what, host, .. }) = hidden.filter(|_| resolvers.is_empty()) {
                let message = format!(
                    "the name of {what}, {host:?}, stands in this domain: without resolvers no client would find it"
                );
                wrong(&path, message);
            }
        }
        for (i, record) in dns.extra_records.iter().enumerate() {
            let path = ["tailnets", name, "dns", "extra_records", &i.to_string(), "name"];
            let label = record.name.0.split('.').next().unwrap_or_default();
            if let Some(Server { what, .. }) = servers.iter().find(|server| server.is_called(&record.name)) {
                wrong(
                    &path,
                    format!("this is the name of {what}: clients would look for it at this address"),
                );
            } else if record.name.is_local() || means_this_host(label) {
                wrong(&path, format!("every host means itself by {label:?}, so no other can have this name"));
            }
        }
        if let Some(policy) = &tailnet.policy {
            for (place, message) in policy_problems(policy) {
                let mut path = vec!["tailnets", name, "policy"];
                path.extend(place.iter().map(String::as_str));
                wrong(&path, message);
            }
        }
    }

    let mut regions: BTreeMap<u16, String> = BTreeMap::new();
    let embedded = config.embedded();
    if let Some(relay) = &embedded {
        if !is_label(&relay.code) {
            wrong(
                &["embedded_relay", "code"],
                "a region's code has lower-case letters, digits and hyphens only".to_owned(),
            );
        }
        regions.insert(relay.id, relay.code.clone());
        if !config.server_url.0.is_https() && !relay.insecure_for_tests {
            let message = "clients reach the embedded relay by TLS only: use https://, or embedded_relay: false with a relay of its own in relays";
            wrong(&["server_url"], message.to_owned());
        }
        let ports: Vec<u16> = relay.stun_listen.iter().map(|address| address.0.port()).collect();
        if ports.iter().any(|port| *port != ports[0]) {
            wrong(&["embedded_relay", "stun_listen"], "all addresses must have the same port".to_owned());
        }
        if config.relays.contains_key(&relay.code) {
            wrong(
                &["relays", &relay.code],
                "the embedded relay has this code; give it or this region another one".to_owned(),
            );
        }
    } else if config.relays.is_empty() {
        let message = "without the embedded relay at least one region is needed in relays: nodes could not reach each other";
        wrong(&["embedded_relay"], message.to_owned());
    }
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    for (code, region) in &config.relays {
        if !is_label(code) {
            wrong(
                &["relays", code],
                "a region's code has lower-case letters, digits and hyphens only".to_owned(),
            );
        }
        if let Some(other) = regions.insert(region.id, code.clone())
            && other != *code
        {
            wrong(&["relays", code, "id"], format!("the region {other:?} has this id already"));
        }
        for (i, node) in region.nodes.iter().enumerate() {
            let i = i.to_string();
            let within = config.tailnets.iter().find(|(_, tailnet)| tailnet.domain.contains(&node.host_name));
            if let Some((tailnet, Tailnet { domain, .. })) = within {
                let message = format!(
                    "a relay must not stand in a network's domain, here {domain} of {tailnet:?}: clients would look for it inside the network"
                );
                wrong(&["relays", code, "nodes", &i, "host_name"], message);
            }
            let Some(name) = &node.name else { continue };
            if let Some(other) = names.insert(name, code) {
                let path = ["relays", code, "nodes", &i, "name"];
                wrong(&path, format!("a relay of the region {other:?} has this name already"));
            }
        }
    }
    problems.sort_by_key(|problem| problem.position);
    problems
}

/// A name that clients must find outside of every network.
struct Server {
    what: String,
    host: String,
}

impl Server {
    fn is_called(&self, name: &super::Domain) -> bool {
        self.host.trim_end_matches('.').eq_ignore_ascii_case(&name.0)
    }
}

/// The coordinator (and its embedded relay), and the relays.
fn servers(config: &Config) -> Vec<Server> {
    let coordinator =
        Server { what: "the coordinator".to_owned(), host: config.server_url.0.host().to_owned() };
    let relays =
        config.relays.iter().flat_map(|(code, region)| region.nodes.iter().map(move |node| (code, node)));
    let named = |(code, node): (&String, &super::types::RelayNode)| Server {
        what: format!("a relay of the region {code:?}"),
        host: node.host_name.clone(),
    };
    std::iter::once(coordinator).chain(relays.map(named)).collect()
}

/// What can be used and will hardly do what is wanted.
pub(super) fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    for (name, tailnet) in &config.tailnets {
        for (place, server) in nameservers(&tailnet.dns) {
            if resolver(server).is_ok_and(|to| to.ip().is_some_and(|ip| ip.is_loopback())) {
                warnings.push(format!(
                    "/tailnets/{name}/dns/{}: the resolver {server} is each client's own host: where that one asks 100.100.100.100, its questions come back and fail",
                    place.join("/")
                ));
            }
        }
    }
    warnings
}

/// All resolvers of a network, each with its place below `dns`.
fn nameservers(dns: &Dns) -> impl Iterator<Item = (Vec<String>, &Nameserver)> {
    let split = dns.split.iter().map(|(suffix, servers)| (vec!["split".to_owned(), suffix.clone()], servers));
    let lists = std::iter::once((vec!["nameservers".to_owned()], &dns.nameservers)).chain(split);
    lists.flat_map(|(list, servers)| {
        let place = move |i: usize| list.iter().cloned().chain([i.to_string()]).collect();
        servers.iter().enumerate().map(move |(i, server)| (place(i), server))
    })
}

fn resolver(server: &Nameserver) -> Result<ResolverAddr, &'static str> {
    let to: ResolverAddr = server.0.parse()?;
    if to.ip().is_some_and(|ip| ip == QUAD100_V4 || ip == QUAD100_V6) {
        return Err("at this address each client answers itself, and would ask itself");
    }
    Ok(to)
}

/// What is wrong with a policy that stands in the configuration, and where in it.
fn policy_problems(policy: &PolicySetting) -> Vec<(Vec<String>, String)> {
    if let Some(path) = policy.path() {
        let absolute = path.as_str().is_some_and(|path| path.parse::<super::AbsolutePath>().is_ok());
        if !absolute {
            return vec![(vec!["path".to_owned()], "expected the policy file's absolute path".to_owned())];
        }
        let other = policy.0.keys().find(|key| *key != "path");
        let message = "a policy is either in the file of `path` or here: take one of them away";
        return other.map(|key| (vec![key.clone()], message.to_owned())).into_iter().collect();
    }
    let text = serde_json::Value::from(policy.0.clone()).to_string();
    let Err(invalid) = Policy::parse(&text, Format::HuJson) else { return Vec::new() };
    let said = |problem: Problem| {
        let help = problem.help.map(|help| format!(" ({help})")).unwrap_or_default();
        (steps(&problem.place), format!("{}{help}", problem.message))
    };
    invalid.problems.into_iter().map(said).collect()
}

/// `acls[0].dst[1]` as the steps to it.
fn steps(place: &str) -> Vec<String> {
    let pieces = place.split(['.', '[', ']']).filter(|piece| !piece.is_empty());
    pieces.map(|piece| piece.trim_matches('"').to_owned()).collect()
}
