//! The addresses of this host at which others may find it, candidates for its endpoints; and the networks around it.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use lacis_wire::control::endpoint_type::{EXPLICIT, LOCAL, PORT_MAPPED, STUN, STUN_LOCAL_PORT};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::Handle;

/// Control servers cut long lists; ours stays far below.
const MOST: usize = 32;
/// Privacy extensions give an interface many addresses of one subnet.
const PER_V6_SUBNET: usize = 2;

/// An address, and the index of the device that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) ip: IpAddr,
    pub(crate) device: u32,
}

/// What the kernel says of this host's devices.
#[derive(Clone, Debug, Default)]
pub(crate) struct Devices {
    /// Those that are up and connected.
    pub(crate) working: HashSet<u32>,
    /// Their addresses, as far as they can be endpoints.
    pub(crate) addresses: Vec<Address>,
    /// Networks that they are connected to, whatever their addresses; with the index of the device.
    pub(crate) networks: Vec<(IpNet, u32)>,
    /// Bridges that lead to nothing but containers and virtual machines of this host.
    pub(crate) inner_bridges: HashSet<u32>,
}

/// The networks that this host is connected to, the mesh and loopback apart; sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lan {
    pub(crate) networks: Vec<IpNet>,
    /// Those of them that are inside this host, of containers and virtual machines.
    pub(crate) internal: Vec<IpNet>,
}

impl Lan {
    /// `uplinks`: devices that lead to the internet. What they are connected to is outside, even by a bridge.
    pub(crate) fn new(devices: &Devices, uplinks: &[u32]) -> Self {
        let of = |wanted: &dyn Fn(u32) -> bool| {
            let nets: BTreeSet<IpNet> =
                devices.networks.iter().filter(|(_, device)| wanted(*device)).map(|(net, _)| *net).collect();
            nets.into_iter().collect()
        };
        let internal = |device| devices.inner_bridges.contains(&device) && !uplinks.contains(&device);
        Self { networks: of(&|_| true), internal: of(&internal) }
    }
}

/// Devices and addresses of all interfaces, as far as they can be endpoints: not those of the mesh's own device or of
/// another mesh's, not link-local, loopback only if there is nothing else.
pub(crate) async fn devices(handle: &Handle, tun_index: u32) -> Result<Devices, rtnetlink::Error> {
    let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
    let addresses: Vec<AddressMessage> = handle.address().get().execute().try_collect().await?;
    Ok(select(&links, &addresses, tun_index))
}

fn select(links: &[LinkMessage], addresses: &[AddressMessage], tun_index: u32) -> Devices {
    let indexes = |wanted: &dyn Fn(&LinkMessage) -> bool| -> HashSet<u32> {
        links.iter().filter(|link| wanted(link)).map(|link| link.header.index).collect()
    };
    let working = indexes(&|link| {
        link.header.index != tun_index && link.header.flags.contains(LinkFlags::Up | LinkFlags::Running)
    });
    // A device without a link layer is a tunnel; one with an address of the mesh's ranges belongs to another mesh,
    // and a mesh in a mesh helps nobody. A LAN or an uplink may have such addresses.
    let tunnels = indexes(&|link| link.header.link_layer_type == LinkLayerType::None);
    let found = addresses.iter().filter(|message| is_settled(message)).filter_map(|message| {
        let device = message.header.index;
        let address = Address { ip: ip(message)?, device };
        let foreign_mesh = tunnels.contains(&device) && lacis_dns::is_mesh(address.ip);
        (working.contains(&device) && !foreign_mesh).then_some(address)
    });
    let networks = addresses
        .iter()
        .filter(|message| working.contains(&message.header.index))
        .flat_map(|message| networks(message).into_iter().map(|net| (net, message.header.index)))
        .collect();
    let addresses = usable(found.collect());
    Devices { working, addresses, networks, inner_bridges: inner_bridges(links) }
}

/// Bridges whose ports are all those of containers and virtual machines, or that have none.
fn inner_bridges(links: &[LinkMessage]) -> HashSet<u32> {
    let kind = |link: &LinkMessage| {
        link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(info) => info.iter().find_map(|part| match part {
                LinkInfo::Kind(kind) => Some(kind.clone()),
                _ => None,
            }),
            _ => None,
        })
    };
    let master = |link: &LinkMessage| {
        link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(*index),
            _ => None,
        })
    };
    let leads_out = |link: &&LinkMessage| !matches!(kind(link), Some(InfoKind::Veth | InfoKind::Tun));
    let outside: HashSet<u32> = links.iter().filter(leads_out).filter_map(master).collect();
    let bridges = links.iter().filter(|link| kind(link) == Some(InfoKind::Bridge));
    bridges.map(|link| link.header.index).filter(|index| !outside.contains(index)).collect()
}

/// What an address connects its device to. On a point-to-point link that is the other end, and the address alone.
fn networks(message: &AddressMessage) -> Vec<IpNet> {
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            _ => {}
        }
    }
    let own = local.filter(|local| other != Some(*local)).map(IpNet::from);
    let net = other.or(local).and_then(|ip| IpNet::new(ip, message.header.prefix_len).ok());
    let is_lan = |net: &IpNet| match net.addr() {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => false,
        ip => !ip.is_loopback() && net.prefix_len() != 0,
    };
    net.map(|net| net.trunc()).into_iter().chain(own).filter(is_lan).collect()
}

/// Not one that is still being checked, that somebody else has, or that is about to go.
fn is_settled(message: &AddressMessage) -> bool {
    let unsettled = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
    let of = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    };
    let flags = message.attributes.iter().find_map(of);
    let flags = flags.unwrap_or(AddressFlags::from_bits_retain(message.header.flags.bits().into()));
    !flags.intersects(unsettled)
}

fn ip(message: &AddressMessage) -> Option<IpAddr> {
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    find(|attribute| if let AddressAttribute::Local(ip) = attribute { Some(*ip) } else { None }).or_else(
        || find(|attribute| if let AddressAttribute::Address(ip) = attribute { Some(*ip) } else { None }),
    )
}

/// 100.64.0.0/10: carriers and meshes use it.
pub(crate) fn is_shared(ip: Ipv4Addr) -> bool {
    u32::from(ip) & 0xffc0_0000 == u32::from(Ipv4Addr::new(100, 64, 0, 0))
}

fn usable(all: Vec<Address>) -> Vec<Address> {
    let mut ordinary: Vec<Address> = Vec::new();
    let mut poor = Vec::new();
    let mut loopback = Vec::new();
    for address in all {
        match address.ip {
            ip if ip.is_unspecified() || ip.is_multicast() => {}
            ip if ip.is_loopback() => loopback.push(address),
            IpAddr::V4(v4) if v4.is_link_local() => poor.push(address),
            IpAddr::V6(v6) if v6.is_unicast_link_local() => {}
            IpAddr::V6(v6) if v6.is_unique_local() => poor.push(address),
            IpAddr::V6(v6) => {
                let subnet = |other: &&Address| matches!(other.ip, IpAddr::V6(o) if o.segments()[..4] == v6.segments()[..4]);
                if ordinary.iter().filter(subnet).count() < PER_V6_SUBNET {
                    ordinary.push(address);
                }
            }
            IpAddr::V4(_) => ordinary.push(address),
        }
    }
    let mut chosen = [ordinary, poor, loopback].into_iter().find(|some| !some.is_empty()).unwrap_or_default();
    chosen.truncate(MOST);
    chosen
}

/// Whatever may be an endpoint of this node, by where it comes from.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sources<'a> {
    /// What the router maps to this node's port.
    pub(crate) mapped: Option<SocketAddrV4>,
    /// What servers saw of this node.
    pub(crate) seen: &'a [SocketAddr],
    /// The address that servers saw with the port that is configured here: somebody may have told the router to
    /// forward it.
    pub(crate) forwarded: Option<SocketAddr>,
    /// What the user says.
    pub(crate) declared: &'a [SocketAddr],
    /// This host's own addresses.
    pub(crate) own: &'a [IpAddr],
    /// The tunnel's UDP ports, IPv4 and IPv6; 0 for none.
    pub(crate) ports: (u16, u16),
}

/// The endpoints of this node and the type of each, the most promising first (the NAT dossier, section 15.3).
pub(crate) fn endpoints(sources: &Sources<'_>) -> (Vec<SocketAddr>, Vec<u8>) {
    let own = sources.own.iter().filter_map(|ip| {
        let port = if ip.is_ipv4() { sources.ports.0 } else { sources.ports.1 };
        (port != 0).then_some((SocketAddr::new(*ip, port), LOCAL))
    });
    let typed = |addresses: &[SocketAddr], kind: u8| -> Vec<(SocketAddr, u8)> {
        addresses.iter().map(|address| (*address, kind)).collect()
    };
    let mapped = sources.mapped.map(|address| (SocketAddr::V4(address), PORT_MAPPED));
    let found = mapped
        .into_iter()
        .chain(typed(sources.seen, STUN))
        .chain(sources.forwarded.map(|address| (address, STUN_LOCAL_PORT)))
        .chain(typed(sources.declared, EXPLICIT))
        .chain(own);
    let mut all: Vec<(SocketAddr, u8)> = Vec::new();
    for (address, kind) in found {
        if all.iter().all(|(known, _)| *known != address) {
            all.push((address, kind));
        }
    }
    all.into_iter().unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn usable_of(texts: &[&str]) -> Vec<IpAddr> {
        let all = ips(texts).into_iter().map(|ip| Address { ip, device: 1 }).collect();
        usable(all).into_iter().map(|address| address.ip).collect()
    }

    fn link(index: u32, kind: LinkLayerType, flags: LinkFlags) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.link_layer_type = kind;
        link.header.flags = flags;
        link
    }

    fn address(device: u32, ip: &str, flags: AddressFlags) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.index = device;
        message.attributes.push(AddressAttribute::Address(ip.parse().unwrap()));
        message.attributes.push(AddressAttribute::Flags(flags));
        message
    }

    #[test]
    fn link_local_and_private_addresses_give_way_to_better_ones() {
        let all = ["127.0.0.1", "192.168.1.2", "fe80::1", "fd00::1", "169.254.3.4"];
        assert_eq!(usable_of(&all), ips(&["192.168.1.2"]));
        assert_eq!(usable_of(&["127.0.0.1", "169.254.3.4"]), ips(&["169.254.3.4"]));
        assert_eq!(usable_of(&["127.0.0.1", "::1"]), ips(&["127.0.0.1", "::1"]));
    }

    #[test]
    fn two_addresses_of_an_ipv6_subnet_are_enough() {
        let all = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:1::1"];
        assert_eq!(usable_of(&all), ips(&["2001:db8::1", "2001:db8::2", "2001:db8:1::1"]));
    }

    #[test]
    fn a_lan_may_use_the_meshes_ranges_and_a_tunnel_of_a_mesh_may_not() {
        let on = LinkFlags::Up | LinkFlags::Running;
        let links = [
            link(2, LinkLayerType::Ether, on),
            link(3, LinkLayerType::None, on),
            link(4, LinkLayerType::None, on),
            link(5, LinkLayerType::None, on),
        ];
        let plain = AddressFlags::empty();
        let addresses = [
            address(2, "100.64.7.2", plain),
            address(3, "100.64.0.1", plain), // ours
            address(4, "100.100.1.1", plain),
            address(5, "10.8.0.2", plain),
        ];
        let devices = select(&links, &addresses, 3);
        assert_eq!(devices.working, [2, 4, 5].into());
        let found: Vec<_> = devices.addresses.iter().map(|address| address.ip).collect();
        assert_eq!(found, ips(&["100.64.7.2", "10.8.0.2"]));
    }

    #[test]
    fn networks_are_those_of_working_devices_and_bridges_of_containers_are_inside() {
        let on = LinkFlags::Up | LinkFlags::Running;
        let kind = |mut link: LinkMessage, kind: InfoKind, master: Option<u32>| {
            link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
            link.attributes.extend(master.map(LinkAttribute::Controller));
            link
        };
        let mut port = link(7, LinkLayerType::Ether, on);
        port.attributes.push(LinkAttribute::Controller(6));
        let links = [
            link(2, LinkLayerType::Ether, on),
            link(3, LinkLayerType::None, on), // ours
            kind(link(4, LinkLayerType::Ether, on), InfoKind::Bridge, None),
            kind(link(5, LinkLayerType::Ether, on), InfoKind::Veth, Some(4)),
            kind(link(6, LinkLayerType::Ether, on), InfoKind::Bridge, None),
            port,
            link(8, LinkLayerType::Ppp, on),
        ];
        let plain = |device, ip, length| {
            let mut message = address(device, ip, AddressFlags::Permanent);
            message.header.prefix_len = length;
            message
        };
        let mut far_end = plain(8, "198.51.100.1", 32);
        far_end.attributes.push(AddressAttribute::Local("203.0.113.9".parse().unwrap()));
        let addresses = [
            plain(2, "192.168.1.2", 24),
            plain(2, "fe80::1", 64),
            plain(3, "100.64.0.1", 32),
            plain(4, "172.17.0.1", 16),
            plain(6, "10.5.0.1", 24),
            far_end,
        ];
        let devices = select(&links, &addresses, 3);
        let texts = |nets: Vec<IpNet>| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
        let lan = Lan::new(&devices, &[2]);
        assert_eq!(
            texts(lan.networks),
            ["10.5.0.0/24", "172.17.0.0/16", "192.168.1.0/24", "198.51.100.1/32", "203.0.113.9/32"]
        );
        assert_eq!(texts(lan.internal), ["172.17.0.0/16"]);
        assert!(Lan::new(&devices, &[4]).internal.is_empty());
    }

    #[test]
    fn what_does_not_work_is_no_endpoint() {
        let on = LinkFlags::Up | LinkFlags::Running;
        let links = [link(2, LinkLayerType::Ether, on), link(3, LinkLayerType::Ether, LinkFlags::Up)];
        let addresses = [
            address(2, "2001:db8::1", AddressFlags::Tentative),
            address(2, "2001:db8::2", AddressFlags::Deprecated),
            address(2, "2001:db8::3", AddressFlags::Permanent),
            address(3, "192.168.1.2", AddressFlags::Permanent),
        ];
        let devices = select(&links, &addresses, 9);
        let found: Vec<_> = devices.addresses.iter().map(|address| address.ip).collect();
        assert_eq!(found, ips(&["2001:db8::3"]));
    }

    #[test]
    fn an_endpoint_is_told_once_by_its_best_source() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (all, kinds) = endpoints(&Sources {
            mapped: Some("198.51.100.1:7".parse().unwrap()),
            seen: &[at("192.0.2.1:41641"), at("198.51.100.1:1025")],
            forwarded: Some(at("198.51.100.1:41641")),
            declared: &[at("203.0.113.1:9"), at("198.51.100.1:7")],
            own: &ips(&["192.0.2.1", "10.0.0.2", "2001:db8::1"]),
            ports: (41641, 0),
        });
        let expected = [
            ("198.51.100.1:7", PORT_MAPPED),
            ("192.0.2.1:41641", STUN),
            ("198.51.100.1:1025", STUN),
            ("198.51.100.1:41641", STUN_LOCAL_PORT),
            ("203.0.113.1:9", EXPLICIT),
            ("10.0.0.2:41641", LOCAL),
        ];
        assert_eq!(all, expected.map(|(address, _)| at(address)));
        assert_eq!(kinds, expected.map(|(_, kind)| kind));
    }
}
