//! Addresses, routes and rules, by netlink.
//!
//! Routes are in a table of their own, which only unmarked packets are sent to: what the daemon itself sends carries
//! the mark and never comes back into the tunnel. With an exit node a second table, the guard, refuses what the first
//! should have taken: each of them, and each of the rules that lead there, may be swept away without a packet that goes
//! past. Neither needs the device, so both outlive the daemon.

use std::collections::HashSet;
use std::net::IpAddr;

use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use tokio_util::task::AbortOnDropHandle;

use super::monitor::Monitor;
use super::rules::{Mesh, Rules};
use super::{HostError, HostOptions, Report, Routes};

/// The smallest MTU with which the kernel leaves a device its IPv6 (RFC 8200, section 5).
const MIN_MTU_V6: u32 = 1280;
const EVERYTHING: [&str; 2] = ["0.0.0.0/0", "::/0"];

/// Where a route of ours leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum To {
    Device,
    /// Past the table, to what the host's other rules say.
    Throw,
    Unreachable,
}

impl To {
    fn of(kind: RouteType) -> Self {
        match kind {
            RouteType::Throw => Self::Throw,
            RouteType::Unreachable => Self::Unreachable,
            _ => Self::Device,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Route {
    table: u32,
    net: IpNet,
    to: To,
}

#[derive(Debug)]
pub(super) struct Network {
    options: HostOptions,
    handle: Handle,
    /// As `handle`, with the kernel choosing among routes: a host may have a million.
    tables: Handle,
    _connections: [AbortOnDropHandle<()>; 2],
    /// The device that the tunnel has opened.
    device: Option<u32>,
    /// Of IPv4 and IPv6.
    rules: [Rules; 2],
    monitor: Option<Monitor>,
}

pub(super) fn failed(doing: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> HostError {
    let doing = doing.into();
    move |source| HostError::Netlink { doing, source }
}

/// Another program did it already, or undid it.
fn is_errno(error: &rtnetlink::Error, errno: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -errno)
}

impl Network {
    pub(super) fn open(options: HostOptions) -> Result<Self, HostError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(HostError::Open)?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        // Before Linux 4.20 the kernel does not choose, which costs time only.
        let (choosing, tables, _) = rtnetlink::new_connection_with_strict_check()
            .or_else(|_| rtnetlink::new_connection())
            .map_err(HostError::Open)?;
        let choosing = AbortOnDropHandle::new(tokio::spawn(choosing));
        Ok(Self {
            rules: [Rules::new(false, &options), Rules::new(true, &options)],
            options,
            handle,
            tables,
            _connections: [connection, choosing],
            device: None,
            monitor: None,
        })
    }

    /// The tunnel has opened this device: from now on changes to it, to our routes and to rules are noticed.
    pub(super) fn watch(
        &mut self,
        device: u32,
        nft_table: Option<String>,
    ) -> std::sync::Arc<tokio::sync::Notify> {
        self.device = Some(device);
        let monitor = Monitor::start(device, [self.options.table, self.options.guard_table], nft_table);
        let changed = monitor.changed();
        self.monitor = Some(monitor);
        changed
    }

    /// The device's index.
    pub(super) async fn index(&self) -> Result<u32, HostError> {
        Ok(self.link().await?.header.index)
    }

    async fn link(&self) -> Result<LinkMessage, HostError> {
        let name = &self.options.tun_name;
        let get = self.handle.link().get();
        let get = match self.device {
            Some(index) => get.match_index(index),
            None => get.match_name(name.clone()),
        };
        let link = match get.execute().try_next().await {
            Ok(Some(link)) => link,
            Ok(None) => return Err(HostError::NoDevice(name.clone())),
            Err(error) if is_errno(&error, libc::ENODEV) => return Err(HostError::NoDevice(name.clone())),
            Err(error) => return Err(failed(format!("looking for the device {name}"))(error)),
        };
        let now = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(now) => Some(now),
            _ => None,
        });
        match now {
            Some(now) if now != name => Err(HostError::Renamed { name: name.clone(), now: now.clone() }),
            _ => Ok(link),
        }
    }

    /// Is the mesh's device one that a running daemon has open?
    pub(super) async fn is_in_use(&self) -> bool {
        self.link().await.is_ok_and(|link| link.header.flags.contains(LinkFlags::Running))
    }

    /// Can the device have IPv6? It can be switched off for that alone, or for the whole host.
    fn has_ipv6(&self) -> bool {
        !ipv6_is_off("all") && !ipv6_is_off(&self.options.tun_name)
    }

    /// What is wrong with the device, in words.
    fn ailments(&self, addresses: &[IpNet], link: &LinkMessage) -> Vec<String> {
        let name = &self.options.tun_name;
        let mut found = Vec::new();
        let mtu = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
        if let Some(mtu) = mtu.filter(|mtu| *mtu != self.options.mtu) {
            let wanted = self.options.mtu;
            let without = if mtu < MIN_MTU_V6 { ", which is too little for IPv6" } else { "" };
            found.push(format!(
                "the MTU of {name} is {mtu}{without}; the tunnel's is {wanted}: `ip link set {name} mtu {wanted}`"
            ));
        }
        let switched_off = |of: &&str| ipv6_switch(of).is_some_and(|on| on != "0");
        let too_small = mtu.is_some_and(|mtu| mtu < MIN_MTU_V6);
        if !too_small
            && addresses.iter().any(|net| matches!(net, IpNet::V6(_)))
            && let Some(of) = ["all", name.as_str()].into_iter().find(switched_off)
        {
            found.push(format!(
                "IPv6 is switched off, so the mesh has only IPv4 here: `sysctl -w net.ipv6.conf.{of}.disable_ipv6=0`"
            ));
        }
        found
    }

    /// What the tables should have.
    fn wanted_routes(&self, routes: &Routes, has_ipv6: bool) -> HashSet<Route> {
        let Self { options: HostOptions { table, guard_table, .. }, .. } = self;
        let device = routes.device.iter().filter(|net| has_ipv6 || matches!(net, IpNet::V4(_)));
        let mut wanted: HashSet<Route> =
            device.map(|net| Route { table: *table, net: net.trunc(), to: To::Device }).collect();
        for table in [*table, *guard_table].into_iter().take(if routes.guard { 2 } else { 1 }) {
            wanted.extend(routes.thrown.iter().map(|net| Route { table, net: net.trunc(), to: To::Throw }));
            if routes.guard {
                let all = EVERYTHING.iter().filter_map(|net| net.parse().ok());
                wanted.extend(all.map(|net| Route { table, net, to: To::Unreachable }));
            }
        }
        wanted
    }

    pub(super) async fn apply(&mut self, addresses: &[IpNet], routes: &Routes) -> Result<Report, HostError> {
        let has_ipv6 = self.has_ipv6();
        // A kernel without IPv6 has nothing to refuse.
        let has_rules = ipv6_switch("all").is_some();
        let mut wanted = self.wanted_routes(routes, has_ipv6);
        wanted.retain(|route| has_rules || matches!(route.net, IpNet::V4(_)));
        let mut report = Report::default();

        // What needs no device comes first: it is what is left if the rest fails.
        let link = self.link().await;
        let index = link.as_ref().map_or(0, |link| link.header.index);
        let there = self.routes(index).await?;
        let present: HashSet<Route> = there.iter().map(|(route, _)| *route).collect();
        let missing = |device: bool| {
            wanted.difference(&present).filter(move |route| (route.to == To::Device) == device).copied()
        };
        for route in missing(false) {
            self.add_route(route, index).await?;
            report.changes += 1;
        }
        let families = if has_rules { 2 } else { 1 };
        for rules in self.rules.iter_mut().take(families) {
            report.changes += rules.add_missing(&self.handle).await?;
        }

        let link = link?;
        if !link.header.flags.contains(LinkFlags::Up) {
            let up = self.handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await;
            up.map_err(failed(format!("setting {} up", self.options.tun_name)))?;
            report.changes += 1;
        }
        let usable = |net: &&IpNet| has_ipv6 || matches!(net, IpNet::V4(_));
        let own: HashSet<IpNet> = addresses.iter().filter(usable).copied().collect();
        let present = self.addresses(index).await?;
        for net in own.difference(&present) {
            let added = self.handle.address().add(index, net.addr(), net.prefix_len()).execute().await;
            ignore(added, libc::EEXIST).map_err(failed(format!("adding the address {net}")))?;
            report.changes += 1;
        }
        // Before anything is taken away, so that there is no moment without a route.
        for route in missing(true) {
            self.add_route(route, index).await?;
            report.changes += 1;
        }
        let mesh = Mesh { addresses, routes: &routes.device };
        for rules in self.rules.iter_mut().take(families) {
            report.changes += rules.put_first(&self.handle, mesh).await?;
            report
                .missing
                .extend(rules.found().filter(|line| !report.missing.contains(line)).collect::<Vec<_>>());
        }
        if let Some(monitor) = &self.monitor {
            monitor.follow_tables(self.rules.iter().flat_map(|rules| rules.tables_before()).copied());
        }
        for (route, message) in there {
            if wanted.contains(&route) {
                continue;
            }
            let removed = self.handle.route().del(message).execute().await;
            ignore(removed, libc::ESRCH).map_err(failed(format!("removing the route to {}", route.net)))?;
            report.changes += 1;
        }
        for net in self.addresses(index).await?.difference(&own) {
            self.remove_address(index, *net).await?;
            report.changes += 1;
        }
        report.missing.extend(self.ailments(addresses, &link));
        Ok(report)
    }

    async fn add_route(&self, route: Route, index: u32) -> Result<(), HostError> {
        let added = self.handle.route().add(self.route(route, index)).replace().execute().await;
        added.map_err(failed(format!("adding the route to {}", route.net)))
    }

    /// Undoes it all. The device may be gone already, and everything on it.
    pub(super) async fn revert(&mut self) {
        let index = self.index().await;
        // Routes that lead into no device are not gone with it. No device has the number 0.
        if let Ok(routes) = self.routes(*index.as_ref().unwrap_or(&0)).await {
            for (route, message) in routes {
                let removed = ignore(self.handle.route().del(message).execute().await, libc::ESRCH);
                log(removed, &format!("removing the route to {}", route.net));
            }
        }
        if let Ok(index) = index
            && let Ok(addresses) = self.addresses(index).await
        {
            for net in addresses {
                if let Err(error) = self.remove_address(index, net).await {
                    tracing::warn!(%error);
                }
            }
        }
        for rules in &mut self.rules {
            rules.remove(&self.handle).await;
        }
    }

    /// Names of devices of other daemons, whose routes are in the mesh's table as well.
    pub(super) async fn neighbours(&self) -> Vec<String> {
        let index = self.index().await.unwrap_or(0);
        let mut found: Vec<u32> = Vec::new();
        for message in self.table(self.options.table).await.unwrap_or_default() {
            let device = parse_route(&message, self.options.table).and_then(|(_, device, _)| device);
            found.extend(
                device.filter(|device| To::of(message.header.kind) == To::Device && *device != index),
            );
        }
        found.sort_unstable();
        found.dedup();
        let mut names = Vec::new();
        for device in found {
            let link = self.handle.link().get().match_index(device).execute().try_next().await;
            names.extend(link.ok().flatten().into_iter().flat_map(|link| link.attributes).find_map(
                |attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                },
            ));
        }
        names
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

    fn route(&self, route: Route, index: u32) -> RouteMessage {
        let Route { table, net, to } = route;
        let mut message = match net {
            IpNet::V4(net) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(net.addr(), net.prefix_len())
                .table_id(table)
                .build(),
            IpNet::V6(net) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(net.addr(), net.prefix_len())
                .table_id(table)
                .build(),
        };
        match to {
            To::Device => message.attributes.push(RouteAttribute::Oif(index)),
            To::Throw => message.header.kind = RouteType::Throw,
            To::Unreachable => message.header.kind = RouteType::Unreachable,
        }
        if to != To::Device {
            message.attributes.push(RouteAttribute::Priority(metric(&self.options.tun_name)));
        } else if matches!(net, IpNet::V4(_)) {
            message.header.scope = RouteScope::Link;
        }
        message
    }

    /// All routes of a table.
    async fn table(&self, table: u32) -> Result<Vec<RouteMessage>, HostError> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut ask = RouteMessage::default();
            ask.header.address_family = family;
            ask.attributes.push(RouteAttribute::Table(table));
            let get = self.tables.route().get(ask).execute();
            let found: Result<Vec<_>, _> = get.try_collect().await;
            match found {
                Ok(found) => all.extend(found),
                // A table that never had a route of this family.
                Err(error) if is_errno(&error, libc::ENOENT) => {}
                Err(error) => return Err(failed("reading the routes")(error)),
            }
        }
        Ok(all)
    }

    /// Our routes: those that lead into the device, and those that lead into none and have our metric. Other daemons
    /// may use the same tables.
    async fn routes(&self, index: u32) -> Result<Vec<(Route, RouteMessage)>, HostError> {
        let own_metric = metric(&self.options.tun_name);
        let mut all = Vec::new();
        for table in [self.options.table, self.options.guard_table] {
            for message in self.table(table).await? {
                let Some((net, device, metric)) = parse_route(&message, table) else { continue };
                let to = To::of(message.header.kind);
                let ours = if to == To::Device { device == Some(index) } else { metric == own_metric };
                if ours {
                    all.push((Route { table, net, to }, message));
                }
            }
        }
        Ok(all)
    }
}

/// The metric of our routes that lead into no device: below those that do, and another for each device, so that what a
/// daemon that was killed left is found again and what another one has made is not.
fn metric(device: &str) -> u32 {
    // FNV-1a.
    let hash =
        device.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash | 0x8000_0000
}

fn ipv6_switch(scope: &str) -> Option<String> {
    super::forwarding::read_sysctl(&format!("net/ipv6/conf/{scope}/disable_ipv6"))
}

fn ipv6_is_off(scope: &str) -> bool {
    ipv6_switch(scope).is_none_or(|value| value != "0")
}

/// The destination, the device and the metric of a route, if it is one of this table.
fn parse_route(message: &RouteMessage, table: u32) -> Option<(IpNet, Option<u32>, u32)> {
    let mut of = u32::from(message.header.table);
    let (mut destination, mut device, mut metric) = (None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => of = *id,
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => destination = Some(IpAddr::V6(*ip)),
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::Priority(priority) => metric = *priority,
            _ => {}
        }
    }
    let everywhere = if message.header.address_family == AddressFamily::Inet {
        IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)
    };
    let net = IpNet::new(destination.unwrap_or(everywhere), message.header.destination_prefix_length).ok()?;
    (of == table).then_some((net, device, metric))
}

pub(super) fn ignore(result: Result<(), rtnetlink::Error>, errno: i32) -> Result<(), rtnetlink::Error> {
    match result {
        Err(error) if is_errno(&error, errno) => Ok(()),
        other => other,
    }
}

pub(super) fn log(result: Result<(), rtnetlink::Error>, doing: &str) {
    if let Err(error) = result {
        tracing::warn!(%error, "{doing} failed");
    }
}
