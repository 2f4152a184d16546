//! systemd-resolved, over D-Bus: the device gets servers and domains of its own, the rest of the host stays.

use std::net::IpAddr;
use std::time::Duration;

use lacis_dns::OsDns;
use zbus::Connection;

use super::resolver::ResolverError;

const SERVICE: &str = "org.freedesktop.resolve1";
const PATH: &str = "/org/freedesktop/resolve1";
const INTERFACE: &str = "org.freedesktop.resolve1.Manager";
/// It answers at once or not at all.
const LIMIT: Duration = Duration::from_secs(2);
/// The error of a list that is too long.
const TOO_MANY: &str = "System.Error.E2BIG";
const INET: i32 = 2;
const INET6: i32 = 10;

#[derive(Debug)]
pub(super) struct Resolved {
    bus: Connection,
    /// The device that was set.
    link: Option<i32>,
    /// Its name on the bus when it was told everything. After a restart it has another, and may have forgotten.
    told: Option<String>,
}

impl Resolved {
    pub(super) async fn connect() -> Result<Self, ResolverError> {
        let connected = tokio::time::timeout(LIMIT, async {
            let bus = Connection::system().await?;
            bus.call_method(Some(SERVICE), PATH, Some("org.freedesktop.DBus.Peer"), "Ping", &()).await?;
            Ok::<_, zbus::Error>(bus)
        });
        let bus = connected.await.map_err(|_| late())??;
        Ok(Self { bus, link: None, told: None })
    }

    async fn call<B>(&self, method: &str, body: &B) -> Result<(), ResolverError>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType,
    {
        let call = self.bus.call_method(Some(SERVICE), PATH, Some(INTERFACE), method, body);
        tokio::time::timeout(LIMIT, call).await.map_err(|_| late())??;
        Ok(())
    }

    pub(super) async fn set(&mut self, index: u32, dns: &OsDns) -> Result<(), ResolverError> {
        self.link = Some(index as i32);
        self.tell(index as i32, dns).await
    }

    async fn tell(&mut self, link: i32, dns: &OsDns) -> Result<(), ResolverError> {
        self.told = None;
        // First, so that a restart during what follows is noticed. One that is stopped is started by what follows.
        let owner = self.owner().await.ok();
        let servers: Vec<(i32, Vec<u8>)> = dns
            .servers
            .iter()
            .map(|ip| match ip {
                IpAddr::V4(ip) => (INET, ip.octets().to_vec()),
                IpAddr::V6(ip) => (INET6, ip.octets().to_vec()),
            })
            .collect();
        // Searched ones, then those that only lead here; "." is everything.
        let mut domains: Vec<(String, bool)> =
            dns.search.iter().map(|domain| (domain.clone(), false)).collect();
        let only_routed = dns.match_domains.iter().filter(|domain| !dns.search.contains(domain));
        domains.extend(only_routed.map(|domain| (domain.clone(), true)));
        let takes_all = dns.match_domains.is_empty() && !dns.servers.is_empty();
        if takes_all {
            domains.push((".".to_owned(), true));
        }
        self.call("SetLinkDNS", &(link, servers)).await?;
        match self.call("SetLinkDomains", &(link, &domains)).await {
            // Old versions take few domains. Reverse zones are many, and the first that can be missed.
            Err(ResolverError::Bus(zbus::Error::MethodError(name, ..))) if name == TOO_MANY => {
                domains.retain(|(domain, _)| domain.rsplit('.').next() != Some("arpa"));
                self.call("SetLinkDomains", &(link, &domains)).await?;
            }
            other => other?,
        }
        self.call("SetLinkDefaultRoute", &(link, takes_all)).await?;
        for method in ["SetLinkLLMNR", "SetLinkMulticastDNS", "SetLinkDNSSEC", "SetLinkDNSOverTLS"] {
            // Older versions do not know all of them.
            if let Err(error) = self.call(method, &(link, "no")).await {
                tracing::debug!(%error, method);
            }
        }
        self.call("FlushCaches", &()).await?;
        self.told = owner;
        Ok(())
    }

    /// Who has the service's name on the bus now. Asking the bus itself does not start the service.
    async fn owner(&self) -> Result<String, ResolverError> {
        let bus = "org.freedesktop.DBus";
        let call =
            self.bus.call_method(Some(bus), "/org/freedesktop/DBus", Some(bus), "GetNameOwner", &(SERVICE,));
        let reply = tokio::time::timeout(LIMIT, call).await.map_err(|_| late())??;
        Ok(reply.body().deserialize()?)
    }

    /// Says everything again to a service that was restarted. One that is not there is told when it is back.
    pub(super) async fn repair(&mut self, dns: &OsDns) -> Result<(), ResolverError> {
        let Some(link) = self.link else { return Ok(()) };
        match self.owner().await {
            Ok(owner) if self.told.as_ref() != Some(&owner) => {}
            _ => return Ok(()),
        }
        tracing::info!("systemd-resolved was restarted; it is set up for the mesh again");
        self.tell(link, dns).await
    }

    pub(super) async fn revert(&mut self) -> Result<(), ResolverError> {
        match self.link.take() {
            Some(link) => self.call("RevertLink", &(link,)).await,
            None => Ok(()),
        }
    }
}

fn late() -> ResolverError {
    ResolverError::Bus(zbus::Error::Failure("no answer".to_owned()))
}
