//! Rules: `acls`, `grants`, `ssh`, `nodeAttrs`, and what a policy says of itself: `tests`, `sshTests`, `properties`.

use std::collections::BTreeMap;

use lacis_wire::control::{MAX_CAPABILITY_VALUE, MAX_NESTING};
use serde_json::Value;

use super::{Reader, Taken, mark, says_something};
use crate::document::{Data, Item, member};
use crate::language::selector::{self, Selector, WithPorts, Wrong};
use crate::language::values::{
    capability_name, check_period, grant_ports, login, pool, posture_name, property,
};
use crate::language::{Acl, Body, Grant, Mark, NodeAttrs, Said, Ssh, SshTest, Target, Test};
use crate::ssh::SshVerdict;

/// What nodes that are app connectors are sent; a name of Tailscale's own that only `nodeAttrs` may have.
const APP_CONNECTORS: &str = "tailscale.com/app-connectors";

/// Names of capabilities in one rule.
const MAX_CAPABILITIES: usize = 256;
/// Values of one capability.
const MAX_CAPABILITY_VALUES: usize = 256;

/// The action of an `ssh` rule; blanks around it do not count.
fn ssh_action(text: &str) -> Result<SshVerdict, Wrong> {
    let message = match text.trim() {
        "accept" => return Ok(SshVerdict::Accept),
        "check" => return Ok(SshVerdict::Check { period: None }),
        "" => "action must be specified".to_owned(),
        other => format!("{other:?} is not a valid action"),
    };
    Err((message, Some("accept or check".to_owned())))
}

impl Reader {
    pub(super) fn acl(&mut self, item: &Item, place: &str) -> Option<Acl> {
        let mut fields = self.rule(item, place)?;
        match fields.take("action") {
            Some((item, place)) => {
                if let Some(action) = self.text(item, &place)
                    && action.what != "accept"
                {
                    let message = format!("action={:?} is not supported", action.what);
                    let help = "\"accept\" is the only one: what no rule accepts is refused".to_owned();
                    self.problems.push(action.mark.problem(message, Some(help)));
                }
            }
            None => self.wrong(item, place, "action must be specified", Some("\"accept\"".to_owned())),
        }
        let protocol = match fields.take("proto") {
            Some((item, _)) if matches!(&item.data, Data::Text(text) if text.is_empty()) => None,
            Some((item, place)) => self.parsed(item, &place, selector::protocol).map(|said| said.what),
            None => None,
        };
        let src = self.renamed(&mut fields, "src", "users");
        let src = self.parties(src);
        let dst = self.renamed(&mut fields, "dst", "ports");
        let dst = self.destinations(dst);
        if let Some(protocol) = protocol.filter(|protocol| !selector::has_ports(*protocol)) {
            for target in dst.iter().filter(|target| target.what.ports != [selector::ALL_PORTS]) {
                let message =
                    format!("protocol {} does not support specific ports", selector::show_protocol(protocol));
                self.problems.push(target.mark.problem(message, Some("write * for the ports".to_owned())));
            }
        }
        let posture = self.all(fields.take("srcPosture"), posture_name);
        let acl = Acl { mark: fields.mark.clone(), protocol, src, posture, dst };
        self.done(fields);
        Some(acl)
    }

    /// Destinations with ports. One whose ports are wrong is kept with all of them, so that its name is checked too.
    fn destinations(&mut self, taken: Taken<'_>) -> Vec<Said<Target>> {
        let mut all = Vec::new();
        for text in self.texts(taken) {
            let mut wrong = |(message, help): Wrong| {
                let message = format!("dst={:?}: {message}", text.what);
                self.problems.push(text.mark.problem(message, help));
            };
            match WithPorts::parse(&text.what) {
                Err(error) => wrong(error),
                Ok(WithPorts { host, ports }) => {
                    let ports = ports.unwrap_or_else(|error| {
                        wrong(error);
                        vec![selector::ALL_PORTS]
                    });
                    match host {
                        Ok(to) => all.push(Said { what: Target { to, ports }, mark: text.mark }),
                        Err(error) => wrong(error),
                    }
                }
            }
        }
        all
    }

    fn capabilities(&mut self, taken: Taken<'_>, known: &[&str]) -> BTreeMap<String, Said<Vec<Value>>> {
        let mut all = BTreeMap::new();
        let Some((item, place)) = taken else { return all };
        let Some(fields) = self.fields(item, &place) else { return all };
        if fields.left.len() > MAX_CAPABILITIES {
            self.wrong(item, &place, format!("more than {MAX_CAPABILITIES} capabilities in one rule"), None);
        }
        for (key, item) in fields.left {
            let place = member(&place, &key.name);
            let at = Mark { at: key.at, place: place.clone() };
            if let Some((message, help)) = capability_name(&key.name).filter(|_| !known.contains(&&*key.name))
            {
                self.problems.push(at.problem(message, help));
            }
            let list = self.list(Some((item, place.clone())));
            if list.len() > MAX_CAPABILITY_VALUES {
                let message = format!("more than {MAX_CAPABILITY_VALUES} values of one capability");
                self.wrong(item, &place, message, None);
            }
            let values = list.into_iter().filter_map(|(item, place)| self.capability_value(item, &place));
            all.insert(key.name.clone(), Said { what: values.collect(), mark: at });
        }
        all
    }

    /// A value that every client can decode, and that fits beside others into a map.
    fn capability_value(&mut self, item: &Item, place: &str) -> Option<Value> {
        if item.depth() > MAX_NESTING {
            let message = format!("the value of a capability nests deeper than {MAX_NESTING} levels");
            self.wrong(item, place, message, None);
            return None;
        }
        let value = item.to_json();
        if value.to_string().len() > MAX_CAPABILITY_VALUE {
            let message = format!("the value of a capability is longer than {MAX_CAPABILITY_VALUE} bytes");
            self.wrong(item, place, message, None);
            return None;
        }
        Some(value)
    }

    pub(super) fn grant(&mut self, item: &Item, place: &str) -> Option<Grant> {
        let mut fields = self.rule(item, place)?;
        let src = self.parties(fields.take("src"));
        let dst = self.parties(fields.take("dst"));
        let (ip, app) = (fields.take("ip"), fields.take("app"));
        let no_app =
            app.as_ref().is_none_or(|(item, _)| matches!(&item.data, Data::Map(app) if app.is_empty()));
        let is_empty = !says_something(&ip) && no_app;
        let ip = self.all(ip, grant_ports);
        let app = self.capabilities(app, &[]);
        let via = self.all(fields.take("via"), |text| match Selector::parse(text)? {
            Selector::Tag(tag) => Ok(tag),
            _ => Err((format!("via can only be a tag, not {text:?}"), None)),
        });
        if is_empty {
            self.wrong(
                item,
                place,
                "ip and app can not both be empty",
                Some("\"ip\": [\"*\"] is all traffic".to_owned()),
            );
        }
        let posture = self.all(fields.take("srcPosture"), posture_name);
        let grant = Grant { mark: fields.mark.clone(), src, posture, dst, ip, app, via };
        self.done(fields);
        Some(grant)
    }

    pub(super) fn ssh(&mut self, item: &Item, place: &str) -> Option<Ssh> {
        let mut fields = self.rule(item, place)?;
        // Without an action that is known the rest is read all the same, for its own mistakes.
        let action = match fields.take("action") {
            Some((item, place)) => self.parsed(item, &place, ssh_action).map(|said| said.what),
            None => {
                self.wrong(item, place, "action must be specified", Some("accept or check".to_owned()));
                None
            }
        };
        let verdict = match (action, fields.take("checkPeriod")) {
            (Some(SshVerdict::Accept), Some((item, place))) => {
                self.wrong(item, &place, "checkPeriod is only valid with action \"check\"", None);
                SshVerdict::Accept
            }
            (_, Some((item, place))) => {
                SshVerdict::Check { period: self.parsed(item, &place, check_period).map(|said| said.what) }
            }
            (verdict, None) => verdict.unwrap_or(SshVerdict::Accept),
        };
        let src = self.parties(fields.take("src"));
        let dst = self.parties(fields.take("dst"));
        let users = fields.take("users");
        if !says_something(&users) {
            self.wrong(
                item,
                place,
                "users must be specified",
                Some("such as \"root\" or \"autogroup:nonroot\"".to_owned()),
            );
        }
        let users = self.all(users, |text| login(text.trim()));
        let mut accept_env = Vec::new();
        for said in self.texts(fields.take("acceptEnv")) {
            if said.what.is_empty() {
                self.problems.push(said.mark.problem("acceptEnv values cannot be empty", None));
            }
            accept_env.push(said.what);
        }
        for name in ["recorder", "enforceRecorder"] {
            let taken = fields.take(name);
            if says_something(&taken)
                && let Some((item, place)) = taken.filter(|(item, _)| !matches!(item.data, Data::Bool(false)))
            {
                self.wrong(
                    item,
                    &place,
                    format!("{name} is not supported: sessions cannot be recorded here"),
                    None,
                );
            }
        }
        let posture = self.all(fields.take("srcPosture"), posture_name);
        let ssh = Ssh { mark: fields.mark.clone(), verdict, src, posture, dst, users, accept_env };
        self.done(fields);
        Some(ssh)
    }

    pub(super) fn node_attrs(&mut self, item: &Item, place: &str) -> Option<NodeAttrs> {
        let mut fields = self.rule(item, place)?;
        let target = self.parties(fields.take("target"));
        let attrs = self.texts(fields.take("attr"));
        let app = self.capabilities(fields.take("app"), &[APP_CONNECTORS]);
        if let Some(said) = app.get(APP_CONNECTORS) {
            let message = format!("{APP_CONNECTORS:?} is not honoured: there are no app connectors here");
            self.warnings.push(said.mark.problem(message, None));
        }
        let ip_pool = self.all(fields.take("ipPool"), pool);
        let attrs = NodeAttrs { mark: fields.mark.clone(), target, attrs, app, ip_pool };
        self.done(fields);
        Some(attrs)
    }

    pub(super) fn test(&mut self, item: &Item, place: &str) -> Option<Test> {
        let mut fields = self.rule(item, place)?;
        let src = match self.renamed(&mut fields, "src", "user") {
            Some((item, place)) => self.text(item, &place).map(|said| said.what),
            None => None,
        };
        let protocol = match fields.take("proto") {
            Some((item, place)) => self.text(item, &place).filter(|said| !said.what.is_empty()),
            None => None,
        };
        let accept = self.renamed(&mut fields, "accept", "allow");
        let accept = self.texts(accept);
        let deny = self.texts(fields.take("deny"));
        if let Some((item, place)) = fields.take("srcPostureAttrs") {
            let message = "srcPostureAttrs is not honoured: a test is about the nodes as they are";
            self.warnings.push(mark(item, &place).problem(message, None));
        }
        let test = Test { mark: fields.mark.clone(), src: src.unwrap_or_default(), protocol, accept, deny };
        self.done(fields);
        Some(test)
    }

    pub(super) fn ssh_test(&mut self, item: &Item, place: &str) -> Option<SshTest> {
        let mut fields = self.rule(item, place)?;
        let src = match fields.take("src") {
            Some((item, place)) => self.text(item, &place).map(|said| said.what),
            None => None,
        };
        let dst = match fields.take("dst") {
            Some((item, place)) if matches!(item.data, Data::Text(_)) => {
                self.text(item, &place).into_iter().collect()
            }
            taken => self.texts(taken),
        };
        let mut names = |reader: &mut Self, name| -> Vec<String> {
            reader.texts(fields.take(name)).into_iter().map(|said| said.what).collect()
        };
        let (accept, deny, check) = (names(self, "accept"), names(self, "deny"), names(self, "check"));
        let test =
            SshTest { mark: fields.mark.clone(), src: src.unwrap_or_default(), dst, accept, deny, check };
        self.done(fields);
        Some(test)
    }

    pub(super) fn properties(&mut self, item: &Item, place: &str, body: &mut Body) {
        let Some(mut fields) = self.rule(item, place) else { return };
        for (name, list) in [("never", &mut body.never), ("always", &mut body.always)] {
            *list = match fields.take(name) {
                Some((item, place)) if matches!(item.data, Data::Text(_)) => {
                    self.parsed(item, &place, property).into_iter().collect()
                }
                taken => self.all(taken, property),
            };
            // A group may be named without its prefix, where nothing else is called so.
            for said in list {
                for selector in [&mut said.what.from, &mut said.what.to.to] {
                    if let Selector::Host(name) = selector
                        && !body.hosts.contains_key(name)
                        && body.groups.contains_key(&format!("group:{name}"))
                    {
                        *selector = Selector::Group(format!("group:{name}"));
                    }
                }
            }
        }
        self.done(fields);
    }
}
