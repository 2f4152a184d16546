//! What can be said of a policy without knowing users and nodes: names that nothing defines, selectors where they mean
//! nothing, combinations that would not do what they say.

use crate::facts::literal;
use crate::language::selector::{Selector, nearest};
use crate::language::{Body, Mark, Said};
use crate::problem::Problem;
use crate::state::is_mesh_v6;

/// Which side of which rule.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
    SshSource,
    SshDestination,
    Attributes,
}

/// All problems, in the order of the sections.
pub(crate) fn check(body: &Body) -> (Vec<Problem>, Vec<Problem>) {
    let mut check = Check { body, problems: Vec::new(), warnings: Vec::new() };
    check.rules();
    check.ssh();
    check.attributes();
    check.postures();
    check.owners();
    check.properties();
    (check.problems, check.warnings)
}

/// Can it be behind a router?
fn is_routed(selector: &Selector) -> bool {
    matches!(
        selector,
        Selector::Internet
            | Selector::Host(_)
            | Selector::Address(_)
            | Selector::Net(_)
            | Selector::Range(..)
    )
}

struct Check<'a> {
    body: &'a Body,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl Check<'_> {
    fn wrong(&mut self, mark: &Mark, message: impl Into<String>, help: Option<&str>) {
        self.problems.push(mark.problem(message, help.map(str::to_owned)));
    }

    /// The name is defined, and may stand on this side.
    fn selector(&mut self, selector: &Selector, mark: &Mark, side: Side) {
        self.defined(selector, mark, side);
        let source = matches!(side, Side::Source | Side::SshSource);
        match selector {
            Selector::Own if source => {
                self.wrong(mark, "\"autogroup:self\" not valid on the src side of a rule", None);
            }
            Selector::Own if side == Side::Attributes => {
                self.wrong(
                    mark,
                    "nodeAttrs target does not support autogroup:self",
                    Some("autogroup:member is all nodes of users"),
                );
            }
            Selector::Internet if side != Side::Destination => {
                self.wrong(mark, "autogroup:internet can only be used in dst of acls and grants", None);
            }
            Selector::DangerAll if side != Side::Source => {
                let what = if side == Side::Attributes {
                    "target"
                } else if source {
                    "src of ssh"
                } else {
                    "dst"
                };
                self.wrong(mark, format!("cannot use autogroup:danger-all as a {what}"), None);
            }
            Selector::Any if side == Side::SshDestination => {
                let help = "name tags, autogroup:self or autogroup:member";
                self.wrong(mark, "wildcard (*) is not supported as SSH destination", Some(help));
            }
            Selector::Any if side == Side::SshSource => {
                self.wrong(
                    mark,
                    "wildcard (*) is not supported as SSH source",
                    Some("autogroup:member is everybody"),
                );
            }
            Selector::Host(name) if side == Side::SshDestination => {
                let help = "SSH rules name nodes by tags, users or autogroups";
                self.wrong(mark, format!("invalid dst {name:?}"), Some(help));
            }
            Selector::Address(_)
            | Selector::Net(_)
            | Selector::Range(..)
            | Selector::Group(_)
            | Selector::Domain(_)
                if side == Side::SshDestination =>
            {
                let help = "SSH rules name nodes by tags, users or autogroups";
                self.wrong(mark, format!("invalid dst \"{selector}\""), Some(help));
            }
            Selector::Host(_) | Selector::Address(_) | Selector::Net(_) | Selector::Range(..)
                if side == Side::SshSource =>
            {
                let help = "SSH rules know people and tags, not addresses";
                self.wrong(mark, format!("invalid src \"{selector}\""), Some(help));
            }
            Selector::Host(_) | Selector::Address(_) | Selector::Net(_) | Selector::Range(..)
                if side == Side::Destination && is_mesh_v6(literal(self.body, selector).as_ref()) =>
            {
                let message =
                    format!("{selector} means no node: an IPv6 address of the mesh is nobody's here");
                let help = "as in Tailscale; name the IPv4 address, a tag or a user".to_owned();
                self.warnings.push(mark.problem(message, Some(help)));
            }
            Selector::Shared => {
                let message =
                    "autogroup:shared matches nobody: nodes cannot be shared with other networks here";
                self.warnings.push(mark.problem(message, None));
            }
            _ => {}
        }
    }

    /// What the policy itself must define is defined.
    fn defined(&mut self, selector: &Selector, mark: &Mark, side: Side) {
        let (message, near) = match selector {
            Selector::Group(name) if !self.body.groups.contains_key(name) => (
                format!("group not defined in policy: {name:?}"),
                nearest(name, self.body.groups.keys().map(String::as_str)),
            ),
            Selector::Tag(name) if !self.body.tag_owners.contains_key(name) => {
                let side = match side {
                    Side::Source => "src: ",
                    Side::Destination => "dst: ",
                    _ => "",
                };
                (
                    format!("{side}tag not found: {name:?}"),
                    nearest(name, self.body.tag_owners.keys().map(String::as_str)),
                )
            }
            Selector::Host(name) if !self.body.hosts.contains_key(name) && side != Side::SshDestination => (
                format!("invalid address or undefined host: {name:?}"),
                nearest(name, self.body.hosts.keys().map(String::as_str)),
            ),
            _ => return,
        };
        let help = near.map(|near| format!("did you mean {near}?")).or_else(|| match selector {
            Selector::Tag(_) => Some("tags are defined in tagOwners".to_owned()),
            Selector::Host(_) => Some("aliases are defined in hosts; a user is written NAME@".to_owned()),
            _ => None,
        });
        self.problems.push(mark.problem(message, help));
    }

    fn rules(&mut self) {
        let body = self.body;
        for acl in body.acls.iter().flatten() {
            for src in &acl.src {
                self.selector(&src.what, &src.mark, Side::Source);
            }
            for dst in &acl.dst {
                self.selector(&dst.what.to, &dst.mark, Side::Destination);
                self.own(&acl.src, &dst.what.to, &dst.mark, true);
            }
        }
        for grant in body.grants.iter().flatten() {
            for src in &grant.src {
                self.selector(&src.what, &src.mark, Side::Source);
            }
            for dst in &grant.dst {
                self.selector(&dst.what, &dst.mark, Side::Destination);
                self.own(&grant.src, &dst.what, &dst.mark, false);
                match &dst.what {
                    Selector::Net(net) if net.prefix_len() == 0 => {
                        let message = format!(
                            "dst \"{net}\": to allow all IP addresses, use \"*\" or \"autogroup:internet\""
                        );
                        self.wrong(&dst.mark, message, None);
                    }
                    Selector::Internet if !grant.app.is_empty() => {
                        self.wrong(&dst.mark, "cannot use app grants with autogroup:internet", None);
                    }
                    _ => {}
                }
            }
            if !grant.via.is_empty() {
                for dst in grant.dst.iter().filter(|dst| !is_routed(&dst.what)) {
                    let message =
                        format!("{} is not reached via a router: the grant does nothing for it", dst.what);
                    let help = "via is for networks and autogroup:internet".to_owned();
                    self.warnings.push(dst.mark.problem(message, Some(help)));
                }
            }
            for via in &grant.via {
                if !body.tag_owners.contains_key(&via.what) {
                    let near = nearest(&via.what, body.tag_owners.keys().map(String::as_str));
                    let help = near.map(|near| format!("did you mean {near}?"));
                    self.problems.push(via.mark.problem(format!("via: tag not found: {:?}", via.what), help));
                }
            }
        }
    }

    /// `autogroup:self` needs sources that have a self. `*` has, in acls, for the nodes that are somebody's.
    fn own(&mut self, sources: &[Said<Selector>], to: &Selector, mark: &Mark, any_has: bool) {
        let fits = |source: &Selector| source.is_people() || (any_has && *source == Selector::Any);
        // A source that is no source at all has its own message.
        let judged = |source: &Selector| !matches!(source, Selector::Own | Selector::Internet);
        if *to == Selector::Own && sources.iter().any(|src| judged(&src.what) && !fits(&src.what)) {
            let message = "autogroup:self can only be used with users, groups, or supported autogroups";
            self.wrong(mark, message, Some("such as autogroup:member"));
        }
    }

    fn ssh(&mut self) {
        for rule in &self.body.ssh {
            for src in &rule.src {
                self.selector(&src.what, &src.mark, Side::SshSource);
            }
            for dst in &rule.dst {
                self.selector(&dst.what, &dst.mark, Side::SshDestination);
                let from_tags =
                    rule.src.iter().any(|src| matches!(src.what, Selector::Tag(_) | Selector::Tagged));
                match &dst.what {
                    Selector::Own if rule.src.iter().any(|src| !src.what.is_people()) => {
                        let message =
                            "autogroup:self destination requires source to contain only users or groups";
                        self.wrong(&dst.mark, message, Some("such as autogroup:member"));
                    }
                    Selector::Member | Selector::Role(_) if from_tags => {
                        let message =
                            format!("tags in SSH source cannot access {} (user-owned devices)", dst.what);
                        self.wrong(&dst.mark, message, None);
                    }
                    Selector::User(_) if from_tags => {
                        self.wrong(&dst.mark, "tags in SSH source cannot access user-owned devices", None);
                    }
                    Selector::User(user) if rule.src.iter().any(|src| src.what != dst.what) => {
                        let message =
                            format!("the destination {user} requires source to contain only that same user");
                        self.wrong(&dst.mark, message, Some("or name autogroup:self"));
                    }
                    _ => {}
                }
            }
        }
    }

    fn attributes(&mut self) {
        for attrs in &self.body.node_attrs {
            for target in &attrs.target {
                self.selector(&target.what, &target.mark, Side::Attributes);
            }
            for attr in &attrs.attrs {
                if matches!(attr.what.as_str(), "funnel" | "https") {
                    let message =
                        format!("the attribute {:?} is not honoured: nothing here answers for it", attr.what);
                    self.warnings.push(attr.mark.problem(message, None));
                }
            }
        }
    }

    fn postures(&mut self) {
        let body = self.body;
        let of_rules = body.acls.iter().flatten().flat_map(|acl| &acl.posture);
        let of_grants = body.grants.iter().flatten().flat_map(|grant| &grant.posture);
        let of_ssh = body.ssh.iter().flat_map(|rule| &rule.posture);
        for said in of_rules.chain(of_grants).chain(of_ssh).chain(&body.default_posture) {
            if !body.postures.contains_key(&said.what) {
                let near = nearest(&said.what, body.postures.keys().map(String::as_str));
                let help = near.map(|near| format!("did you mean {near}?"));
                self.problems.push(said.mark.problem(format!("posture not found: {:?}", said.what), help));
            }
        }
    }

    fn owners(&mut self) {
        let body = self.body;
        let owners = body.tag_owners.values().flat_map(|owners| &owners.what);
        let approvers = body.auto_routes.iter().flat_map(|(_, approvers)| approvers).chain(&body.auto_exit);
        for said in owners.chain(approvers) {
            self.defined(&said.what, &said.mark, Side::Attributes);
        }
        for (route, approvers) in &body.auto_routes {
            if route.what.prefix_len() == 0 && !approvers.is_empty() {
                let message = format!("{} in autoApprovers.routes approves no exit routes", route.what);
                let help = "they are approved by autoApprovers.exitNode".to_owned();
                self.warnings.push(route.mark.problem(message, Some(help)));
            }
        }
    }

    fn properties(&mut self) {
        for said in self.body.never.iter().chain(&self.body.always) {
            self.defined(&said.what.from, &said.mark, Side::Attributes);
            self.defined(&said.what.to.to, &said.mark, Side::Attributes);
        }
    }
}
