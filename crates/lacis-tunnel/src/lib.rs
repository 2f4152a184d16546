//! The packet path of the daemon: TUN device, UDP sockets, WireGuard sessions and the packet filter.
//!
//! One thread outside the asynchronous runtime owns all of them, polls the descriptors and moves packets in
//! batches; `lacis-client` steers it through [`Tunnel`] (commands, never blocking) and reads what leaves it from
//! [`Outputs`]. The thread decides nothing about paths: each peer has one [`Path`], set from outside.
//! The design and its figures are those of the data plane measurements (`reference/dataplane.md`); filter and
//! in-tunnel messages follow `reference/client.md`, sections 6 and 7.
//!
//! - [`Tunnel::start`] opens the device and the sockets and starts the thread;
//! - [`Tunnel::set_identity`], [`Tunnel::set_peers`], [`Tunnel::set_path`], [`Tunnel::set_filter`] give it its state;
//! - [`Outputs::relay`] carries sealed packets as ready DERP frames, [`Tunnel::relay_in`] takes the other direction;
//! - [`Outputs::udp`] and [`Tunnel::send_udp`] share the sockets with path discovery and STUN;
//!   [`Tunnel::open_socket`] opens more of them: a [`Way`] is a socket of ours and an address;
//! - [`Tunnel::set_routes`] says which networks this node routes: 4via6 routes among them are translated;
//! - [`Outputs::quad100`] and [`Tunnel::inject`] connect the resolver that lives inside the device; what it can answer
//!   without waiting, a [`Responder`] answers on the packet thread.

mod checksum;
mod coalesce;
mod config;
mod error;
mod filter;
#[doc(hidden)]
pub mod fuzzing;
mod outputs;
mod packet;
mod peers;
mod queue;
mod segment;
mod sinks;
mod stats;
mod sys;
mod tsmp;
mod tunnel;
mod via;
mod worker;

pub use config::{DEFAULT_MTU, MAX_RESPONSE, Path, PeerConfig, Responder, SocketId, TunnelConfig, Way};
pub use error::Error;
pub use filter::{DropReason, Filter, Flows, Verdict};
pub use outputs::{Event, Outputs, PongKind, RelayBatch, RelayOutput, SendFailure, UdpIn};
pub use packet::{Parsed, protocol};
pub use stats::{PeerStats, Stats};
pub use tsmp::{Reject, RejectReason};
pub use tunnel::Tunnel;
pub use via::DUMMY_SOURCE as VIA_DUMMY_SOURCE;
