//! From the host to peers: judge, route, cut and seal.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use boringtun::noise::TunnResult;

use super::timers::{STALE, tick_peer};
use super::{Now, Worker};
use crate::config::{MAX_RESPONSE, Path};
use crate::filter::Verdict;
use crate::outputs::{Event, Senders};
use crate::packet::{Parsed, protocol};
use crate::peers::{Identity, Peer};
use crate::segment::{VnetHeader, segment};
use crate::sinks::{Sinks, sealed_len};
use crate::via::{Answer, Translator};

/// Where the resolver answers.
pub(super) const QUAD100_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 100, 100, 100));
pub(super) const QUAD100_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53));
/// Between two [`Event::PeerActive`] of a peer.
const TELL_ACTIVE: Duration = Duration::from_secs(2);
/// Packets kept for a peer that has no path yet: enough to begin a few connections.
const PATHLESS: u32 = 32;
/// First byte of a WireGuard data packet.
const DATA: u8 = 4;

impl Worker {
    /// Takes a packet or super-packet that the host sends.
    pub(super) fn outgoing(&mut self, header: VnetHeader, packet: &mut [u8]) {
        let counters = &self.shared.counters;
        let Some(parsed) = Parsed::new(packet) else {
            counters.out_malformed.add(1);
            return;
        };
        let packet = &mut packet[..parsed.len];
        if parsed.dst == QUAD100_V4 || parsed.dst == QUAD100_V6 {
            return self.ask_resolver(header, packet);
        }
        if parsed.proto == protocol::TSMP {
            counters.out_filtered.add(1);
            return;
        }
        let mut whole;
        let (flow, header, packet) = match self.via.answer(packet, &parsed, self.now.instant) {
            Answer::No => (None, header, packet),
            Answer::Taken => return,
            Answer::Of(flow) => (Some((flow, false)), header, packet),
            Answer::Whole(flow, bytes) => {
                whole = bytes;
                (Some((flow, true)), VnetHeader::default(), &mut whole[..])
            }
        };
        let parsed = flow.as_ref().map_or(parsed, |(flow, _)| Translator::judged(flow, &parsed));
        if self.filter.outbound(&parsed, &mut self.flows) != Verdict::Accept {
            counters.out_filtered.add(1);
            return;
        }
        let Some(slot) = self.peers.route(parsed.dst) else {
            counters.out_no_route.add(1);
            return;
        };
        if !self.prepare(slot) {
            return;
        }
        let Self { peers, identity: Some(identity), sinks, out, shared, now, via, .. } = self else { return };
        let Some(peer) = peers.get(slot) else { return };
        let counters = &shared.counters;
        if Peer::due(&mut peer.active_told, now.instant, TELL_ACTIVE) {
            out.event(Event::PeerActive { key: peer.key, has_path: peer.path != Path::None });
        }
        if peer.way_out() == Path::None {
            // With a session the packet would be sealed for nothing; without one it waits inside the state.
            if peer.confirmed || peer.pathless >= PATHLESS {
                counters.out_no_path.add(1);
                return;
            }
            peer.pathless += 1;
        }
        peer.counters.last_send.set(now.millis);
        let had_waited = peer.waiting;
        let mut packets = 0;
        let mut refusal = None;
        let result = segment(header, packet, |packet| {
            packets += 1;
            let mut send = |packet: &[u8]| seal(peer, identity, sinks, out, *now, packet);
            match &flow {
                None => send(packet),
                Some((flow, cut)) => {
                    counters.via_out.add(1);
                    refusal = via.outbound(flow, packet, *cut, send);
                }
            }
        });
        counters.tun_read.add(packets);
        if result.is_err() {
            counters.out_malformed.add(1);
        }
        if peer.waiting && !had_waited {
            self.note_retry(slot);
        }
        if let Some(refusal) = refusal {
            self.inject(&refusal);
        }
    }

    /// Takes a packet to the resolver's addresses.
    fn ask_resolver(&mut self, header: VnetHeader, packet: &mut [u8]) {
        let Self { coalescer, responder, out, tun, shared, .. } = self;
        let counters = &shared.counters;
        let result = segment(header, packet, |packet| {
            if !coalescer.has_room(MAX_RESPONSE) {
                super::flush(coalescer, tun, counters);
            }
            let space = &mut coalescer.space()[..MAX_RESPONSE];
            let answer = responder(packet, space).and_then(|len| Parsed::new(space.get(..len)?));
            match answer {
                Some(parsed) => {
                    counters.quad100_answered.add(1);
                    coalescer.push(&parsed);
                }
                None => out.quad100(packet),
            }
        });
        if result.is_err() {
            counters.out_malformed.add(1);
        }
    }

    /// Sends a packet made here to a peer.
    pub(super) fn send_to_peer(&mut self, slot: u32, packet: &[u8]) {
        if !self.prepare(slot) {
            return;
        }
        let Self { peers, identity: Some(identity), sinks, out, now, .. } = self else { return };
        let Some(peer) = peers.get(slot) else { return };
        seal(peer, identity, sinks, out, *now, packet);
        if peer.waiting {
            self.note_retry(slot);
        }
    }

    /// Makes sure that a peer has WireGuard state whose clock is right. False without identity or peer.
    pub(super) fn prepare(&mut self, slot: u32) -> bool {
        let now = self.now.instant;
        let Some(identity) = &self.identity else {
            self.shared.counters.no_identity.add(1);
            return false;
        };
        let Some(peer) = self.peers.get(slot) else { return false };
        if now.saturating_duration_since(peer.last_tick) > STALE {
            tick_peer(peer, identity, &mut self.sinks, &self.out, now);
        }
        peer.last_used = now;
        let (_, fresh) = peer.tunn(identity, now);
        if fresh {
            // An expired peer may still be in the list.
            if !self.peers.live.contains(&slot) {
                self.peers.live.push(slot);
            }
        }
        self.ticker.hurry(now);
        true
    }
}

/// Seals a packet to where the peer's path leads; without a session it waits and a handshake begins.
fn seal(peer: &mut Peer, identity: &Identity, sinks: &mut Sinks, out: &Senders, now: Now, packet: &[u8]) {
    let (path, key) = (peer.way_out(), peer.key);
    let (tunn, _) = peer.tunn(identity, now.instant);
    let need = sealed_len(packet.len());
    let sent =
        sinks.emit(path, &key, need, out, now.instant, |space| match tunn.encapsulate(packet, space) {
            TunnResult::WriteToNetwork(sealed) => sealed.len(),
            _ => 0,
        });
    if sent.first() != Some(&DATA) && !peer.waiting {
        peer.wait(now.instant);
    }
    if !sent.is_empty() && path != Path::None {
        peer.counters.tx_bytes.add(sent.len() as u64);
        peer.counters.tx_packets.add(1);
    }
}
