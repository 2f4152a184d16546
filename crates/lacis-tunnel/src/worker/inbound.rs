//! From peers to the host: find the peer of a datagram, open it, check its source, judge it.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn, TunnResult};
use lacis_wire::key::NodeKey;
use lacis_wire::{disco, stun};

use super::Worker;
use super::outbound::{QUAD100_V4, QUAD100_V6};
use crate::config::{Path, Way};
use crate::filter::{DropReason, Verdict};
use crate::outputs::Event;
use crate::packet::{Parsed, protocol};
use crate::peers::Peer;
use crate::sinks::sealed_len;
use crate::via::DUMMY_SOURCE;

/// Where a datagram came from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Udp(Way),
    /// The key is the one that the relay told.
    Relay(NodeKey),
}

impl Source {
    /// Where an answer gets back to the sender.
    fn path(self) -> Path {
        match self {
            Self::Udp(way) => Path::Direct(way),
            Self::Relay(_) => Path::Relay,
        }
    }
}

/// Between two [`Event::AuthenticatedSource`] of a peer.
const TELL_SOURCE: Duration = Duration::from_millis(500);
/// Between two [`Event::UnknownPeer`].
const TELL_UNKNOWN: Duration = Duration::from_millis(100);

/// Handshakes kept for peers that this node does not know yet: as many as may join at once.
const PARKED: usize = 256;
/// They are kept this long: the sender tries again after five seconds.
const PARKED_LIFE: Duration = Duration::from_secs(5);

const HANDSHAKE_INIT: u32 = 1;
const HANDSHAKE_RESPONSE: u32 = 2;
const COOKIE_REPLY: u32 = 3;
const DATA: u32 = 4;
const HANDSHAKE_INIT_LEN: usize = 148;
const COOKIE_REPLY_LEN: usize = 64;
/// Least length of a data packet: headers and the tag of an empty one.
const DATA_LEAST: usize = 32;

/// Between two initiations to a peer that talks on in a session this node has forgotten.
const BEGIN_AGAIN: Duration = Duration::from_millis(500);
/// Between two [`Event::StraySession`].
const TELL_STRAY: Duration = Duration::from_millis(100);

/// The last handshakes that came too early. Two nodes do not learn of one another at the same moment, and the one that
/// knows first would otherwise wait for its second try.
#[derive(Debug, Default)]
pub(super) struct Parked(Vec<(Instant, NodeKey, Source, Vec<u8>)>);

impl Parked {
    fn park(&mut self, key: NodeKey, source: Source, data: &[u8], now: Instant) {
        if data.len() != HANDSHAKE_INIT_LEN {
            return;
        }
        self.0.retain(|(at, other, ..)| *other != key && now.saturating_duration_since(*at) < PARKED_LIFE);
        if self.0.len() >= PARKED {
            self.0.remove(0);
        }
        self.0.push((now, key, source, data.to_vec()));
    }

    /// Takes out those of keys that are known now.
    fn take(&mut self, now: Instant, known: impl Fn(&NodeKey) -> bool) -> Vec<(Source, Vec<u8>)> {
        self.0.retain(|(at, ..)| now.saturating_duration_since(*at) < PARKED_LIFE);
        let taken = self.0.extract_if(.., |(_, key, ..)| known(key));
        taken.map(|(_, _, source, data)| (source, data)).collect()
    }
}

fn number(data: &[u8], at: usize) -> u32 {
    data.get(at..at + 4).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// Our own addresses and the resolver's. No peer speaks from them, not even one that stands for the whole internet.
fn is_ours(local: &[IpAddr], source: IpAddr) -> bool {
    source == QUAD100_V4 || source == QUAD100_V6 || local.contains(&source)
}

/// STUN or disco by the first bytes, and no longer than these can be.
fn is_for_others(data: &[u8]) -> bool {
    disco::looks_like(data) || stun::looks_like(data)
}

impl Worker {
    /// Takes one datagram.
    pub(super) fn datagram(&mut self, data: &[u8], source: Source) {
        match number(data, 0) {
            DATA if data.len() >= DATA_LEAST => self.data(data, source),
            HANDSHAKE_INIT => self.handshake_init(data, source),
            HANDSHAKE_RESPONSE => self.session_message(data, 8, source),
            COOKIE_REPLY => self.session_message(data, 4, source),
            _ => match source {
                Source::Udp(way) if is_for_others(data) => self.out.udp(way, data),
                _ => self.shared.counters.udp_unknown.add(1),
            },
        }
    }

    /// The peer whose session a message names, unless it came by relay from another.
    fn peer_of_session(&mut self, session: u32, source: Source) -> Option<u32> {
        let slot = self.peers.slot_of_session(session);
        let known = self.peers.get(slot).is_some_and(|peer| {
            peer.tunn.is_some() && !matches!(source, Source::Relay(key) if key != peer.key)
        });
        if known && self.prepare(slot) {
            return Some(slot);
        }
        self.shared.counters.in_no_session.add(1);
        match source {
            Source::Relay(key) => self.begin_session(&key),
            Source::Udp(way) => {
                if Peer::due(&mut self.stray_told, self.now.instant, TELL_STRAY) {
                    self.out.event(Event::StraySession { way });
                }
            }
        }
        None
    }

    /// A peer uses a session that this node has forgotten, by restarting perhaps. Somebody has told who it is (the
    /// relay, or the path logic by the address), so this side begins anew; WireGuard alone would leave it to the peer,
    /// which notices after 15 seconds.
    pub(super) fn begin_session(&mut self, key: &NodeKey) {
        let now = self.now.instant;
        let Some(slot) = self.peers.slot_of(key) else { return };
        let Some(peer) = self.peers.get(slot) else { return };
        // An initiation may have gone to a path that led nowhere: it is repeated as long as the peer talks on.
        if !peer.confirmed && Peer::due(&mut peer.begun, now, BEGIN_AGAIN) {
            if peer.path == Path::None {
                peer.heard = Path::Relay;
            }
            let anew = peer.tunn.is_some();
            self.initiate(slot, anew, None);
        }
    }

    fn data(&mut self, data: &[u8], source: Source) {
        let Some(slot) = self.peer_of_session(number(data, 4), source) else { return };
        if !self.coalescer.has_room(data.len()) {
            self.flush_tun();
        }
        let counters = &self.shared.counters;
        let Some(peer) = self.peers.get(slot) else { return };
        let Some(tunn) = peer.tunn.as_deref_mut() else { return };
        let space = self.coalescer.space();
        if space.len() < data.len() {
            counters.in_invalid.add(1);
            return;
        }
        let (len, inner_source) = match tunn.decapsulate(None, data, space) {
            TunnResult::WriteToTunnelV4(packet, source) => (packet.len(), Some(IpAddr::V4(source))),
            TunnResult::WriteToTunnelV6(packet, source) => (packet.len(), Some(IpAddr::V6(source))),
            TunnResult::Done | TunnResult::WriteToNetwork(_) => (0, None),
            TunnResult::Err(WireGuardError::NoCurrentSession | WireGuardError::WrongIndex) => {
                counters.in_no_session.add(1);
                return;
            }
            TunnResult::Err(_) => {
                counters.in_invalid.add(1);
                return;
            }
        };
        let confirmed = peer.confirmed;
        self.authenticated(slot, source, data.len());
        if !confirmed {
            self.session_works(slot);
        }
        if let Some(inner_source) = inner_source {
            self.opened(slot, len, inner_source);
        }
    }

    /// A packet of the peer opened: counters and its address.
    fn authenticated(&mut self, slot: u32, source: Source, len: usize) {
        let now = self.now;
        let Some(peer) = self.peers.get(slot) else { return };
        peer.counters.rx_bytes.add(len as u64);
        peer.counters.rx_packets.add(1);
        peer.counters.last_receive.set(now.millis);
        if peer.path == Path::None {
            peer.heard = source.path();
        }
        if let Source::Udp(way) = source
            && peer.source != Some(way)
            && Peer::due(&mut peer.source_told, now.instant, TELL_SOURCE)
        {
            peer.source = Some(way);
            self.out.event(Event::AuthenticatedSource { key: peer.key, way });
        }
    }

    /// Both sides have proved their keys: tells so, and sends what waited.
    fn session_works(&mut self, slot: u32) {
        let now = self.now;
        let Some(peer) = self.peers.get(slot) else { return };
        peer.confirmed = true;
        peer.pathless = 0;
        peer.counters.last_handshake.set(now.millis);
        self.out.event(Event::HandshakeDone { key: peer.key });
        if !peer.stop_waiting() {
            return;
        }
        let (path, key) = (peer.way_out(), peer.key);
        let need = sealed_len(crate::sys::tun::MAX_PACKET);
        let Some(tunn) = peer.tunn.as_deref_mut() else { return };
        // An empty datagram asks for the next packet that waits.
        loop {
            let sent = self.sinks.emit(path, &key, need, &self.out, now.instant, |space| {
                match tunn.decapsulate(None, &[], space) {
                    TunnResult::WriteToNetwork(packet) => packet.len(),
                    _ => 0,
                }
            });
            if sent.is_empty() {
                break;
            }
            peer.counters.tx_bytes.add(sent.len() as u64);
            peer.counters.tx_packets.add(1);
        }
    }

    /// A handshake response or a cookie: the number of the session is at `at`.
    fn session_message(&mut self, data: &[u8], at: usize, source: Source) {
        let Some(slot) = self.peer_of_session(number(data, at), source) else { return };
        if self.handshake(slot, data, source).is_err() {
            return;
        }
        self.authenticated(slot, source, data.len());
        if number(data, 0) == HANDSHAKE_RESPONSE {
            self.session_works(slot);
        }
    }

    fn handshake_init(&mut self, data: &[u8], source: Source) {
        let counters = &self.shared.counters;
        let Some(identity) = &self.identity else {
            counters.no_identity.add(1);
            return;
        };
        let (key, addr) = match source {
            // The relay has told the key, and the peer's state checks it: no work for strangers.
            Source::Relay(key) => (key, None),
            Source::Udp(way) => {
                let mut cookie = [0; COOKIE_REPLY_LEN];
                identity.limiter.reset_count();
                let packet = match identity.limiter.verify_packet(Some(way.addr.ip()), data, &mut cookie) {
                    Ok(Packet::HandshakeInit(packet)) => packet,
                    Err(TunnResult::WriteToNetwork(cookie)) => {
                        counters.in_handshake_limited.add(1);
                        self.sinks.sockets.send_one(way, cookie, None);
                        return;
                    }
                    _ => {
                        counters.in_invalid.add(1);
                        return;
                    }
                };
                match parse_handshake_anon(&identity.secret, &identity.public, &packet) {
                    Ok(half) => (NodeKey::from_bytes(half.peer_static_public), Some(way.addr)),
                    Err(_) => {
                        counters.in_invalid.add(1);
                        return;
                    }
                }
            }
        };
        let Some(slot) = self.peers.slot_of(&key) else {
            counters.in_unknown_peer.add(1);
            if Peer::due(&mut self.unknown_told, self.now.instant, TELL_UNKNOWN) {
                self.out.event(Event::UnknownPeer { key, addr });
            }
            self.parked.park(key, source, data, self.now.instant);
            return;
        };
        // A malformed message must not make state.
        if !matches!(Tunn::parse_incoming_packet(data), Ok(Packet::HandshakeInit(_))) || !self.prepare(slot) {
            self.shared.counters.in_invalid.add(1);
            return;
        }
        match self.handshake(slot, data, source) {
            Ok(()) => {}
            Err(WireGuardError::WrongTai64nTimestamp) => return self.challenge(slot, source),
            Err(_) => return,
        }
        if let Some(peer) = self.peers.get(slot) {
            // The next data packet proves that the initiator has the session.
            peer.confirmed = false;
            peer.counters.rx_bytes.add(data.len() as u64);
            peer.counters.rx_packets.add(1);
            if peer.path == Path::None {
                peer.heard = source.path();
                self.out.event(Event::PeerActive { key, has_path: false });
            }
        }
    }

    /// An initiation made with the peer's key is stamped no later than one before: a replay, or the peer has restarted
    /// or its clock was set back. An initiation of our own tells them apart, since only the peer can answer it, and
    /// it needs no later time. It goes where the message came from as well: the peer may have left its path.
    fn challenge(&mut self, slot: u32, source: Source) {
        let now = self.now.instant;
        let Some(peer) = self.peers.get(slot) else { return };
        if Peer::due(&mut peer.begun, now, BEGIN_AGAIN) {
            self.initiate(slot, true, Some(source.path()));
        }
    }

    /// There are new peers: their handshakes that waited are taken up.
    pub(super) fn unpark(&mut self) {
        if self.identity.is_none() {
            return;
        }
        let peers = &self.peers;
        for (source, data) in self.parked.take(self.now.instant, |key| peers.slot_of(key).is_some()) {
            self.handshake_init(&data, source);
        }
    }

    /// Gives a handshake message to the peer's state and sends the answer; the error says why it was refused.
    ///
    /// An answer goes where the message came from, too, if that is not on the peer's path: the path may be one that
    /// the peer has left, and it waits for this answer.
    fn handshake(&mut self, slot: u32, data: &[u8], source: Source) -> Result<(), WireGuardError> {
        let now = self.now.instant;
        let none = WireGuardError::NoCurrentSession;
        let Some(peer) = self.peers.get(slot) else { return Err(none) };
        let key = peer.key;
        let path = if peer.path == Path::None { source.path() } else { peer.path };
        let Some(tunn) = peer.tunn.as_deref_mut() else { return Err(none) };
        let mut refused = None;
        let sent = self.sinks.emit(path, &key, sealed_len(0), &self.out, now, |space| {
            match tunn.decapsulate(None, data, space) {
                TunnResult::WriteToNetwork(packet) => packet.len(),
                TunnResult::Err(error) => {
                    refused = Some(error);
                    0
                }
                _ => 0,
            }
        });
        peer.counters.tx_bytes.add(sent.len() as u64);
        peer.counters.tx_packets.add(u64::from(!sent.is_empty()));
        if !sent.is_empty() && !path.covers(source.path()) {
            let answer = sent.to_vec();
            self.sinks.repeat(source.path(), &key, &answer, &self.out, now);
        }
        let Some(error) = refused else { return Ok(()) };
        let counters = &self.shared.counters;
        match error {
            WireGuardError::UnderLoad => counters.in_handshake_limited.add(1),
            WireGuardError::WrongTai64nTimestamp => counters.in_stale_handshake.add(1),
            _ => counters.in_invalid.add(1),
        }
        Err(error)
    }

    /// A packet to a 4via6 route of this node lies in the merger's space: the host gets it as IPv4.
    fn translate(&mut self, slot: u32, parsed: &Parsed) {
        let source = self.peers.get(slot).and_then(|peer| peer.config.ipv4).unwrap_or(DUMMY_SOURCE);
        let packet = &self.coalescer.space()[..parsed.len];
        let translated = self.via.inbound(packet, parsed, source, self.now.instant).map(<[u8]>::to_vec);
        let counters = &self.shared.counters;
        let Some(packet) = translated else { return counters.via_dropped.add(1) };
        counters.via_in.add(1);
        if !self.coalescer.has_room(packet.len()) {
            self.flush_tun();
        }
        let Some(space) = self.coalescer.space().get_mut(..packet.len()) else { return };
        space.copy_from_slice(&packet);
        if let Some(parsed) = Parsed::new(&packet) {
            self.coalescer.push(&parsed);
        }
    }

    /// A packet of `len` bytes lies decrypted in the merger's space.
    fn opened(&mut self, slot: u32, len: usize, source: IpAddr) {
        let counters = &self.shared.counters;
        if self.checked_source != Some((source, slot)) {
            if self.peers.route(source) != Some(slot) || is_ours(&self.local, source) {
                counters.in_wrong_source.add(1);
                return;
            }
            self.checked_source = Some((source, slot));
        }
        let packet = &self.coalescer.space()[..len];
        let Some(parsed) = Parsed::new(packet) else {
            counters.in_malformed.add(1);
            return;
        };
        if parsed.proto == protocol::TSMP && !parsed.later_fragment {
            counters.in_consumed.add(1);
            let message = crate::tsmp::parse(packet, &parsed);
            if let Some(message) = message {
                self.message(slot, &parsed, message);
            }
            return;
        }
        if parsed.is_echo_reply() && self.pings.has_echoes() {
            let reply = packet.get(parsed.l4 + 4..parsed.l4 + 8).and_then(|bytes| bytes.first_chunk::<4>());
            if let Some(&[id0, id1, seq0, seq1]) = reply
                && self.echo_reply(slot, u16::from_be_bytes([id0, id1]), u16::from_be_bytes([seq0, seq1]))
            {
                return;
            }
        }
        // Somebody else's sessions are not this peer's to report on.
        if parsed.quoted.is_some_and(|(_, dst)| self.peers.route(dst) != Some(slot)) {
            self.shared.counters.in_stray_error.add(1);
            return;
        }
        let jailed = self.peers.get(slot).is_some_and(|peer| peer.config.jailed);
        let counters = &self.shared.counters;
        let reason = match self.filter.inbound(&parsed, &mut self.flows, jailed) {
            Verdict::Accept if self.via.takes(parsed.dst) => return self.translate(slot, &parsed),
            Verdict::Accept => {
                self.via.yield_to(&parsed, &self.coalescer.space()[..parsed.len]);
                return self.coalescer.push(&parsed);
            }
            Verdict::Drop(reason) => reason,
        };
        match reason {
            DropReason::BadSource => counters.in_bad_source.add(1),
            DropReason::Multicast => counters.in_multicast.add(1),
            DropReason::LinkLocal => counters.in_link_local.add(1),
            DropReason::NotLocal => counters.in_not_local.add(1),
            DropReason::Fragment => counters.in_fragment.add(1),
            DropReason::StrayError => counters.in_stray_error.add(1),
            DropReason::NoRule => {
                counters.in_filtered.add(1);
                if parsed.is_tcp_syn() && parsed.src.is_ipv4() {
                    self.refuse(slot, &parsed, jailed);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_speaks_from_our_addresses_or_the_resolvers() {
        let local = [IpAddr::from([100, 64, 0, 1])];
        for ours in ["100.64.0.1", "100.100.100.100", "fd7a:115c:a1e0::53"] {
            assert!(is_ours(&local, ours.parse().unwrap()), "{ours}");
        }
        assert!(!is_ours(&local, IpAddr::from([100, 64, 0, 2])));
    }

    #[test]
    fn stun_and_disco_are_told_from_wireguard() {
        assert!(is_for_others(&stun::request(stun::TxId([0; 12]))));
        let mut disco = disco::MAGIC.to_vec();
        disco.resize(disco::MIN_PING_LEN, 0);
        assert!(is_for_others(&disco));
        disco.resize(disco::MAX_LEN + 1, 0);
        assert!(
            !is_for_others(&disco),
            "a stranger's datagram must not take more of the queue than disco needs"
        );
        assert!(!is_for_others(&[4, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]));
        assert!(!is_for_others(&[]));
    }
}
