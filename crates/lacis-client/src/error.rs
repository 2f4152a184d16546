//! Why the daemon cannot start or go on, each in one line that says what to do.

use std::io;
use std::path::PathBuf;

/// What ends the daemon. Everything that can heal is retried instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{doing} {} failed: {source}", path.display())]
    State { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("another lacisd uses the state directory {} (one daemon for each --state-dir)", path.display())]
    StateInUse { path: PathBuf },
    #[error(
        "the saved state {} is damaged: {source} (move it away to start as a new node, or restore it from a backup)",
        path.display()
    )]
    StateDamaged { path: PathBuf, source: serde_json::Error },
    #[error(transparent)]
    Tunnel(#[from] lacis_tunnel::Error),
    #[error(transparent)]
    Host(#[from] crate::host::HostError),
    #[error("the local API's socket {}: {source}", path.display())]
    Socket { path: PathBuf, source: io::Error },
    #[error("another lacisd listens on {} (stop it, or give this one another --socket)", path.display())]
    SocketInUse { path: PathBuf },
    #[error("waiting for signals: {0}")]
    Signals(io::Error),
}
