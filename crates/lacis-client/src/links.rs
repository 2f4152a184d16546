//! Which way this host is connected, and the news when that changes: netlink tells of links, addresses, routes and
//! rules; what they mean together is read anew each time, so that a lost message does no lasting harm.
//!
//! The way out is asked of the kernel, for a packet with the daemon's mark: that is the way its own packets take,
//! whatever the main table, other VPNs' rules and the mesh's own table say to everybody else.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::interfaces::{self, Devices, Lan};
use crate::metered::Metered;

/// All that says how this host is connected.
pub(crate) const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];
/// What belongs together comes within this time of its first message.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// It is looked again even without any message.
const RECHECK: Duration = Duration::from_mins(1);
/// After netlink failed.
const RETRY: Duration = Duration::from_secs(2);
/// States that the receiver has not taken yet.
const KEPT: usize = 8;
/// Somewhere on the internet, where nobody has a route of his own to: both are of withdrawn special ranges (RFC 7526,
/// RFC 4843). Nothing is ever sent there.
pub(crate) const SOMEWHERE_V4: Ipv4Addr = Ipv4Addr::new(192, 88, 99, 1);
pub(crate) const SOMEWHERE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0x10, 0, 0, 0, 0, 0, 1);

/// The way to the internet in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Uplink {
    /// Index of the device.
    pub(crate) device: u32,
    /// The next router; none on point-to-point links.
    pub(crate) gateway: Option<IpAddr>,
    /// The address from which packets go.
    pub(crate) source: Option<IpAddr>,
}

/// How this host is connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkState {
    /// Addresses at which others may find it: see [`interfaces::devices`].
    pub(crate) addresses: Vec<IpAddr>,
    /// Those of them that are on the devices of the ways below.
    pub(crate) on_uplinks: Vec<IpAddr>,
    pub(crate) default_v4: Option<Uplink>,
    pub(crate) default_v6: Option<Uplink>,
    /// What it is connected to. Of no consequence to paths.
    pub(crate) lan: Lan,
    /// Each byte costs: what is not needed is not sent.
    pub(crate) metered: bool,
}

/// What a change means for the paths to peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// There are other candidates; the paths in use go on.
    Minor,
    /// Packets leave by another device, router or address: nothing that was known of any path holds.
    Major,
}

impl LinkState {
    /// What happened between `before` and this.
    pub(crate) fn change_since(&self, before: &Self) -> Option<Change> {
        if *self == (Self { lan: self.lan.clone(), ..before.clone() }) {
            return None;
        }
        let ways = |state: &Self| (state.default_v4, state.default_v6);
        let lost = before.on_uplinks.iter().any(|ip| !self.addresses.contains(ip));
        Some(if ways(self) != ways(before) || lost { Change::Major } else { Change::Minor })
    }
}

/// Why it is not known how this host is connected.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("netlink cannot be opened: {0}")]
    Open(io::Error),
    #[error("netlink does not tell how this host is connected: {0}")]
    Read(#[from] rtnetlink::Error),
    #[error("netlink has ended")]
    Closed,
}

/// The state now, and again after each change, for as long as the receiver is there. `tun_index` is the mesh's own
/// device, which does not count.
pub(crate) fn watch(tun_index: u32, fwmark: Option<u32>) -> mpsc::Receiver<LinkState> {
    let (states, receiver) = mpsc::channel(KEPT);
    tokio::spawn(async move {
        let mut last = None;
        while let Err(error) = follow(tun_index, fwmark, &mut last, &states).await {
            tracing::warn!(%error, "changes of the network may be noticed late; trying again");
            tokio::select! { () = sleep(RETRY) => {}, () = states.closed() => return }
        }
    });
    receiver
}

/// Returns when the receiver is gone.
async fn follow(
    tun_index: u32,
    fwmark: Option<u32>,
    last: &mut Option<LinkState>,
    states: &mpsc::Sender<LinkState>,
) -> Result<(), LinkError> {
    let (connection, handle, mut messages) =
        rtnetlink::new_multicast_connection(&GROUPS).map_err(LinkError::Open)?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let metered = Metered::open().await;
    loop {
        let state = LinkState { metered: metered.ask().await, ..read(&handle, tun_index, fwmark).await? };
        if last.as_ref() != Some(&state) {
            *last = Some(state.clone());
            if states.send(state).await.is_err() {
                return Ok(());
            }
        }
        // Any message will do, also that some were lost.
        tokio::select! {
            message = messages.next() => drop(message.ok_or(LinkError::Closed)?),
            () = sleep(RECHECK) => {}
            () = states.closed() => return Ok(()),
        }
        let settled = sleep(DEBOUNCE);
        tokio::pin!(settled);
        loop {
            tokio::select! {
                () = &mut settled => break,
                message = messages.next() => drop(message.ok_or(LinkError::Closed)?),
            }
        }
    }
}

async fn read(handle: &Handle, tun_index: u32, fwmark: Option<u32>) -> Result<LinkState, rtnetlink::Error> {
    let devices = interfaces::devices(handle, tun_index).await?;
    let default_v4 = way_out(handle, SOMEWHERE_V4.into(), fwmark).await?;
    let default_v6 = way_out(handle, SOMEWHERE_V6.into(), fwmark).await?;
    Ok(combine(devices, default_v4, default_v6))
}

fn combine(devices: Devices, default_v4: Option<Uplink>, default_v6: Option<Uplink>) -> LinkState {
    let working = |uplink: &Uplink| devices.working.contains(&uplink.device);
    let (default_v4, default_v6) = (default_v4.filter(working), default_v6.filter(working));
    let is_uplink = |device: u32| default_v4.iter().chain(&default_v6).any(|uplink| uplink.device == device);
    let on_uplinks = devices.addresses.iter().filter(|address| is_uplink(address.device));
    let uplinks: Vec<u32> = default_v4.iter().chain(&default_v6).map(|uplink| uplink.device).collect();
    LinkState {
        on_uplinks: on_uplinks.map(|address| address.ip).collect(),
        addresses: devices.addresses.iter().map(|address| address.ip).collect(),
        lan: Lan::new(&devices, &uplinks),
        default_v4,
        default_v6,
        metered: false,
    }
}

/// The IPv4 way to the internet, if it is known and not by the mesh's own device.
pub(crate) async fn uplink_v4(tun_index: u32, fwmark: Option<u32>) -> Option<Uplink> {
    let (connection, handle, _) = rtnetlink::new_connection().ok()?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let way = way_out(&handle, SOMEWHERE_V4.into(), fwmark).await;
    way.ok().flatten().filter(|uplink| uplink.device != tun_index)
}

/// The way that a marked packet to there takes.
async fn way_out(
    handle: &Handle,
    to: IpAddr,
    fwmark: Option<u32>,
) -> Result<Option<Uplink>, rtnetlink::Error> {
    let mut ask = RouteMessage::default();
    (ask.header.address_family, ask.header.destination_prefix_length) =
        if to.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) };
    ask.attributes.push(RouteAttribute::Destination(to.into()));
    ask.attributes.extend(fwmark.map(RouteAttribute::Mark));
    match handle.route().get(ask).execute().try_next().await {
        Ok(route) => Ok(route.as_ref().and_then(uplink)),
        // The kernel's way to say that there is no way.
        Err(rtnetlink::Error::NetlinkError(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn uplink(route: &RouteMessage) -> Option<Uplink> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    };
    let (mut device, mut gateway, mut source) = (None, None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            // IPv4 by a router that is known by its IPv6 address.
            RouteAttribute::Via(RouteVia::Inet6(router)) => gateway = Some(IpAddr::V6(*router)),
            RouteAttribute::PrefSource(address) => source = ip(address),
            _ => {}
        }
    }
    Some(Uplink { device: device?, gateway, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interfaces::Address;

    fn by(device: u32, gateway: &str, source: &str) -> Uplink {
        Uplink { device, gateway: gateway.parse().ok(), source: source.parse().ok() }
    }

    fn state(addresses: &[(&str, u32)], default_v4: Option<Uplink>) -> LinkState {
        let address = |(ip, device): &(&str, u32)| Address { ip: ip.parse().unwrap(), device: *device };
        let addresses: Vec<_> = addresses.iter().map(address).collect();
        let working = [1, 2, 3].into();
        combine(Devices { working, addresses, ..Devices::default() }, default_v4, None)
    }

    #[test]
    fn a_route_is_read() {
        let mut route = RouteMessage::default();
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![
            RouteAttribute::Destination(RouteAddress::Inet(SOMEWHERE_V4)),
            RouteAttribute::Oif(2),
            RouteAttribute::Gateway(RouteAddress::Inet(Ipv4Addr::new(192, 168, 1, 1))),
            RouteAttribute::PrefSource(RouteAddress::Inet(Ipv4Addr::new(192, 168, 1, 7))),
        ];
        assert_eq!(uplink(&route), Some(by(2, "192.168.1.1", "192.168.1.7")));
        route.header.kind = RouteType::BlackHole;
        assert_eq!(uplink(&route), None);
    }

    #[test]
    fn another_router_device_or_address_is_a_major_change() {
        let home = state(&[("192.168.1.7", 2)], Some(by(2, "192.168.1.1", "192.168.1.7")));
        assert_eq!(home.change_since(&home), None);
        for other in [
            state(&[("192.168.1.7", 2)], Some(by(2, "192.168.1.254", "192.168.1.7"))),
            state(&[("192.168.1.7", 2), ("10.0.0.7", 3)], Some(by(3, "10.0.0.1", "10.0.0.7"))),
            state(&[("192.168.1.8", 2)], Some(by(2, "192.168.1.1", "192.168.1.8"))),
            state(&[], None),
        ] {
            assert_eq!(other.change_since(&home), Some(Change::Major), "{other:?}");
            assert_eq!(home.change_since(&other), Some(Change::Major), "{other:?}");
        }
    }

    #[test]
    fn what_comes_and_goes_beside_the_uplink_is_a_minor_change() {
        let way = Some(by(2, "192.168.1.1", "192.168.1.7"));
        let home = state(&[("192.168.1.7", 2)], way);
        let with_containers = state(&[("192.168.1.7", 2), ("172.18.0.1", 3)], way);
        assert_eq!(with_containers.change_since(&home), Some(Change::Minor));
        assert_eq!(home.change_since(&with_containers), Some(Change::Minor));
        let one_more = state(&[("192.168.1.7", 2), ("192.168.1.9", 2)], way);
        assert_eq!(one_more.change_since(&home), Some(Change::Minor));
        assert_eq!(home.change_since(&one_more), Some(Change::Major), "paths may have used it");
    }

    #[test]
    fn another_network_beside_is_no_change_for_paths() {
        let home = state(&[("192.168.1.7", 2)], None);
        let lan = Lan { networks: vec!["172.18.0.0/16".parse().unwrap()], internal: Vec::new() };
        let other = LinkState { lan, ..home.clone() };
        assert_ne!(other, home);
        assert_eq!(other.change_since(&home), None);
    }

    #[test]
    fn a_way_by_a_dead_device_or_the_meshes_own_is_none() {
        let gone = state(&[], Some(by(9, "192.168.1.1", "192.168.1.7")));
        assert_eq!(gone.default_v4, None);
    }
}
