//! Simulated networks, for proving [`crate::Paths`] on thousands of them.
//!
//! A [`Scenario`] is plain data: routers, places, nodes, who talks to whom, and what happens when. [`generate`] makes
//! one of a seed, [`run`] plays it in virtual time and tells what became of it, [`verdict`] says from the scenario
//! alone what can be expected, [`check`] compares the two, and [`shrink`] looks for a smaller scenario that still
//! fails. A run depends on its scenario (with its seed) and on nothing else.
//!
//! Routers behave as `router.rs` says (measured with real kernels, `reference/natlab.md`); around each `Paths` is a
//! shell that does what the daemon does (`world.rs`). Not modelled: NAT64 (a host without IPv4 does not reach
//! addresses of IPv4), port mapping by PCP and its like, fragments, TCP's own troubles under the relay's connection.

mod check;
mod clock;
mod flow;
mod generate;
mod internet;
mod model;
mod node;
mod packet;
mod router;
mod scenario;
mod shrink;
mod text;
mod world;

pub use check::{
    DIRECT_WITHIN, Failure, MOST_CHANGES, MOST_IN_A_MINUTE, MOST_IN_A_SERIES, MOST_SOCKETS,
    MOST_WHEN_SETTLED, Property, check,
};
pub use flow::{FlowOutcome, MOST_SILENCE, MOST_SILENCE_AFTER_DEATH, Silence};
pub use generate::generate;
pub use model::{Expected, Verdict, verdict};
pub use node::Counts;
pub use router::{Depends, Nat, Ports};
pub use scenario::{Event, Family, Link, Net, NodeSpec, Place, RouterSpec, SETTLE, Scenario, Udp};
pub use shrink::shrink;
pub use text::NotAScenario;
pub use world::{run, trace};

use crate::RegionId;

/// The only relay's region.
const REGION: RegionId = 1;

/// What became of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Of each flow.
    pub flows: Vec<FlowOutcome>,
    /// Of each node.
    pub nodes: Vec<Counts>,
    /// What must never be, in words.
    pub faults: Vec<String>,
    /// How much was planned: the same for every run of the same scenario.
    pub happened: u64,
}
