//! What follows for one node from the policy and from itself: its addresses as others are told them, and the routes
//! that are approved; and whom a selector means.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::language::Body;
use crate::language::selector::Selector;
use crate::policy::Policy;
use crate::population::{Node, User};
use crate::ranges::{Ranges, Sources};

/// The name of the attribute that takes a node's IPv4 address away.
const DISABLE_IPV4: &str = "disable-ipv4";

/// One node, and what follows for it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Facts {
    pub(crate) node: Node,
    /// As others are told them, IPv4 first.
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) own: Sources,
    /// Approved routes, exit routes aside.
    pub(crate) subnets: Vec<IpNet>,
    pub(crate) behind: Ranges,
    /// Approved exit routes.
    pub(crate) exits: Vec<IpNet>,
}

impl Facts {
    pub(crate) fn of(policy: &Policy, users: &[User], node: Node) -> Self {
        let user = node.user.and_then(|id| users.iter().find(|user| user.id == id));
        let body = policy.body();
        let without_v4 = body.node_attrs.iter().any(|attrs| {
            attrs.attrs.iter().any(|attr| attr.what == DISABLE_IPV4)
                && attrs.target.iter().any(|target| means_node(body, &target.what, &node, user))
        });
        let v4 = node.v4.filter(|_| !without_v4).map(IpAddr::V4);
        let addresses: Vec<IpAddr> = v4.into_iter().chain(node.v6.map(IpAddr::V6)).collect();
        let approved: Vec<IpNet> =
            node.advertised.iter().filter(|route| is_approved(body, &node, user, route)).copied().collect();
        let (exits, subnets): (Vec<_>, Vec<_>) = approved.into_iter().partition(|net| net.prefix_len() == 0);
        Self {
            own: Ranges::of_nets(addresses.iter().copied().map(IpNet::from)).into(),
            behind: Ranges::of_nets(subnets.iter().copied()),
            addresses,
            subnets,
            exits,
            node,
        }
    }

    /// Has it approved routes?
    pub(crate) fn is_router(&self) -> bool {
        !self.subnets.is_empty() || !self.exits.is_empty()
    }

    /// Is it somebody's, and not a tagged one?
    pub(crate) fn is_owned(&self) -> bool {
        self.node.tags.is_empty() && self.node.user.is_some()
    }
}

fn is_approved(body: &Body, node: &Node, user: Option<&User>, route: &IpNet) -> bool {
    if route.prefix_len() == 0 {
        // One of the two without the other is no way to the internet: approving one approves both.
        return node.approved.iter().any(|net| net.prefix_len() == 0)
            || body.auto_exit.iter().any(|approver| means_node(body, &approver.what, node, user));
    }
    node.approved.contains(route) || auto_approves(body, node, user, route)
}

fn auto_approves(body: &Body, node: &Node, user: Option<&User>, route: &IpNet) -> bool {
    body.auto_routes.iter().any(|(net, approvers)| {
        net.what.prefix_len() != 0
            && net.what.contains(route)
            && approvers.iter().any(|approver| means_node(body, &approver.what, node, user))
    })
}

/// `a` is how a policy writes user `user`: as email address, as name, or as `NAME@`.
pub(crate) fn is_user(written: &str, user: &User) -> bool {
    let same = |name: &str| written.eq_ignore_ascii_case(name);
    same(&user.name)
        || user.email.as_deref().is_some_and(same)
        || written.strip_suffix('@').is_some_and(|name| name.eq_ignore_ascii_case(&user.name))
}

fn in_domain(domain: &str, user: &User) -> bool {
    user.mail().is_some_and(|(_, host)| host.eq_ignore_ascii_case(domain))
}

/// Does a selector that names people mean this one?
pub(crate) fn means_user(body: &Body, selector: &Selector, user: &User) -> bool {
    match selector {
        Selector::Member => true,
        Selector::Role(role) => user.roles.contains(role),
        Selector::User(written) => is_user(written, user),
        Selector::Domain(domain) => in_domain(domain, user),
        Selector::Group(group) => {
            user.groups.contains(group)
                || body.groups.get(group).is_some_and(|members| {
                    members.what.iter().any(|member| match member.what.strip_prefix("user:*@") {
                        Some(domain) => in_domain(domain, user),
                        None => is_user(&member.what, user),
                    })
                })
        }
        _ => false,
    }
}

/// The addresses that a selector is about by itself; `None` when it means nodes.
pub(crate) fn literal(body: &Body, selector: &Selector) -> Option<Ranges> {
    match selector {
        Selector::Address(address) => Some(Ranges::of_net(&IpNet::from(*address))),
        Selector::Net(net) => Some(Ranges::of_net(net)),
        Selector::Range(first, last) => Some(Ranges::collect([(*first, *last)])),
        Selector::Host(name) => {
            Some(body.hosts.get(name).map_or_else(Ranges::default, |net| Ranges::of_net(&net.what)))
        }
        _ => None,
    }
}

/// Does a selector mean this node, by its user, its tags or its own addresses?
pub(crate) fn means_node(body: &Body, selector: &Selector, node: &Node, user: Option<&User>) -> bool {
    match selector {
        Selector::Any | Selector::DangerAll => true,
        Selector::Tagged => !node.tags.is_empty(),
        Selector::Tag(tag) => node.tags.contains(tag),
        Selector::Own | Selector::Internet | Selector::Shared => false,
        Selector::Posture(name) => body.postures.get(name).is_some_and(|conditions| {
            conditions.what.iter().all(|condition| condition.what.holds(&node.posture))
        }),
        people if people.is_people() => {
            node.tags.is_empty() && user.is_some_and(|user| means_user(body, people, user))
        }
        address => literal(body, address).is_some_and(|ranges| {
            node.v4.is_some_and(|v4| ranges.contains(v4.into()))
                || node.v6.is_some_and(|v6| ranges.contains(v6.into()))
        }),
    }
}

impl Policy {
    /// May this user give this tag to a node of theirs? An owner that is a tag says nothing of users.
    pub fn may_tag(&self, user: &User, tag: &str) -> bool {
        let body = self.body();
        body.tag_owners
            .get(tag)
            .is_some_and(|owners| owners.what.iter().any(|owner| means_user(body, &owner.what, user)))
    }

    /// Is this tag one that the policy knows?
    pub fn has_tag(&self, tag: &str) -> bool {
        self.body().tag_owners.contains_key(tag)
    }
}
