//! The TUN device: opened with as many offloads as the kernel has, read and written with its virtio header.
#![allow(unsafe_code, reason = "ioctl, readv and writev on the device")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use crate::error::Error;

/// Sets the length of a device's queue; libc has no name for it.
const SIOCSIFTXQLEN: libc::Ioctl = 0x8943;
/// Packets that wait for the packet thread. The kernel's 500 are 4 ms of small ones, less than a busy scheduler may keep
/// it waiting.
const QUEUE: libc::c_int = 2000;
/// Length of the virtio header before every packet.
pub(crate) const VNET_LEN: usize = 10;
/// The longest packet that the device gives or takes.
pub(crate) const MAX_PACKET: usize = 65_535;
const DEVICE: &str = "/dev/net/tun";
const NAME_MAX: usize = 15;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const IFF_TUN: libc::c_short = 0x0001;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;

const OFFLOAD_CSUM: libc::c_uint = 0x01;
const OFFLOAD_TSO4: libc::c_uint = 0x02;
const OFFLOAD_TSO6: libc::c_uint = 0x04;
const OFFLOAD_TSO_ECN: libc::c_uint = 0x08;
const OFFLOAD_USO4: libc::c_uint = 0x20;
const OFFLOAD_USO6: libc::c_uint = 0x40;

/// What the kernel does for this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offloads {
    /// Large TCP packets both ways.
    pub tso: bool,
    /// Large UDP packets both ways (from Linux 6.2).
    pub uso: bool,
}

impl Offloads {
    pub(crate) fn tcp(self) -> bool {
        self.tso
    }

    pub(crate) fn udp(self) -> bool {
        self.uso
    }
}

impl std::fmt::Display for Offloads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match (self.tso, self.uso) {
            (true, true) => "TCP and UDP",
            (true, false) => "TCP",
            _ => "none",
        })
    }
}

#[derive(Debug)]
pub(crate) struct Tun {
    fd: OwnedFd,
    name: String,
    index: u32,
    offloads: Offloads,
}

#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    value: IfValue,
}

#[repr(C)]
union IfValue {
    flags: libc::c_short,
    number: libc::c_int,
    _size: [u8; 24],
}

impl IfReq {
    fn new(name: &str) -> Self {
        let mut bytes = [0; libc::IFNAMSIZ];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Self { name: bytes, value: IfValue { _size: [0; 24] } }
    }
}

fn ioctl(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: &mut IfReq) -> io::Result<()> {
    // SAFETY: the request is one that takes a `struct ifreq`, which `IfReq` is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Tun {
    pub(crate) fn open(name: &str, mtu: u16) -> Result<Self, Error> {
        let usable = |c: char| c != '/' && !c.is_whitespace() && c != ':' && c != '%';
        if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(usable) || name.starts_with('.') {
            return Err(Error::BadName { name: name.to_owned() });
        }
        let fd = Self::attach(name)?;
        let mut tun =
            Self { fd, name: name.to_owned(), index: 0, offloads: Offloads { tso: false, uso: false } };
        tun.set_header_len()?;
        let tcp = OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_TSO_ECN;
        tun.offloads.uso = tun.offload(tcp | OFFLOAD_USO4 | OFFLOAD_USO6);
        tun.offloads.tso = tun.offloads.uso || tun.offload(tcp);
        if !tun.offloads.tso {
            // Checksums alone, or nothing: every packet is an ordinary one then.
            let _ = tun.offload(OFFLOAD_CSUM) || tun.offload(0);
        }
        tun.configure(mtu)?;
        Ok(tun)
    }

    fn attach(name: &str) -> Result<OwnedFd, Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) => Error::NoPermission { name: name.to_owned(), source },
                _ => Error::NoTunDevice(source),
            })?;
        let fd = OwnedFd::from(file);
        let mut request = IfReq::new(name);
        request.value.flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
        ioctl(fd.as_fd(), TUNSETIFF, &mut request).map_err(|source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Error::NoPermission { name: name.to_owned(), source },
            Some(libc::EBUSY) => Error::NameInUse { name: name.to_owned() },
            Some(libc::EINVAL) => Error::OtherDevice { name: name.to_owned(), source },
            _ => Error::Tun { name: name.to_owned(), step: "TUNSETIFF", source },
        })?;
        Ok(fd)
    }

    /// A device that was there before may have another length set.
    fn set_header_len(&self) -> Result<(), Error> {
        let len = VNET_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const len) };
        if result < 0 {
            let name = self.name.clone();
            return Err(Error::Tun {
                name,
                step: "setting the header length",
                source: io::Error::last_os_error(),
            });
        }
        Ok(())
    }

    fn offload(&self, bits: libc::c_uint) -> bool {
        // SAFETY: TUNSETOFFLOAD takes a number.
        unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(bits)) == 0 }
    }

    fn configure(&mut self, mtu: u16) -> Result<(), Error> {
        let failed = |step| {
            let name = self.name.clone();
            move |source| Error::Tun { name, step, source }
        };
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)
            .map_err(failed("opening a socket"))?;
        let mut request = IfReq::new(&self.name);
        request.value.number = libc::c_int::from(mtu);
        ioctl(socket.as_fd(), libc::SIOCSIFMTU as libc::Ioctl, &mut request)
            .map_err(failed("setting the MTU"))?;
        let mut request = IfReq::new(&self.name);
        request.value.number = QUEUE;
        if let Err(error) = ioctl(socket.as_fd(), SIOCSIFTXQLEN, &mut request) {
            tracing::debug!(%error, "the device keeps its short queue");
        }
        let mut request = IfReq::new(&self.name);
        ioctl(socket.as_fd(), libc::SIOCGIFFLAGS as libc::Ioctl, &mut request)
            .map_err(failed("reading its flags"))?;
        // SAFETY: the kernel has just written the flags.
        let flags = unsafe { request.value.flags };
        request.value.flags = flags | libc::IFF_UP as libc::c_short;
        ioctl(socket.as_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &mut request)
            .map_err(failed("bringing it up"))?;
        let mut request = IfReq::new(&self.name);
        ioctl(socket.as_fd(), libc::SIOCGIFINDEX as libc::Ioctl, &mut request)
            .map_err(failed("reading its index"))?;
        // SAFETY: the kernel has just written the index.
        self.index = unsafe { request.value.number } as u32;
        Ok(())
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    pub(crate) fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Reads one packet with its virtio header; `None` when nothing waits, 0 for a packet that the kernel could not
    /// hand over.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match rustix::io::read(&self.fd, buffer) {
            Ok(length) => Ok(Some(length)),
            // A super-packet of a kind that the header has no word for. It is gone, the device is not.
            Err(rustix::io::Errno::INVAL) => Ok(Some(0)),
            // A signal is nothing to act on: the device is still ready at the next turn.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes one packet from its pieces, the virtio header first.
    pub(crate) fn write(&self, pieces: &[io::IoSlice<'_>]) -> io::Result<()> {
        rustix::io::writev(&self.fd, pieces)?;
        Ok(())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
