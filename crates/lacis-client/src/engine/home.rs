//! Which relays can be used from here, which of them is home, and what is announced of the others.
//!
//! Home is a relay to which a connection stands: a better one is connected to first and becomes home then, and one that is
//! lost is left for the next. What peers must know is which regions this node cannot use, so that both can meet elsewhere
//! ([`crate::relays`]). It stands in `Hostinfo.Services` as entries of the protocol [`UNUSABLE`] with the region as port:
//! control servers pass services on to peers, and clients that do not know a service overlook it.

use std::collections::{BTreeMap, BTreeSet};

use lacis_wire::control::{Node, Service};
use lacis_wire::local::NetcheckReport;
use tokio::time::Instant;

use super::Engine;
use crate::netcheck::{self, choose_home};
use crate::relays::Place;

/// A service of this protocol is a region that the node cannot use.
const UNUSABLE: &str = "derp-unreachable";

/// As this node announces them.
pub(super) fn services(unusable: &BTreeSet<u16>) -> Vec<Service> {
    let service = |region: &u16| Service { proto: UNUSABLE.to_owned(), port: *region, ..Service::default() };
    unusable.iter().map(service).collect()
}

/// Where a peer is reached by relay.
pub(super) fn place(node: &Node) -> Place {
    let regions = node.hostinfo.services.iter().filter(|service| service.proto == UNUSABLE);
    Place { home: node.home_derp, unusable: regions.map(|service| service.port).collect() }
}

impl Engine {
    /// A home at once, if there is any choice to make at all: the last one, or the only one. Otherwise the relays are
    /// measured, quickly.
    pub(super) fn find_home(&mut self) {
        let Some(map) = &self.map else { return };
        self.reach.retain(|region| map.derp_map.regions.contains_key(&region));
        let home = self.relays.home();
        if map.derp_map.regions.contains_key(&home) {
            self.relays.set_home(home);
            return;
        }
        let mut dialled = map.derp_map.regions.iter().filter(|(_, region)| netcheck::relays(region));
        match (dialled.next(), dialled.next()) {
            (Some((only, _)), None) => self.set_home(*only),
            (None, _) => self.relays.set_home(0),
            (Some(_), Some(_)) => self.measure(false),
        }
    }

    pub(super) fn region_code(&self, region: u16) -> String {
        let code = self.map.as_ref().and_then(|map| map.derp_map.regions.get(&region));
        code.map_or_else(|| region.to_string(), |region| region.region_code.clone())
    }

    fn set_home(&mut self, home: u16) {
        if self.relays.home() != home {
            tracing::info!(region = home, code = %self.region_code(home), "home relay");
        }
        self.relays.set_home(home);
        self.saved.home_region = home;
    }

    /// What a measurement found of the regions' relays by HTTPS. Where there is a connection, it knows better.
    pub(super) fn follow_checks(&mut self, https: BTreeMap<u16, Result<(), String>>) {
        let now = Instant::now();
        for (region, outcome) in https {
            match outcome {
                Ok(()) => {
                    if self.reach.answers(region, now) {
                        self.relays.try_region(region);
                    }
                }
                Err(_) if self.relays.is_open(region) => {}
                Err(reason) => {
                    if let Some(suppressed) = self.log.allow("relay does not answer", region) {
                        tracing::info!(region, %reason, suppressed, "the relay does not answer by HTTPS");
                    }
                    self.reach.does_not_answer(region, reason, now);
                }
            }
        }
        self.follow_relays();
    }

    /// Makes home, the relays that are avoided and what is announced of them follow from what can be used.
    pub(super) fn follow_relays(&mut self) {
        if !self.netcheck.is_on() {
            self.home_since = None;
            self.unusable.clear();
            self.relays_due = None;
            return;
        }
        self.choose_home();
        let now = Instant::now();
        let home = self.relays.home();
        let stands = self.relays.is_connected(home);
        self.home_since = self.home_since.or(Some(now)).filter(|_| stands);
        // Where a peer is at home it is connected: its region is used as soon as it can be.
        self.relays.set_unusable(self.reach.unreachable().map(|(region, _)| region).collect());
        let peers = || self.map.iter().flat_map(|map| map.peers.values());
        let matters = |region| region != home && peers().any(|peer| peer.home_derp == region);
        self.unusable = self.reach.announce(self.home_since, matters, now);
        self.relays_due = self.reach.due(self.home_since, now);
    }

    /// Moves home to the best region there is, once a connection to it stands.
    fn choose_home(&mut self) {
        let Some(map) = &self.map else { return };
        let now = Instant::now();
        let present = self.relays.home();
        let stands = self.relays.is_connected(present);
        let can_be_used = |region| self.reach.is_usable(region, now) || region == present && stands;
        let lost = !map.derp_map.regions.contains_key(&present) || !can_be_used(present);
        // While the control server is away, peers could not learn of a new home: only a lost one is left.
        if !self.streaming && !lost {
            return;
        }
        // A connection that stands says more than an answer that was lost.
        if stands && !lost && !self.latencies.contains_key(&present) {
            return;
        }
        let best = choose_home(&self.latencies, &map.derp_map, present, can_be_used);
        let Some(best) = best.filter(|best| *best != present) else { return };
        if self.relays.is_connected(best) {
            if lost {
                self.reach.left(present, now);
            }
            self.set_home(best);
        } else {
            self.relays.try_region(best);
        }
    }

    /// The relays that cannot be reached, in lines for people.
    pub(super) fn unreachable_relays(&self) -> impl Iterator<Item = String> {
        self.reach.unreachable().map(move |(region, reason)| {
            let code = self.region_code(region);
            let hint = if answers_stun(&self.report, region) { ", although it answers STUN" } else { "" };
            format!("relay {code} cannot be reached{hint}: {reason}")
        })
    }
}

fn answers_stun(report: &NetcheckReport, region: u16) -> bool {
    report.region_v4_latency.contains_key(&region) || report.region_v6_latency.contains_key(&region)
}

#[cfg(test)]
mod tests {
    use lacis_wire::control::Hostinfo;

    use super::*;

    #[test]
    fn what_a_node_announces_is_what_its_peers_read() {
        let unusable = BTreeSet::from([2, 901]);
        let mut services = services(&unusable);
        services.push(Service { proto: "peerapi4".into(), port: 7, ..Service::default() });
        let hostinfo = Hostinfo { services, ..Hostinfo::default() };
        let node = Node { home_derp: 5, hostinfo, ..Node::default() };
        assert_eq!(place(&node), Place { home: 5, unusable });
    }
}
