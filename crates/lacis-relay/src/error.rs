//! What can go wrong in this crate, said so that one line tells what to do.

use std::net::SocketAddr;
use std::path::PathBuf;

/// An error of the relay, its program or its client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the configuration could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The configuration is not what it should be.
    #[error("{path}: {message}")]
    Config {
        /// Which file.
        path: PathBuf,
        /// Where in it, and what was expected.
        message: String,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address} for {what}{}", bind_hint(source))]
    Bind {
        /// Which address.
        address: SocketAddr,
        /// For what: clients, STUN or metrics.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The state directory, the key, the certificate or TLS.
    #[error(transparent)]
    Serve(#[from] lacis_serve::Error),
    /// A URL of the configuration is not one that this program can ask.
    #[error("{url} is not an http:// or https:// URL: {message}")]
    Url {
        /// The text.
        url: String,
        /// What is wrong with it.
        message: String,
    },
}

/// What to do about an address that cannot be bound.
fn bind_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => " (another program has that port: stop it, or choose another one)",
        std::io::ErrorKind::PermissionDenied => " (ports below 1024 need CAP_NET_BIND_SERVICE)",
        std::io::ErrorKind::AddrNotAvailable => " (this host does not have that address)",
        _ => "",
    }
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // some libraries repeat their cause in their own text
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
