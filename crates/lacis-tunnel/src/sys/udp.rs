//! UDP sockets that send and receive in batches: one system call for up to 64 KiB of datagrams of one size.
#![allow(
    unsafe_code,
    reason = "sendmsg and recvmsg with control messages, and socket options that no crate has"
)]

use std::cell::Cell;
use std::io;
use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::error::Error;

/// A default buffer holds three batches; anything slower than the sender loses the rest.
const BUFFER: usize = 8 << 20;
const SOL_UDP: libc::c_int = 17;
const UDP_SEGMENT: libc::c_int = 103;
const UDP_GRO: libc::c_int = 104;
/// How long a destination that refused a batch gets single datagrams.
const REFUSED_FOR: Duration = Duration::from_secs(30);
/// Datagrams in one batch: what all kernels take.
pub(crate) const MAX_SEGMENTS: usize = 64;
/// With its headers a batch stays below what crosses the network stack whole.
const MAX_BATCH_V4: usize = 65_493;
const MAX_BATCH_V6: usize = MAX_BATCH_V4 - 20;
/// How long a full send buffer may hold up the packet thread.
const FULL_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
/// More than any control message here.
const CONTROL: usize = 64;

/// Both families on one port, as far as the host has them.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) v4: Option<UdpSocket>,
    pub(crate) v6: Option<UdpSocket>,
}

#[derive(Debug)]
pub(crate) struct UdpSocket {
    socket: Socket,
    port: u16,
    /// The kernel knows `UDP_SEGMENT`.
    gso: bool,
    /// A destination to which batches do not go, and until when that is believed.
    refused: Cell<Option<(SocketAddr, Instant)>>,
}

/// What one receive call gave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    pub len: usize,
    /// Size of each datagram; the last may be shorter.
    pub segment: usize,
    pub from: SocketAddr,
}

/// Bytes of one batch to there.
pub(crate) fn max_batch(to: SocketAddr) -> usize {
    if to.is_ipv4() { MAX_BATCH_V4 } else { MAX_BATCH_V6 }
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sent {
    pub datagrams: u64,
    pub errors: u64,
    /// It took single sends after the batch failed.
    pub fallback: bool,
}

impl Sockets {
    /// Sends `data` as datagrams of `segment` bytes, the last maybe shorter.
    pub(crate) fn send(&self, to: SocketAddr, data: &[u8], segment: usize, now: Instant) -> Sent {
        let datagrams = data.len().div_ceil(segment.max(1)) as u64;
        let Some(socket) = self.for_address(to) else {
            return Sent { errors: datagrams, ..Sent::default() };
        };
        match socket.send_batch(to, data, segment.max(1), now) {
            Ok(fallback) => Sent { datagrams, errors: 0, fallback },
            Err(error) => {
                tracing::trace!(%to, %error, "a send failed");
                Sent { errors: datagrams, ..Sent::default() }
            }
        }
    }

    pub(crate) fn open(port: u16, fwmark: Option<u32>) -> Result<Self, Error> {
        let (v4, first) = match UdpSocket::open_or_any(Domain::IPV4, port, fwmark) {
            Ok(socket) => (Some(socket), None),
            Err(error @ Error::Mark { .. }) => return Err(error),
            Err(error) => (None, Some(error)),
        };
        // The same port in both families is friendlier to those who open firewalls.
        let wanted = v4.as_ref().map_or(port, |socket| socket.port);
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
        Ok(Self { v4, v6 })
    }

    pub(crate) fn ports(&self) -> (u16, u16) {
        let port = |socket: &Option<UdpSocket>| socket.as_ref().map_or(0, |socket| socket.port);
        (port(&self.v4), port(&self.v6))
    }

    fn for_address(&self, to: SocketAddr) -> Option<&UdpSocket> {
        if to.is_ipv4() { self.v4.as_ref() } else { self.v6.as_ref() }
    }
}

impl UdpSocket {
    fn open_or_any(domain: Domain, port: u16, fwmark: Option<u32>) -> Result<Self, Error> {
        match Self::open(domain, port, fwmark) {
            Err(Error::Udp { source, .. }) if port != 0 && source.kind() == io::ErrorKind::AddrInUse => {
                Self::open(domain, 0, fwmark)
            }
            other => other,
        }
    }

    fn open(domain: Domain, port: u16, fwmark: Option<u32>) -> Result<Self, Error> {
        let failed = |step| move |source| Error::Udp { step, source };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))
            .map_err(failed("opening a socket"))?;
        let any: SocketAddr = if domain == Domain::IPV4 {
            (Ipv4Addr::UNSPECIFIED, port).into()
        } else {
            socket.set_only_v6(true).map_err(failed("restricting a socket to IPv6"))?;
            (Ipv6Addr::UNSPECIFIED, port).into()
        };
        if let Some(mark) = fwmark {
            socket.set_mark(mark).map_err(|source| Error::Mark { mark, source })?;
        }
        socket.bind(&any.into()).map_err(failed("binding a port"))?;
        let port = socket
            .local_addr()
            .map_err(failed("reading the port"))?
            .as_socket()
            .map_or(0, |address| address.port());
        for (force, plain) in
            [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
        {
            // Without CAP_NET_ADMIN the kernel's maximum is what there is.
            if set_option(&socket, libc::SOL_SOCKET, force, BUFFER as libc::c_int).is_err() {
                let _ = set_option(&socket, libc::SOL_SOCKET, plain, BUFFER as libc::c_int);
            }
        }
        let gso = set_option(&socket, SOL_UDP, UDP_SEGMENT, 0).is_ok();
        // Without it datagrams come one by one, which works too.
        let _ = set_option(&socket, SOL_UDP, UDP_GRO, 1);
        Ok(Self { socket, port, gso, refused: Cell::new(None) })
    }

    /// Sends one datagram.
    fn send(&self, to: SocketAddr, data: &[u8]) -> io::Result<()> {
        let to = SockAddr::from(to);
        self.patiently(|| self.socket.send_to(data, &to).map(drop))
    }

    /// Sends, and once more after a short wait when the send buffer is full: that slows the host's senders down,
    /// where dropping a whole batch would stop them.
    fn patiently(&self, send: impl Fn() -> io::Result<()>) -> io::Result<()> {
        match send() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
                // Whether there is room now is seen by the second try.
                let _ = poll(&mut fds, Some(&FULL_WAIT));
                send()
            }
            other => other,
        }
    }

    /// Sends `data` as datagrams of `segment` bytes, the last maybe shorter. True: it took single sends after a
    /// batch failed.
    fn send_batch(&self, to: SocketAddr, data: &[u8], segment: usize, now: Instant) -> io::Result<bool> {
        if data.len() <= segment {
            return self.send(to, data).map(|()| false);
        }
        let refused = self.refused.get().is_some_and(|(address, until)| address == to && now < until);
        if self.gso && !refused {
            match self.send_segmented(to, data, segment) {
                Ok(()) => return Ok(false),
                // A route whose MTU is smaller, or a device that cannot: not tried again for a while.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)) =>
                {
                    self.refused.set(Some((to, now + REFUSED_FOR)));
                }
                Err(error) => return Err(error),
            }
        }
        for datagram in data.chunks(segment) {
            self.send(to, datagram)?;
        }
        Ok(self.gso)
    }

    fn send_segmented(&self, to: SocketAddr, data: &[u8], segment: usize) -> io::Result<()> {
        let address = SockAddr::from(to);
        let mut piece = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        let mut control = Control([0; CONTROL]);
        // SAFETY: all zeros is a valid msghdr; every pointer put into it outlives the call.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_name = address.as_ptr().cast_mut().cast();
        message.msg_namelen = address.len();
        message.msg_iov = &raw mut piece;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the control buffer is aligned and larger than the one message written to it.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(size_of::<u16>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = SOL_UDP;
            (*header).cmsg_type = UDP_SEGMENT;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<u16>() as u32) as _;
            libc::CMSG_DATA(header).cast::<u16>().write_unaligned(segment as u16);
        }
        self.patiently(|| {
            // SAFETY: see above; the data is only read.
            let sent =
                unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
            if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        })
    }

    /// Receives one datagram, or several of one size and sender; `None` when nothing waits.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<Received>> {
        let mut storage = SockAddrStorage::zeroed();
        let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut control = Control([0; CONTROL]);
        // SAFETY: all zeros is a valid msghdr; every pointer put into it outlives the call.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_name = (&raw mut storage).cast();
        message.msg_namelen = size_of::<SockAddrStorage>() as libc::socklen_t;
        message.msg_iov = &raw mut piece;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = CONTROL as _;
        // SAFETY: see above.
        let received = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) };
        if received < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        let len = received as usize;
        // SAFETY: the kernel has written an address of `msg_namelen` bytes.
        let address = unsafe { SockAddr::new(storage, message.msg_namelen) };
        let from = address.as_socket().ok_or_else(|| io::Error::other("a datagram without a sender"))?;
        let mut segment = len;
        // SAFETY: the kernel has written whole control messages into the buffer, which these macros walk.
        unsafe {
            let mut header = libc::CMSG_FIRSTHDR(&raw const message);
            while !header.is_null() {
                if (*header).cmsg_level == SOL_UDP && (*header).cmsg_type == UDP_GRO {
                    segment = libc::CMSG_DATA(header).cast::<libc::c_int>().read_unaligned() as usize;
                }
                header = libc::CMSG_NXTHDR(&raw const message, header);
            }
        }
        Ok(Some(Received { len, segment: segment.max(1), from }))
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Aligned as control messages need it.
#[repr(align(8))]
struct Control([u8; CONTROL]);

fn set_option(socket: &Socket, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: all options set here take an int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_arrives_as_the_datagrams_it_was_made_of() {
        let a = Sockets::open(0, None).unwrap().v4.unwrap();
        let b = Sockets::open(0, None).unwrap().v4.unwrap();
        let to = SocketAddr::from(([127, 0, 0, 1], b.port));
        let data: Vec<u8> = (0..10_500_u32).map(|n| (n / 1000) as u8).collect();
        a.send_batch(to, &data, 1000, Instant::now()).unwrap();
        let mut buffer = vec![0; 65536];
        let mut datagrams = Vec::new();
        while datagrams.len() < 11 {
            if let Some(got) = b.receive(&mut buffer).unwrap() {
                datagrams.extend(buffer[..got.len].chunks(got.segment).map(<[u8]>::to_vec));
            }
        }
        assert!(
            datagrams.iter().enumerate().all(|(n, datagram)| datagram.iter().all(|b| usize::from(*b) == n))
        );
        assert_eq!(datagrams[10].len(), 500);
    }

    #[test]
    fn a_taken_port_is_replaced_by_another() {
        let first = Sockets::open(0, None).unwrap();
        let (port, _) = first.ports();
        let second = Sockets::open(port, None).unwrap();
        assert_ne!(second.ports().0, port);
        assert_ne!(second.ports().0, 0);
    }
}
