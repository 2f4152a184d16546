//! UDP sockets that send and receive in batches: one system call for up to 64 KiB of datagrams of one size.
#![allow(
    unsafe_code,
    reason = "sendmsg and recvmsg with control messages, and socket options that no crate has"
)]

use std::cell::RefCell;
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
/// How long a destination that refused a batch gets single datagrams. The next try costs nothing but a system call:
/// what refuses a batch has sent none of it.
const REFUSED_FOR: Duration = Duration::from_secs(30);
/// Such destinations remembered.
const REFUSED: usize = 16;
/// Datagrams in one batch: what all kernels take.
pub(crate) const MAX_SEGMENTS: usize = 64;
/// With its headers a batch stays below what crosses the network stack whole.
const MAX_BATCH_V4: usize = 65_493;
const MAX_BATCH_V6: usize = MAX_BATCH_V4 - 20;
/// How long a full send buffer may hold up the packet thread.
const FULL_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
/// More than any control message here.
const CONTROL: usize = 64;

#[derive(Debug)]
pub(crate) struct UdpSocket {
    socket: Socket,
    port: u16,
    /// The kernel knows `UDP_SEGMENT`.
    gso: bool,
    /// Destinations to which batches do not go, and until when that is believed.
    refused: RefCell<Vec<(SocketAddr, Instant)>>,
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
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// How many were sent, the first ones.
    pub datagrams: u64,
    /// It took single sends after the batch failed.
    pub fallback: bool,
    /// Why the rest was not.
    pub error: Option<io::Error>,
}

impl UdpSocket {
    /// On this port, or on any if it is taken.
    pub(crate) fn open_or_any(domain: Domain, port: u16, fwmark: Option<u32>) -> Result<Self, Error> {
        match Self::open(domain, port, fwmark) {
            Err(error) if port != 0 && error.is_port_taken() => Self::open(domain, 0, fwmark),
            other => other,
        }
    }

    pub(crate) fn open(domain: Domain, port: u16, fwmark: Option<u32>) -> Result<Self, Error> {
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
        // Datagrams larger than a link on the way are cut into fragments, here or there. The other choice, not to be
        // cut, loses them where the errors that tell of small links are filtered.
        let (level, name, never) = if domain == Domain::IPV4 {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
        } else {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)
        };
        set_option(&socket, level, name, never).map_err(failed("allowing fragments"))?;
        let gso = set_option(&socket, SOL_UDP, UDP_SEGMENT, 0).is_ok();
        // Without it datagrams come one by one, which works too.
        let _ = set_option(&socket, SOL_UDP, UDP_GRO, 1);
        Ok(Self { socket, port, gso, refused: RefCell::default() })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Sends one datagram, that may make `hops` hops if told, else as many as usual.
    pub(crate) fn send(&self, to: SocketAddr, data: &[u8], hops: Option<u8>) -> io::Result<()> {
        let Some(hops) = hops else {
            let to = SockAddr::from(to);
            return self.patiently(|| self.socket.send_to(data, &to).map(drop));
        };
        let (level, kind) = if to.is_ipv4() {
            (libc::IPPROTO_IP, libc::IP_TTL)
        } else {
            (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT)
        };
        self.send_with(to, data, level, kind, libc::c_int::from(hops))
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

    /// Sends `data` as datagrams of `segment` bytes, the last maybe shorter.
    pub(crate) fn send_batch(&self, to: SocketAddr, data: &[u8], segment: usize, now: Instant) -> Batch {
        if data.len() <= segment {
            return match self.send(to, data, None) {
                Ok(()) => Batch { datagrams: 1, ..Batch::default() },
                Err(error) => Batch { error: Some(error), ..Batch::default() },
            };
        }
        if self.gso && !self.is_refused(to, now) {
            match self.send_with(to, data, SOL_UDP, UDP_SEGMENT, segment as u16) {
                Ok(()) => {
                    return Batch { datagrams: data.len().div_ceil(segment) as u64, ..Batch::default() };
                }
                // A route whose MTU is smaller, or a device that cannot: not tried again for a while.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)) =>
                {
                    self.refuse(to, now);
                }
                Err(error) => return Batch { error: Some(error), ..Batch::default() },
            }
        }
        let mut batch = Batch { fallback: self.gso, ..Batch::default() };
        for datagram in data.chunks(segment) {
            if let Err(error) = self.send(to, datagram, None) {
                batch.error = Some(error);
                break;
            }
            batch.datagrams += 1;
        }
        batch
    }

    fn is_refused(&self, to: SocketAddr, now: Instant) -> bool {
        self.refused.borrow().iter().any(|(address, until)| *address == to && now < *until)
    }

    fn refuse(&self, to: SocketAddr, now: Instant) {
        let mut refused = self.refused.borrow_mut();
        refused.retain(|(address, until)| *address != to && now < *until);
        if refused.len() >= REFUSED {
            refused.remove(0);
        }
        refused.push((to, now + REFUSED_FOR));
    }

    /// Sends with one control message, whose value the kernel reads as a `T`.
    fn send_with<T: Copy>(
        &self,
        to: SocketAddr,
        data: &[u8],
        level: libc::c_int,
        kind: libc::c_int,
        value: T,
    ) -> io::Result<()> {
        const { assert!(size_of::<T>() <= size_of::<libc::c_int>()) };
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
            message.msg_controllen = libc::CMSG_SPACE(size_of::<T>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = level;
            (*header).cmsg_type = kind;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<T>() as u32) as _;
            libc::CMSG_DATA(header).cast::<T>().write_unaligned(value);
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

    fn socket() -> UdpSocket {
        UdpSocket::open(Domain::IPV4, 0, None).unwrap()
    }

    fn local(socket: &UdpSocket) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], socket.port))
    }

    #[test]
    fn a_batch_arrives_as_the_datagrams_it_was_made_of() {
        let (a, b) = (socket(), socket());
        let data: Vec<u8> = (0..10_500_u32).map(|n| (n / 1000) as u8).collect();
        let batch = a.send_batch(local(&b), &data, 1000, Instant::now());
        assert_eq!((batch.datagrams, batch.fallback), (11, false));
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
    fn the_number_of_hops_is_that_of_one_datagram() {
        let (a, b) = (socket(), socket());
        set_option(&b.socket, libc::IPPROTO_IP, libc::IP_RECVTTL, 1).unwrap();
        for (hops, seen) in [(Some(3), 3), (None, 64), (Some(255), 255)] {
            a.send(local(&b), b"x", hops).unwrap();
            assert_eq!(ttl_of_next(&b), seen);
        }
        // Nothing may make no hop at all.
        assert!(a.send(local(&b), b"x", Some(0)).is_err());
        let v6 = UdpSocket::open(Domain::IPV6, 0, None);
        if let Ok(v6) = v6 {
            let to = SocketAddr::from((Ipv6Addr::LOCALHOST, v6.port));
            // A host may have the family and no loopback address in it.
            let _ = v6.send(to, b"x", Some(2));
        }
    }

    fn ttl_of_next(socket: &UdpSocket) -> libc::c_int {
        let mut buffer = [0; 64];
        let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut control = Control([0; CONTROL]);
        // SAFETY: all zeros is a valid msghdr; every pointer put into it outlives the calls, and the macros walk what
        // the kernel has written.
        unsafe {
            let mut message: libc::msghdr = mem::zeroed();
            message.msg_iov = &raw mut piece;
            message.msg_iovlen = 1;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = CONTROL as _;
            assert!(libc::recvmsg(socket.socket.as_raw_fd(), &raw mut message, 0) > 0);
            let mut header = libc::CMSG_FIRSTHDR(&raw const message);
            while !header.is_null() {
                if ((*header).cmsg_level, (*header).cmsg_type) == (libc::IPPROTO_IP, libc::IP_TTL) {
                    return libc::CMSG_DATA(header).cast::<libc::c_int>().read_unaligned();
                }
                header = libc::CMSG_NXTHDR(&raw const message, header);
            }
        }
        panic!("no TTL");
    }

    #[test]
    fn destinations_that_refuse_batches_are_remembered_apart() {
        let a = socket();
        let now = Instant::now();
        let to = |n: u8| SocketAddr::from(([192, 0, 2, n], 9));
        a.refuse(to(1), now);
        a.refuse(to(2), now);
        assert!(a.is_refused(to(1), now) && a.is_refused(to(2), now) && !a.is_refused(to(3), now));
        assert!(!a.is_refused(to(1), now + REFUSED_FOR));
        for n in 3..100 {
            a.refuse(to(n), now);
        }
        assert_eq!(a.refused.borrow().len(), REFUSED);
    }

    #[test]
    fn an_icmp_error_is_no_error_of_the_socket() {
        let (a, b) = (socket(), socket());
        let gone = local(&b);
        drop(b);
        for _ in 0..3 {
            a.send(gone, b"anybody?", None).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            assert!(a.receive(&mut [0; 64]).unwrap().is_none());
        }
        let mut fds = [PollFd::new(&a.socket, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap(), 0);
    }
}
