//! For people: how a peer is reached, why not directly, and what would help.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lacis_wire::disco::traversal::{Allocator, Mapping, NatReport};

use crate::core::Core;
use crate::peer::{PeerState, Whole};
use crate::search::Outcome;
use crate::types::{Path, SocketId};

/// One address of the peer, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// The address.
    pub addr: SocketAddr,
    /// Whether it was tried from a socket beside the main one.
    pub extra_socket: bool,
    /// Pings without an answer since the last answer.
    pub unanswered: u32,
    /// How long ago it answered.
    pub answered: Option<Duration>,
    /// It answers, but datagrams of full size do not pass.
    pub too_small: bool,
}

/// The whole story of one peer's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Why {
    /// Where packets go now.
    pub path: Path,
    /// This node's NAT.
    pub own_nat: NatReport,
    /// The peer's, if it has told.
    pub peer_nat: Option<NatReport>,
    /// All addresses that were tried.
    pub tried: Vec<Tried>,
    /// Packets that searches of ports have cost this node.
    pub probes: u32,
    /// Why the path is not direct, a sentence each.
    pub reasons: Vec<String>,
    /// What would help, a sentence each.
    pub remedies: Vec<String>,
}

impl Why {
    pub(crate) fn of(state: &PeerState, core: &Core, now: Instant) -> Self {
        let tried: Vec<_> = state
            .ways
            .iter()
            .map(|(way, candidate)| Tried {
                addr: way.addr,
                extra_socket: way.socket != SocketId::MAIN,
                unanswered: candidate.pings,
                answered: candidate.last_pong.map(|at| now.saturating_duration_since(at)),
                too_small: matches!(candidate.whole, Whole::Fails(_)),
            })
            .collect();
        let mut why = Self {
            path: state.path,
            own_nat: core.nat_report(),
            peer_nat: state.nat,
            tried,
            probes: state.probes_sent,
            reasons: Vec::new(),
            remedies: Vec::new(),
        };
        if !state.is_direct(now) {
            why.explain(state, core, now);
        }
        why
    }

    fn because(&mut self, reason: impl Into<String>, remedy: impl Into<String>) {
        self.reasons.push(reason.into());
        let remedy = remedy.into();
        if !remedy.is_empty() {
            self.remedies.push(remedy);
        }
    }

    fn explain(&mut self, state: &PeerState, core: &Core, now: Instant) {
        if state.peer.wireguard_only {
            return self.because(
                "it speaks nothing but WireGuard: packets go to its endpoints, and nothing tells whether they arrive",
                "",
            );
        }
        if !state.peer.disco {
            return self.because(
                "it does not say how to look for a direct path (it has no disco key)",
                "update the software on the peer",
            );
        }
        if !state.is_active(now) && state.session.is_none() {
            return self.because(
                "nothing was sent to it lately, so no direct path is looked for",
                "send something, or run `lacis ping` without --why",
            );
        }
        if core.local_at.is_some() && !core.local.udp {
            self.because(
                "no UDP leaves or enters this node's network: not even STUN is answered",
                "let UDP out of this network, at least to port 3478 and to the peers' ports",
            );
        }
        if state.nat.is_some_and(|nat| !nat.udp) {
            self.because("no UDP leaves or enters the peer's network", "let UDP out of the peer's network");
        }
        if self.tried.iter().any(|tried| tried.too_small) {
            self.because(
                "a direct path answers, but datagrams of full size do not pass it (an MTU below 1360 bytes where fragments are dropped)",
                "let IP fragments through, or raise the MTU on that path",
            );
        }
        if self.tried.is_empty() {
            self.because(
                "the peer has told no address at which it could be reached",
                "see whether it is online, and whether it can reach the coordinator",
            );
        }
        self.explain_nats(state);
        match state.searches.outcome {
            Some(Outcome::Missed) => self
                .reasons
                .push("a search of the varying NAT's ports found none; it is tried again later".into()),
            Some(Outcome::Exhausted) => self.because(
                "a search of ports was ended, because the network let no further flows through",
                "allow this host more connections in its router, or let the peer's router map a port",
            ),
            None if state.searches.is_busy() => {
                self.reasons.push("ports of the varying NAT are being searched right now".into());
            }
            None => {}
        }
        if self.reasons.is_empty() {
            let silent = self.tried.iter().filter(|tried| tried.answered.is_none()).count();
            let started =
                state.session.map_or(Duration::ZERO, |session| now.saturating_duration_since(session.since));
            self.because(
                format!(
                    "{silent} of {} addresses of the peer have not answered in {:.1} s; it is tried on",
                    self.tried.len(),
                    started.as_secs_f64()
                ),
                "a firewall may drop UDP on one of the two sides: let UDP through, or let a router map a port",
            );
        }
    }

    fn explain_nats(&mut self, state: &PeerState) {
        let (ours, theirs) = (self.own_nat.mapping, state.mapping());
        let remedy = |whose: &str| {
            format!(
                "enable UPnP, NAT-PMP or PCP in {whose} router, forward a UDP port, or use a router with endpoint-independent mapping"
            )
        };
        match (ours, theirs) {
            (Mapping::Varies, Mapping::Varies) => {
                let low = |nat: &NatReport| nat.allocator == Allocator::Linux && nat.low_ports;
                let both = low(&self.own_nat) && state.nat.is_some_and(|nat| low(&nat));
                let text = if both {
                    "both NATs use another port for every destination; such a pair is found by chance"
                } else {
                    "both NATs use another port for every destination: neither side can know where the other will appear"
                };
                self.because(text, remedy("one side's"));
            }
            (Mapping::Varies, _) => {
                self.because(
                    "the NAT in front of this node uses another port for every destination",
                    remedy("this side's"),
                );
                if state.nat.is_none() {
                    self.reasons.push(
                        "the peer does not take part in port searches (it is no lacisd, or an old one)"
                            .into(),
                    );
                }
            }
            (_, Mapping::Varies) => {
                self.because(
                    "the NAT in front of the peer uses another port for every destination",
                    remedy("the peer's"),
                );
            }
            _ => {}
        }
        let off = |nat: &NatReport| !nat.searches && nat.udp;
        if (ours == Mapping::Varies || theirs == Mapping::Varies)
            && (off(&self.own_nat) || state.nat.is_some_and(|nat| off(&nat)))
        {
            self.reasons
                .push("port searches are off on one side (a metered network, or no STUN server)".into());
        }
    }
}
