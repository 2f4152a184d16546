//! Why the daemon cannot start or go on, each in one line that says what to do.

use std::io;
use std::path::PathBuf;

fn way_out(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            " (run lacisd as root, or give it a directory of its own with --state-dir)"
        }
        io::ErrorKind::StorageFull => " (make room on that disk)",
        io::ErrorKind::ReadOnlyFilesystem => " (choose a writable directory with --state-dir)",
        _ => "",
    }
}

/// What ends the daemon. Everything that can heal is retried instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{doing} {} failed: {source}{}", path.display(), way_out(.source))]
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
    #[error("the network device is gone ({0}): did somebody delete it? Start lacisd again")]
    TunLost(String),
    #[error(
        "the packet thread has ended, which is a fault of lacisd: start it again, and report what it said before"
    )]
    PacketThread,
    #[error(
        "the state directory {} has files of other programs in it: give lacisd a directory of its own with --state-dir",
        path.display()
    )]
    StateDirShared { path: PathBuf },
    #[error("{} is in the way of the local API's socket and is no socket: name another path with --socket", path.display())]
    NoSocket { path: PathBuf },
    #[error(
        "a lacisd runs with the device {tun}: it puts this host back itself when it is stopped (`systemctl stop lacisd`)"
    )]
    Running { tun: String },
    #[error("--cleanup changes routes, rules and the firewall, which needs CAP_NET_ADMIN: run it as root")]
    NotAllowed,
    #[error("waiting for signals: {0}")]
    Signals(io::Error),
}
