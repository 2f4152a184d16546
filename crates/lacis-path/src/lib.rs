//! Which way to a peer: directly by UDP when any pair of NATs allows it, through the relay until then and after.
//!
//! [`Paths`] is a state machine without sockets and without a clock. Whoever owns it (the daemon's engine, or a
//! simulated node in [`sim`]) tells it what happens with [`Paths::handle`], carries out what [`Paths::poll_output`]
//! gives until there is nothing more, and calls [`Paths::wake`] when [`Paths::poll_timeout`] has come. Messages are
//! given in the clear: sealing them is the owner's work. How it works, in words and pictures: `docs/nat-traversal.md`.
//! The rules for pings, trust and choice are those of disco (`reference/derp-and-nat-traversal.md`, sections 14 to 17);
//! what goes beyond them is told in [`rotation`] and [`search`].

mod types;

pub use types::{Input, Local, Output, Path, Peer, RegionId, SocketId, Via, Way};
