//! The packet thread.
use crate::outputs::Senders;
use crate::sys::tun::Tun;
use crate::sys::udp::Sockets;
use crate::tunnel::Shared;
use std::sync::Arc;
pub(crate) struct Worker {}
impl Worker {
    pub(crate) fn new(_shared: Arc<Shared>, _tun: Tun, _sockets: Sockets, _out: Senders) -> Self {
        Self {}
    }
    pub(crate) fn run(self) {}
}
