//! MagicDNS: names of the mesh answered on the spot, everything else passed on.
//!
//! [`DnsState`] is what the network map says, as plain data; [`Resolver`] answers DNS messages with it (the client
//! dossier, sections 8 and 9), and asks others by plain DNS, over TLS and over HTTPS; [`Quad100`] makes the resolver reachable at 100.100.100.100 and fd7a:115c:a1e0::53
//! inside the tunnel's packet stream, so that no socket is bound on the host; [`os_config`] decides what the host's own
//! resolver is told.

mod answer;
mod forward;
#[doc(hidden)]
pub mod fuzzing;
mod inline;
mod known;
mod loops;
mod packet;
mod quad100;
mod resolver;
mod secure;
mod state;
mod tcp;

pub use quad100::{QUAD100_V4, QUAD100_V6, Quad100};
pub use resolver::{Options, Resolver, Transport};
pub use state::{DnsState, Inside, OsDns, SecureUpstream, Upstream, is_mesh, os_config};
