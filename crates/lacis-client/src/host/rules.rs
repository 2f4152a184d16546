//! The routing rules that lead packets to the mesh's tables, and their place among those of other programs.
//!
//! Rules without a priority of their own are put before all others by the kernel, so another VPN that is brought up
//! later (`wg-quick` with 0.0.0.0/0) takes the mesh's packets, and the daemon's own sealed ones. Whether a rule does
//! that is asked of the kernel, for packets such as it would match; then the mesh's rules are put before it, for as
//! long as it is there. What selects other packets only (by source, device, user, …) is left where it is.

use std::fmt::{self, Display};
use std::net::IpAddr;

use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteProtocol};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion};

use super::network::{failed, ignore, log};
use super::{HostError, HostOptions};
use crate::links::{SOMEWHERE_V4, SOMEWHERE_V6};

const MAIN_TABLE: u32 = 254;
const DEFAULT_TABLE: u32 = 253;
const LOCAL_TABLE: u32 = 255;
/// `FRA_PROTOCOL` of our rules, by which they are known at whatever priority.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(52);
/// Priorities where nothing is in the way, in a gap that distributions leave free: marked to main, marked to default,
/// marked nowhere, all to the mesh, all to the guard.
const PRIORITIES: [u32; COUNT] = [5210, 5230, 5250, 5270, 5280];
const COUNT: usize = 5;
/// Times that rules are put before others in one go.
const MAX_MOVES: usize = 4;

/// What a rule of ours does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    priority: u32,
    /// Only packets with the daemon's mark.
    marked: bool,
    /// `None`: unreachable.
    table: Option<u32>,
}

/// A rule of another program, as far as it matters.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Foreign {
    priority: u32,
    invert: bool,
    source: Option<IpNet>,
    destination: Option<IpNet>,
    /// Value and mask.
    mark: Option<(u32, u32)>,
    /// It selects by something that the mesh's packets do not have, or not all of them.
    narrow: bool,
    /// `None`: packets end there.
    table: Option<u32>,
    suppressed: Option<u32>,
}

/// A packet that must go the mesh's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    to: IpAddr,
    from: Option<IpAddr>,
    marked: bool,
}

/// What the mesh's routes are, for rules of one family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mesh<'a> {
    /// This node's own addresses.
    pub(super) addresses: &'a [IpNet],
    /// Destinations that lead into the device.
    pub(super) routes: &'a [IpNet],
}

/// Rules of one family.
#[derive(Debug)]
pub(super) struct Rules {
    v6: bool,
    mark: u32,
    mask: u32,
    mesh_table: u32,
    guard_table: u32,
    /// Rules of others that ours were put before.
    passed: Vec<Foreign>,
    /// Those that ours cannot be put before: no priority is left there.
    first: Vec<Foreign>,
    /// Tables of rules before ours.
    tables_before: Vec<u32>,
}

impl Foreign {
    /// `None` for rules that lead nowhere in particular.
    fn parse(message: &RuleMessage) -> Option<Self> {
        let header = &message.header;
        let mut found = Self {
            priority: 0,
            invert: header.flags.contains(RuleFlags::Invert),
            source: None,
            destination: None,
            mark: None,
            narrow: header.tos != 0,
            table: Some(header.table.into()),
            suppressed: None,
        };
        let (mut mark, mut mask) = (0, u32::MAX);
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(priority) => found.priority = *priority,
                RuleAttribute::Source(ip) => found.source = IpNet::new(*ip, header.src_len).ok(),
                RuleAttribute::Destination(ip) => found.destination = IpNet::new(*ip, header.dst_len).ok(),
                RuleAttribute::FwMark(value) => mark = *value,
                RuleAttribute::FwMask(value) => mask = *value,
                RuleAttribute::Table(table) => found.table = Some(*table),
                RuleAttribute::SuppressPrefixLen(length) if *length != u32::MAX => {
                    found.suppressed = Some(*length);
                }
                RuleAttribute::Iifname(_)
                | RuleAttribute::Oifname(_)
                | RuleAttribute::UidRange(_)
                | RuleAttribute::IpProtocol(_)
                | RuleAttribute::SourcePortRange(_)
                | RuleAttribute::DestinationPortRange(_)
                | RuleAttribute::L3MDev(true) => found.narrow = true,
                RuleAttribute::TunId(id) if *id != 0 => found.narrow = true,
                _ => {}
            }
        }
        // The kernel leaves out a mark of 0, and the mask of all bits.
        found.mark = (mark != 0 || mask != u32::MAX).then_some((mark, mask)).filter(|(_, mask)| *mask != 0);
        match header.action {
            RuleAction::ToTable => {}
            RuleAction::Blackhole | RuleAction::Unreachable | RuleAction::Prohibit => found.table = None,
            _ => return None,
        }
        Some(found)
    }

    fn matches(&self, sample: &Sample, mark: u32) -> bool {
        let mark = if sample.marked { mark } else { 0 };
        let selected = self.source.is_none_or(|net| sample.from.is_some_and(|ip| net.contains(&ip)))
            && self.destination.is_none_or(|net| net.contains(&sample.to))
            && self.mark.is_none_or(|(value, mask)| mark & mask == value);
        !self.narrow && selected != self.invert
    }

    /// Is it there for just the daemon's packets?
    fn names(&self, mark: u32) -> bool {
        !self.invert && self.mark.is_some_and(|(value, mask)| value != 0 && mark & mask == value)
    }
}

impl Display for Foreign {
    /// As `ip rule` does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}from ", self.priority, if self.invert { "not " } else { "" })?;
        match self.source {
            Some(net) => write!(f, "{net}")?,
            None => f.write_str("all")?,
        }
        if let Some(net) = self.destination {
            write!(f, " to {net}")?;
        }
        match self.mark {
            Some((value, u32::MAX)) => write!(f, " fwmark {value:#x}")?,
            Some((value, mask)) => write!(f, " fwmark {value:#x}/{mask:#x}")?,
            None => {}
        }
        match self.table {
            Some(MAIN_TABLE) => f.write_str(" lookup main")?,
            Some(DEFAULT_TABLE) => f.write_str(" lookup default")?,
            Some(table) => write!(f, " lookup {table}")?,
            None => f.write_str(" unreachable")?,
        }
        self.suppressed.map_or(Ok(()), |length| write!(f, " suppress_prefixlength {length}"))
    }
}

impl Rules {
    pub(super) fn new(v6: bool, options: &HostOptions) -> Self {
        Self {
            v6,
            mark: options.fwmark,
            mask: options.fwmark_mask,
            mesh_table: options.table,
            guard_table: options.guard_table,
            passed: Vec::new(),
            first: Vec::new(),
            tables_before: Vec::new(),
        }
    }

    /// Where ours are: all before the first of those that they were put before.
    fn wanted(&self) -> [Rule; COUNT] {
        let first = self.passed.iter().map(|rule| rule.priority).min();
        let priority = |place: usize| match first {
            // There is room: the others are in `first`.
            Some(priority) => priority.saturating_sub((COUNT - place) as u32),
            None => PRIORITIES[place],
        };
        let rule = |place, marked, table| Rule { priority: priority(place), marked, table };
        [
            rule(0, true, Some(MAIN_TABLE)),
            rule(1, true, Some(DEFAULT_TABLE)),
            rule(2, true, None),
            rule(3, false, Some(self.mesh_table)),
            rule(4, false, Some(self.guard_table)),
        ]
    }

    /// A rule such as ours, and whether it was made by us.
    fn parse(&self, message: &RuleMessage) -> Option<(Rule, bool)> {
        let mut rule = Rule { priority: 0, marked: false, table: Some(message.header.table.into()) };
        let (mut mask, mut ours) = (u32::MAX, false);
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(priority) => rule.priority = *priority,
                RuleAttribute::FwMark(mark) if *mark == self.mark => rule.marked = true,
                RuleAttribute::FwMark(0) => {}
                RuleAttribute::FwMark(_)
                | RuleAttribute::Iifname(_)
                | RuleAttribute::Oifname(_)
                | RuleAttribute::Source(_)
                | RuleAttribute::Destination(_)
                | RuleAttribute::UidRange(_)
                | RuleAttribute::IpProtocol(_) => return None,
                RuleAttribute::SuppressPrefixLen(length) if *length != u32::MAX => return None,
                RuleAttribute::FwMask(bits) => mask = *bits,
                RuleAttribute::Table(table) => rule.table = Some(*table),
                RuleAttribute::Protocol(protocol) => ours = *protocol == PROTOCOL,
                _ => {}
            }
        }
        match message.header.action {
            RuleAction::ToTable => {}
            RuleAction::Unreachable => rule.table = None,
            _ => return None,
        }
        let shaped =
            self.wanted().iter().any(|wanted| (wanted.marked, wanted.table) == (rule.marked, rule.table));
        let plain = !message.header.flags.contains(RuleFlags::Invert) && (!rule.marked || mask == self.mask);
        (shaped && plain).then_some((rule, ours))
    }

    async fn all(&self, handle: &Handle) -> Result<Vec<RuleMessage>, HostError> {
        let version = if self.v6 { IpVersion::V6 } else { IpVersion::V4 };
        let get = handle.rule().get(version).execute();
        get.try_collect().await.map_err(failed("reading the routing rules"))
    }

    /// Adds those that are missing. Returns how many.
    pub(super) async fn add_missing(&mut self, handle: &Handle) -> Result<usize, HostError> {
        let all = match self.all(handle).await {
            Ok(all) => all,
            // A kernel without IPv6 rules has nothing to compare.
            Err(_) if self.v6 => return Ok(0),
            Err(error) => return Err(error),
        };
        let foreign: Vec<Foreign> = self.foreign(&all);
        self.passed.retain(|rule| foreign.contains(rule));
        self.first.retain(|rule| foreign.contains(rule));
        let present: Vec<Rule> = all.iter().filter_map(|message| Some(self.parse(message)?.0)).collect();
        let mut added = 0;
        for rule in self.wanted() {
            if !present.contains(&rule) {
                self.add(handle, rule).await?;
                added += 1;
            }
        }
        Ok(added)
    }

    /// Puts ours before rules of others that lead the mesh's packets elsewhere, and takes away what is left of ours at
    /// other places. Returns the number of changes.
    pub(super) async fn put_first(&mut self, handle: &Handle, mesh: Mesh<'_>) -> Result<usize, HostError> {
        let mut changes = 0;
        for _ in 0..MAX_MOVES {
            let Ok(all) = self.all(handle).await else { return Ok(changes) };
            let mut before = self.before(&all);
            before.retain(|rule| !self.first.contains(rule));
            if !self.divert(handle, &before, mesh).await {
                break;
            }
            let in_the_way = before.into_iter().filter(|rule| !self.samples(rule, mesh).is_empty());
            let (none_left, passed): (Vec<_>, Vec<_>) =
                in_the_way.partition(|rule| rule.priority <= COUNT as u32);
            self.first.extend(none_left);
            self.passed.extend(passed);
            changes += self.add_missing(handle).await?;
        }
        let wanted = self.wanted();
        let all = self.all(handle).await.unwrap_or_default();
        self.tables_before = self.before(&all).iter().filter_map(|rule| rule.table).collect();
        for message in all {
            if self.parse(&message).is_some_and(|(rule, ours)| ours && !wanted.contains(&rule)) {
                let removed = handle.rule().del(message).execute().await;
                ignore(removed, libc::ENOENT).map_err(failed("removing a routing rule"))?;
                changes += 1;
            }
        }
        Ok(changes)
    }

    /// Rules of other programs, without those that every host has.
    fn foreign(&self, all: &[RuleMessage]) -> Vec<Foreign> {
        let is_local = |rule: &Foreign| rule.priority == 0 && rule.table == Some(LOCAL_TABLE);
        let others = all.iter().filter(|message| self.parse(message).is_none()).filter_map(Foreign::parse);
        others.filter(|rule| !is_local(rule)).collect()
    }

    /// Those of them that are asked before the mesh's table.
    fn before(&self, all: &[RuleMessage]) -> Vec<Foreign> {
        let [.., mesh, _] = self.wanted();
        self.foreign(all).into_iter().filter(|rule| rule.priority < mesh.priority).collect()
    }

    /// Packets that a rule would take, and that must go the mesh's way.
    fn samples(&self, rule: &Foreign, mesh: Mesh<'_>) -> Vec<Sample> {
        let of_family = |net: &&IpNet| matches!(net, IpNet::V6(_)) == self.v6;
        let somewhere = if self.v6 { IpAddr::V6(SOMEWHERE_V6) } else { IpAddr::V4(SOMEWHERE_V4) };
        let destination = rule.destination.filter(|_| !rule.invert);
        // A packet that leaves for one of our routes, and if need be from our address.
        let within = |net: &IpNet| match destination {
            None if net.prefix_len() == 0 => Some(somewhere),
            None => Some(net.addr()),
            Some(place) if place.contains(&net.addr()) => Some(net.addr()),
            Some(place) => net.contains(&place.addr()).then(|| place.addr()),
        };
        let from = rule.source.and_then(|net| {
            mesh.addresses.iter().filter(of_family).map(IpNet::addr).find(|ip| net.contains(ip))
        });
        let (everything, nodes): (Vec<&IpNet>, Vec<&IpNet>) =
            mesh.routes.iter().filter(of_family).partition(|net| net.prefix_len() == 0);
        let to = [nodes.into_iter().find_map(within), everything.into_iter().find_map(within)];
        let to_mesh = to.into_iter().flatten().map(|to| Sample { to, from, marked: false });
        let own = Sample { to: somewhere, from: None, marked: true };
        let own = (destination.is_none() && !rule.names(self.mark)).then_some(own);
        own.into_iter().chain(to_mesh).filter(|sample| rule.matches(sample, self.mark)).collect()
    }

    /// Does one of these rules lead packets elsewhere?
    async fn divert(&self, handle: &Handle, rules: &[Foreign], mesh: Mesh<'_>) -> bool {
        for rule in rules {
            for sample in self.samples(rule, mesh) {
                let Some(table) = rule.table else { return true };
                let good: [u32; 2] = if sample.marked {
                    [MAIN_TABLE, DEFAULT_TABLE]
                } else {
                    [self.mesh_table, self.guard_table]
                };
                if !good.contains(&table) && self.table_of(handle, sample).await == Some(table) {
                    return true;
                }
            }
        }
        false
    }

    /// The table that has the route of such a packet. None when there is no route, or one that is a refusal.
    async fn table_of(&self, handle: &Handle, sample: Sample) -> Option<u32> {
        let mut ask = RouteMessage::default();
        let length = if self.v6 { 128 } else { 32 };
        ask.header.address_family = if self.v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        ask.header.destination_prefix_length = length;
        ask.header.flags = RouteFlags::LookupTable;
        ask.attributes.push(RouteAttribute::Destination(sample.to.into()));
        if let Some(from) = sample.from {
            ask.header.source_prefix_length = length;
            ask.attributes.push(RouteAttribute::Source(from.into()));
        }
        if sample.marked {
            ask.attributes.push(RouteAttribute::Mark(self.mark));
        }
        let route = handle.route().get(ask).execute().try_next().await.ok()??;
        let table = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        });
        Some(table.unwrap_or(route.header.table.into()))
    }

    async fn add(&self, handle: &Handle, rule: Rule) -> Result<(), HostError> {
        let add = handle.rule().add().priority(rule.priority);
        let add = match rule.table {
            Some(table) => add.table_id(table).action(RuleAction::ToTable),
            None => add.table_id(0).action(RuleAction::Unreachable),
        };
        let attributes = |message: &mut RuleMessage| {
            message.attributes.push(RuleAttribute::Protocol(PROTOCOL));
            if rule.marked {
                message.attributes.push(RuleAttribute::FwMark(self.mark));
                message.attributes.push(RuleAttribute::FwMask(self.mask));
            }
        };
        let added = if self.v6 {
            let mut add = add.v6();
            attributes(add.message_mut());
            add.execute().await
        } else {
            let mut add = add.v4();
            attributes(add.message_mut());
            add.execute().await
        };
        ignore(added, libc::EEXIST).map_err(failed(format!("adding the routing rule {}", rule.priority)))
    }

    /// Takes all of ours away.
    pub(super) async fn remove(&mut self, handle: &Handle) {
        self.passed.clear();
        self.first.clear();
        for message in self.all(handle).await.unwrap_or_default() {
            if self.parse(&message).is_some_and(|(_, ours)| ours) {
                log(ignore(handle.rule().del(message).execute().await, libc::ENOENT), "removing a rule");
            }
        }
    }

    /// Tables of other programs whose routes may lead the mesh's packets elsewhere.
    pub(super) fn tables_before(&self) -> &[u32] {
        &self.tables_before
    }

    /// What was found of other programs, in words.
    pub(super) fn found(&self) -> impl Iterator<Item = String> + '_ {
        let passed = self.passed.iter().map(|rule| {
            format!(
                "another program's routing rule took the mesh's packets ({rule}): the mesh's own rules were put before it"
            )
        });
        let first = self.first.iter().map(|rule| {
            format!(
                "another program's routing rule takes the mesh's packets ({rule}), and nothing can be put before it: give it a priority above {COUNT}"
            )
        });
        passed.chain(first)
    }
}
