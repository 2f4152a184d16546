//! What ends the program, each in one line that says what to do.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::config::ConfigError;
use crate::core::policy::PolicyError;

/// Why the coordinator does not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A listener's address cannot be had.
    #[error("cannot listen on {address} for {what}: {source} ({})", listen_hint(source, key))]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What was to be served there.
        what: &'static str,
        /// The configuration's key that names the address.
        key: &'static str,
        /// From the system.
        source: io::Error,
    },
    /// The admin socket cannot be had.
    #[error(
        "cannot listen on the admin socket {path}: {source} (its directory must exist and be writable; `admin_socket` in the configuration names another place)"
    )]
    AdminSocket {
        /// Its path.
        path: PathBuf,
        /// From the system.
        source: io::Error,
    },
    /// Somebody answers on the admin socket.
    #[error("another coordinator is running: it answers on {path} (stop it first)")]
    Running {
        /// The admin socket.
        path: PathBuf,
    },
    /// The database has nodes, and the key that they know the coordinator by is not there.
    #[error(
        "the database has {nodes} nodes, but the coordinator's key {path} is missing: put it back from a backup; or start once with `serve --init` to make another, and let every machine sign in again with `lacis up --force-reauth`"
    )]
    MissingKey {
        /// Where the key should be.
        path: PathBuf,
        /// How many nodes there are.
        nodes: usize,
    },
    /// The state directory, a key, the certificate or TLS.
    #[error(transparent)]
    Serve(#[from] lacis_serve::Error),
    /// The embedded relay.
    #[error(transparent)]
    Relay(#[from] lacis_relay::Error),
    /// The database, or what is in it.
    #[error(transparent)]
    Core(#[from] crate::core::Error),
    /// The runtime or the signals.
    #[error("cannot {doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// From the system.
        source: io::Error,
    },
}

impl Error {
    /// Whether it takes a person to heal it, in the configuration or state directory: starting again does not help. Files
    /// that the configuration only names (a certificate, a policy) may come later: they are tried again.
    pub fn is_config(&self) -> bool {
        use crate::core::Error as Core;
        use crate::store::Error as Store;
        use lacis_serve::Error as Serve;
        match self {
            Self::Config(_)
            | Self::MissingKey { .. }
            | Self::Core(Core::UnknownTailnet { .. } | Core::Store(Store::Missing { .. }))
            | Self::Serve(Serve::Tls(_)) => true,
            Self::Core(Core::Policy { error, .. }) => !matches!(error, PolicyError::Read { .. }),
            _ => false,
        }
    }
}

fn listen_hint(source: &io::Error, key: &str) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => {
            format!("another program has this port: stop it, or change `{key}` in the configuration")
        }
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need root or the capability CAP_NET_BIND_SERVICE".to_owned()
        }
        io::ErrorKind::AddrNotAvailable => {
            format!("this host has no such address: change `{key}` in the configuration")
        }
        _ => format!("change `{key}` in the configuration"),
    }
}
