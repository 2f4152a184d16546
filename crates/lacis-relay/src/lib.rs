//! DERP and STUN: the relay that carries packets between nodes with no direct path, and the client that the
//! daemon reaches it with.
//!
//! - [`server::Relay`] is the relay itself: embedded in the coordinator or run by the program `lacis-relay`.
//!   It routes datagrams by node key and never sees inside them; [`server::Admission`] says who may use it.
//! - [`stun::Server`] tells clients their public address.
//! - [`client::RelayClient`] keeps one connection to one region alive and moves batches of packets through it.
//! - [`config`], [`serve`], [`verify`]: what the program adds.
//!
//! A packet's way through the relay: socket -> TLS -> a large read -> frames are re-addressed in place in the
//! read buffer (a `SendPacket` and a `RecvPacket` have the same size) -> one copy of a whole run of frames into
//! the destination's bounded queue -> one large write. Frame formats are `lacis_wire::derp`'s.

pub mod client;
pub mod config;
pub mod serve;
pub mod server;
pub mod stun;
pub mod verify;

mod buffers;
mod error;

pub use error::Error;
