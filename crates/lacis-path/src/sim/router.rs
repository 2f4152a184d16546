//! One router of a simulated network: NAT for IPv4, a stateful firewall for IPv6.
//!
//! It behaves as Linux was measured to behave (`reference/natlab.md`), with the variations of RFC 4787. A flow is a
//! pair of an inner and a remote address; its entry keeps the port that the outside sees. Ports are shared by flows
//! to different remotes, never by two flows to the same one: whoever comes second gets another port. That holds for
//! the router's own flows too, which is why an unsolicited packet that an open router accepts spoils the pair of
//! ports it came on. Time to live is the business of [`super::internet`], which asks here only for what is forwarded.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use fastrand::Rng;

/// A flow that is answered becomes a stream once it is still in use after this long
/// (`udp_stream_ts` in Linux' nf_conntrack_proto_udp.c).
const STREAM_AFTER: Duration = Duration::from_secs(2);
/// A clash is answered by another port so many times, then the packet is dropped.
const TRIES: usize = 128;
/// Ports that a counting allocator goes through before it begins anew.
const COUNTED: u16 = 4096;

/// What a mapping or a filter looks at besides the inner address (RFC 4787, sections 4.1 and 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depends {
    /// Nothing: endpoint-independent.
    Nothing,
    /// The remote's address.
    Address,
    /// The remote's address and port.
    Port,
}

/// From where a new mapping takes its port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// It keeps the inner port when that is free (`masquerade`).
    Keep,
    /// At random as Linux does it (`masquerade random`): from a range that depends on the inner port.
    Linux,
    /// At random from a block.
    Block(u16, u16),
    /// The next one, counted from here.
    Counter(u16),
    /// At random from 1024 to 65535.
    Random,
}

/// How a router treats UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nat {
    /// What a mapping depends on.
    pub mapping: Depends,
    /// What lets packets in.
    pub filtering: Depends,
    /// Ports of new mappings.
    pub ports: Ports,
    /// Unsolicited packets to the router's own address are accepted by the router itself.
    pub open_input: bool,
    /// Inner hosts reach each other by their outer addresses.
    pub hairpin: bool,
    /// Seconds that an entry lives without an answer, and with traffic of both directions.
    pub lifetime: (u16, u16),
    /// Flows that it keeps at most; new ones are dropped then.
    pub most_flows: Option<u16>,
}

impl Nat {
    /// The common home router: Linux' `masquerade`, a port-restricted cone.
    pub const CONE: Self = Self {
        mapping: Depends::Nothing,
        filtering: Depends::Port,
        ports: Ports::Keep,
        open_input: false,
        hairpin: false,
        lifetime: (30, 120),
        most_flows: None,
    };
    /// The same, accepting unsolicited packets to itself.
    pub const OPEN_INPUT: Self = Self { open_input: true, ..Self::CONE };
    /// Lets in whoever the inner host has sent to, from any port.
    pub const RESTRICTED: Self = Self { filtering: Depends::Address, ..Self::CONE };
    /// Lets in everybody.
    pub const FULL: Self = Self { filtering: Depends::Nothing, ..Self::CONE };
    /// `masquerade fully-random`.
    pub const SYMMETRIC: Self = Self { mapping: Depends::Port, ports: Ports::Linux, ..Self::CONE };
}

/// Where a packet from outside goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inward {
    /// To this inner address.
    To(SocketAddr),
    /// To the router itself, which has nothing to say to it.
    Itself,
    /// Dropped.
    Nowhere,
}

#[derive(Clone, Copy, Debug)]
struct Flow {
    port: u16,
    outward: bool,
    born: Duration,
    replied: bool,
    until: Duration,
}

#[derive(Clone, Copy, Debug)]
enum Owner {
    Inner(SocketAddr),
    /// The router, until then.
    Itself(Duration),
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<Quick>>;

/// A router's memory.
#[derive(Debug)]
pub(super) struct Table {
    nat: Nat,
    /// By inner and remote address.
    flows: Map<(SocketAddr, SocketAddr), Flow>,
    /// By outer port and remote: whose it is.
    owners: Map<(u16, SocketAddr), Owner>,
    /// The port of an inner address, for the remote address if the mapping depends on it.
    mapped: Map<(SocketAddr, Option<IpAddr>), (u16, Duration)>,
    /// Which inner address an outer port leads to, for the remote address if the filter depends on it.
    admitted: Map<(u16, Option<IpAddr>), (SocketAddr, Duration)>,
    counted: u16,
}

impl Table {
    /// With nothing in it.
    pub(super) fn new(nat: Nat) -> Self {
        Self {
            nat,
            flows: Map::default(),
            owners: Map::default(),
            mapped: Map::default(),
            admitted: Map::default(),
            counted: 0,
        }
    }

    /// How it treats UDP.
    pub(super) fn nat(&self) -> Nat {
        self.nat
    }

    /// Forgets everything.
    pub(super) fn reboot(&mut self) {
        *self = Self { counted: self.counted, ..Self::new(self.nat) };
    }

    /// A packet leaves: the port that the remote sees, or `None` if it is dropped.
    pub(super) fn outward(
        &mut self,
        now: Duration,
        inner: SocketAddr,
        remote: SocketAddr,
        rng: &mut Rng,
    ) -> Option<u16> {
        let known = self.flows.get_mut(&(inner, remote)).filter(|flow| flow.until > now);
        let (port, until) = if let Some(flow) = known {
            flow.touch(now, true, self.nat.lifetime);
            (flow.port, flow.until)
        } else {
            if !self.has_room(now) {
                return None;
            }
            let port = self.choose(now, inner, remote, rng)?;
            let until = self.enter(now, inner, remote, port, true);
            // The next flow follows the newest, also where that had to give way (Linux' find_appropriate_src, measured).
            if self.nat.mapping != Depends::Port {
                self.mapped.insert((inner, self.nat.mapping.key(remote)), (port, until));
            }
            (port, until)
        };
        self.note(now, inner, remote, port, until);
        Some(port)
    }

    /// A packet comes to the outer address.
    pub(super) fn inward(&mut self, now: Duration, remote: SocketAddr, port: u16) -> Inward {
        let mut itself = false;
        match self.owners.get_mut(&(port, remote)) {
            Some(Owner::Inner(inner)) => {
                let inner = *inner;
                if let Some(flow) = self.flows.get_mut(&(inner, remote)).filter(|flow| flow.until > now) {
                    flow.touch(now, false, self.nat.lifetime);
                    let until = flow.until;
                    self.note(now, inner, remote, port, until);
                    return Inward::To(inner);
                }
            }
            Some(Owner::Itself(until)) => itself = *until > now,
            None => {}
        }
        if !itself && let Some(inner) = self.admits(now, remote, port) {
            if !self.has_room(now) {
                return Inward::Nowhere;
            }
            self.enter(now, inner, remote, port, false);
            return Inward::To(inner);
        }
        if !self.nat.open_input {
            return Inward::Nowhere;
        }
        let until = now + Duration::from_secs(self.nat.lifetime.0.into());
        self.owners.insert((port, remote), Owner::Itself(until));
        Inward::Itself
    }

    /// The same without translation, for IPv6: a packet leaves.
    pub(super) fn pass_outward(&mut self, now: Duration, inner: SocketAddr, remote: SocketAddr) {
        let lifetime = self.nat.lifetime;
        let known = self.flows.get_mut(&(inner, remote)).filter(|flow| flow.until > now);
        if let Some(flow) = known {
            flow.touch(now, true, lifetime);
        } else {
            self.enter(now, inner, remote, inner.port(), true);
        }
    }

    /// And one comes: whether it is part of a flow that began inside.
    pub(super) fn pass_inward(&mut self, now: Duration, inner: SocketAddr, remote: SocketAddr) -> bool {
        let known = self.flows.get_mut(&(inner, remote)).filter(|flow| flow.until > now);
        known.map(|flow| flow.touch(now, false, self.nat.lifetime)).is_some()
    }

    fn has_room(&mut self, now: Duration) -> bool {
        let Some(most) = self.nat.most_flows.map(usize::from) else { return true };
        if self.flows.len() >= most {
            self.flows.retain(|_, flow| flow.until > now);
        }
        self.flows.len() < most
    }

    fn choose(&mut self, now: Duration, inner: SocketAddr, remote: SocketAddr, rng: &mut Rng) -> Option<u16> {
        let mapped = self.mapped.get(&(inner, self.nat.mapping.key(remote)));
        let mapped = mapped.filter(|(_, until)| *until > now).map(|(port, _)| *port);
        for attempt in 0..TRIES {
            let port = match (mapped, self.nat.ports) {
                (Some(port), _) if attempt == 0 => port,
                (_, Ports::Keep) if attempt > 1 => linux_port(inner.port(), rng),
                _ => self.next_port(inner.port(), rng),
            };
            if self.is_free(now, inner, remote, port) {
                return Some(port);
            }
        }
        None
    }

    fn next_port(&mut self, source: u16, rng: &mut Rng) -> u16 {
        match self.nat.ports {
            Ports::Keep => source,
            Ports::Linux => linux_port(source, rng),
            Ports::Block(first, last) => rng.u16(first..=last),
            Ports::Counter(first) => {
                self.counted = (self.counted + 1) % COUNTED;
                first + self.counted
            }
            Ports::Random => rng.u16(1024..),
        }
    }

    fn is_free(&self, now: Duration, inner: SocketAddr, remote: SocketAddr, port: u16) -> bool {
        let clashes = match self.owners.get(&(port, remote)) {
            Some(Owner::Itself(until)) => *until > now,
            Some(Owner::Inner(other)) => {
                *other != inner && self.flows.get(&(*other, remote)).is_some_and(|flow| flow.until > now)
            }
            None => false,
        };
        // A port that everybody may send to can lead to one inner address only.
        let promised = self.nat.filtering != Depends::Port
            && (self.admitted.get(&(port, self.nat.filtering.key(remote))))
                .is_some_and(|(other, until)| *other != inner && *until > now);
        !clashes && !promised
    }

    fn admits(&self, now: Duration, remote: SocketAddr, port: u16) -> Option<SocketAddr> {
        if self.nat.filtering == Depends::Port {
            return None;
        }
        let (inner, until) = self.admitted.get(&(port, self.nat.filtering.key(remote)))?;
        (*until > now).then_some(*inner)
    }

    fn enter(
        &mut self,
        now: Duration,
        inner: SocketAddr,
        remote: SocketAddr,
        port: u16,
        outward: bool,
    ) -> Duration {
        let until = now + Duration::from_secs(self.nat.lifetime.0.into());
        self.flows.insert((inner, remote), Flow { port, outward, born: now, replied: false, until });
        self.owners.insert((port, remote), Owner::Inner(inner));
        until
    }

    /// Mappings and filters live as long as the longest of their flows.
    fn note(&mut self, now: Duration, inner: SocketAddr, remote: SocketAddr, port: u16, until: Duration) {
        if self.nat.mapping != Depends::Port {
            let key = (inner, self.nat.mapping.key(remote));
            let mapped = self.mapped.entry(key).or_insert((port, until));
            if mapped.1 <= now || mapped.0 == port {
                *mapped = (port, mapped.1.max(until));
            }
        }
        if self.nat.filtering != Depends::Port {
            let key = (port, self.nat.filtering.key(remote));
            let admitted = self.admitted.entry(key).or_insert((inner, until));
            *admitted = (inner, admitted.1.max(until));
        }
    }
}

impl Flow {
    fn touch(&mut self, now: Duration, outward: bool, (unreplied, stream): (u16, u16)) {
        self.replied |= outward != self.outward;
        let old = self.replied && now > self.born + STREAM_AFTER;
        self.until = now + Duration::from_secs(if old { stream } else { unreplied }.into());
    }
}

impl Depends {
    fn key(self, remote: SocketAddr) -> Option<IpAddr> {
        (self == Self::Address).then_some(remote.ip())
    }
}

/// The port that Linux draws for a source port: from the same class as it, and for ordinary ports by a 16-bit random
/// number modulo 64512, so that 1024-2047 come up twice as often.
fn linux_port(source: u16, rng: &mut Rng) -> u16 {
    match source {
        ..512 => rng.u16(1..512),
        512..1024 => rng.u16(600..1024),
        _ => 1024 + rng.u16(..) % 64512,
    }
}

/// Hashes a few integers quickly and always alike; nobody chooses keys against it.
#[derive(Clone, Copy, Debug, Default)]
struct Quick(u64);

impl Quick {
    fn mix(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl Hasher for Quick {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            self.mix(chunk.iter().fold(0, |word, byte| word << 8 | u64::from(*byte)));
        }
    }

    fn write_u16(&mut self, word: u16) {
        self.mix(word.into());
    }

    fn write_usize(&mut self, word: usize) {
        self.mix(word as u64);
    }
}

#[cfg(test)]
#[path = "router_tests.rs"]
mod tests;
