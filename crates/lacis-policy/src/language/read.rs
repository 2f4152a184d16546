//! From a text's tree to a policy: every key is known or refused by name, every value has its type, and every problem
//! is collected with its place.

use std::collections::BTreeMap;

use ipnet::IpNet;
use lacis_wire::control::{MAX_CAPABILITY_VALUE, MAX_NESTING, RawJson};
use serde_json::Value;

use super::posture::Condition;
use super::selector::{self, Selector, Wrong};
use super::values::{capability_name, check_period, grant_ports, login, pool, posture_name, property};
use super::{Acl, Body, Grant, Mark, NodeAttrs, Said, Ssh, SshTest, Target, Test};
use crate::document::{Data, Document, Item, Key, entry, member};
use crate::problem::Problem;
use crate::ssh::SshVerdict;

/// Top-level keys of others that mean nothing here, and why.
const NOT_HONOURED: [(&str, &str); 2] = [
    ("derpMap", "relays are set in the coordinator's configuration"),
    ("OneCGNATRoute", "clients choose their routes themselves; use nodeAttrs with one-cgnat?v=true"),
];

/// What was read, with what is wrong and what is not honoured.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    pub(crate) body: Body,
    pub(crate) problems: Vec<Problem>,
    pub(crate) warnings: Vec<Problem>,
}

/// Reads a policy's structure. References are not followed.
pub(crate) fn read(document: &Document) -> Reading {
    let mut reader = Reader::default();
    let body = reader.body(&document.root);
    Reading { body, problems: reader.problems, warnings: reader.warnings }
}

#[derive(Default)]
struct Reader {
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
}

/// An object being read: what is left in the end is unknown.
struct Fields<'a> {
    mark: Mark,
    left: Vec<&'a (Key, Item)>,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// Takes a member; names match whatever their case, as Tailscale takes them.
    fn take(&mut self, name: &'static str) -> Option<(&'a Item, String)> {
        self.known.push(name);
        let at = self.left.iter().position(|(key, _)| key.name.eq_ignore_ascii_case(name))?;
        let (key, item) = self.left.remove(at);
        Some((item, member(&self.mark.place, &key.name)))
    }
}

fn mark(item: &Item, place: &str) -> Mark {
    Mark { at: item.at, place: place.to_owned() }
}

impl Reader {
    fn wrong(&mut self, item: &Item, place: &str, message: impl Into<String>, help: Option<String>) {
        self.problems.push(mark(item, place).problem(message, help));
    }

    fn expected(&mut self, item: &Item, place: &str, what: &str) {
        self.wrong(item, place, format!("{what} is expected here, not {}", item.kind()), None);
    }

    fn fields<'a>(&mut self, item: &'a Item, place: &str) -> Option<Fields<'a>> {
        if let Data::Map(entries) = &item.data {
            return Some(Fields {
                mark: mark(item, place),
                left: entries.iter().collect(),
                known: Vec::new(),
            });
        }
        self.expected(item, place, "an object");
        None
    }

    /// Refuses what nobody took.
    fn done(&mut self, fields: Fields<'_>) {
        for (key, _) in fields.left {
            let help = selector::nearest(&key.name, fields.known.iter().copied())
                .map(|near| format!("did you mean {near:?}?"));
            let place = member(&fields.mark.place, &key.name);
            let message = format!("unknown field {:?}", key.name);
            self.problems.push(Mark { at: key.at, place }.problem(message, help));
        }
    }

    /// The entries of a list; a missing one and null are empty.
    fn list<'a>(&mut self, taken: Option<(&'a Item, String)>) -> Vec<(&'a Item, String)> {
        match taken {
            None => Vec::new(),
            Some((item, place)) => match &item.data {
                Data::Null => Vec::new(),
                Data::List(items) => {
                    items.iter().enumerate().map(|(at, item)| (item, entry(&place, at))).collect()
                }
                _ => {
                    self.expected(item, &place, "a list");
                    Vec::new()
                }
            },
        }
    }

    fn text(&mut self, item: &Item, place: &str) -> Option<Said<String>> {
        if let Data::Text(text) = &item.data {
            return Some(Said { what: text.clone(), mark: mark(item, place) });
        }
        self.expected(item, place, "a text");
        None
    }

    fn texts(&mut self, taken: Option<(&Item, String)>) -> Vec<Said<String>> {
        let list = self.list(taken);
        list.into_iter().filter_map(|(item, place)| self.text(item, &place)).collect()
    }

    fn flag(&mut self, taken: Option<(&Item, String)>) -> bool {
        match taken {
            None => false,
            Some((item, place)) => match item.data {
                Data::Bool(value) => value,
                _ => {
                    self.expected(item, &place, "true or false");
                    false
                }
            },
        }
    }

    /// Reads a text by a function that says what is wrong with it.
    fn parsed<T>(
        &mut self,
        item: &Item,
        place: &str,
        parse: impl FnOnce(&str) -> Result<T, Wrong>,
    ) -> Option<Said<T>> {
        let text = self.text(item, place)?;
        match parse(&text.what) {
            Ok(what) => Some(Said { what, mark: text.mark }),
            Err((message, help)) => {
                self.problems.push(text.mark.problem(message, help));
                None
            }
        }
    }

    fn all<T>(
        &mut self,
        taken: Option<(&Item, String)>,
        parse: impl Fn(&str) -> Result<T, Wrong>,
    ) -> Vec<Said<T>> {
        let list = self.list(taken);
        list.into_iter().filter_map(|(item, place)| self.parsed(item, &place, &parse)).collect()
    }

    fn selectors(&mut self, taken: Option<(&Item, String)>) -> Vec<Said<Selector>> {
        self.all(taken, Selector::parse)
    }

    fn body(&mut self, root: &Item) -> Body {
        let mut body = Body::default();
        let Some(mut fields) = self.fields(root, "") else { return body };
        if let Some((item, place)) = fields.take("groups") {
            body.groups = self.groups(item, &place);
        }
        if let Some((item, place)) = fields.take("hosts") {
            body.hosts = self.hosts(item, &place);
        }
        if let Some((item, place)) = fields.take("tagOwners") {
            body.tag_owners = self.tag_owners(item, &place);
        }
        if let Some((item, place)) = fields.take("postures") {
            body.postures = self.postures(item, &place);
        }
        body.default_posture = self.all(fields.take("defaultSrcPosture"), posture_name);
        if let Some((item, place)) = fields.take("autoApprovers") {
            self.auto_approvers(item, &place, &mut body);
        }
        if let Some(taken) = fields.take("acls").filter(|(item, _)| !matches!(item.data, Data::Null)) {
            let list = self.list(Some(taken));
            body.acls = Some(list.into_iter().filter_map(|(item, place)| self.acl(item, &place)).collect());
        }
        if let Some(taken) = fields.take("grants").filter(|(item, _)| !matches!(item.data, Data::Null)) {
            let list = self.list(Some(taken));
            body.grants =
                Some(list.into_iter().filter_map(|(item, place)| self.grant(item, &place)).collect());
        }
        let list = self.list(fields.take("ssh"));
        body.ssh = list.into_iter().filter_map(|(item, place)| self.ssh(item, &place)).collect();
        let list = self.list(fields.take("nodeAttrs"));
        body.node_attrs =
            list.into_iter().filter_map(|(item, place)| self.node_attrs(item, &place)).collect();
        let list = self.list(fields.take("tests"));
        body.tests = list.into_iter().filter_map(|(item, place)| self.test(item, &place)).collect();
        let list = self.list(fields.take("sshTests"));
        body.ssh_tests = list.into_iter().filter_map(|(item, place)| self.ssh_test(item, &place)).collect();
        if let Some((item, place)) = fields.take("properties") {
            self.properties(item, &place, &mut body);
        }
        body.randomize_client_port = self.flag(fields.take("randomizeClientPort"));
        if let Some((item, place)) = fields.take("disableIPv4")
            && self.flag(Some((item, place.clone())))
        {
            let help = Some("use nodeAttrs with the attribute disable-ipv4 and the target *".to_owned());
            self.wrong(item, &place, "disableIPv4 is not supported for a whole network", help);
        }
        for (name, why) in NOT_HONOURED {
            if let Some((item, place)) = fields.take(name) {
                let message = format!("{name} is not honoured: {why}");
                self.warnings.push(mark(item, &place).problem(message, None));
            }
        }
        self.done(fields);
        body
    }

    fn groups(&mut self, item: &Item, place: &str) -> BTreeMap<String, Said<Vec<Said<String>>>> {
        let mut groups = BTreeMap::new();
        let Some(fields) = self.fields(item, place) else { return groups };
        for (key, item) in fields.left {
            let place = member(place, &key.name);
            if key.name.strip_prefix("group:").is_none_or(str::is_empty) {
                let message = format!("group name {:?} must start with 'group:'", key.name);
                self.problems.push(Mark { at: key.at, place }.problem(message, None));
                continue;
            }
            let mut members = Vec::new();
            for text in self.texts(Some((item, place.clone()))) {
                match Selector::parse(&text.what) {
                    Ok(Selector::User(_) | Selector::Domain(_)) => members.push(text),
                    Ok(Selector::Group(_)) => {
                        let message = format!(
                            "groups[{:?}]: {:?}: group members cannot be recursive",
                            key.name, text.what
                        );
                        let help = "name the users of the other group one by one".to_owned();
                        self.problems.push(text.mark.problem(message, Some(help)));
                    }
                    _ => {
                        let message = format!("{:?} is no user", text.what);
                        let help = "members are email addresses, or NAME@".to_owned();
                        self.problems.push(text.mark.problem(message, Some(help)));
                    }
                }
            }
            groups.insert(key.name.clone(), Said { what: members, mark: Mark { at: key.at, place } });
        }
        groups
    }

    fn hosts(&mut self, item: &Item, place: &str) -> BTreeMap<String, Said<IpNet>> {
        let mut hosts = BTreeMap::new();
        let Some(fields) = self.fields(item, place) else { return hosts };
        for (key, item) in fields.left {
            let place = member(place, &key.name);
            if !matches!(Selector::parse(&key.name), Ok(Selector::Host(_))) {
                let message = format!("{:?} cannot be a host's alias", key.name);
                let help = "an alias has letters, digits, '-', '_' and '.', and is no address".to_owned();
                self.problems.push(Mark { at: key.at, place }.problem(message, Some(help)));
                continue;
            }
            let net = self.parsed(item, &place, |text| match Selector::parse(text) {
                Ok(Selector::Address(address)) => Ok(IpNet::from(address)),
                Ok(Selector::Net(net)) => Ok(net),
                Err(wrong) if text.contains('/') => Err(wrong),
                _ => Err((
                    format!("{text:?} is an invalid address"),
                    Some("an address or a network".to_owned()),
                )),
            });
            if let Some(net) = net {
                hosts.insert(key.name.clone(), net);
            }
        }
        hosts
    }

    fn tag_owners(&mut self, item: &Item, place: &str) -> BTreeMap<String, Said<Vec<Said<Selector>>>> {
        let mut owners = BTreeMap::new();
        let Some(fields) = self.fields(item, place) else { return owners };
        for (key, item) in fields.left {
            let place = member(place, &key.name);
            match Selector::parse(&key.name) {
                Ok(Selector::Tag(_)) => {}
                other => {
                    let message = match other {
                        Err((message, _)) => message,
                        Ok(_) => format!("{:?} is no tag: tags start with 'tag:'", key.name),
                    };
                    self.problems.push(Mark { at: key.at, place }.problem(message, None));
                    continue;
                }
            }
            let list = self.selectors(Some((item, place.clone())));
            let mut of_tag = Vec::new();
            for owner in list {
                if owner.what.is_people() || matches!(owner.what, Selector::Tag(_)) {
                    of_tag.push(owner);
                } else {
                    let message = format!("{} cannot own a tag", owner.what);
                    let help = "users, groups, roles and other tags can".to_owned();
                    self.problems.push(owner.mark.problem(message, Some(help)));
                }
            }
            owners.insert(key.name.clone(), Said { what: of_tag, mark: Mark { at: key.at, place } });
        }
        owners
    }

    fn approvers(&mut self, taken: Option<(&Item, String)>) -> Vec<Said<Selector>> {
        let mut list = self.selectors(taken);
        list.retain(|approver| {
            let fits = approver.what.is_people() || matches!(approver.what, Selector::Tag(_));
            if !fits {
                let message = format!("{} cannot be an auto approver", approver.what);
                let help = "users, groups, roles and tags can".to_owned();
                self.problems.push(approver.mark.problem(message, Some(help)));
            }
            fits
        });
        list
    }

    fn auto_approvers(&mut self, item: &Item, place: &str, body: &mut Body) {
        let Some(mut fields) = self.fields(item, place) else { return };
        if let Some((item, place)) = fields.take("routes")
            && let Some(routes) = self.fields(item, &place)
        {
            for (key, item) in routes.left {
                let place = member(&place, &key.name);
                let at = Mark { at: key.at, place: place.clone() };
                match key.name.parse::<IpNet>() {
                    Ok(net) if net.trunc() == net => {
                        let approvers = self.approvers(Some((item, place)));
                        body.auto_routes.push((Said { what: net, mark: at }, approvers));
                    }
                    Ok(net) => {
                        let help = Some(format!("the network is {}", net.trunc()));
                        let message = format!("{:?} has bits set after its prefix", key.name);
                        self.problems.push(at.problem(message, help));
                    }
                    Err(_) => {
                        let help = Some("such as 10.0.0.0/8".to_owned());
                        self.problems.push(at.problem(format!("{:?} is an invalid network", key.name), help));
                    }
                }
            }
        }
        body.auto_exit = self.approvers(fields.take("exitNode"));
        if let Some((item, place)) = fields.take("services") {
            let message = "autoApprovers.services is not honoured: services are not supported here";
            self.warnings.push(mark(item, &place).problem(message, None));
        }
        self.done(fields);
    }

    fn postures(&mut self, item: &Item, place: &str) -> BTreeMap<String, Said<Vec<Said<Condition>>>> {
        let mut postures = BTreeMap::new();
        let Some(fields) = self.fields(item, place) else { return postures };
        for (key, item) in fields.left {
            let place = member(place, &key.name);
            let at = Mark { at: key.at, place: place.clone() };
            match posture_name(&key.name) {
                Ok(name) => {
                    let what = self.all(Some((item, place)), Condition::parse);
                    postures.insert(name, Said { what, mark: at });
                }
                Err((message, help)) => self.problems.push(at.problem(message, help)),
            }
        }
        postures
    }

    fn acl(&mut self, item: &Item, place: &str) -> Option<Acl> {
        let mut fields = self.fields(item, place)?;
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
        let src = self.selectors(fields.take("src"));
        let dst = self.all(fields.take("dst"), |text| {
            selector::with_ports(text)
                .map(|(to, ports)| Target { to, ports })
                .map_err(|(message, help)| (format!("dst={text:?}: {message}"), help))
        });
        if let Some(protocol) = protocol.filter(|protocol| !selector::has_ports(*protocol)) {
            for target in dst.iter().filter(|target| target.what.ports != [selector::ALL_PORTS]) {
                let message =
                    format!("protocol {} does not support specific ports", selector::show_protocol(protocol));
                self.problems.push(target.mark.problem(message, Some("write * for the ports".to_owned())));
            }
        }
        let posture = self.all(fields.take("srcPosture"), posture_name);
        for name in ["users", "ports"] {
            if let Some((item, place)) = fields.take(name) {
                let now = if name == "users" { "src" } else { "dst" };
                self.wrong(
                    item,
                    &place,
                    format!("{name:?} is the old name"),
                    Some(format!("it is {now:?} now")),
                );
            }
        }
        let acl = Acl { mark: fields.mark.clone(), protocol, src, posture, dst };
        self.done(fields);
        Some(acl)
    }

    fn capabilities(&mut self, taken: Option<(&Item, String)>) -> BTreeMap<String, Said<Vec<Value>>> {
        let mut all = BTreeMap::new();
        let Some((item, place)) = taken else { return all };
        let Some(fields) = self.fields(item, &place) else { return all };
        for (key, item) in fields.left {
            let place = member(&place, &key.name);
            let at = Mark { at: key.at, place: place.clone() };
            if let Some((message, help)) = capability_name(&key.name) {
                self.problems.push(at.problem(message, help));
            }
            let values: Vec<Value> =
                self.list(Some((item, place))).into_iter().map(|(item, _)| item.to_json()).collect();
            if !values.iter().all(|value| RawJson::from(value).is_bounded()) {
                let message = format!(
                    "a value of {:?} is longer than {MAX_CAPABILITY_VALUE} bytes or nested deeper than {MAX_NESTING}",
                    key.name
                );
                self.problems.push(at.problem(message, None));
            }
            all.insert(key.name.clone(), Said { what: values, mark: at });
        }
        all
    }

    fn grant(&mut self, item: &Item, place: &str) -> Option<Grant> {
        let mut fields = self.fields(item, place)?;
        let src = self.selectors(fields.take("src"));
        let dst = self.selectors(fields.take("dst"));
        let ip = self.all(fields.take("ip"), grant_ports);
        let app = self.capabilities(fields.take("app"));
        let via = self.all(fields.take("via"), |text| match Selector::parse(text)? {
            Selector::Tag(tag) => Ok(tag),
            _ => Err((format!("via can only be a tag, not {text:?}"), None)),
        });
        if ip.is_empty()
            && app.is_empty()
            && self.problems.iter().all(|problem| !problem.place.starts_with(place))
        {
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

    fn ssh(&mut self, item: &Item, place: &str) -> Option<Ssh> {
        let mut fields = self.fields(item, place)?;
        let verdict = match fields.take("action") {
            Some((item, place)) => {
                let said = self.text(item, &place)?;
                match said.what.as_str() {
                    "accept" => SshVerdict::Accept,
                    "check" => SshVerdict::Check { period: None },
                    "" => {
                        self.problems.push(
                            said.mark.problem("action must be specified", Some("accept or check".to_owned())),
                        );
                        return None;
                    }
                    other => {
                        let message = format!("{other:?} is not a valid action");
                        self.problems.push(said.mark.problem(message, Some("accept or check".to_owned())));
                        return None;
                    }
                }
            }
            None => {
                self.wrong(item, place, "action must be specified", Some("accept or check".to_owned()));
                return None;
            }
        };
        let verdict = match (verdict, fields.take("checkPeriod")) {
            (SshVerdict::Check { .. }, Some((item, place))) => {
                SshVerdict::Check { period: self.parsed(item, &place, check_period).map(|said| said.what) }
            }
            (SshVerdict::Accept, Some((item, place))) => {
                self.wrong(item, &place, "checkPeriod is only valid with action \"check\"", None);
                verdict
            }
            (verdict, None) => verdict,
        };
        let src = self.selectors(fields.take("src"));
        let dst = self.selectors(fields.take("dst"));
        let users = self.all(fields.take("users"), login);
        let named = item_has(item, "users");
        if users.is_empty() && !named {
            self.wrong(
                item,
                place,
                "users must be specified",
                Some("such as \"root\" or \"autogroup:nonroot\"".to_owned()),
            );
        }
        let mut accept_env = Vec::new();
        for said in self.texts(fields.take("acceptEnv")) {
            if said.what.is_empty() {
                self.problems.push(said.mark.problem("acceptEnv values cannot be empty", None));
            }
            accept_env.push(said.what);
        }
        for name in ["recorder", "enforceRecorder"] {
            if let Some((item, place)) = fields.take(name) {
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

    fn node_attrs(&mut self, item: &Item, place: &str) -> Option<NodeAttrs> {
        let mut fields = self.fields(item, place)?;
        let target = self.selectors(fields.take("target"));
        let attrs = self.texts(fields.take("attr"));
        let app = self.capabilities(fields.take("app"));
        let ip_pool = self.all(fields.take("ipPool"), pool);
        let attrs = NodeAttrs { mark: fields.mark.clone(), target, attrs, app, ip_pool };
        self.done(fields);
        Some(attrs)
    }

    fn test(&mut self, item: &Item, place: &str) -> Option<Test> {
        let mut fields = self.fields(item, place)?;
        let src = match fields.take("src") {
            Some((item, place)) => self.text(item, &place).map(|said| said.what),
            None => None,
        };
        let protocol = match fields.take("proto") {
            Some((item, place)) => self.text(item, &place).filter(|said| !said.what.is_empty()),
            None => None,
        };
        let accept = self.texts(fields.take("accept"));
        let deny = self.texts(fields.take("deny"));
        if let Some((item, place)) = fields.take("srcPostureAttrs") {
            let message = "srcPostureAttrs is not honoured: a test is about the nodes as they are";
            self.warnings.push(mark(item, &place).problem(message, None));
        }
        let test = Test { mark: fields.mark.clone(), src: src.unwrap_or_default(), protocol, accept, deny };
        self.done(fields);
        Some(test)
    }

    fn ssh_test(&mut self, item: &Item, place: &str) -> Option<SshTest> {
        let mut fields = self.fields(item, place)?;
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

    fn properties(&mut self, item: &Item, place: &str, body: &mut Body) {
        let Some(mut fields) = self.fields(item, place) else { return };
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

fn item_has(item: &Item, name: &str) -> bool {
    match &item.data {
        Data::Map(entries) => entries.iter().any(|(key, item)| {
            key.name.eq_ignore_ascii_case(name)
                && !matches!(&item.data, Data::Null)
                && !matches!(&item.data, Data::List(items) if items.is_empty())
        }),
        _ => false,
    }
}
