//! Why a tunnel could not be started, in words that say what to do.

use std::io;

/// Errors of [`crate::Tunnel::start`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/net/tun` is missing.
    #[error(
        "there is no /dev/net/tun: load the kernel module with `modprobe tun`, or give the container the device ({0})"
    )]
    NoTunDevice(#[source] io::Error),
    /// Not allowed to make a network device.
    #[error(
        "no permission to make the network device {name}: run as root or with the capability CAP_NET_ADMIN ({source})"
    )]
    NoPermission {
        /// The device that was asked for.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The name is not usable.
    #[error("`{name}` is no name for a network device: 1 to 15 characters without `/` and white space")]
    BadName {
        /// The name in question.
        name: String,
    },
    /// Another process holds a device with this name.
    #[error(
        "the network device {name} is in use by another process: stop it (is another daemon running?) or choose \
         another name"
    )]
    NameInUse {
        /// The name in question.
        name: String,
    },
    /// A device of this name exists, but is no TUN device of our kind.
    #[error(
        "a network device {name} of another kind exists: remove it with `ip link delete {name}` or choose another name ({source})"
    )]
    OtherDevice {
        /// The name in question.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A step of setting up the device failed.
    #[error("cannot set up the network device {name}: {step}: {source}")]
    Tun {
        /// The device.
        name: String,
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// No UDP socket, of neither family.
    #[error("cannot open a UDP socket on any port: {step}: {source}")]
    Udp {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The mark of the sockets could not be set.
    #[error("cannot mark the UDP sockets with {mark:#x}: the capability CAP_NET_ADMIN is needed ({source})")]
    Mark {
        /// The mark asked for.
        mark: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The thread or its means of waking could not be made.
    #[error("cannot start the packet thread: {0}")]
    Thread(#[source] io::Error),
}

impl Error {
    /// Somebody else has the port.
    pub(crate) fn is_port_taken(&self) -> bool {
        matches!(self, Self::Udp { source, .. } if source.kind() == io::ErrorKind::AddrInUse)
    }
}
