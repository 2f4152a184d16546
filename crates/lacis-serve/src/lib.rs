//! What the programs that serve share: listeners that strangers cannot fill, TLS with reload, Unix sockets with the
//! peer's credentials, state directories and key files, and log lines that strangers cannot flood.
//!
//! - [`places::Places`] decides which connection gives way when there are too many. No I/O, no clock.
//! - [`listener::Listeners`] serves a router over TCP with the limits of [`listener::HttpLimits`]; [`unix`] over a Unix
//!   socket, with places by user.
//! - [`bind`], [`tls`], [`readahead`], [`proxy`]: what a listener needs.
//! - [`keys`]: the state directory and key files that nobody else may read.
//! - [`log::LogLimiter`]: at most so many lines of a kind by source.
//!
//! Nothing here knows the protocols that the programs speak.

pub mod bind;
pub mod keys;
pub mod listener;
pub mod log;
pub mod metrics;
pub mod places;
pub mod proxy;
pub mod readahead;
pub mod tls;
pub mod unix;

mod error;
mod http1;

pub use error::Error;
pub use http1::call;
