//! The network around this host: when it is measured, and what the control server and the path logic learn of it.

use std::net::SocketAddr;
use std::time::Duration;

use lacis_wire::control::NetInfo;
use lacis_wire::derp;
use lacis_wire::local::Netcheck;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Engine;
use crate::netcheck::{self, Depth, Findings, Means};

/// The network is measured again after this, with some chance, so that nodes do not all do it at once.
const MEASURE_EVERY: Duration = Duration::from_secs(20);
const MEASURE_SPREAD: Duration = Duration::from_secs(6);
/// While a relay has been lost lately.
const MEASURE_SOON: Duration = Duration::from_secs(8);
/// What changes seldom is measured so often.
const FULL_EVERY: Duration = Duration::from_mins(5);

/// Requests for a measurement that may wait; more are refused.
const MAX_WAITING: usize = 64;

/// What a measurement found.
#[derive(Debug)]
pub(super) struct Measurement {
    findings: Findings,
    depth: Depth,
    network: u64,
}

/// When the network was and will be measured.
#[derive(Debug, Default)]
pub(super) struct NetcheckRuns {
    on: bool,
    running: bool,
    again: bool,
    next: Option<Instant>,
    waiting: Vec<oneshot::Sender<Result<Netcheck, String>>>,
    /// When everything was measured last.
    full: Option<Instant>,
    /// Which network is measured: results of another one are out of date.
    network: u64,
}

impl NetcheckRuns {
    /// Is this node in its network?
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    pub(super) fn set_on(&mut self, on: bool) {
        self.on = on;
    }

    fn full_is_due(&self) -> bool {
        self.full.is_none_or(|at| at.elapsed() >= FULL_EVERY)
    }

    /// The network is another one: what is being measured is of no use.
    pub(super) fn start_over(&mut self) {
        self.full = None;
        self.network += 1;
        self.running = false;
    }
}

impl Engine {
    /// Measures the network; `whole` takes as long as it needs to know everything.
    pub(super) fn measure(&mut self, whole: bool) {
        let Some(map) = &self.map else { return };
        if std::mem::replace(&mut self.netcheck.running, true) {
            self.netcheck.again = true;
            return;
        }
        let (map, tunnel, probes) = (map.derp_map.clone(), self.tunnel.clone(), self.probes.clone());
        let (dial, reports) = (self.relays.dial_options(), self.reports.clone());
        let (home, network) = (self.relays.home(), self.netcheck.network);
        let depth = match whole {
            false => Depth::Home,
            true if self.netcheck.waiting.is_empty() && !self.netcheck.full_is_due() => Depth::Usual,
            true => Depth::Full,
        };
        if depth == Depth::Full {
            self.netcheck.full = Some(Instant::now());
        }
        let router = (depth == Depth::Full).then(|| self.port_map.probe());
        // Only while peers cannot be told anything better.
        let early = self.saved.endpoints.is_empty().then(|| self.early.clone());
        tokio::spawn(async move {
            let means =
                Means { map: &map, tunnel: &tunnel, probes: &probes, dial: &dial, home, router, early };
            let findings = netcheck::measure(means, depth).await;
            // The engine may have stopped.
            let _ = reports.send(Measurement { findings, depth, network }).await;
        });
    }

    pub(super) fn measure_if_due(&mut self) {
        if self.netcheck.next.is_some_and(|at| at <= Instant::now()) {
            self.netcheck.next = None;
            self.measure(true);
        }
    }

    /// A server has told an address of ours before the rest was measured.
    pub(super) fn seen_early(&mut self, seen: SocketAddr) {
        if !self.saved.endpoints.contains(&seen) {
            self.saved.endpoints.push(seen);
            self.tell_local();
        }
    }

    pub(super) fn measured(&mut self, measurement: Measurement) {
        let Measurement { findings: Findings { mut report, servers, https }, depth, network } = measurement;
        if network != self.netcheck.network {
            return;
        }
        self.netcheck.running = false;
        netcheck::keep_unmeasured(&mut report, &self.report);
        let again = std::mem::take(&mut self.netcheck.again);
        if self.map.is_none() {
            return;
        }
        self.latencies.clone_from(&report.region_latency);
        self.follow_checks(https);
        let now = Instant::now();
        let pause = if self.reach.is_recent(now) { MEASURE_SOON } else { MEASURE_EVERY };
        let chance = f64::from(derp::random_nonce()[0]) / 255.0;
        self.netcheck.next = Some(now + pause + MEASURE_SPREAD.mul_f64(chance));
        report.region_unreachable =
            self.reach.unreachable().map(|(region, why)| (region, why.to_owned())).collect();
        report.preferred_derp = self.relays.home();
        tracing::debug!(udp = report.udp, home = report.preferred_derp, global = %report.global_v4, "measured the network");
        let whole = depth != Depth::Home;
        if depth == Depth::Full {
            let derp_map = self.map.as_ref().map(|map| (*map.derp_map).clone()).unwrap_or_default();
            for reply in self.netcheck.waiting.drain(..) {
                let _ = reply.send(Ok(Netcheck { report: report.clone(), derp_map: derp_map.clone() }));
            }
        }
        if whole {
            let seen = netcheck::reflexive(&report);
            // Without an answer the last ones may still be true: servers are away more often than addresses change.
            if !seen.is_empty() {
                self.saved.endpoints = seen;
            }
            self.report = report;
            self.stun_servers = servers;
            self.tell_local();
        }
        if again || !whole {
            self.measure(true);
        }
    }

    /// Whoever waits for a measurement gets none.
    pub(super) fn fail_netchecks(&mut self, why: &str) {
        for reply in self.netcheck.waiting.drain(..) {
            // Gone meanwhile: nobody to tell.
            let _ = reply.send(Err(why.to_owned()));
        }
    }

    pub(super) fn netcheck_for(&mut self, reply: oneshot::Sender<Result<Netcheck, String>>) {
        if self.map.is_none() {
            let text = "no relays are known before this node has joined a network: run `lacis up` first";
            let _ = reply.send(Err(text.to_owned()));
            return;
        }
        // Those whose asker has gone.
        self.netcheck.waiting.retain(|reply| !reply.is_closed());
        if self.netcheck.waiting.len() >= MAX_WAITING {
            let _ = reply.send(Err("too many requests wait for a measurement of the network".to_owned()));
            return;
        }
        self.netcheck.waiting.push(reply);
        self.measure(true);
    }

    /// What the control server is told of the network around this host; nothing before there is a home.
    pub(super) fn net_info(&self) -> Option<NetInfo> {
        let home = self.relays.home();
        (home != 0).then(|| NetInfo {
            have_port_map: self.mapped.borrow().is_some(),
            ..netcheck::net_info(&self.report, home)
        })
    }
}
