//! Notices when another program may have changed what is ours on this host: the device, its addresses, our routes,
//! rules, and our tables of the firewall. Netlink says so at once; what really changed is found by looking.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use crate::links::GROUPS;

/// After netlink failed.
const RETRY: Duration = Duration::from_secs(2);
const NETLINK_NETFILTER: isize = 12;
/// The bit of the group `NFNLGRP_NFTABLES`, which is the seventh.
const GROUP_NFTABLES: u32 = 1 << 6;
/// `NFNL_SUBSYS_NFTABLES`, the upper byte of a message's type.
const SUBSYSTEM_NFTABLES: u8 = 10;
/// A header of netlink, and netfilter's own.
const HEADERS: usize = 16 + 4;
/// The attribute with the table's name, of every message that is about something in a table.
const TABLE_NAME: u16 = 1;
/// More than the kernel puts into one datagram.
const MAX_DATAGRAM: usize = 64 * 1024;

#[derive(Debug)]
pub(super) struct Monitor {
    changed: Arc<Notify>,
    others: Arc<Mutex<BTreeSet<u32>>>,
    _task: AbortOnDropHandle<()>,
}

/// What concerns us.
#[derive(Debug)]
struct Ours {
    device: u32,
    tables: [u32; 2],
    /// Tables of other programs' rules that are asked before ours.
    others: Arc<Mutex<BTreeSet<u32>>>,
    nft_table: Option<String>,
}

impl Monitor {
    /// `device` is an index; `tables` are those of our routes, `nft_table` is the name of those of our firewall.
    pub(super) fn start(device: u32, tables: [u32; 2], nft_table: Option<String>) -> Self {
        let changed = Arc::new(Notify::new());
        let others = Arc::new(Mutex::new(BTreeSet::new()));
        let ours = Ours { device, tables, others: Arc::clone(&others), nft_table };
        let notify = Arc::clone(&changed);
        let task = tokio::spawn(async move {
            loop {
                if let Err(error) = follow(&ours, &notify).await {
                    tracing::debug!(%error, "changes of this host may be noticed late; trying again");
                }
                tokio::time::sleep(RETRY).await;
            }
        });
        Self { changed, others, _task: AbortOnDropHandle::new(task) }
    }

    /// Notified after each change.
    pub(super) fn changed(&self) -> Arc<Notify> {
        Arc::clone(&self.changed)
    }

    /// Routes of these tables concern us as well.
    pub(super) fn follow_tables(&self, tables: impl Iterator<Item = u32>) {
        *self.others.lock().unwrap_or_else(PoisonError::into_inner) = tables.collect();
    }
}

/// Returns when netlink fails.
async fn follow(ours: &Ours, changed: &Notify) -> io::Result<()> {
    let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&GROUPS)?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    // Without it the firewall is looked at from time to time.
    let mut rules = nftables().inspect_err(|error| tracing::debug!(%error, "no news of nftables")).ok();
    let mut datagram = Vec::with_capacity(MAX_DATAGRAM);
    // What was before is not known.
    changed.notify_one();
    loop {
        let concerns = tokio::select! {
            message = messages.next() => match message {
                Some((message, _)) => match &message.payload {
                    NetlinkPayload::InnerMessage(message) => ours.concerned(message),
                    NetlinkPayload::Overrun(_) => true,
                    _ => false,
                },
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            },
            read = read(rules.as_ref(), &mut datagram) => match read {
                Ok(()) => ours.nft_table.as_ref().is_none_or(|table| names_table(&datagram, table)),
                // Some messages were lost.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => true,
                Err(error) => {
                    tracing::debug!(%error, "no more news of nftables");
                    rules = None;
                    true
                }
            },
        };
        if concerns {
            changed.notify_one();
        }
    }
}

fn nftables() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind(&SocketAddr::new(0, GROUP_NFTABLES))?;
    Ok(socket)
}

async fn read(socket: Option<&TokioSocket>, datagram: &mut Vec<u8>) -> io::Result<()> {
    match socket {
        Some(socket) => {
            datagram.clear();
            socket.recv(datagram).await
        }
        None => std::future::pending().await,
    }
}

impl Ours {
    fn concerned(&self, message: &RouteNetlinkMessage) -> bool {
        match message {
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => true,
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                let table = table_of(route);
                self.tables.contains(&table)
                    || self.others.lock().unwrap_or_else(PoisonError::into_inner).contains(&table)
            }
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
                link.header.index == self.device
            }
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
                address.header.index == self.device
            }
            _ => false,
        }
    }
}

fn table_of(route: &RouteMessage) -> u32 {
    let named = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    named.unwrap_or(route.header.table.into())
}

/// Is one of these messages of nftables about something in the table of this name?
fn names_table(mut datagram: &[u8], name: &str) -> bool {
    while let Some(length) = datagram.first_chunk().map(|length| u32::from_ne_bytes(*length) as usize) {
        let Some(message) = datagram.get(..length.max(HEADERS)) else { return false };
        if message[5] == SUBSYSTEM_NFTABLES && table_name(&message[HEADERS..]) == Some(name.as_bytes()) {
            return true;
        }
        datagram = datagram.get(message.len().next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

fn table_name(mut attributes: &[u8]) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        if kind == TABLE_NAME {
            return value.strip_suffix(&[0]);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = [(value.len() as u16 + 4).to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
        let rest = attributes.concat();
        let mut bytes = ((HEADERS + rest.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADERS, 0);
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn a_message_about_our_table_is_known_by_its_name() {
        let deleted = |name: &[u8]| message(10 << 8 | 2, &[attribute(2, &[0; 4]), attribute(1, name)]);
        assert!(names_table(&deleted(b"lacis\0"), "lacis"));
        let both = [deleted(b"theirs\0"), deleted(b"lacis\0")].concat();
        assert!(names_table(&both, "lacis"));
        assert!(!names_table(&deleted(b"lacis2\0"), "lacis"));
        // Of another subsystem.
        assert!(!names_table(&message(11 << 8, &[attribute(1, b"lacis\0")]), "lacis"));
    }

    #[test]
    fn messages_that_are_cut_short_are_about_nothing() {
        let whole = message(10 << 8, &[attribute(3, b"x"), attribute(1, b"lacis\0")]);
        for length in 0..whole.len() - 2 {
            assert!(!names_table(&whole[..length], "lacis"), "{length}");
        }
        assert!(!names_table(&[0; 64], "lacis") && !names_table(&[255; 64], "lacis"));
    }

    #[test]
    fn routes_of_other_tables_and_addresses_of_other_devices_are_not_ours() {
        let ours = Ours { device: 7, tables: [52, 5252], others: Arc::default(), nft_table: None };
        let route = |table: u32| {
            let mut route = RouteMessage::default();
            route.attributes.push(RouteAttribute::Table(table));
            RouteNetlinkMessage::DelRoute(route)
        };
        assert!(ours.concerned(&route(52)) && ours.concerned(&route(5252)));
        assert!(!ours.concerned(&route(254)));
        ours.others.lock().unwrap().insert(51820);
        assert!(ours.concerned(&route(51820)));
        let mut address = netlink_packet_route::address::AddressMessage::default();
        address.header.index = 2;
        assert!(!ours.concerned(&RouteNetlinkMessage::DelAddress(address.clone())));
        address.header.index = 7;
        assert!(ours.concerned(&RouteNetlinkMessage::DelAddress(address)));
    }
}
