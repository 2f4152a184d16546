//! Addresses of nodes: one IPv4 and one IPv6 each, stable for the node's life.
//!
//! Both come from one number, so that they are found and given back together: 100.64.0.0 + n and
//! fd7a:115c:a1e0:: + n. Clients assume these ranges (routes, reverse zones and filters are built on them). Where the
//! policy says so, the number comes from a pool.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

const V4_BASE: u32 = u32::from_be_bytes([100, 64, 0, 0]);
/// Hosts of 100.64.0.0/10.
const POOL: u32 = 1 << 22;
const V6_BASE: u128 = 0xfd7a_115c_a1e0 << 80;
/// fd7a:115c:a1e0::53 is the resolver.
const V6_RESOLVER: u32 = 0x53;

/// Which addresses of a network are given.
#[derive(Debug, Default)]
pub struct Addresses {
    taken: HashSet<u32>,
    next: u32,
}

/// May this number be given at all?
fn usable(n: u32) -> bool {
    let [_, second, third, _] = (V4_BASE + n).to_be_bytes();
    n != 0
        && n != POOL - 1
        && n != V6_RESOLVER
        // 100.100.100.0/24: the resolver's own range.
        && !(second == 100 && third == 100)
        // 100.115.92.0/23: ChromeOS's containers.
        && !(second == 115 && (third & 0xfe) == 92)
}

/// Of an address outside the range: [`POOL`] or more.
fn number(v4: Ipv4Addr) -> u32 {
    u32::from(v4).wrapping_sub(V4_BASE)
}

fn pair(n: u32) -> (Ipv4Addr, Ipv6Addr) {
    (Ipv4Addr::from(V4_BASE + n), Ipv6Addr::from(V6_BASE + u128::from(n)))
}

impl Addresses {
    /// Gives the next free pair; `None` when all four million are given.
    pub fn give(&mut self) -> Option<(Ipv4Addr, Ipv6Addr)> {
        for _ in 0..POOL {
            let n = self.next;
            self.next = (n + 1) % POOL;
            if usable(n) && self.taken.insert(n) {
                return Some(pair(n));
            }
        }
        None
    }

    /// Gives the lowest free pair whose IPv4 address is in the first of these pools that has one; `None` when all are
    /// given. What is given otherwise goes on where it was.
    pub fn give_from(&mut self, pools: &[IpNet]) -> Option<(Ipv4Addr, Ipv6Addr)> {
        let nets = pools.iter().filter_map(|pool| match pool {
            IpNet::V4(net) => Some(net),
            IpNet::V6(_) => None,
        });
        let mut numbers = nets.flat_map(|net| net.hosts()).map(number);
        let n = numbers.find(|n| *n < POOL && usable(*n) && !self.taken.contains(n))?;
        self.taken.insert(n);
        Some(pair(n))
    }

    /// Marks a pair that a node has (as read from the database) as given. Those that come next are above it, unless it
    /// came from a pool.
    pub fn take(&mut self, v4: Ipv4Addr, pools: &[IpNet]) {
        let n = number(v4);
        if n >= POOL {
            return;
        }
        self.taken.insert(n);
        if !pools.iter().any(|pool| pool.contains(&IpAddr::V4(v4))) {
            self.next = self.next.max((n + 1) % POOL);
        }
    }

    /// Takes a deleted node's pair back.
    pub fn give_back(&mut self, v4: Ipv4Addr) {
        self.taken.remove(&number(v4));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_come_from_one_number() {
        let mut addresses = Addresses::default();
        let (v4, v6) = addresses.give().unwrap();
        assert_eq!((v4.to_string(), v6.to_string()), ("100.64.0.1".into(), "fd7a:115c:a1e0::1".into()));
    }

    #[test]
    fn reserved_ranges_are_never_given() {
        let mut addresses = Addresses::default();
        let mut given = HashSet::new();
        while let Some((v4, v6)) = addresses.give() {
            let [first, second, third, last] = v4.octets();
            assert!(first == 100 && (64..128).contains(&second));
            assert!(!(second == 100 && third == 100), "{v4}");
            assert!(!(second == 115 && (third == 92 || third == 93)), "{v4}");
            assert!(!matches!((second, third, last), (64, 0, 0) | (127, 255, 255)));
            assert_ne!(v6, "fd7a:115c:a1e0::53".parse::<Ipv6Addr>().unwrap());
            assert_eq!(v6.segments()[3..6], [0, 0, 0]);
            assert!(given.insert(v4));
        }
        assert_eq!(given.len(), (1 << 22) - 2 - 1 - 256 - 512);
    }

    #[test]
    fn an_address_is_given_again_only_after_it_came_back() {
        let mut addresses = Addresses::default();
        addresses.take(Ipv4Addr::new(100, 64, 0, 1), &[]);
        let (second, _) = addresses.give().unwrap();
        assert_eq!(second, Ipv4Addr::new(100, 64, 0, 2));
        addresses.give_back(second);
        assert_eq!(addresses.give().unwrap().0, Ipv4Addr::new(100, 64, 0, 3));
    }

    #[test]
    fn a_pool_gives_its_hosts_from_the_lowest_and_then_no_more() {
        let pools: Vec<IpNet> = ["100.81.0.8/30", "100.90.0.1/32"].map(|net| net.parse().unwrap()).to_vec();
        let mut addresses = Addresses::default();
        let give = |addresses: &mut Addresses| addresses.give_from(&pools).map(|(v4, _)| v4.to_string());
        let all: Vec<_> = std::iter::from_fn(|| give(&mut addresses)).collect();
        assert_eq!(all, ["100.81.0.9", "100.81.0.10", "100.90.0.1"]);
        assert_eq!(addresses.give().unwrap().0, Ipv4Addr::new(100, 64, 0, 1), "others are not drawn there");
        addresses.give_back(Ipv4Addr::new(100, 81, 0, 9));
        let (v4, v6) = addresses.give_from(&pools).unwrap();
        assert_eq!((v4, v6), (Ipv4Addr::new(100, 81, 0, 9), "fd7a:115c:a1e0::11:9".parse().unwrap()));
        // What the policy's language lets through and is reserved all the same.
        assert_eq!(addresses.give_from(&["100.64.0.0/32".parse().unwrap()]), None);
        assert_eq!(addresses.give_from(&["10.0.0.0/30".parse().unwrap()]), None);
    }

    #[test]
    fn after_a_restart_others_still_stay_out_of_a_pool() {
        let pools: [IpNet; 1] = ["100.81.0.0/24".parse().unwrap()];
        let mut addresses = Addresses::default();
        addresses.take(Ipv4Addr::new(100, 64, 0, 7), &[]);
        addresses.take(Ipv4Addr::new(100, 81, 0, 1), &pools);
        assert_eq!(addresses.give().unwrap().0, Ipv4Addr::new(100, 64, 0, 8));
        assert_eq!(addresses.give_from(&pools).unwrap().0, Ipv4Addr::new(100, 81, 0, 2));
    }
}
