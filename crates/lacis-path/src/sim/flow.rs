//! Two users who talk, and the watch over them: does what they say arrive, and in time?

use std::time::Duration;

use super::packet::Data;
use crate::Path;

/// Without a fault nobody is without an answer for longer.
pub const MOST_SILENCE: Duration = Duration::from_secs(3);
/// The same when a way has died and nobody said so.
pub const MOST_SILENCE_AFTER_DEATH: Duration = Duration::from_secs(8);

/// Nothing was heard though something could have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// Since when.
    pub since: Duration,
    /// How long it was allowed to be.
    pub allowed: Duration,
    /// How long it was.
    pub lasted: Duration,
}

/// What became of a flow.
#[derive(Clone, Debug)]
pub struct FlowOutcome {
    /// Who began.
    pub from: usize,
    /// Who answered.
    pub to: usize,
    /// Packets sent.
    pub sent: u64,
    /// Answers that came.
    pub answered: u64,
    /// Those of them that came directly.
    pub directly: u64,
    /// From the first packet to the first answer.
    pub first_answer: Option<Duration>,
    /// The worst silence that was too long.
    pub silence: Option<Silence>,
    /// When both paths were direct first.
    pub direct_first: Option<Duration>,
    /// When they were so first after the last event.
    pub direct_again: Option<Duration>,
    /// Since when they have been so without a break.
    pub direct_since: Option<Duration>,
    /// Both paths at the end.
    pub paths: (Path, Path),
    /// Whether a ping was sent at the end, and whether it was answered.
    pub pinged: Option<bool>,
}

/// A flow that runs.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) pinged: Option<Duration>,
    pub(super) ponged: bool,
    sent: u64,
    answered: u64,
    directly: u64,
    began: Option<Duration>,
    first_answer: Option<Duration>,
    /// The last answer, or when it became possible to have one.
    heard: Option<Duration>,
    /// When ways may have died last, and when they did so unnoticed.
    killed: Option<Duration>,
    unnoticed: Option<Duration>,
    /// Both paths were direct, and nothing has happened to them since.
    proven: bool,
    last_change: Duration,
    direct_first: Option<Duration>,
    direct_again: Option<Duration>,
    direct_since: Option<Duration>,
    silence: Option<Silence>,
}

impl Flow {
    pub(super) fn new((from, to, _): (usize, usize, u32), last_change: Duration) -> Self {
        Self {
            from,
            to,
            pinged: None,
            ponged: false,
            sent: 0,
            answered: 0,
            directly: 0,
            began: None,
            first_answer: None,
            heard: None,
            killed: None,
            unnoticed: None,
            proven: false,
            last_change,
            direct_first: None,
            direct_again: None,
            direct_since: None,
            silence: None,
        }
    }

    /// Who sent this packet.
    pub(super) fn sender(&self, data: Data) -> usize {
        if data.answer { self.to } else { self.from }
    }

    /// Nobody can or wants to say anything.
    pub(super) fn pause(&mut self) {
        self.heard = None;
    }

    /// The next packet, while the relay can carry it or not.
    pub(super) fn send(&mut self, flow: usize, now: Duration, relayed: bool) -> Data {
        self.began.get_or_insert(now);
        if relayed || self.proven {
            let since = *self.heard.get_or_insert(now);
            let dead = self.unnoticed.is_some_and(|at| at + MOST_SILENCE_AFTER_DEATH > since);
            let allowed = if dead { MOST_SILENCE_AFTER_DEATH } else { MOST_SILENCE };
            let lasted = now.saturating_sub(since);
            if lasted > allowed && self.silence.is_none_or(|worst| worst.since == since) {
                self.silence = Some(Silence { since, allowed, lasted });
            }
        } else {
            self.heard = None;
        }
        self.sent += 1;
        Data { flow, number: self.sent, answer: false }
    }

    pub(super) fn answered(&mut self, now: Duration, directly: bool) {
        self.answered += 1;
        self.directly += u64::from(directly);
        if self.first_answer.is_none() {
            self.first_answer = self.began.map(|began| now.saturating_sub(began));
        }
        self.heard = self.heard.map(|_| now);
    }

    pub(super) fn look(&mut self, now: Duration, direct: bool) {
        if !direct {
            self.direct_since = None;
            return;
        }
        self.direct_since.get_or_insert(now);
        self.direct_first.get_or_insert(now);
        if now >= self.last_change {
            self.direct_again.get_or_insert(now);
        }
        // What a fault has killed counts as a way again once it has been used for a while.
        self.proven |= self.killed.is_none_or(|at| now > at + MOST_SILENCE_AFTER_DEATH);
    }

    pub(super) fn killed(&mut self, now: Duration, noticed: bool) {
        self.proven = false;
        self.direct_since = None;
        self.killed = Some(now);
        if !noticed {
            self.unnoticed = Some(now);
        }
    }

    pub(super) fn outcome(self, paths: (Path, Path)) -> FlowOutcome {
        FlowOutcome {
            from: self.from,
            to: self.to,
            sent: self.sent,
            answered: self.answered,
            directly: self.directly,
            first_answer: self.first_answer,
            silence: self.silence,
            direct_first: self.direct_first,
            direct_again: self.direct_again,
            direct_since: self.direct_since,
            paths,
            pinged: self.pinged.map(|_| self.ponged),
        }
    }
}
