//! The system calls: TUN device, UDP sockets with batches, and the means of waking the thread.

pub(crate) mod tun;
pub(crate) mod udp;
pub(crate) mod wake;
