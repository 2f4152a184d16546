//! Port mapping: asks the router at home to let through what comes for the tunnel's UDP port, by PCP, NAT-PMP or
//! UPnP, whichever it speaks, and keeps the mapping alive.
//!
//! All packets carry the daemon's mark, which no published crate for these protocols offers. Without it they would
//! take the way of other packets: to the exit node while one is used, or to the peer whose subnet covers this LAN,
//! and a stranger's router would be asked, or none.

#[cfg(test)]
mod mutations;
mod pcp;
mod upnp;

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::{interfaces, links};

/// What routers are asked for.
const LEASE: Duration = Duration::from_hours(2);
/// Whatever a router grants, it is asked again within these.
const LEAST_LEASE: Duration = Duration::from_mins(2);
const MOST_LEASE: Duration = Duration::from_hours(24);
/// What was found to be there is believed for this long; what was not, for a moment only.
const TRUST: Duration = Duration::from_mins(10);
const DISTRUST: Duration = Duration::from_secs(5);
/// A router that maps nothing is asked again after this; somebody may have allowed it meanwhile.
const RETRY: Duration = Duration::from_mins(10);
/// A mapping that could not be renewed is tried again after this, while it lasts.
const RENEW_RETRY: Duration = Duration::from_mins(1);
/// To give a mapping back. The router may be out of reach.
const RELEASE: Duration = Duration::from_secs(1);
const PCP_PORT: u16 = 5351;
/// Requests that may wait for the task.
const ASKS: usize = 32;

/// The number with which a router refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the router refuses (result {0})")]
struct Refused(u16);

/// Which protocols the router speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) upnp: bool,
    pub(crate) pmp: bool,
    pub(crate) pcp: bool,
}

/// The router, and this host's address towards it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Router {
    address: Ipv4Addr,
    own: Ipv4Addr,
    pcp_port: u16,
}

#[derive(Debug)]
enum Ask {
    Renew,
    Probe(oneshot::Sender<Found>),
}

/// Keeps one port mapped. Dropped, it gives the mapping back.
#[derive(Debug)]
pub(crate) struct PortMap {
    asks: mpsc::Sender<Ask>,
    external: watch::Receiver<Option<SocketAddrV4>>,
    task: JoinHandle<()>,
}

impl PortMap {
    /// Maps the UDP `port` of this host from now on, unless `on` is false: then no router is ever asked anything.
    /// `tun_index` is the mesh's own device, behind which no router is looked for.
    pub(crate) fn start(port: u16, tun_index: u32, fwmark: Option<u32>, on: bool) -> Self {
        let (asks, inbox) = mpsc::channel(ASKS);
        let (sender, external) = watch::channel(None);
        let keeper = Keeper { port, tun_index, fwmark, external: sender, looked: None, mapping: None };
        let task = tokio::spawn(keeper.run(inbox, on && port != 0));
        Self { asks, external, task }
    }

    /// Where the port is reached from outside, while it is.
    pub(crate) fn external(&self) -> watch::Receiver<Option<SocketAddrV4>> {
        self.external.clone()
    }

    /// What the router speaks. No answer comes where there is no router, or when nothing may be asked.
    pub(crate) fn probe(&self) -> oneshot::Receiver<Found> {
        let (reply, answer) = oneshot::channel();
        self.ask(Ask::Probe(reply));
        answer
    }

    /// The network has changed: there may be another router.
    pub(crate) fn renew(&self) {
        self.ask(Ask::Renew);
    }

    fn ask(&self, ask: Ask) {
        // With so many waiting, one more changes nothing; a reply dropped is no answer, which callers expect.
        let _ = self.asks.try_send(ask);
    }

    /// Gives the mapping back and returns when that is done, a second later at most.
    pub(crate) async fn close(self) {
        let Self { asks, task, .. } = self;
        drop(asks);
        // If it takes longer, the mapping ends by itself some time.
        let _ = timeout(RELEASE, task).await;
    }
}

/// How a mapping was made, and so how it is renewed and given back.
#[derive(Clone, Debug)]
enum Means {
    Pcp(pcp::Nonce),
    Pmp,
    Upnp(upnp::Service),
}

#[derive(Clone, Debug)]
struct Mapping {
    router: Router,
    means: Means,
    external: SocketAddrV4,
    until: Instant,
}

/// What was seen of a router, and when.
#[derive(Debug)]
struct Looked {
    at: Instant,
    router: Router,
    pcp: bool,
    pmp: bool,
    upnp: Upnp,
}

#[derive(Debug)]
enum Upnp {
    /// Not looked for: PCP or NAT-PMP is there.
    Unknown,
    Absent,
    Present(upnp::Service),
}

impl Looked {
    fn found(&self) -> Found {
        Found { upnp: matches!(self.upnp, Upnp::Present(_)), pmp: self.pmp, pcp: self.pcp }
    }

    fn is_fresh(&self, router: Router, now: Instant) -> bool {
        let trust = if self.found() == Found::default() { DISTRUST } else { TRUST };
        self.router == router && now - self.at < trust
    }
}

struct Keeper {
    port: u16,
    tun_index: u32,
    fwmark: Option<u32>,
    external: watch::Sender<Option<SocketAddrV4>>,
    looked: Option<Looked>,
    mapping: Option<Mapping>,
}

impl Keeper {
    async fn run(mut self, mut asks: mpsc::Receiver<Ask>, on: bool) {
        if !on {
            while asks.recv().await.is_some() {}
            return;
        }
        let mut next = Instant::now();
        loop {
            tokio::select! {
                ask = asks.recv() => match ask {
                    Some(Ask::Renew) => next = Instant::now(),
                    Some(Ask::Probe(reply)) => {
                        if let Some(router) = self.router().await {
                            // Whoever asked may have gone.
                            let _ = reply.send(self.look(router, true).await.found());
                        }
                    }
                    None => break,
                },
                () = sleep_until(next) => next = self.refresh().await,
            }
        }
        if let Some(mapping) = self.mapping.take() {
            give_back(mapping, self.port, self.fwmark).await;
        }
    }

    /// The router of the main routing table. Only private ones are asked: others belong to a provider.
    async fn router(&self) -> Option<Router> {
        let uplink = links::uplink_v4(self.tun_index, self.fwmark).await?;
        let (Some(IpAddr::V4(address)), Some(IpAddr::V4(own))) = (uplink.gateway, uplink.source) else {
            return None;
        };
        let private = address.is_private() || address.is_link_local() || interfaces::is_shared(address);
        private.then_some(Router { address, own, pcp_port: PCP_PORT })
    }

    /// What the router speaks: everything, or just what is needed to map.
    async fn look(&mut self, router: Router, everything: bool) -> &Looked {
        let now = Instant::now();
        let known = self.looked.take().filter(|looked| looked.is_fresh(router, now));
        let mut looked = match known {
            Some(looked) => looked,
            None => {
                let (pcp, pmp) = match pcp::Client::new(router, self.fwmark).await {
                    Ok(client) => {
                        // One after the other: both come from one socket.
                        let pcp = client.has_pcp().await;
                        (pcp, client.has_pmp().await)
                    }
                    Err(error) => {
                        tracing::debug!(%error, "PCP and NAT-PMP cannot be tried");
                        (false, false)
                    }
                };
                Looked { at: now, router, pcp, pmp, upnp: Upnp::Unknown }
            }
        };
        if matches!(looked.upnp, Upnp::Unknown) && (everything || !(looked.pcp || looked.pmp)) {
            looked.upnp = match upnp::find(router, self.fwmark).await {
                Ok(service) => Upnp::Present(service),
                Err(error) => {
                    tracing::debug!(%error, "no router that speaks UPnP");
                    Upnp::Absent
                }
            };
        }
        self.looked.insert(looked)
    }

    /// Makes or renews the mapping; gives when to do that again.
    async fn refresh(&mut self) -> Instant {
        let router = self.router().await;
        if let Some(old) = self.mapping.take_if(|mapping| Some(mapping.router) != router) {
            self.external.send_replace(None);
            tracing::info!(external = %old.external, "another router: the old port mapping is given up");
            let (port, fwmark) = (self.port, self.fwmark);
            tokio::spawn(async move { give_back(old, port, fwmark).await });
        }
        let Some(router) = router else { return Instant::now() + RETRY };
        let made = self.make(router).await;
        let now = Instant::now();
        if let Some((means, external, lifetime)) = made {
            let lifetime = lifetime.clamp(LEAST_LEASE, MOST_LEASE);
            self.mapping = Some(Mapping { router, means, external, until: now + lifetime });
            let changed = self.external.send_if_modified(|old| old.replace(external) != Some(external));
            if changed {
                tracing::info!(%external, router = %router.address, "the router maps a port to this node");
            }
            return now + lifetime / 2;
        }
        match &self.mapping {
            Some(mapping) if mapping.until > now => mapping.until.min(now + RENEW_RETRY),
            _ => {
                if self.mapping.take().is_some() {
                    tracing::info!("the router does not map a port to this node any more");
                    self.external.send_replace(None);
                }
                now + RETRY
            }
        }
    }

    /// Tries what the router speaks: what worked before, then PCP, NAT-PMP, UPnP.
    async fn make(&mut self, router: Router) -> Option<(Means, SocketAddrV4, Duration)> {
        let before = self.mapping.clone();
        let looked = self.look(router, false).await;
        let mut ways = Vec::new();
        let wish = before.as_ref().map(|mapping| mapping.external);
        ways.extend(before.map(|mapping| mapping.means));
        if looked.pcp {
            ways.push(Means::Pcp(random()));
        }
        if looked.pmp {
            ways.push(Means::Pmp);
        }
        if let Upnp::Present(service) = &looked.upnp {
            ways.push(Means::Upnp(service.clone()));
        }
        for means in ways {
            match self.map(router, &means, wish).await {
                Ok((external, lifetime)) if is_possible(*external.ip()) && external.port() != 0 => {
                    return Some((means, external, lifetime));
                }
                Ok((external, _)) => tracing::debug!(%external, ?means, "the router maps to nowhere"),
                Err(error) => tracing::debug!(%error, ?means, "no port mapping"),
            }
        }
        None
    }

    async fn map(
        &self,
        router: Router,
        means: &Means,
        wish: Option<SocketAddrV4>,
    ) -> Result<(SocketAddrV4, Duration), upnp::UpnpError> {
        let granted = match means {
            Means::Pcp(nonce) => {
                pcp::Client::new(router, self.fwmark).await?.map_pcp(nonce, self.port, wish).await?
            }
            Means::Pmp => pcp::Client::new(router, self.fwmark).await?.map_pmp(self.port, wish).await?,
            Means::Upnp(service) => {
                let wish = wish.map(|wish| wish.port());
                let port = service.map(router, self.fwmark, self.port, wish).await?;
                let ip = service.external_ip(self.fwmark).await?;
                return Ok((SocketAddrV4::new(ip, port), LEASE));
            }
        };
        Ok((granted.external, granted.lifetime))
    }
}

async fn give_back(mapping: Mapping, port: u16, fwmark: Option<u32>) {
    let Mapping { router, means, external, .. } = mapping;
    let giving = async {
        match &means {
            Means::Pcp(nonce) => pcp::Client::new(router, fwmark).await?.unmap_pcp(nonce, port).await?,
            Means::Pmp => pcp::Client::new(router, fwmark).await?.unmap_pmp(port).await?,
            Means::Upnp(service) => service.unmap(fwmark, external.port()).await?,
        }
        Ok::<_, upnp::UpnpError>(())
    };
    match timeout(RELEASE, giving).await {
        Ok(Ok(())) => tracing::debug!(%external, "the port mapping is given back"),
        Ok(Err(error)) => tracing::debug!(%external, %error, "the port mapping ends by itself"),
        Err(_) => tracing::debug!(%external, "the port mapping ends by itself: the router does not answer"),
    }
}

/// Can it be the far side of a router? A private one can: of the inner of two.
fn is_possible(ip: Ipv4Addr) -> bool {
    !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast() && !ip.is_broadcast()
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the system gives randomness");
    bytes
}

/// One that no well-known service has.
fn random_port() -> u16 {
    1024 + u16::from_le_bytes(random()) % (u16::MAX - 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTER: Router = Router {
        address: Ipv4Addr::new(192, 168, 1, 1),
        own: Ipv4Addr::new(192, 168, 1, 7),
        pcp_port: PCP_PORT,
    };

    #[tokio::test]
    async fn what_is_off_asks_nothing_and_answers_nothing() {
        let map = PortMap::start(41641, 0, None, false);
        assert!(map.probe().await.is_err());
        map.renew();
        assert_eq!(*map.external().borrow(), None);
        map.close().await;
    }

    #[tokio::test]
    async fn what_was_found_is_believed_longer_than_what_was_not() {
        let at = Instant::now();
        let looked = |pcp| Looked { at, router: ROUTER, pcp, pmp: false, upnp: Upnp::Unknown };
        let later = |time| at + time;
        assert!(looked(true).is_fresh(ROUTER, later(DISTRUST)));
        assert!(!looked(true).is_fresh(ROUTER, later(TRUST)));
        assert!(!looked(false).is_fresh(ROUTER, later(DISTRUST)));
        let other = Router { own: Ipv4Addr::new(192, 168, 1, 8), ..ROUTER };
        assert!(!looked(true).is_fresh(other, at));
    }

    #[test]
    fn random_ports_are_for_anybody() {
        assert!((0..1000).all(|_| random_port() >= 1024));
    }
}
