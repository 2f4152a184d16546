//! Where is this socket seen? Asked of one STUN server after the other until an answer comes, for whoever needs the
//! place of a new socket: a rotation, and both sides of a port search.

use std::time::{Duration, Instant};

use lacis_wire::disco::TxId;

use crate::core::Core;
use crate::types::SocketId;

/// A server that does not answer is asked again, and another one.
pub(crate) const ASK_AGAIN: Duration = Duration::from_millis(150);
const ASKS: usize = 3;
/// The answer to the last one may take so long.
pub(crate) const LAST_ANSWER: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Question {
    socket: SocketId,
    asked: Vec<TxId>,
    /// When it is asked again, or given up.
    pub(crate) next: Instant,
}

impl Question {
    pub(crate) fn ask(core: &mut Core, now: Instant, socket: SocketId) -> Self {
        let asked = core.reflect(socket, 0).into_iter().collect();
        Self { socket, asked, next: now + ASK_AGAIN }
    }

    /// Asks again, as is due. False when it has been asked often enough.
    pub(crate) fn again(&mut self, core: &mut Core, now: Instant) -> bool {
        let asks = self.asked.len() < ASKS;
        if asks {
            self.asked.extend(core.reflect(self.socket, self.asked.len()));
            self.next = now + if self.asked.len() < ASKS { ASK_AGAIN } else { LAST_ANSWER };
        }
        asks
    }

    pub(crate) fn is_answered_by(&self, tx: TxId) -> bool {
        self.asked.contains(&tx)
    }
}
