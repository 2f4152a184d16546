//! Who may reach whom, and through whom: a policy's text becomes what each node of a network gets.
//!
//! [`Policy::parse`] reads the language that Tailscale and Headscale users know (HuJSON, or the same as YAML), and says
//! what is wrong with line and column. [`Network::compile`] applies it to a [`Population`]: packet filters, visible
//! peers, SSH rules, node attributes, approved and primary routes. No I/O and no clock.

mod attributes;
mod check;
mod decision;
mod document;
mod facts;
mod filter;
mod language;
mod network;
mod policy;
mod population;
mod problem;
mod program;
mod ranges;
mod routes;
mod ssh;
mod state;
mod test;

pub use decision::{Decision, Endpoint, Protocol, Reason};
pub use document::Format;
pub use network::{Difference, Network, PeerRoutes};
pub use policy::Policy;
pub use population::{Node, Population, Role, Settings, User};
pub use problem::{Invalid, Position, Problem};
pub use ssh::{SshRule, SshVerdict};
pub use state::NOT_INTERNET;
