//! Applies what this host should look like, one wish after the other, the latest always.
//!
//! Netlink and D-Bus take their time; the engine does not wait for them.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, sleep_until};

use crate::host::{FileWatch, Host, HostState};

/// How often it is looked whether other programs have changed what is ours.
const REPAIR: Duration = Duration::from_secs(10);
/// Nothing makes this task look at the resolver again sooner.
const MIN_PAUSE: Duration = Duration::from_millis(50);

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

/// A handle to wish with.
#[derive(Debug)]
pub(crate) struct HostTask {
    wish: watch::Sender<Option<HostState>>,
    tried: watch::Receiver<bool>,
    base: watch::Receiver<Vec<SocketAddr>>,
}

impl HostTask {
    /// Starts; ends, having put the host back, when the handle is dropped. The task gives that end.
    pub(crate) fn start(host: Host, news: mpsc::Sender<HostNews>) -> (Self, tokio::task::JoinHandle<()>) {
        let (wish, wishes) = watch::channel(None);
        let (base_sender, base) = watch::channel(host.base_resolvers());
        let (tried_sender, tried) = watch::channel(false);
        let task = tokio::spawn(run(host, wishes, base_sender, tried_sender, news));
        (Self { wish, tried, base }, task)
    }

    /// The host should look like this from now on; `None`: as if we were not there.
    pub(crate) fn wish(&self, state: Option<HostState>) {
        self.wish.send_if_modified(|old| {
            let changed = *old != state;
            *old = state;
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

async fn run(
    mut host: Host,
    mut wishes: watch::Receiver<Option<HostState>>,
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
    loop {
        let due = host.resolver_due();
        let repair = tokio::select! {
            changed = wishes.changed() => if changed.is_err() { break } else { None },
            _ = repair.tick() => Some(Part::All),
            () = resolver_changed(&mut files, due) => Some(Part::Resolver),
        };
        files = host.watch_resolver();
        if let Some(part) = repair.filter(|part| !again || matches!(part, Part::Resolver)) {
            let report = match part {
                Part::All => host.repair().await,
                Part::Resolver => host.repair_resolver().await,
            };
            follow_base(&host, &base, &news).await;
            if !report.warnings.is_empty() {
                again = true;
                let _ = news.send(HostNews::Applied { warnings: report.warnings }).await;
            }
            if report.missing != missing {
                missing = report.missing;
                let _ = news.send(HostNews::Missing(missing.clone())).await;
            }
            continue;
        }
        let wish = wishes.borrow_and_update().clone();
        let before = missing.clone();
        let heard = match &wish {
            Some(state) => match host.apply(state).await {
                Ok(report) => {
                    missing = report.missing;
                    HostNews::Applied { warnings: report.warnings }
                }
                Err(error) => HostNews::Failed(error.to_string()),
            },
            None => {
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
    host.revert().await;
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
