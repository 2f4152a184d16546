//! Laboratory: networks of namespaces that the real programs run in, driven by scripts that run in NixOS's virtual
//! machines too; and a load generator.
//!
//! A scenario is a folder in `tests/`: `topology.toml` ([`topology`]) becomes a plan with addresses and units
//! ([`plan`]), [`run`] makes namespaces for it, [`boot`] builds it from within, and the driver (`driver/*.py`) runs
//! the scenario's `test.py`. [`matrix`] runs one such scenario and prints what all pairs of NATs come to ([`expect`] is
//! what they should). [`load`] stands alone: it drives any ts2021 server with simulated clients. [`hostile`] is what the scenario `hostile`
//! attacks with.

pub mod boot;
pub mod expect;
pub mod hostile;
pub mod load;
pub mod matrix;
pub mod nat;
pub mod net;
mod node;
pub mod pki;
pub mod plan;
pub mod run;
pub mod shell;
pub mod sys;
pub mod topology;
pub mod units;
