//! Rules made fast to ask: for each family blocks of 512 rules, in which every address, port and protocol is looked up
//! once and yields the set of rules that it fits, as bits; a packet passes when the sets have a rule in common.
//!
//! So a question costs some binary searches for each block whatever the rules are, and memory grows with the length of
//! the rules, not with their combinations.

use std::collections::HashMap;

use super::rules::{IpSet, Rule};

/// Rules in a block.
const BLOCK: usize = 512;
const WORDS: usize = BLOCK / 64;

/// A set of rules of one block.
type Bits = [u64; WORDS];

/// What is looked up.
pub(super) trait Key: Copy + Ord {
    /// The least value.
    const FIRST: Self;

    /// The next value; `None` after the greatest.
    fn after(self) -> Option<Self>;
}

macro_rules! keys {
    ($($key:ty),*) => {$(
        impl Key for $key {
            const FIRST: Self = 0;

            fn after(self) -> Option<Self> {
                self.checked_add(1)
            }
        }
    )*};
}

keys!(u8, u16, u32, u128);

/// Which rules of a block each value fits.
#[derive(Debug)]
struct Axis<K> {
    /// Where the set changes; the first is the least value.
    starts: Vec<K>,
    /// For each start the number of its set: most of them occur many times.
    numbers: Vec<u32>,
    sets: Vec<Bits>,
}

impl<K: Key> Axis<K> {
    /// Of ranges `(rule, first, last)`; those of one rule do not overlap.
    fn new(ranges: impl Iterator<Item = (usize, K, K)>) -> Self {
        // At the same value a range that ends comes before one that begins.
        let mut edges = Vec::new();
        for (rule, first, last) in ranges {
            edges.push((first, true, rule));
            edges.extend(last.after().map(|end| (end, false, rule)));
        }
        edges.sort_unstable();
        let mut axis = Self { starts: vec![K::FIRST], numbers: vec![0], sets: vec![[0; WORDS]] };
        let mut known = HashMap::from([([0; WORDS], 0)]);
        let mut set = [0; WORDS];
        for edges in edges.chunk_by(|one, other| one.0 == other.0) {
            let start = edges[0].0;
            for &(_, begins, rule) in edges {
                let bit = 1 << (rule % 64);
                if begins {
                    set[rule / 64] |= bit;
                } else {
                    set[rule / 64] &= !bit;
                }
            }
            let number = *known.entry(set).or_insert_with(|| {
                axis.sets.push(set);
                axis.sets.len() as u32 - 1
            });
            if start == K::FIRST {
                axis.numbers[0] = number;
            } else if axis.numbers.last() != Some(&number) {
                axis.starts.push(start);
                axis.numbers.push(number);
            }
        }
        axis
    }

    fn find(&self, value: K) -> &Bits {
        let after = self.starts.partition_point(|&start| start <= value);
        &self.sets[self.numbers[after - 1] as usize]
    }
}

fn both(one: &Bits, other: &Bits) -> Bits {
    std::array::from_fn(|word| one[word] & other[word])
}

fn any(set: &Bits) -> bool {
    set.iter().any(|&word| word != 0)
}

/// What is asked beside the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Nothing: any rule between the two will do.
    Addresses,
    /// A protocol and a destination port.
    Port(u8, u16),
    /// A protocol without ports: the rule has to name it and to mean all ports.
    Whole(u8),
}

#[derive(Debug)]
struct Block<K> {
    sources: Axis<K>,
    destinations: Axis<K>,
    ports: Axis<u16>,
    protocols: Axis<u8>,
    all_ports: Bits,
}

impl<K: Key> Block<K> {
    fn new(rules: &[&Rule], ranges: impl Fn(&IpSet) -> &[(K, K)]) -> Self {
        let numbered = || rules.iter().copied().enumerate();
        let addresses = |of: fn(&Rule) -> &IpSet| {
            Axis::new(numbered().flat_map(|(number, rule)| {
                ranges(of(rule)).iter().map(move |&(first, last)| (number, first, last))
            }))
        };
        let mut all_ports = [0; WORDS];
        for (number, _) in numbered().filter(|(_, rule)| rule.ports == (0, u16::MAX)) {
            all_ports[number / 64] |= 1 << (number % 64);
        }
        Self {
            sources: addresses(|rule| &rule.sources),
            destinations: addresses(|rule| &rule.destinations),
            ports: Axis::new(numbered().map(|(number, rule)| (number, rule.ports.0, rule.ports.1))),
            protocols: Axis::new(numbered().flat_map(|(number, rule)| {
                rule.protocols.iter().map(move |&protocol| (number, protocol, protocol))
            })),
            all_ports,
        }
    }

    fn allows(&self, src: K, dst: K, ask: Ask) -> bool {
        let fitting = both(self.destinations.find(dst), self.sources.find(src));
        any(&fitting)
            && match ask {
                Ask::Addresses => true,
                Ask::Port(protocol, port) => {
                    any(&both(&both(&fitting, self.ports.find(port)), self.protocols.find(protocol)))
                }
                Ask::Whole(protocol) => {
                    any(&both(&both(&fitting, &self.all_ports), self.protocols.find(protocol)))
                }
            }
    }
}

/// The rules of one family; `K` is its address as a number.
#[derive(Debug)]
pub(super) struct Index<K>(Vec<Block<K>>);

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: Key> Index<K> {
    /// `ranges` gives the family's part of a set, sorted and without overlaps.
    pub(super) fn new(rules: &[Rule], ranges: impl Fn(&IpSet) -> &[(K, K)]) -> Self {
        let useful =
            |rule: &&Rule| !ranges(&rule.sources).is_empty() && !ranges(&rule.destinations).is_empty();
        let rules: Vec<&Rule> = rules.iter().filter(useful).collect();
        Self(rules.chunks(BLOCK).map(|rules| Block::new(rules, &ranges)).collect())
    }

    /// Whether some rule allows it.
    pub(super) fn allows(&self, src: K, dst: K, ask: Ask) -> bool {
        self.0.iter().any(|block| block.allows(src, dst, ask))
    }
}
