//! The place for one port search at a time: each costs the NATs entries.
//!
//! It is given in the order of asking, so that a peer which asks again and again gets no more of it than the others
//! that want it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use lacis_wire::key::NodeKey;

/// A request is dropped when it was not repeated for so long: openers repeat theirs each two seconds at most.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// Requests that are kept.
const MAX_WAITING: usize = 64;

/// Who searches, and who wants to.
#[derive(Debug, Default)]
pub(crate) struct SearchSlot {
    holder: Option<NodeKey>,
    /// In the order of asking, with the time of the last request.
    waiting: VecDeque<(NodeKey, Instant)>,
}

impl SearchSlot {
    /// Takes the place for a search with this peer. When it is not free, or others asked before, the request is noted.
    pub(crate) fn take(&mut self, now: Instant, peer: NodeKey) -> bool {
        let free = self.is_free_for(now, &peer);
        if free {
            self.forget(&peer);
            self.holder = Some(peer);
        }
        free
    }

    /// Whether [`Self::take`] would succeed. If not, the request is noted.
    pub(crate) fn is_free_for(&mut self, now: Instant, peer: &NodeKey) -> bool {
        self.waiting.retain(|(_, at)| now < *at + MAX_WAIT);
        if self.holder.is_none() && self.waiting.front().is_none_or(|(first, _)| first == peer) {
            return true;
        }
        if let Some((_, at)) = self.waiting.iter_mut().find(|(other, _)| other == peer) {
            *at = now;
        } else if self.waiting.len() < MAX_WAITING {
            self.waiting.push_back((*peer, now));
        }
        false
    }

    /// The search with this peer is over, or it has no more use for one.
    pub(crate) fn release(&mut self, peer: &NodeKey) {
        if self.holder.as_ref() == Some(peer) {
            self.holder = None;
        }
    }

    /// This peer wants no search any more.
    pub(crate) fn forget(&mut self, peer: &NodeKey) {
        self.waiting.retain(|(other, _)| other != peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeKey = NodeKey::from_bytes([1; 32]);
    const B: NodeKey = NodeKey::from_bytes([2; 32]);

    #[test]
    fn who_had_the_place_waits_for_those_who_asked_meanwhile() {
        let now = Instant::now();
        let mut slot = SearchSlot::default();
        assert!(slot.take(now, A));
        assert!(!slot.take(now, B));
        slot.release(&A);
        assert!(!slot.take(now, A), "B asked before");
        assert!(slot.take(now, B));
        slot.release(&B);
        assert!(slot.take(now, A));
    }

    #[test]
    fn who_does_not_come_back_keeps_nobody_waiting_for_long() {
        let now = Instant::now();
        let mut slot = SearchSlot::default();
        assert!(slot.take(now, A));
        assert!(!slot.take(now, B));
        slot.release(&A);
        assert!(slot.take(now + MAX_WAIT, A));
    }

    #[test]
    fn requests_are_bounded() {
        let now = Instant::now();
        let mut slot = SearchSlot::default();
        assert!(slot.take(now, A));
        for n in 0..1000_u16 {
            let mut key = [3; 32];
            key[..2].copy_from_slice(&n.to_be_bytes());
            assert!(!slot.take(now, NodeKey::from_bytes(key)));
        }
        assert_eq!(slot.waiting.len(), MAX_WAITING);
    }
}
