//! Addresses, routes and rules, by netlink.
//!
//! Routes are in a table of their own, which only unmarked packets are sent to: what the daemon itself sends carries
//! the mark and never comes back into the tunnel.

use std::collections::HashSet;
use std::net::IpAddr;

use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};
use tokio_util::task::AbortOnDropHandle;

use super::{HostError, HostOptions, Report, Routes};

const MAIN_TABLE: u32 = 254;
const DEFAULT_TABLE: u32 = 253;
/// Priorities of the rules, in a gap that distributions leave free.
const MARKED_TO_MAIN: u32 = 5210;
const MARKED_TO_DEFAULT: u32 = 5230;
const MARKED_NOWHERE: u32 = 5250;
const ALL_TO_MESH: u32 = 5270;

/// A rule of ours, in the form that can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Rule {
    v6: bool,
    priority: u32,
    /// Only packets with the daemon's mark.
    marked: bool,
    /// `None`: unreachable.
    table: Option<u32>,
}

/// Where a route of our table leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum To {
    Device,
    /// Past the table, to what the host's other rules say.
    Throw,
    /// Nowhere.
    Nowhere,
}

impl To {
    fn of(kind: RouteType) -> Self {
        match kind {
            RouteType::Throw => Self::Throw,
            RouteType::Unreachable => Self::Nowhere,
            _ => Self::Device,
        }
    }
}

type Route = (IpNet, To);

#[derive(Debug)]
pub(super) struct Network {
    options: HostOptions,
    handle: Handle,
    _connection: AbortOnDropHandle<()>,
    warned_of_ipv6: bool,
    /// Routes that lead into no device and are ours: nothing else tells them from those of another daemon. `None`
    /// before the first look, which takes those over that a crash has left.
    deviceless: Option<HashSet<Route>>,
}

fn failed(doing: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> HostError {
    let doing = doing.into();
    move |source| HostError::Netlink { doing, source }
}

/// Somebody else did it already, or undid it.
fn is_errno(error: &rtnetlink::Error, errno: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -errno)
}

impl Network {
    pub(super) fn open(options: HostOptions) -> Result<Self, HostError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(HostError::Open)?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok(Self { options, handle, _connection: connection, warned_of_ipv6: false, deviceless: None })
    }

    /// The device's index.
    pub(super) async fn index(&self) -> Result<u32, HostError> {
        let name = &self.options.tun_name;
        let link = self.handle.link().get().match_name(name.clone()).execute().try_next().await;
        match link {
            Ok(Some(link)) => Ok(link.header.index),
            Ok(None) => Err(HostError::NoDevice(name.clone())),
            Err(error) if is_errno(&error, libc::ENODEV) => Err(HostError::NoDevice(name.clone())),
            Err(error) => Err(failed(format!("looking for the device {name}"))(error)),
        }
    }

    /// Can the device have IPv6? It can be switched off for that alone, or for the whole host.
    fn has_ipv6(&mut self) -> bool {
        let has = !ipv6_is_off("all") && !ipv6_is_off(&self.options.tun_name);
        if !has && !std::mem::replace(&mut self.warned_of_ipv6, true) {
            tracing::warn!("IPv6 is switched off on this host: the mesh has only IPv4 here");
        }
        has
    }

    /// What the table should have. IPv6 without the device is no way around an exit node.
    fn wanted_routes(routes: &Routes, has_ipv6: bool) -> HashSet<Route> {
        let usable = |net: &&IpNet| has_ipv6 || matches!(net, IpNet::V4(_));
        let to = |list: &[IpNet], to| -> Vec<Route> {
            list.iter().filter(usable).map(|net| (net.trunc(), to)).collect()
        };
        let blocked = routes.device.iter().filter(|net| !usable(net) && net.prefix_len() == 0);
        to(&routes.device, To::Device)
            .into_iter()
            .chain(to(&routes.thrown, To::Throw))
            .chain(blocked.map(|net| (*net, To::Nowhere)))
            .collect()
    }

    pub(super) async fn apply(&mut self, addresses: &[IpNet], routes: &Routes) -> Result<Report, HostError> {
        let has_ipv6 = self.has_ipv6();
        let usable = |net: &&IpNet| has_ipv6 || matches!(net, IpNet::V4(_));
        let addresses: HashSet<IpNet> = addresses.iter().filter(usable).copied().collect();
        // Without IPv6 on the whole host there is nothing to block.
        let has_rules = has_ipv6 || !ipv6_is_off("all");
        let mut routes = Self::wanted_routes(routes, has_ipv6);
        routes.retain(|(net, _)| has_rules || matches!(net, IpNet::V4(_)));
        let index = self.index().await?;
        let mut report = Report::default();

        let present = self.addresses(index).await?;
        for net in addresses.difference(&present) {
            let added = self.handle.address().add(index, net.addr(), net.prefix_len()).execute().await;
            ignore(added, libc::EEXIST).map_err(failed(format!("adding the address {net}")))?;
            report.changes += 1;
        }
        self.rules(has_rules, &mut report).await?;
        let there = self.routes(index).await?;
        let present: HashSet<Route> = there.iter().map(|(route, _)| *route).collect();
        // Before anything is taken away, so that there is no moment without a route.
        for (net, to) in routes.difference(&present) {
            let route = self.route(*net, *to, index);
            let added = self.handle.route().add(route).replace().execute().await;
            added.map_err(failed(format!("adding the route to {net}")))?;
            if *to != To::Device {
                self.deviceless.get_or_insert_default().insert((*net, *to));
            }
            report.changes += 1;
        }
        for (route, message) in there {
            if routes.contains(&route) {
                continue;
            }
            let removed = self.handle.route().del(message).execute().await;
            ignore(removed, libc::ESRCH).map_err(failed(format!("removing the route to {}", route.0)))?;
            self.deviceless.get_or_insert_default().remove(&route);
            report.changes += 1;
        }
        for net in self.addresses(index).await?.difference(&addresses) {
            self.remove_address(index, *net).await?;
            report.changes += 1;
        }
        Ok(report)
    }

    /// Undoes it all. The device may be gone already, and everything on it.
    pub(super) async fn revert(&mut self) {
        let index = self.index().await;
        // Routes that go past the table are not gone with the device. No device has the number 0.
        if let Ok(routes) = self.routes(*index.as_ref().unwrap_or(&0)).await {
            for ((net, _), message) in routes {
                let removed = ignore(self.handle.route().del(message).execute().await, libc::ESRCH);
                log(removed, &format!("removing the route to {net}"));
            }
        }
        self.deviceless = Some(HashSet::new());
        if let Ok(index) = index
            && let Ok(addresses) = self.addresses(index).await
        {
            for net in addresses {
                if let Err(error) = self.remove_address(index, net).await {
                    tracing::warn!(%error);
                }
            }
        }
        for v6 in [false, true] {
            for (_, message) in self.present_rules(v6).await.unwrap_or_default() {
                log(self.handle.rule().del(message).execute().await, "removing a rule");
            }
        }
    }

    async fn addresses(&self, index: u32) -> Result<HashSet<IpNet>, HostError> {
        let get = self.handle.address().get().set_link_index_filter(index).execute();
        let messages: Vec<_> = get.try_collect().await.map_err(failed("reading the device's addresses"))?;
        let of = |message: &netlink_packet_route::address::AddressMessage| {
            let mut address = None;
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::Local(ip) => address = Some(*ip),
                    AddressAttribute::Address(ip) => address = address.or(Some(*ip)),
                    _ => {}
                }
            }
            IpNet::new(address?, message.header.prefix_len).ok()
        };
        // Link-local addresses are the kernel's own.
        let ours = |net: &IpNet| !matches!(net.addr(), IpAddr::V6(ip) if ip.is_unicast_link_local());
        Ok(messages.iter().filter_map(of).filter(ours).collect())
    }

    async fn remove_address(&self, index: u32, net: IpNet) -> Result<(), HostError> {
        let get =
            self.handle.address().get().set_link_index_filter(index).set_address_filter(net.addr()).execute();
        let doing = format!("removing the address {net}");
        let found: Vec<_> = get.try_collect().await.map_err(failed(doing.clone()))?;
        for message in found {
            let removed = self.handle.address().del(message).execute().await;
            ignore(removed, libc::EADDRNOTAVAIL).map_err(failed(doing.clone()))?;
        }
        Ok(())
    }

    fn route(&self, net: IpNet, to: To, index: u32) -> RouteMessage {
        let mut message = match net {
            IpNet::V4(net) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(net.addr(), net.prefix_len())
                .table_id(self.options.table)
                .build(),
            IpNet::V6(net) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(net.addr(), net.prefix_len())
                .table_id(self.options.table)
                .build(),
        };
        match to {
            To::Device => message.attributes.push(RouteAttribute::Oif(index)),
            To::Throw => message.header.kind = RouteType::Throw,
            To::Nowhere => message.header.kind = RouteType::Unreachable,
        }
        if to == To::Device && matches!(net, IpNet::V4(_)) {
            message.header.scope = RouteScope::Link;
        }
        message
    }

    /// The routes of our table that are ours: those that lead into the device, and those that lead into none.
    async fn routes(&mut self, index: u32) -> Result<Vec<(Route, RouteMessage)>, HostError> {
        let mut all = Vec::new();
        let mut of_others = false;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut ask = RouteMessage::default();
            ask.header.address_family = family;
            let get = self.handle.route().get(ask).execute();
            let messages: Vec<_> = get.try_collect().await.map_err(failed("reading the routes"))?;
            for message in messages {
                let Some((net, device)) = parse_route(&message, self.options.table) else { continue };
                match (To::of(message.header.kind), device) {
                    (To::Device, Some(device)) if device == index => all.push(((net, To::Device), message)),
                    (To::Device, _) => of_others = true,
                    (to, _) => all.push(((net, to), message)),
                }
            }
        }
        let deviceless = self.deviceless.get_or_insert_with(|| {
            let found = all.iter().map(|(route, _)| *route).filter(|(_, to)| *to != To::Device);
            if of_others { HashSet::new() } else { found.collect() }
        });
        all.retain(|(route, _)| route.1 == To::Device || deviceless.contains(route));
        Ok(all)
    }

    fn wanted_rules(&self, v6: bool) -> [Rule; 4] {
        let rule = |priority, marked, table| Rule { v6, priority, marked, table };
        [
            rule(MARKED_TO_MAIN, true, Some(MAIN_TABLE)),
            rule(MARKED_TO_DEFAULT, true, Some(DEFAULT_TABLE)),
            rule(MARKED_NOWHERE, true, None),
            rule(ALL_TO_MESH, false, Some(self.options.table)),
        ]
    }

    /// Our rules that are there, with the messages that remove them.
    async fn present_rules(&self, v6: bool) -> Result<Vec<(Rule, RuleMessage)>, HostError> {
        let version = if v6 { IpVersion::V6 } else { IpVersion::V4 };
        let get = self.handle.rule().get(version).execute();
        let messages: Vec<_> = get.try_collect().await.map_err(failed("reading the routing rules"))?;
        let wanted = self.wanted_rules(v6);
        let ours = messages.into_iter().filter_map(|message| {
            let rule = self.parse_rule(v6, &message)?;
            wanted.contains(&rule).then_some((rule, message))
        });
        Ok(ours.collect())
    }

    fn parse_rule(&self, v6: bool, message: &RuleMessage) -> Option<Rule> {
        let mut rule = Rule { v6, priority: 0, marked: false, table: Some(message.header.table.into()) };
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(priority) => rule.priority = *priority,
                RuleAttribute::FwMark(mark) if *mark == self.options.fwmark => rule.marked = true,
                RuleAttribute::FwMark(0) => {}
                RuleAttribute::FwMark(_) => return None,
                RuleAttribute::Table(table) => rule.table = Some(*table),
                RuleAttribute::Iifname(_)
                | RuleAttribute::Oifname(_)
                | RuleAttribute::Source(_)
                | RuleAttribute::Destination(_) => return None,
                _ => {}
            }
        }
        match message.header.action {
            RuleAction::ToTable => {}
            RuleAction::Unreachable => rule.table = None,
            _ => return None,
        }
        Some(rule)
    }

    async fn rules(&self, has_ipv6: bool, report: &mut Report) -> Result<(), HostError> {
        for v6 in [false, true] {
            if v6 && !has_ipv6 {
                continue;
            }
            let present: Vec<Rule> = match self.present_rules(v6).await {
                Ok(present) => present.into_iter().map(|(rule, _)| rule).collect(),
                // A kernel without IPv6 rules has nothing to compare.
                Err(_) if v6 => continue,
                Err(error) => return Err(error),
            };
            for rule in self.wanted_rules(v6).iter().filter(|rule| !present.contains(rule)) {
                self.add_rule(*rule).await?;
                report.changes += 1;
            }
        }
        Ok(())
    }

    async fn add_rule(&self, rule: Rule) -> Result<(), HostError> {
        let add = self.handle.rule().add().priority(rule.priority);
        let add = match rule.table {
            Some(table) => add.table_id(table).action(RuleAction::ToTable),
            None => add.table_id(0).action(RuleAction::Unreachable),
        };
        let attributes = |message: &mut RuleMessage| {
            if rule.marked {
                message.attributes.push(RuleAttribute::FwMark(self.options.fwmark));
                message.attributes.push(RuleAttribute::FwMask(self.options.fwmark_mask));
            }
        };
        let added = if rule.v6 {
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
}

fn ipv6_is_off(scope: &str) -> bool {
    let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
    std::fs::read_to_string(path).map_or(true, |text| text.trim() != "0")
}

/// The destination and the device of a route, if it is one of this table.
fn parse_route(message: &RouteMessage, table: u32) -> Option<(IpNet, Option<u32>)> {
    let mut of = u32::from(message.header.table);
    let (mut destination, mut device) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => of = *id,
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => destination = Some(IpAddr::V6(*ip)),
            RouteAttribute::Oif(index) => device = Some(*index),
            _ => {}
        }
    }
    let everywhere = if message.header.address_family == AddressFamily::Inet {
        IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)
    };
    let net = IpNet::new(destination.unwrap_or(everywhere), message.header.destination_prefix_length).ok()?;
    (of == table).then_some((net, device))
}

fn ignore(result: Result<(), rtnetlink::Error>, errno: i32) -> Result<(), rtnetlink::Error> {
    match result {
        Err(error) if is_errno(&error, errno) => Ok(()),
        other => other,
    }
}

fn log(result: Result<(), rtnetlink::Error>, doing: &str) {
    if let Err(error) = result {
        tracing::warn!(%error, "{doing} failed");
    }
}
