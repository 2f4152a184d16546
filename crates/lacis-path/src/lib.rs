//! Which way to a peer: directly by UDP when any pair of NATs allows it, through the relay until then and after.
//!
//! [`Paths`] is a state machine without sockets and without a clock. Whoever owns it (the daemon's engine, or a
//! simulated node) tells it what happens with [`Paths::handle`], carries out what [`Paths::poll_output`] gives until
//! there is nothing more, and calls [`Paths::wake`] when [`Paths::poll_timeout`] has come. Messages are given in the
//! clear: sealing them is the owner's work. How it works, in words and pictures: `docs/nat-traversal.md`.
//!
//! The rules for pings, trust and choice are those of disco (`reference/derp-and-nat-traversal.md`, sections 14 to 17);
//! they are in `peer.rs` and `peer/`. What goes beyond them: `rotation.rs` (another socket when a port is spoilt), `survey.rs`
//! (from where a NAT takes its ports) and `search.rs` with `prober.rs` (finding a port of a NAT whose mapping varies).

mod core;
mod paths;
mod peer;
mod prober;
mod question;
mod rotation;
mod score;
mod search;
pub mod sim;
mod slot;
mod survey;
mod types;
mod why;

pub use paths::Paths;
pub use types::{Input, Local, Output, Path, Peer, RegionId, SocketId, Via, Way};
pub use why::{Tried, Why};
