//! `recvmsg` and `sendmsg` with the local address of a datagram, so that an answer leaves from the address that
//! was asked. The only unsafe code of the crate; Linux only.
#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, size_of, size_of_val, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

/// Which local address a datagram was sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PacketInfo {
    pub(super) local: Option<IpAddr>,
    /// Needed to answer from a link-local address.
    pub(super) interface: u32,
}

/// Room for one `in_pktinfo` and one `in6_pktinfo` (a dual-stack socket may give both), aligned for headers.
#[repr(C, align(8))]
struct Control([MaybeUninit<u8>; 128]);

/// Asks the kernel to tell the local address of each datagram.
pub(super) fn enable(socket: &socket2::Socket, v6: bool) -> io::Result<()> {
    if v6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)
    } else {
        set(socket, libc::IPPROTO_IP, libc::IP_PKTINFO)
    }
}

fn set(socket: &socket2::Socket, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the pointer and length describe `on`, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            ptr::from_ref(&on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Receives one datagram.
pub(super) fn receive(socket: &impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr, PacketInfo)> {
    let mut control = Control([MaybeUninit::uninit(); 128]);
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let fd = socket.as_fd().as_raw_fd();
    let mut info = PacketInfo { local: None, interface: 0 };
    // SAFETY: try_init gives a zeroed storage large enough for any address; all pointers in `message` live
    // through recvmsg, which writes at most the lengths given.
    let (len, from) = unsafe {
        let mut received = 0;
        let ((), from) = socket2::SockAddr::try_init(|storage, storage_len| {
            let mut message: libc::msghdr = zeroed();
            message.msg_name = storage.cast();
            message.msg_namelen = *storage_len;
            message.msg_iov = &raw mut iov;
            message.msg_iovlen = 1;
            message.msg_control = ptr::from_mut(&mut control).cast();
            message.msg_controllen = size_of::<Control>() as _;
            let n = libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT);
            if n < 0 {
                return Err(io::Error::last_os_error());
            }
            received = n as usize;
            *storage_len = message.msg_namelen;
            read_control(&message, &mut info);
            Ok(())
        })?;
        (received, from)
    };
    let from = from.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok((len, from, info))
}

/// SAFETY: `message` has just been filled by recvmsg and its control buffer is alive.
unsafe fn read_control(message: &libc::msghdr, info: &mut PacketInfo) {
    // SAFETY: the CMSG macros stay within msg_controllen, which recvmsg set; the kernel writes whole structures
    // of the type that level and type name, and they are read unaligned.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            let data = libc::CMSG_DATA(header);
            match ((*header).cmsg_level, (*header).cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let raw: libc::in_pktinfo = ptr::read_unaligned(data.cast());
                    info.local = Some(Ipv4Addr::from(u32::from_be(raw.ipi_addr.s_addr)).into());
                    info.interface = raw.ipi_ifindex as u32;
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let raw: libc::in6_pktinfo = ptr::read_unaligned(data.cast());
                    info.local = Some(Ipv6Addr::from(raw.ipi6_addr.s6_addr).into());
                    info.interface = raw.ipi6_ifindex as u32;
                }
                _ => {}
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
}

/// Sends one datagram from the local address in `info`.
pub(super) fn send(socket: &impl AsFd, bytes: &[u8], to: SocketAddr, info: &PacketInfo) -> io::Result<()> {
    let to = socket2::SockAddr::from(to);
    let mut control = Control([MaybeUninit::zeroed(); 128]);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: an all-zero msghdr is valid; every pointer set in it lives through sendmsg; `put` writes one control message
    // that fits the buffer and msg_controllen is set to its size.
    let sent = unsafe {
        let mut message: libc::msghdr = zeroed();
        message.msg_name = to.as_ptr().cast_mut().cast();
        message.msg_namelen = to.len();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = ptr::from_mut(&mut control).cast();
        message.msg_controllen = size_of::<Control>() as _;
        match info.local {
            Some(IpAddr::V4(local)) => {
                let raw = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from(local).to_be() },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                put(&mut message, libc::IPPROTO_IP, libc::IP_PKTINFO, raw);
            }
            Some(IpAddr::V6(local)) => {
                // a link-local address means nothing without its interface; others may leave by any
                let interface = if local.is_unicast_link_local() { info.interface } else { 0 };
                let raw = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: local.octets() },
                    ipi6_ifindex: interface as _,
                };
                put(&mut message, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, raw);
            }
            None => {
                message.msg_control = ptr::null_mut();
                message.msg_controllen = 0;
            }
        }
        libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, libc::MSG_DONTWAIT)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// SAFETY: `message` has a zeroed control buffer with room for one `T`.
unsafe fn put<T>(message: &mut libc::msghdr, level: libc::c_int, kind: libc::c_int, value: T) {
    // SAFETY: CMSG_FIRSTHDR is not null as the buffer holds more than a header, and the value fits behind it.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(message);
        (*header).cmsg_level = level;
        (*header).cmsg_type = kind;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<T>() as u32) as _;
        ptr::write_unaligned(libc::CMSG_DATA(header).cast(), value);
        message.msg_controllen = libc::CMSG_SPACE(size_of::<T>() as u32) as _;
    }
}
