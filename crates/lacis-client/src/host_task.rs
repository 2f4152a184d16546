//! Applies what this host should look like, one wish after the other, the latest always.
//!
//! Netlink and D-Bus take their time; the engine does not wait for them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, sleep_until};

use crate::host::{FileWatch, Host, HostState};

/// How often it is looked whether other programs have changed what is ours, even if nothing was noticed.
const REPAIR: Duration = Duration::from_secs(10);
/// Nothing makes this task look at the resolver again sooner.
const MIN_PAUSE: Duration = Duration::from_millis(50);
/// What is noticed is repaired at once, so many times; a program that insists is answered after pauses.
const MAX_BURST: u32 = 30;
const PAUSE: Duration = Duration::from_millis(200);

/// What the engine hears.
#[derive(Debug)]
pub(crate) enum HostNews {
    /// It looks as was wished, as far as it can.
    Applied { warnings: Vec<String> },
    /// What the host itself lacks, and how to mend it; told when it is something else than before.
    Missing(Vec<String>),
    /// It looks as if we were not there.
    Reverted,
    /// It does not yet; it is tried again.
    Failed(String),
    /// The resolvers that the host had without us are known, or others.
    BaseResolvers,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    /// Not known yet: what an earlier daemon has left stays.
    Unknown,
    State(HostState),
    /// As if we were not there.
    Nothing,
    /// The daemon ends because of a failure, and will be started again.
    Abandoned,
}

/// A handle to wish with.
#[derive(Debug)]
pub(crate) struct HostTask {
    wish: watch::Sender<Wanted>,
    tried: watch::Receiver<bool>,
    base: watch::Receiver<Vec<SocketAddr>>,
}

impl HostTask {
    /// Starts, with the index of the mesh's device; ends, having put the host back, when the handle is dropped. The
    /// task gives that end.
    pub(crate) fn start(
        mut host: Host,
        device: u32,
        news: mpsc::Sender<HostNews>,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (wish, wishes) = watch::channel(Wanted::Unknown);
        let (base_sender, base) = watch::channel(host.base_resolvers());
        let (tried_sender, tried) = watch::channel(false);
        let changed = host.watch(device);
        let task = tokio::spawn(run(host, changed, wishes, base_sender, tried_sender, news));
        (Self { wish, tried, base }, task)
    }

    /// The host should look like this from now on; `None`: as if we were not there.
    pub(crate) fn wish(&self, state: Option<HostState>) {
        self.set(state.map_or(Wanted::Nothing, Wanted::State));
    }

    /// The daemon fails: with an exit node the host stays as it is.
    pub(crate) fn abandon(&self) {
        self.set(Wanted::Abandoned);
    }

    fn set(&self, wanted: Wanted) {
        self.wish.send_if_modified(|old| {
            let changed = *old != wanted;
            *old = wanted;
            changed
        });
    }

    /// Becomes true when the first wish has been followed, as far as that was possible.
    pub(crate) fn tried(&self) -> watch::Receiver<bool> {
        self.tried.clone()
    }

    pub(crate) fn base_resolvers(&self) -> Vec<SocketAddr> {
        self.base.borrow().clone()
    }
}

/// How often repairs are made that were not asked for by the clock.
#[derive(Debug)]
struct Pace {
    /// When all of the burst is there again.
    full: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { full: now }
    }

    /// When the next one may be.
    fn next(&self, now: Instant) -> Instant {
        (self.full + PAUSE).checked_sub(PAUSE * MAX_BURST).map_or(now, |at| at.max(now))
    }

    fn take(&mut self, now: Instant) {
        self.full = self.full.max(now) + PAUSE;
    }

    /// Is there an end to answering at once?
    fn is_spent(&self, now: Instant) -> bool {
        self.next(now) > now
    }
}

async fn run(
    mut host: Host,
    changed: Arc<Notify>,
    mut wishes: watch::Receiver<Wanted>,
    base: watch::Sender<Vec<SocketAddr>>,
    tried: watch::Sender<bool>,
    news: mpsc::Sender<HostNews>,
) {
    let mut repair = tokio::time::interval(REPAIR);
    repair.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Something did not work: it may at the next try.
    let mut again = false;
    let mut missing = Vec::new();
    // Before the first look at what the host has, so that nothing falls in between.
    let mut files = host.watch_resolver();
    let mut pace = Pace::new(Instant::now());
    // A change was noticed, and is repaired as soon as the pace allows it.
    let mut noticed = false;
    loop {
        let due = host.resolver_due();
        let repair = tokio::select! {
            changed = wishes.changed() => if changed.is_err() { break } else { None },
            _ = repair.tick() => Some(Part::All),
            () = changed.notified(), if !noticed => {
                noticed = true;
                continue;
            }
            () = sleep_until(pace.next(Instant::now())), if noticed => {
                pace.take(Instant::now());
                Some(Part::All)
            }
            () = resolver_changed(&mut files, due) => Some(Part::Resolver),
        };
        noticed &= matches!(repair, Some(Part::Resolver));
        files = host.watch_resolver();
        if let Some(part) = repair.filter(|part| !again || matches!(part, Part::Resolver)) {
            let done = match part {
                Part::All => host.repair().await,
                Part::Resolver => Ok(host.repair_resolver().await),
            };
            follow_base(&host, &base, &news).await;
            match done {
                Ok(mut report) => {
                    let insists = pace.is_spent(Instant::now());
                    if insists {
                        report.missing.push(
                            "another program keeps changing the mesh's device, addresses, routes, rules or firewall: lacisd puts them back each time".to_owned(),
                        );
                    } else if report.changes > 0 {
                        tracing::warn!(
                            changes = report.changes,
                            "another program had changed the device, addresses, routes, rules or the firewall"
                        );
                    }
                    if !report.warnings.is_empty() {
                        again = true;
                        let _ = news.send(HostNews::Applied { warnings: report.warnings }).await;
                    }
                    if report.missing != missing {
                        missing = report.missing;
                        let _ = news.send(HostNews::Missing(missing.clone())).await;
                    }
                }
                Err(error) => {
                    again = true;
                    let _ = news.send(HostNews::Failed(error.to_string())).await;
                }
            }
            continue;
        }
        let wish = wishes.borrow_and_update().clone();
        let before = missing.clone();
        let heard = match &wish {
            Wanted::Unknown | Wanted::Abandoned => continue,
            Wanted::State(state) => match host.apply(state).await {
                Ok(report) => {
                    missing = report.missing;
                    HostNews::Applied { warnings: report.warnings }
                }
                Err(error) => HostNews::Failed(error.to_string()),
            },
            Wanted::Nothing => {
                host.revert().await;
                missing.clear();
                HostNews::Reverted
            }
        };
        again = match &heard {
            HostNews::Applied { warnings } => !warnings.is_empty(),
            other => matches!(other, HostNews::Failed(_)),
        };
        tried.send_if_modified(|tried| !std::mem::replace(tried, true));
        // The engine may be stopping: nobody needs to hear.
        let _ = news.send(heard).await;
        if missing != before {
            let _ = news.send(HostNews::Missing(missing.clone())).await;
        }
        follow_base(&host, &base, &news).await;
    }
    let abandoned = *wishes.borrow() == Wanted::Abandoned;
    if abandoned {
        host.abandon().await;
    } else {
        host.revert().await;
    }
}

/// What is looked at.
#[derive(Clone, Copy, Debug)]
enum Part {
    All,
    Resolver,
}

/// Waits until it is time to look at the host's resolver again.
async fn resolver_changed(files: &mut FileWatch, due: Option<std::time::Instant>) {
    let earliest = Instant::now() + MIN_PAUSE;
    let due = async {
        match due {
            Some(due) => sleep_until(Instant::from_std(due).max(earliest)).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! { () = files.changed() => {}, () = due => {} }
}

/// The resolvers that the host has without us are others now: questions go to them at once.
async fn follow_base(host: &Host, base: &watch::Sender<Vec<SocketAddr>>, news: &mpsc::Sender<HostNews>) {
    let resolvers = host.base_resolvers();
    let changed = base.send_if_modified(|old| {
        let changed = *old != resolvers;
        *old = resolvers;
        changed
    });
    if changed {
        let _ = news.send(HostNews::BaseResolvers).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repairs_are_made_at_once_until_a_program_insists() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..MAX_BURST {
            assert!(!pace.is_spent(now));
            assert_eq!(pace.next(now), now);
            pace.take(now);
        }
        assert!(pace.is_spent(now));
        for _ in 0..10 {
            now = pace.next(now);
            pace.take(now);
            assert_eq!(pace.next(now), now + PAUSE);
        }
        assert!(!pace.is_spent(now + PAUSE * MAX_BURST));
    }
}
