//! What two Lacis nodes tell each other to pass NATs that pings and call-me-maybe alone do not pass.
//!
//! A disco message of a type of its own: other clients ignore it quietly. It is taken only when it comes by relay.
//! The body is `step u8 ‖ fields`, integers big-endian, IPv4 addresses as 4 bytes; bytes behind the fields are
//! tolerated. Used by `lacis-path`, which says what each message is for.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::RangeInclusive;

/// Type of the disco message: the L of Lacis, far from what others number upwards.
pub const TYPE: u8 = 0x4c;
/// Ranges in one plan; a longer list is cut.
const MOST_RANGES: usize = 32;

const STEP_NAT: u8 = 1;
const STEP_FRESH: u8 = 2;
const STEP_FRESH_AT: u8 = 3;
const STEP_PROBE: u8 = 4;
const STEP_MISSED: u8 = 5;

/// How a NAT chooses the port that the outside sees (RFC 4787, section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mapping {
    /// Not measured, or with too few servers.
    #[default]
    Unknown,
    /// There is no NAT: the host has the address that others see.
    Open,
    /// One port for all destinations.
    Independent,
    /// Another port for each destination ("symmetric").
    Varies,
}

/// From where a NAT whose mapping varies takes its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Allocator {
    /// Not measured.
    #[default]
    Unknown,
    /// As Linux does: a source port in 512-1023 comes out in 600-1023.
    Linux,
    /// From a block of ports, its first and its last.
    Block(u16, u16),
    /// One after the other; the latest that was seen.
    Counter(u16),
    /// From all over the place.
    Random,
}

/// What a node knows of the NAT in front of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NatReport {
    /// Whether UDP reaches anything at all.
    pub udp: bool,
    /// How ports are mapped.
    pub mapping: Mapping,
    /// From where ports are taken, if the mapping varies.
    pub allocator: Allocator,
    /// Whether this node can send from ports below 1024.
    pub low_ports: bool,
    /// Whether this node takes part in port searches.
    pub searches: bool,
    /// Where the main socket is seen.
    pub seen: Option<SocketAddrV4>,
}

/// From which sockets the prober sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeFrom {
    /// From its main socket.
    Main,
    /// From the socket that it opened for [`Traversal::Fresh`].
    Fresh,
    /// From so many new sockets on ports below 1024.
    Low(u8),
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Traversal {
    /// "This is my NAT", and with `ask` "I look for a way to you: tell me of yours".
    Nat {
        /// Whether an answer is wanted.
        ask: bool,
        /// The sender's.
        nat: NatReport,
    },
    /// "Open a new socket and tell me where it is seen."
    Fresh {
        /// Names the search.
        search: u32,
    },
    /// The answer.
    FreshAt {
        /// The same search.
        search: u32,
        /// Where the new socket is seen.
        at: SocketAddrV4,
    },
    /// "My sockets have sent to you: now probe these ports of mine."
    Probe {
        /// Names the search.
        search: u32,
        /// The sockets to probe from.
        from: ProbeFrom,
        /// The address to probe.
        at: Ipv4Addr,
        /// Its ports, in this order; at most 32 ranges.
        ports: Vec<RangeInclusive<u16>>,
    },
    /// "I have probed them all in vain", or have had to stop.
    Missed {
        /// The same search.
        search: u32,
        /// How many probes were sent.
        probes: u16,
        /// New flows failed: the network in front of the prober has had enough.
        exhausted: bool,
    },
}

impl Traversal {
    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Nat { ask, nat } => {
                let flags = u8::from(*ask)
                    | u8::from(nat.udp) << 1
                    | u8::from(nat.low_ports) << 2
                    | u8::from(nat.searches) << 3;
                let mapping = match nat.mapping {
                    Mapping::Unknown => 0,
                    Mapping::Open => 1,
                    Mapping::Independent => 2,
                    Mapping::Varies => 3,
                };
                let (allocator, first, last) = match nat.allocator {
                    Allocator::Unknown => (0, 0, 0),
                    Allocator::Linux => (1, 0, 0),
                    Allocator::Block(first, last) => (2, first, last),
                    Allocator::Counter(latest) => (3, latest, 0),
                    Allocator::Random => (4, 0, 0),
                };
                out.extend_from_slice(&[STEP_NAT, flags, mapping, allocator]);
                out.extend_from_slice(&first.to_be_bytes());
                out.extend_from_slice(&last.to_be_bytes());
                // The unspecified address stands for none.
                put_address(out, nat.seen.unwrap_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)));
            }
            Self::Fresh { search } => {
                out.push(STEP_FRESH);
                out.extend_from_slice(&search.to_be_bytes());
            }
            Self::FreshAt { search, at } => {
                out.push(STEP_FRESH_AT);
                out.extend_from_slice(&search.to_be_bytes());
                put_address(out, *at);
            }
            Self::Probe { search, from, at, ports } => {
                out.push(STEP_PROBE);
                out.extend_from_slice(&search.to_be_bytes());
                let (from, count) = match from {
                    ProbeFrom::Main => (0, 0),
                    ProbeFrom::Fresh => (1, 0),
                    ProbeFrom::Low(count) => (2, *count),
                };
                out.extend_from_slice(&[from, count]);
                out.extend_from_slice(&at.octets());
                for range in ports.iter().take(MOST_RANGES) {
                    out.extend_from_slice(&range.start().to_be_bytes());
                    out.extend_from_slice(&range.end().to_be_bytes());
                }
            }
            Self::Missed { search, probes, exhausted } => {
                out.push(STEP_MISSED);
                out.extend_from_slice(&search.to_be_bytes());
                out.extend_from_slice(&probes.to_be_bytes());
                out.push(u8::from(*exhausted));
            }
        }
    }

    /// Parses a body; `None` for a step or a value that this version does not know, or one that is too short.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let (&step, rest) = body.split_first()?;
        if step == STEP_NAT {
            let (&[flags, mapping, allocator, a, b, c, d], rest) = rest.split_first_chunk::<7>()?;
            let (first, last) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            let (seen, _) = address(rest)?;
            return Some(Self::Nat {
                ask: flags & 1 != 0,
                nat: NatReport {
                    udp: flags & 2 != 0,
                    low_ports: flags & 4 != 0,
                    searches: flags & 8 != 0,
                    mapping: match mapping {
                        1 => Mapping::Open,
                        2 => Mapping::Independent,
                        3 => Mapping::Varies,
                        _ => Mapping::Unknown,
                    },
                    allocator: match allocator {
                        1 => Allocator::Linux,
                        2 if first <= last => Allocator::Block(first, last),
                        3 => Allocator::Counter(first),
                        4 => Allocator::Random,
                        _ => Allocator::Unknown,
                    },
                    seen: Some(seen).filter(|seen| !seen.ip().is_unspecified()),
                },
            });
        }
        let (search, rest) = rest.split_first_chunk::<4>()?;
        let search = u32::from_be_bytes(*search);
        Some(match step {
            STEP_FRESH => Self::Fresh { search },
            STEP_FRESH_AT => Self::FreshAt { search, at: address(rest)?.0 },
            STEP_PROBE => {
                let (&[from, count, a, b, c, d], rest) = rest.split_first_chunk::<6>()?;
                let from = match from {
                    0 => ProbeFrom::Main,
                    1 => ProbeFrom::Fresh,
                    2 => ProbeFrom::Low(count),
                    _ => return None,
                };
                let (ranges, _) = rest.as_chunks::<4>();
                let ports = ranges
                    .iter()
                    .take(MOST_RANGES)
                    .map(|&[a, b, c, d]| u16::from_be_bytes([a, b])..=u16::from_be_bytes([c, d]))
                    .collect();
                Self::Probe { search, from, at: Ipv4Addr::new(a, b, c, d), ports }
            }
            STEP_MISSED => {
                let (&[a, b, exhausted], _) = rest.split_first_chunk::<3>()?;
                Self::Missed { search, probes: u16::from_be_bytes([a, b]), exhausted: exhausted != 0 }
            }
            _ => return None,
        })
    }
}

fn put_address(out: &mut Vec<u8>, address: SocketAddrV4) {
    out.extend_from_slice(&address.ip().octets());
    out.extend_from_slice(&address.port().to_be_bytes());
}

fn address(raw: &[u8]) -> Option<(SocketAddrV4, &[u8])> {
    let (&[a, b, c, d, e, f], rest) = raw.split_first_chunk::<6>()?;
    Some((SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([e, f])), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> Vec<Traversal> {
        let at = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 7), 41641);
        let nat = NatReport {
            udp: true,
            mapping: Mapping::Varies,
            allocator: Allocator::Block(20000, 20999),
            low_ports: true,
            searches: true,
            seen: Some(at),
        };
        vec![
            Traversal::Nat { ask: true, nat },
            Traversal::Nat {
                ask: false,
                nat: NatReport { allocator: Allocator::Counter(7), ..NatReport::default() },
            },
            Traversal::Fresh { search: 7 },
            Traversal::FreshAt { search: 7, at },
            Traversal::Probe {
                search: 7,
                from: ProbeFrom::Low(2),
                at: *at.ip(),
                ports: vec![600..=1023, 1..=1],
            },
            Traversal::Missed { search: 7, probes: 424, exhausted: true },
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        for message in examples() {
            let mut body = Vec::new();
            message.encode(&mut body);
            assert_eq!(Traversal::parse(&body), Some(message));
        }
    }

    #[test]
    fn cut_messages_are_refused_or_shorter_never_a_panic() {
        for message in examples() {
            let mut body = Vec::new();
            message.encode(&mut body);
            for cut in 0..body.len() {
                let read = Traversal::parse(&body[..cut]);
                assert!(
                    read.is_none() || matches!(read, Some(Traversal::Probe { .. })),
                    "{message:?} at {cut}"
                );
            }
        }
    }
}
