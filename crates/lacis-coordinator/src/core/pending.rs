//! Nodes that wait for an administrator: they came without a key and were sent to a page.
//!
//! Anybody can begin a registration, so each machine and each address has a few, and beyond a bound for all whoever has
//! the most loses its oldest: who floods the list takes the places of nobody else. Of each registration little is kept.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};

use lacis_wire::control::Hostinfo;
use lacis_wire::key::{MachineKey, NodeKey};
use tokio::sync::watch;

/// After this nobody waits any more, and the client asks for a new page.
const LIFETIME_SECONDS: i64 = 15 * 60;
/// Registrations of all.
const MAX_PENDING: usize = 1024;
/// Of one machine key: a client has one, or two while its user switches.
const MAX_PER_MACHINE: usize = 4;
/// Of one address, or /64: many machines may join behind one NAT.
const MAX_PER_ADDRESS: usize = 32;

/// One that waits.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub id: String,
    pub machine: MachineKey,
    pub node_key: NodeKey,
    /// Host name, OS and tags. The rest comes with the first map request.
    pub hostinfo: Hostinfo,
    pub version: u16,
    pub created: i64,
    /// In which order they came.
    number: u64,
    source: Source,
    progress: watch::Sender<Progress>,
}

/// How far a registration is, for the request that waits for it.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    approved: bool,
    /// The number of the latest request that waits.
    follow_up: u64,
}

/// Who is at an address: all of a /64, and for the bound of all those of a /48, are taken for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source {
    address: IpAddr,
    site: IpAddr,
}

impl Source {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self { address: v4.into(), site: v4.into() },
            IpAddr::V6(v6) => {
                let prefix = |length: u32| Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << (128 - length)));
                Self { address: prefix(64).into(), site: prefix(48).into() }
            }
        }
    }
}

/// What is kept of a host while it waits. Nothing in it is longer than the bounds of [`Hostinfo`].
pub(super) fn summary(hostinfo: Hostinfo) -> Hostinfo {
    let Hostinfo { hostname, os, request_tags, .. } = hostinfo;
    Hostinfo { hostname, os, request_tags, ..Hostinfo::default() }
}

#[derive(Debug, Default)]
struct State {
    /// By id.
    waiting: HashMap<String, Waiting>,
    last_number: u64,
}

impl State {
    /// Removes the oldest of those that match, if they are `most` or more.
    fn make_room(&mut self, most: usize, matches: impl Fn(&Waiting) -> bool) {
        let matching = || self.waiting.values().filter(|one| matches(one));
        if matching().count() < most {
            return;
        }
        if let Some(oldest) = matching().min_by_key(|one| one.number).map(|one| one.id.clone()) {
            self.waiting.remove(&oldest);
        }
    }

    /// The site that has the most, and of several the one that has waited longest.
    fn largest_site(&self) -> Option<IpAddr> {
        let mut sites: HashMap<IpAddr, (usize, u64)> = HashMap::new();
        for one in self.waiting.values() {
            let (count, oldest) = sites.entry(one.source.site).or_insert((0, u64::MAX));
            *count += 1;
            *oldest = one.number.min(*oldest);
        }
        sites
            .into_iter()
            .max_by_key(|(_, (count, oldest))| (*count, std::cmp::Reverse(*oldest)))
            .map(|(site, _)| site)
    }
}

/// All that wait.
#[derive(Debug, Default)]
pub(super) struct Pending(Mutex<State>);

impl Pending {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a registration and gives its id. A machine that asks again for the same key gets the same one.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub(super) fn add(
        &self,
        machine: MachineKey,
        node_key: NodeKey,
        hostinfo: Hostinfo,
        version: u16,
        address: IpAddr,
        now: i64,
    ) -> Result<String, getrandom::Error> {
        let mut state = self.lock();
        let same = state.waiting.values().find(|one| one.machine == machine && one.node_key == node_key);
        if let Some(same) = same {
            return Ok(same.id.clone());
        }
        let source = Source::of(address);
        state.make_room(MAX_PER_MACHINE, |one| one.machine == machine);
        state.make_room(MAX_PER_ADDRESS, |one| one.source.address == source.address);
        if state.waiting.len() >= MAX_PENDING
            && let Some(largest) = state.largest_site()
        {
            state.make_room(0, |one| one.source.site == largest);
        }
        let mut random = [0; 12];
        getrandom::fill(&mut random)?;
        let id = format!("lacis-reg-{}", hex::encode(random));
        state.last_number += 1;
        let one = Waiting {
            id: id.clone(),
            machine,
            node_key,
            hostinfo: summary(hostinfo),
            version,
            created: now,
            number: state.last_number,
            source,
            progress: watch::Sender::default(),
        };
        state.waiting.insert(id.clone(), one);
        Ok(id)
    }

    pub(super) fn get(&self, id: &str) -> Option<Waiting> {
        self.lock().waiting.get(id).cloned()
    }

    pub(super) fn list(&self) -> Vec<Waiting> {
        let mut all: Vec<_> = self.lock().waiting.values().cloned().collect();
        all.sort_by_key(|one| one.number);
        all
    }

    /// Ends the wait.
    pub(super) fn approve(&self, id: &str) {
        if let Some(one) = self.lock().waiting.remove(id) {
            one.progress.send_modify(|progress| progress.approved = true);
        }
    }

    /// Waits for the administrator's decision, the registration's end, or another request that waits for the same: only
    /// the latest does.
    pub(super) async fn wait(&self, id: &str, machine: &MachineKey) {
        let waiting = {
            let state = self.lock();
            state.waiting.get(id).filter(|one| one.machine == *machine).map(|one| {
                let mut own = 0;
                one.progress.send_modify(|progress| {
                    progress.follow_up += 1;
                    own = progress.follow_up;
                });
                (one.progress.subscribe(), own)
            })
        };
        if let Some((mut progress, own)) = waiting {
            // The sender goes when the registration is forgotten.
            let _ = progress.wait_for(|progress| progress.approved || progress.follow_up != own).await;
        }
    }

    pub(super) fn forget_old(&self, now: i64) {
        self.lock().waiting.retain(|_, one| one.created + LIFETIME_SECONDS > now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lacis_wire::key::{MachinePrivateKey, NodePrivateKey};

    use super::*;

    fn key() -> NodeKey {
        NodePrivateKey::generate().public()
    }

    fn machine() -> MachineKey {
        MachinePrivateKey::generate().public()
    }

    fn begin(pending: &Pending, machine: MachineKey, address: &str) -> String {
        let address = address.parse().unwrap();
        pending.add(machine, key(), Hostinfo::default(), 113, address, 0).unwrap()
    }

    #[test]
    fn who_floods_the_list_takes_only_its_own_places() {
        let pending = Pending::default();
        let honest = begin(&pending, machine(), "192.0.2.1");
        // One machine, from many addresses.
        let flooder = machine();
        let ids: Vec<_> =
            (0..2000).map(|n| begin(&pending, flooder, &format!("198.51.100.{}", n % 250))).collect();
        let left: Vec<_> = ids.iter().filter(|id| pending.get(id).is_some()).collect();
        assert_eq!(left, ids[ids.len() - MAX_PER_MACHINE..].iter().collect::<Vec<_>>());
        // Many machines at one address, and in one /64.
        for n in 0..2000 {
            begin(&pending, machine(), "203.0.113.9");
            begin(&pending, machine(), &format!("2001:db8::{n:x}"));
        }
        assert_eq!(pending.list().len(), 1 + MAX_PER_MACHINE + 2 * MAX_PER_ADDRESS);
        // Many machines in many networks of one site.
        for n in 0..5000 {
            begin(&pending, machine(), &format!("2001:db8:7:{n:x}::1"));
        }
        assert_eq!(pending.list().len(), MAX_PENDING);
        assert!(pending.get(&honest).is_some(), "it has waited longest, and is still there");
        let late = begin(&pending, machine(), "192.0.2.2");
        for n in 0..5000 {
            begin(&pending, machine(), &format!("2001:db8:7:{n:x}::1"));
        }
        assert!(pending.get(&honest).is_some() && pending.get(&late).is_some());
    }

    #[test]
    fn little_is_kept_of_a_host_that_waits() {
        let pending = Pending::default();
        let hostinfo = Hostinfo {
            hostname: "a".to_owned(),
            request_tags: vec!["tag:x".to_owned()],
            routable_ips: vec!["10.0.0.0/8".parse().unwrap(); 1000],
            ..Hostinfo::default()
        };
        let id = pending.add(machine(), key(), hostinfo, 113, [192, 0, 2, 1].into(), 0).unwrap();
        let kept = pending.get(&id).unwrap().hostinfo;
        let tags = vec!["tag:x".to_owned()];
        assert_eq!(kept, Hostinfo { hostname: "a".to_owned(), request_tags: tags, ..Hostinfo::default() });
    }

    #[tokio::test]
    async fn of_two_requests_that_wait_for_the_same_the_latest_waits() {
        let pending = Pending::default();
        let own = machine();
        let id = begin(&pending, own, "192.0.2.1");
        let mut first = std::pin::pin!(pending.wait(&id, &own));
        assert!(tokio::time::timeout(Duration::ZERO, &mut first).await.is_err(), "nobody has decided");
        let mut second = std::pin::pin!(pending.wait(&id, &own));
        assert!(tokio::time::timeout(Duration::ZERO, &mut second).await.is_err());
        first.await;
        pending.approve(&id);
        second.await;
        // Another machine's registration, and none, are not waited for.
        let id = begin(&pending, own, "192.0.2.1");
        pending.wait(&id, &machine()).await;
        pending.wait("none", &own).await;
    }
}
