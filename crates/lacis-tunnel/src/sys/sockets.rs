//! All UDP sockets of the tunnel: the main pair, and the auxiliary ones that the search for a path asks for.

use std::io;
use std::ops::RangeInclusive;
use std::time::Instant;

use socket2::Domain;

use super::udp::UdpSocket;
use crate::config::{SocketId, Way};
use crate::error::Error;
use crate::outputs::SendFailure;

/// Linux's NAT and others like it map a port below 1024 to a port below 1024: few candidates for who must guess.
const LOW_PORTS: RangeInclusive<u16> = 512..=1023;
/// Ports tried before it is given up: enough while hundreds of them are our own.
const LOW_TRIES: u16 = 64;

/// Both families on one port, as far as the host has them, and IPv4 sockets on ports of their own.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) v4: Option<UdpSocket>,
    pub(crate) v6: Option<UdpSocket>,
    auxiliary: Vec<(SocketId, UdpSocket)>,
    fwmark: Option<u32>,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sent {
    pub datagrams: u64,
    pub errors: u64,
    /// It took single sends after the batch failed.
    pub fallback: bool,
    /// Why the rest was not sent, where it says something about the way.
    pub failure: Option<SendFailure>,
}

impl Sockets {
    pub(crate) fn open(port: u16, fwmark: Option<u32>) -> Result<Self, Error> {
        let (v4, first) = match UdpSocket::open_or_any(Domain::IPV4, port, fwmark) {
            Ok(socket) => (Some(socket), None),
            Err(error @ Error::Mark { .. }) => return Err(error),
            Err(error) => (None, Some(error)),
        };
        // The same port in both families is friendlier to those who open firewalls.
        let wanted = v4.as_ref().map_or(port, UdpSocket::port);
        let v6 = match UdpSocket::open_or_any(Domain::IPV6, wanted, fwmark) {
            Ok(socket) => Some(socket),
            Err(error) => match (first, &v4) {
                (Some(first), None) => return Err(first),
                _ => {
                    tracing::debug!(%error, "no IPv6 socket");
                    None
                }
            },
        };
        Ok(Self { v4, v6, auxiliary: Vec::new(), fwmark })
    }

    /// Ports of the main pair, 0 for a family that is not there.
    pub(crate) fn ports(&self) -> (u16, u16) {
        let port = |socket: &Option<UdpSocket>| socket.as_ref().map_or(0, UdpSocket::port);
        (port(&self.v4), port(&self.v6))
    }

    /// Opens an IPv4 socket beside the main pair, on a low port if asked; an older one of this number is closed.
    /// Returns its port.
    pub(crate) fn open_auxiliary(&mut self, id: SocketId, low: bool) -> Result<u16, Error> {
        self.close_auxiliary(id);
        let socket = if low { self.open_low()? } else { UdpSocket::open(Domain::IPV4, 0, self.fwmark)? };
        let port = socket.port();
        self.auxiliary.push((id, socket));
        Ok(port)
    }

    fn open_low(&self) -> Result<UdpSocket, Error> {
        let random = super::random();
        let (first, count) = (*LOW_PORTS.start(), LOW_PORTS.len() as u16);
        // An odd step visits all of a power of two.
        let (begin, step) = (random as u16, (random >> 16) as u16 | 1);
        let mut taken = None;
        for n in 0..LOW_TRIES {
            let port = first + begin.wrapping_add(step.wrapping_mul(n)) % count;
            match UdpSocket::open(Domain::IPV4, port, self.fwmark) {
                Err(error @ Error::Udp { .. }) if error.is_port_taken() => taken = Some(error),
                other => return other,
            }
        }
        Err(taken.unwrap_or_else(|| Error::Udp {
            step: "binding a low port",
            source: io::Error::from(io::ErrorKind::AddrInUse),
        }))
    }

    pub(crate) fn close_auxiliary(&mut self, id: SocketId) {
        self.auxiliary.retain(|(other, _)| *other != id);
    }

    pub(crate) fn auxiliary(&self) -> &[(SocketId, UdpSocket)] {
        &self.auxiliary
    }

    /// The socket of this number and family.
    #[inline]
    pub(crate) fn get(&self, id: SocketId, v4: bool) -> Option<&UdpSocket> {
        match (id, v4) {
            (SocketId::MAIN, true) => self.v4.as_ref(),
            (SocketId::MAIN, false) => self.v6.as_ref(),
            (_, false) => None,
            (_, true) => self.auxiliary.iter().find(|(other, _)| *other == id).map(|(_, socket)| socket),
        }
    }

    fn of(&self, way: Way) -> Option<&UdpSocket> {
        self.get(way.socket, way.addr.is_ipv4())
    }

    /// Sends `data` as datagrams of `segment` bytes, the last maybe shorter.
    pub(crate) fn send(&self, way: Way, data: &[u8], segment: usize, now: Instant) -> Sent {
        let segment = segment.max(1);
        let total = data.len().div_ceil(segment) as u64;
        let Some(socket) = self.of(way) else {
            return Sent { errors: total, failure: Some(SendFailure::NoSocket), ..Sent::default() };
        };
        let batch = socket.send_batch(way.addr, data, segment, now);
        if let Some(error) = &batch.error {
            tracing::trace!(?way, %error, "a send failed");
        }
        Sent {
            datagrams: batch.datagrams,
            errors: total - batch.datagrams,
            fallback: batch.fallback,
            failure: batch.error.as_ref().and_then(failure),
        }
    }

    /// Sends one datagram, if told with another number of hops than usual. False when it failed.
    pub(crate) fn send_one(&self, way: Way, data: &[u8], hops: Option<u8>) -> bool {
        let Some(socket) = self.of(way) else { return false };
        match socket.send(way.addr, data, hops) {
            Ok(()) => true,
            Err(error) => {
                tracing::trace!(?way, ?hops, %error, "a send failed");
                false
            }
        }
    }
}

/// What an error says about the way; nothing where it is only about the moment.
fn failure(error: &io::Error) -> Option<SendFailure> {
    Some(match error.raw_os_error()? {
        // EINVAL: an address that cannot be sent to, such as link-local without a zone.
        libc::EHOSTUNREACH
        | libc::ENETUNREACH
        | libc::EHOSTDOWN
        | libc::ENETDOWN
        | libc::EADDRNOTAVAIL
        | libc::EINVAL => SendFailure::Unreachable,
        libc::EPERM | libc::EACCES => SendFailure::Forbidden,
        libc::EMSGSIZE => SendFailure::TooBig,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn a_taken_port_is_replaced_by_another() {
        let first = Sockets::open(0, None).unwrap();
        let (port, _) = first.ports();
        let second = Sockets::open(port, None).unwrap();
        assert_ne!(second.ports().0, port);
        assert_ne!(second.ports().0, 0);
    }

    #[test]
    fn an_auxiliary_socket_sends_from_its_own_port_until_it_is_closed() {
        let mut sockets = Sockets::open(0, None).unwrap();
        let (id, main) = (SocketId(7), sockets.ports().0);
        let port = sockets.open_auxiliary(id, false).unwrap();
        assert_ne!(port, main);
        let to = SocketAddr::from(([127, 0, 0, 1], main));
        let way = Way { socket: id, addr: to };
        assert!(sockets.send_one(way, b"probe", None));
        let mut buffer = vec![0; 65536];
        let got = loop {
            if let Some(got) = sockets.get(SocketId::MAIN, true).unwrap().receive(&mut buffer).unwrap() {
                break got;
            }
        };
        assert_eq!((got.from.port(), &buffer[..got.len]), (port, &b"probe"[..]));
        sockets.close_auxiliary(id);
        let sent = sockets.send(way, &[0; 100], 50, Instant::now());
        assert_eq!((sent.datagrams, sent.errors, sent.failure), (0, 2, Some(SendFailure::NoSocket)));
    }

    #[test]
    fn low_ports_are_all_found_though_many_are_taken() {
        let mut sockets = Sockets::open(0, None).unwrap();
        for n in 1..=320 {
            match sockets.open_auxiliary(SocketId(n), true) {
                Ok(port) => assert!(LOW_PORTS.contains(&port), "{port}"),
                // An ordinary user may not.
                Err(Error::Udp { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => return,
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(sockets.auxiliary().len(), 320);
    }

    #[test]
    fn only_what_is_about_the_way_condemns_it() {
        let said = |code| failure(&io::Error::from_raw_os_error(code));
        assert_eq!(said(libc::ENETUNREACH), Some(SendFailure::Unreachable));
        assert_eq!(said(libc::EPERM), Some(SendFailure::Forbidden));
        assert_eq!(said(libc::EAGAIN), None);
        assert_eq!(said(libc::ENOBUFS), None);
    }
}
