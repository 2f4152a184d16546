//! The system calls: TUN device, UDP sockets with batches, and the means of waking the thread.

pub(crate) mod sockets;
pub(crate) mod tun;
pub(crate) mod udp;
pub(crate) mod wake;

/// A number that is different at each call, from the random state of the standard library's maps. Not for secrets.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(std::process::id())
}
