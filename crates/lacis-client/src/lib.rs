//! `lacisd`: the daemon that puts a host into its mesh and keeps it there.
//!
//! [`run`] puts the parts together: the tunnel's packet thread, one [`engine`] task that owns every decision, the
//! control session ([`control`]), the relays ([`relays`]), the resolver, the host's network configuration ([`host`])
//! and the local API ([`localapi`]). `ARCHITECTURE.md` follows a packet and a change through them.

mod bus;
mod control;
mod dns;
mod engine;
mod error;
pub mod host;
mod host_task;
mod hostinfo;
mod interfaces;
mod links;
mod localapi;
mod marked;
mod metered;
mod netcheck;
mod netmap;
mod portmap;
mod relays;
mod routing;
mod run;
mod state;
mod uapi;

pub use error::Error;
pub use run::{Options, cleanup, run};
