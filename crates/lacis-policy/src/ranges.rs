//! Sets of addresses as sorted ranges, and sets of nodes as bits.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Addresses of both families, as ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Ranges {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

macro_rules! merge {
    ($ranges:expr) => {{
        let ranges = &mut $ranges;
        ranges.sort_unstable();
        let mut kept = 0;
        for at in 1..ranges.len() {
            let (first, last) = ranges[at];
            if first <= ranges[kept].1.saturating_add(1) {
                ranges[kept].1 = ranges[kept].1.max(last);
            } else {
                kept += 1;
                ranges[kept] = (first, last);
            }
        }
        ranges.truncate(kept + 1);
    }};
}

fn overlap<T: Copy + Ord>(a: &[(T, T)], b: &[(T, T)]) -> bool {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        if x.1 < y.0 {
            a.next();
        } else if y.1 < x.0 {
            b.next();
        } else {
            return true;
        }
    }
    false
}

fn contains<T: Copy + Ord>(ranges: &[(T, T)], value: T) -> bool {
    let after = ranges.partition_point(|range| range.0 <= value);
    after > 0 && value <= ranges[after - 1].1
}

/// Both ends of what is left of `from` without `hole`.
fn cut<T: Copy + Ord>(from: Vec<(T, T)>, hole: (T, T), before: fn(T) -> T, after: fn(T) -> T) -> Vec<(T, T)> {
    let mut left = Vec::with_capacity(from.len() + 1);
    for (first, last) in from {
        if last < hole.0 || hole.1 < first {
            left.push((first, last));
            continue;
        }
        if first < hole.0 {
            left.push((first, before(hole.0)));
        }
        if hole.1 < last {
            left.push((after(hole.1), last));
        }
    }
    left
}

impl Ranges {
    pub(crate) fn everything() -> Self {
        Self { v4: vec![(0, u32::MAX)], v6: vec![(0, u128::MAX)] }
    }

    /// Gathers ranges in any order.
    pub(crate) fn collect(parts: impl IntoIterator<Item = (IpAddr, IpAddr)>) -> Self {
        let mut ranges = Self::default();
        for part in parts {
            match part {
                (IpAddr::V4(first), IpAddr::V4(last)) if first <= last => {
                    ranges.v4.push((first.into(), last.into()));
                }
                (IpAddr::V6(first), IpAddr::V6(last)) if first <= last => {
                    ranges.v6.push((first.into(), last.into()));
                }
                _ => {}
            }
        }
        merge!(ranges.v4);
        merge!(ranges.v6);
        ranges
    }

    pub(crate) fn of_nets(nets: impl IntoIterator<Item = IpNet>) -> Self {
        Self::collect(nets.into_iter().map(|net| (net.network(), net.broadcast())))
    }

    pub(crate) fn of_net(net: &IpNet) -> Self {
        Self::of_nets([*net])
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (IpAddr, IpAddr)> + '_ {
        let v4 =
            self.v4.iter().map(|(a, b)| (IpAddr::V4(Ipv4Addr::from(*a)), IpAddr::V4(Ipv4Addr::from(*b))));
        v4.chain(
            self.v6.iter().map(|(a, b)| (IpAddr::V6(Ipv6Addr::from(*a)), IpAddr::V6(Ipv6Addr::from(*b)))),
        )
    }

    pub(crate) fn union<'a>(sets: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut all = Self::default();
        for set in sets {
            all.v4.extend_from_slice(&set.v4);
            all.v6.extend_from_slice(&set.v6);
        }
        merge!(all.v4);
        merge!(all.v6);
        all
    }

    /// What is here and not in a network.
    pub(crate) fn without(mut self, net: &IpNet) -> Self {
        match net {
            IpNet::V4(net) => {
                let hole = (net.network().into(), net.broadcast().into());
                self.v4 = cut(self.v4, hole, |edge: u32| edge - 1, |edge| edge + 1);
            }
            IpNet::V6(net) => {
                let hole = (net.network().into(), net.broadcast().into());
                self.v6 = cut(self.v6, hole, |edge: u128| edge - 1, |edge| edge + 1);
            }
        }
        self
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => contains(&self.v4, address.into()),
            IpAddr::V6(address) => contains(&self.v6, address.into()),
        }
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        overlap(&self.v4, &other.v4) || overlap(&self.v6, &other.v6)
    }

    /// As the wire writes them: `*`, an address, a network, or `FIRST-LAST`.
    pub(crate) fn texts(&self) -> Vec<String> {
        if *self == Self::everything() {
            return vec!["*".to_owned()];
        }
        self.iter()
            .map(|(first, last)| {
                if first == last {
                    return first.to_string();
                }
                match as_net(first, last) {
                    Some(net) => net.to_string(),
                    None => format!("{first}-{last}"),
                }
            })
            .collect()
    }
}

/// Addresses, with their texts once somebody has asked for them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sources {
    ranges: Ranges,
    texts: OnceLock<Arc<Vec<String>>>,
}

impl PartialEq for Sources {
    fn eq(&self, other: &Self) -> bool {
        self.ranges == other.ranges
    }
}

impl Eq for Sources {}

impl From<Ranges> for Sources {
    fn from(ranges: Ranges) -> Self {
        Self { ranges, texts: OnceLock::new() }
    }
}

impl Deref for Sources {
    type Target = Ranges;

    fn deref(&self) -> &Ranges {
        &self.ranges
    }
}

impl Sources {
    /// See [`Ranges::texts`].
    pub(crate) fn texts(&self) -> Arc<Vec<String>> {
        Arc::clone(self.texts.get_or_init(|| Arc::new(self.ranges.texts())))
    }
}

/// The range as a network, if it is one.
fn as_net(first: IpAddr, last: IpAddr) -> Option<IpNet> {
    let net = match (first, last) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let length = (u32::from(a) ^ u32::from(b)).leading_zeros() as u8;
            IpNet::V4(Ipv4Net::new(a, length).ok()?)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let length = (u128::from(a) ^ u128::from(b)).leading_zeros() as u8;
            IpNet::V6(Ipv6Net::new(a, length).ok()?)
        }
        _ => return None,
    };
    (net.network() == first && net.broadcast() == last).then_some(net)
}

/// A set of nodes, by their slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bits(Vec<u64>);

impl Bits {
    pub(crate) fn empty(slots: usize) -> Self {
        Self(vec![0; slots.div_ceil(64)])
    }

    pub(crate) fn has(&self, slot: usize) -> bool {
        self.0.get(slot / 64).is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    pub(crate) fn set(&mut self, slot: usize, value: bool) {
        if self.0.len() <= slot / 64 {
            self.0.resize(slot / 64 + 1, 0);
        }
        let bit = 1 << (slot % 64);
        if value {
            self.0[slot / 64] |= bit;
        } else {
            self.0[slot / 64] &= !bit;
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            *word |= more;
        }
    }

    /// Drops what is not in the other too.
    pub(crate) fn keep(&mut self, other: &Self) {
        for (at, word) in self.0.iter_mut().enumerate() {
            *word &= other.0.get(at).copied().unwrap_or(0);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(at, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                (left != 0).then(|| {
                    let bit = left.trailing_zeros() as usize;
                    left &= left - 1;
                    at * 64 + bit
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Ranges {
        Ranges::of_nets(texts.iter().map(|text| text.parse().unwrap()))
    }

    #[test]
    fn ranges_merge_and_are_written_short() {
        let ranges = nets(&["10.0.0.2/31", "10.0.0.0/31", "10.0.0.8/32", "fd00::/64"]);
        assert_eq!(ranges.texts(), ["10.0.0.0/30", "10.0.0.8", "fd00::/64"]);
        assert_eq!(nets(&["10.0.0.1/32", "10.0.0.2/32"]).texts(), ["10.0.0.1-10.0.0.2"]);
        assert_eq!(Ranges::everything().texts(), ["*"]);
        let hole = nets(&["10.0.0.0/8"]).without(&"10.1.0.0/16".parse().unwrap());
        assert_eq!(hole.texts(), ["10.0.0.0/16", "10.2.0.0-10.255.255.255"]);
        assert!(hole.overlaps(&nets(&["10.0.0.0/15"])) && !hole.contains("10.1.0.1".parse().unwrap()));
    }

    #[test]
    fn bits_are_a_set() {
        let mut bits = Bits::empty(3);
        bits.set(70, true);
        bits.set(1, true);
        assert_eq!(bits.iter().collect::<Vec<_>>(), [1, 70]);
        bits.set(1, false);
        assert!(bits.has(70) && !bits.has(1) && !bits.has(1000));
    }
}
