//! The virtual clock of a simulated network: what is to happen, in order of time.
//!
//! Time is counted from the beginning of the run. What is due at one moment happens in the order in which it was
//! planned, so that a run depends on its seed alone.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// What is planned.
#[derive(Debug)]
pub(super) struct Agenda<E> {
    /// When, as the how manieth, and where in `plans`: small, because a heap moves its entries about.
    heap: BinaryHeap<Reverse<(Duration, u64, usize)>>,
    plans: Vec<Option<E>>,
    free: Vec<usize>,
    planned: u64,
}

impl<E> Default for Agenda<E> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), plans: Vec::new(), free: Vec::new(), planned: 0 }
    }
}

impl<E> Agenda<E> {
    /// Plans something.
    pub(super) fn at(&mut self, when: Duration, plan: E) {
        let slot = if let Some(slot) = self.free.pop() {
            self.plans[slot] = Some(plan);
            slot
        } else {
            self.plans.push(Some(plan));
            self.plans.len() - 1
        };
        self.heap.push(Reverse((when, self.planned, slot)));
        self.planned += 1;
    }

    /// What comes next, and when.
    pub(super) fn pop(&mut self) -> Option<(Duration, E)> {
        let Reverse((when, _, slot)) = self.heap.pop()?;
        self.free.push(slot);
        self.plans[slot].take().map(|plan| (when, plan))
    }

    /// How much has been planned so far.
    pub(super) fn planned(&self) -> u64 {
        self.planned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_at_once_happens_in_the_order_of_planning() {
        let mut agenda = Agenda::default();
        let second = Duration::from_secs(1);
        for (when, what) in [(2 * second, 'c'), (second, 'a'), (2 * second, 'd'), (second, 'b')] {
            agenda.at(when, what);
        }
        let order: String = std::iter::from_fn(|| agenda.pop()).map(|(_, what)| what).collect();
        assert_eq!(order, "abcd");
        assert_eq!(agenda.plans.len(), 4);
        agenda.at(second, 'e');
        assert_eq!(agenda.plans.len(), 4, "slots are used again");
    }
}
