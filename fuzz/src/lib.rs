//! The targets: each takes any bytes, and asserts what must hold of them. The programs in `fuzz_targets/` give them to
//! libFuzzer, the `tests/mutations.rs` of the crates feed them with what `mutate.rs` makes.

pub mod dns;
pub mod policy;
pub mod tunnel;
pub mod wire;
