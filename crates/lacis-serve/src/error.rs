//! What can go wrong in this crate, said so that one line tells what to do.

use std::io;
use std::path::PathBuf;

/// Why a file, directory or socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A certificate file could not be read.
    #[error(
        "cannot read {path}: {error} (a certificate and its key must be there, and the user that runs the program must be able to read them)"
    )]
    Read {
        /// Which file.
        path: PathBuf,
        /// From the system.
        error: io::Error,
    },
    /// A certificate or its key cannot be used.
    #[error("cannot use the certificate {path}: {message}")]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The TLS library refused its settings.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    /// The state directory or a file in it.
    #[error(
        "cannot {doing} {path}: {error} (the state directory must belong to the user that runs the program)"
    )]
    State {
        /// What was being done.
        doing: &'static str,
        /// The directory or file.
        path: PathBuf,
        /// From the system.
        error: io::Error,
    },
    /// The state directory is locked by another process.
    #[error("another {program} is running: it holds {path} (stop it first)")]
    Running {
        /// What runs.
        program: &'static str,
        /// The lock file.
        path: PathBuf,
    },
    /// A key file that others may read.
    #[error(
        "the key {path} may be read by others (mode {mode:03o}): take that away with `chmod 600 {path}`, and replace the key if others had access"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A key file with something else in it.
    #[error(
        "{path} does not hold a private key: {why} (restore it from a backup; it is never replaced by itself)"
    )]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}
