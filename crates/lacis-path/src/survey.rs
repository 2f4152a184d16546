//! From where the NAT in front takes its ports, when its mapping varies: a few new sockets, each asking one server
//! where it is seen, tell enough (measured in `reference/natlab.md`, "Searching ports against a symmetric NAT").

use std::time::{Duration, Instant};

use lacis_wire::disco::TxId;
use lacis_wire::disco::traversal::{Allocator, Mapping};

use crate::core::{Core, Use};
use crate::types::SocketId;

/// Sockets on ordinary ports.
const ORDINARY: usize = 5;
/// An unanswered question is asked again, so often.
const ASK_AGAIN: Duration = Duration::from_millis(200);
const ASKS: u32 = 3;
/// The answer to the last one may take so long.
const LAST_ANSWER: Duration = Duration::from_secs(1);
/// What is known is believed so long.
const FRESH: Duration = Duration::from_mins(10);
/// Linux maps source ports 512-1023 here.
pub(crate) const LINUX_LOW: std::ops::RangeInclusive<u16> = 600..=1023;
/// Sizes in which operators cut blocks of ports.
const BLOCKS: [u32; 7] = [64, 256, 512, 1000, 1024, 2048, 4096];
/// A counter that others use too takes steps of at most this.
const STEP: u16 = 16;

#[derive(Debug)]
struct Question {
    socket: SocketId,
    low: bool,
    tx: Vec<TxId>,
    seen: Option<u16>,
}

/// The survey of this node's NAT.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    questions: Vec<Question>,
    asked: u32,
    next: Option<Instant>,
    found: Option<(Allocator, Instant)>,
}

impl Survey {
    pub(crate) fn allocator(&self) -> Allocator {
        self.found.map_or(Allocator::Unknown, |(allocator, _)| allocator)
    }

    pub(crate) fn is_running(&self) -> bool {
        !self.questions.is_empty()
    }

    pub(crate) fn timeout(&self) -> Option<Instant> {
        self.next
    }

    /// Begins, if the mapping varies and what is known is old.
    pub(crate) fn begin(core: &mut Core, now: Instant) {
        let known = core.survey.found.is_some_and(|(_, at)| now < at + FRESH);
        let local = &core.local;
        if known
            || core.survey.is_running()
            || local.mapping != Mapping::Varies
            || !local.searches
            || local.stun.is_empty()
        {
            return;
        }
        let low = usize::from(local.low_ports);
        for n in 0..ORDINARY + low {
            let low = n >= ORDINARY;
            let socket = core.open_socket(now, Use::Survey, low);
            core.survey.questions.push(Question { socket, low, tx: Vec::new(), seen: None });
        }
        core.survey.asked = 0;
        core.survey.next = Some(now + ASK_AGAIN);
    }

    /// Another network: everything starts over.
    pub(crate) fn forget(core: &mut Core) {
        for question in std::mem::take(&mut core.survey.questions) {
            core.close_socket(question.socket);
        }
        core.survey.found = None;
        core.survey.next = None;
    }

    pub(crate) fn opened(core: &mut Core, socket: SocketId, ok: bool) {
        if ok {
            Self::ask(core, socket);
        } else {
            core.survey.questions.retain(|question| question.socket != socket);
        }
    }

    fn ask(core: &mut Core, socket: SocketId) {
        let Some(tx) = core.reflect(socket, 0) else { return };
        if let Some(question) = core.survey.questions.iter_mut().find(|question| question.socket == socket) {
            question.tx.push(tx);
        }
    }

    /// True when the answer was for the survey.
    pub(crate) fn reflected(core: &mut Core, now: Instant, tx: TxId, port: u16) -> bool {
        let Some(question) = core.survey.questions.iter_mut().find(|question| question.tx.contains(&tx))
        else {
            return false;
        };
        question.seen = Some(port);
        if core.survey.questions.iter().all(|question| question.seen.is_some()) {
            Self::conclude(core, now);
        }
        true
    }

    pub(crate) fn wake(core: &mut Core, now: Instant) {
        if core.survey.next.is_none_or(|at| at > now) {
            return;
        }
        core.survey.asked += 1;
        if core.survey.asked >= ASKS {
            Self::conclude(core, now);
            return;
        }
        core.survey.next = Some(now + if core.survey.asked + 1 < ASKS { ASK_AGAIN } else { LAST_ANSWER });
        let silent: Vec<_> = core
            .survey
            .questions
            .iter()
            .filter(|question| question.seen.is_none())
            .map(|question| question.socket)
            .collect();
        for socket in silent {
            if core.is_open(socket) {
                Self::ask(core, socket);
            }
        }
    }

    fn conclude(core: &mut Core, now: Instant) {
        core.survey.next = None;
        let questions = std::mem::take(&mut core.survey.questions);
        let seen = |low: bool| -> Vec<u16> {
            questions
                .iter()
                .filter(|question| question.low == low)
                .filter_map(|question| question.seen)
                .collect()
        };
        let allocator = allocator_of(&seen(false), seen(true).first().copied());
        for question in &questions {
            core.close_socket(question.socket);
        }
        // A silent server says nothing about the NAT: asked again when it is needed.
        if allocator != Allocator::Unknown {
            core.survey.found = Some((allocator, now));
        }
    }
}

/// What ports of new sockets (in the order of their opening), and that of one bound in 512-1023, say of the allocator.
fn allocator_of(ordinary: &[u16], low: Option<u16>) -> Allocator {
    if low.is_some_and(|port| LINUX_LOW.contains(&port)) {
        return Allocator::Linux;
    }
    let (Some(&first), Some(&least), Some(&most), Some(&last)) =
        (ordinary.first(), ordinary.iter().min(), ordinary.iter().max(), ordinary.last())
    else {
        return Allocator::Unknown;
    };
    if ordinary.len() < 3 {
        return Allocator::Unknown;
    }
    // The answers may have been in another order than the questions.
    let mut sorted = ordinary.to_vec();
    sorted.sort_unstable();
    if sorted.windows(2).all(|pair| pair[1] - pair[0] >= 1 && pair[1] - pair[0] <= STEP) {
        return Allocator::Counter(last.max(first).max(most));
    }
    let block = BLOCKS.into_iter().find_map(|size| {
        let start = u32::from(least) / size * size;
        let end = u16::try_from(start + size - 1).ok()?;
        (most <= end).then_some(Allocator::Block(start as u16, end))
    });
    block.unwrap_or(Allocator::Random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_low_port_that_comes_out_low_is_linux() {
        assert_eq!(allocator_of(&[40000, 2000, 31111], Some(777)), Allocator::Linux);
        assert_eq!(allocator_of(&[40000, 2000, 31111], Some(30123)), Allocator::Random);
    }

    #[test]
    fn near_ports_are_a_block_and_steps_a_counter() {
        assert_eq!(allocator_of(&[20105, 20890, 20333, 20007, 20600], None), Allocator::Block(20000, 20999));
        assert_eq!(allocator_of(&[30003, 30001, 30002, 30007], None), Allocator::Counter(30007));
    }

    #[test]
    fn too_few_answers_say_nothing() {
        assert_eq!(allocator_of(&[], None), Allocator::Unknown);
        assert_eq!(allocator_of(&[1024, 5000], None), Allocator::Unknown);
    }
}
