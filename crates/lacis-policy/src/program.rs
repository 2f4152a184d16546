//! A policy's rules with their selectors interned: what there is to compute with, before anybody knows who there is.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use lacis_wire::control::PortRange;
use serde_json::Value;

use crate::language::selector::{ALL_PORTS, Selector};
use crate::language::{Body, Mark, Said};

/// Number of an interned selector.
pub(crate) type SelectorId = usize;

/// Protocol (`None`: TCP, UDP, ICMP and ICMPv6) and ports.
pub(crate) type Access = (Option<u8>, Vec<PortRange>);

/// One destination of a rule.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub(crate) to: SelectorId,
    pub(crate) access: Arc<[Access]>,
}

/// An entry of `acls` or `grants`.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    pub(crate) mark: Mark,
    pub(crate) src: Vec<SelectorId>,
    /// Empty, or sources are in one of these too.
    pub(crate) posture: Vec<SelectorId>,
    pub(crate) dst: Vec<Destination>,
    /// Empty, or only routers with one of these tags.
    pub(crate) via: Vec<String>,
    /// Application capabilities, by name.
    pub(crate) app: BTreeMap<String, Vec<Value>>,
    /// What its destinations grant back to its sources.
    pub(crate) companions: Vec<&'static str>,
    /// A destination is `autogroup:self`.
    pub(crate) own: bool,
}

/// The companions of capabilities.
const COMPANIONS: [(&str, &str); 2] = [
    ("tailscale.com/cap/drive", "tailscale.com/cap/drive-sharer"),
    ("tailscale.com/cap/relay", "tailscale.com/cap/relay-target"),
];

/// All of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Program {
    pub(crate) selectors: Vec<Selector>,
    pub(crate) rules: Vec<Rule>,
    /// Targets of each entry of `nodeAttrs`.
    pub(crate) attribute_targets: Vec<Vec<SelectorId>>,
    /// Of each entry of `ssh`.
    pub(crate) ssh: Vec<SshSides>,
}

/// Sources, what they fulfil besides, and destinations of an entry of `ssh`.
#[derive(Clone, Debug)]
pub(crate) struct SshSides {
    pub(crate) src: Vec<SelectorId>,
    pub(crate) posture: Vec<SelectorId>,
    pub(crate) dst: Vec<SelectorId>,
}

#[derive(Default)]
struct Interner {
    selectors: Vec<Selector>,
    ids: HashMap<Selector, SelectorId>,
}

impl Interner {
    fn id(&mut self, selector: &Selector) -> SelectorId {
        if let Some(id) = self.ids.get(selector) {
            return *id;
        }
        let id = self.selectors.len();
        self.selectors.push(selector.clone());
        self.ids.insert(selector.clone(), id);
        id
    }

    fn all(&mut self, list: &[Said<Selector>]) -> Vec<SelectorId> {
        list.iter().map(|said| self.id(&said.what)).collect()
    }

    /// A rule's own postures, or else the default ones.
    fn postures(&mut self, own: &[Said<String>], default: &[Said<String>]) -> Vec<SelectorId> {
        let list = if own.is_empty() { default } else { own };
        list.iter().map(|said| self.id(&Selector::Posture(said.what.clone()))).collect()
    }

    /// A rule about network access alone.
    fn rule(
        &self,
        mark: Mark,
        src: Vec<SelectorId>,
        posture: Vec<SelectorId>,
        dst: Vec<Destination>,
    ) -> Rule {
        let own = dst.iter().any(|dst| self.selectors[dst.to] == Selector::Own);
        Rule { mark, src, posture, dst, via: Vec::new(), app: BTreeMap::new(), companions: Vec::new(), own }
    }
}

impl Program {
    pub(crate) fn of(body: &Body) -> Self {
        let mut interner = Interner::default();
        let mut rules = Vec::new();
        for acl in body.acls.iter().flatten() {
            let src = interner.all(&acl.src);
            let dst = acl.dst.iter().map(|said| {
                let access = [(acl.protocol, said.what.ports.clone())].into();
                Destination { to: interner.id(&said.what.to), access }
            });
            let dst = dst.collect();
            let posture = interner.postures(&acl.posture, &body.default_posture);
            rules.push(interner.rule(acl.mark.clone(), src, posture, dst));
        }
        for grant in body.grants.iter().flatten() {
            let src = interner.all(&grant.src);
            let access: Arc<[Access]> = grant.ip.iter().map(|said| said.what.clone()).collect();
            let dst = interner.all(&grant.dst).into_iter();
            let dst = dst.map(|to| Destination { to, access: Arc::clone(&access) }).collect();
            let via = grant.via.iter().map(|said| said.what.clone()).collect();
            let app: BTreeMap<_, _> =
                grant.app.iter().map(|(name, values)| (name.clone(), values.what.clone())).collect();
            let companions = COMPANIONS.into_iter().filter(|(name, _)| app.contains_key(*name));
            let companions = companions.map(|(_, companion)| companion).collect();
            let posture = interner.postures(&grant.posture, &body.default_posture);
            let rule = interner.rule(grant.mark.clone(), src, posture, dst);
            rules.push(Rule { via, app, companions, ..rule });
        }
        if body.acls.is_none() && body.grants.is_none() {
            // Whoever says nothing of access restricts none.
            let everybody = interner.id(&Selector::Any);
            let dst = vec![Destination { to: everybody, access: [(None, vec![ALL_PORTS])].into() }];
            let at = crate::Position { line: 1, column: 1 };
            let mark = Mark { at, place: "no acls, no grants".to_owned() };
            rules.push(interner.rule(mark, vec![everybody], Vec::new(), dst));
        }
        let attribute_targets = body.node_attrs.iter().map(|attrs| interner.all(&attrs.target)).collect();
        let ssh = body.ssh.iter().map(|rule| SshSides {
            src: interner.all(&rule.src),
            posture: interner.postures(&rule.posture, &body.default_posture),
            dst: interner.all(&rule.dst),
        });
        let ssh = ssh.collect();
        Self { selectors: interner.selectors, rules, attribute_targets, ssh }
    }
}
