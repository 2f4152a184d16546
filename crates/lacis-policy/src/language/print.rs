//! A policy as JSON that reads back as the same policy; comments and order of keys are not kept.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::selector::{Selector, show_ports, show_protocol};
use super::{Body, Login, Property, Said, Target};
use crate::ssh::SshVerdict;

/// The whole of it.
pub(crate) fn print(body: &Body) -> Value {
    let mut all = Map::new();
    let mut put = |name: &str, value: Value| {
        let empty = match &value {
            Value::Array(items) => items.is_empty(),
            Value::Object(entries) => entries.is_empty(),
            Value::Bool(value) => !value,
            _ => false,
        };
        if !empty {
            all.insert(name.to_owned(), value);
        }
    };
    put(
        "groups",
        body.groups
            .iter()
            .map(|(name, members)| (name.clone(), texts(&members.what)))
            .collect::<Map<_, _>>()
            .into(),
    );
    put(
        "hosts",
        body.hosts
            .iter()
            .map(|(name, net)| (name.clone(), host(&net.what).into()))
            .collect::<Map<_, _>>()
            .into(),
    );
    put(
        "tagOwners",
        body.tag_owners
            .iter()
            .map(|(tag, owners)| (tag.clone(), texts(&owners.what)))
            .collect::<Map<_, _>>()
            .into(),
    );
    let postures = body.postures.iter().map(|(name, conditions)| (name.clone(), texts(&conditions.what)));
    put("postures", postures.collect::<Map<_, _>>().into());
    put("defaultSrcPosture", texts(&body.default_posture));
    let mut auto = Map::new();
    if !body.auto_routes.is_empty() {
        let routes = body.auto_routes.iter().map(|(net, approvers)| (net.what.to_string(), texts(approvers)));
        auto.insert("routes".to_owned(), routes.collect::<Map<_, _>>().into());
    }
    if !body.auto_exit.is_empty() {
        auto.insert("exitNode".to_owned(), texts(&body.auto_exit));
    }
    put("autoApprovers", auto.into());
    put("ssh", body.ssh.iter().map(ssh).collect::<Vec<_>>().into());
    put("nodeAttrs", body.node_attrs.iter().map(attributes).collect::<Vec<_>>().into());
    put("tests", body.tests.iter().map(test).collect::<Vec<_>>().into());
    put("sshTests", body.ssh_tests.iter().map(ssh_test).collect::<Vec<_>>().into());
    let mut properties = Map::new();
    for (name, list) in [("never", &body.never), ("always", &body.always)] {
        if !list.is_empty() {
            let list: Vec<Value> = list.iter().map(|said| property(&said.what).into()).collect();
            properties.insert(name.to_owned(), list.into());
        }
    }
    put("properties", properties.into());
    put("randomizeClientPort", body.randomize_client_port.into());
    // An empty list says something: that nothing is allowed.
    if let Some(acls) = &body.acls {
        all.insert("acls".to_owned(), acls.iter().map(acl).collect::<Vec<_>>().into());
    }
    if let Some(grants) = &body.grants {
        all.insert("grants".to_owned(), grants.iter().map(grant).collect::<Vec<_>>().into());
    }
    all.into()
}

fn texts<T: ToString>(list: &[Said<T>]) -> Value {
    list.iter().map(|said| said.what.to_string()).collect::<Vec<_>>().into()
}

/// An address without the length of its prefix.
fn host(net: &ipnet::IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

fn target(target: &Target) -> String {
    let ports = show_ports(&target.ports);
    match &target.to {
        Selector::Address(address) if address.is_ipv6() => format!("[{address}]:{ports}"),
        other => format!("{other}:{ports}"),
    }
}

/// Adds a member unless its list is empty.
fn unless_empty(object: &mut Value, name: &str, value: Value) {
    if value.as_array().is_none_or(|items| !items.is_empty()) {
        object[name] = value;
    }
}

fn acl(acl: &super::Acl) -> Value {
    let dst: Vec<String> = acl.dst.iter().map(|said| target(&said.what)).collect();
    let mut object = json!({"action": "accept", "src": texts(&acl.src), "dst": dst});
    unless_empty(&mut object, "srcPosture", texts(&acl.posture));
    if let Some(protocol) = acl.protocol {
        object["proto"] = show_protocol(protocol).into();
    }
    object
}

fn capabilities(app: &BTreeMap<String, Said<Vec<Value>>>) -> Value {
    app.iter().map(|(name, values)| (name.clone(), values.what.clone().into())).collect::<Map<_, _>>().into()
}

fn grant(grant: &super::Grant) -> Value {
    let mut object = json!({"src": texts(&grant.src), "dst": texts(&grant.dst)});
    let ip = grant.ip.iter().map(|said| match said.what {
        (None, ref ports) => show_ports(ports),
        (Some(protocol), ref ports) => format!("{}:{}", show_protocol(protocol), show_ports(ports)),
    });
    unless_empty(&mut object, "ip", ip.collect::<Vec<_>>().into());
    if !grant.app.is_empty() {
        object["app"] = capabilities(&grant.app);
    }
    unless_empty(&mut object, "srcPosture", texts(&grant.posture));
    unless_empty(&mut object, "via", texts(&grant.via));
    object
}

fn ssh(rule: &super::Ssh) -> Value {
    let users: Vec<String> = rule.users.iter().map(|said| said.what.to_string()).collect();
    let mut object = json!({"src": texts(&rule.src), "dst": texts(&rule.dst), "users": users});
    match rule.verdict {
        SshVerdict::Accept => object["action"] = "accept".into(),
        SshVerdict::Check { period } => {
            object["action"] = "check".into();
            match period {
                Some(0) => object["checkPeriod"] = "always".into(),
                Some(seconds) => object["checkPeriod"] = format!("{seconds}s").into(),
                None => {}
            }
        }
    }
    unless_empty(&mut object, "srcPosture", texts(&rule.posture));
    unless_empty(&mut object, "acceptEnv", rule.accept_env.clone().into());
    object
}

impl std::fmt::Display for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NonRoot => f.write_str("autogroup:nonroot"),
            Self::LocalPart(domain) => write!(f, "localpart:*@{domain}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

fn attributes(attrs: &super::NodeAttrs) -> Value {
    let mut object = json!({"target": texts(&attrs.target)});
    unless_empty(&mut object, "attr", texts(&attrs.attrs));
    if !attrs.app.is_empty() {
        object["app"] = capabilities(&attrs.app);
    }
    unless_empty(&mut object, "ipPool", texts(&attrs.ip_pool));
    object
}

fn test(test: &super::Test) -> Value {
    let mut object = json!({"src": test.src});
    if let Some(protocol) = &test.protocol {
        object["proto"] = protocol.what.clone().into();
    }
    unless_empty(&mut object, "accept", texts(&test.accept));
    unless_empty(&mut object, "deny", texts(&test.deny));
    object
}

fn ssh_test(test: &super::SshTest) -> Value {
    let mut object = json!({"src": test.src, "dst": texts(&test.dst)});
    unless_empty(&mut object, "accept", test.accept.clone().into());
    unless_empty(&mut object, "deny", test.deny.clone().into());
    unless_empty(&mut object, "check", test.check.clone().into());
    object
}

pub(crate) fn property(property: &Property) -> String {
    let protocol = property.protocol.map(|number| show_protocol(number) + " ").unwrap_or_default();
    format!("{} -> {protocol}{}", property.from, target(&property.to))
}
