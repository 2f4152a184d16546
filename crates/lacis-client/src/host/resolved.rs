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
const INET: i32 = 2;
const INET6: i32 = 10;

#[derive(Debug)]
pub(super) struct Resolved {
    bus: Connection,
    /// The device that was set.
    link: Option<i32>,
}

impl Resolved {
    pub(super) async fn connect() -> Result<Self, ResolverError> {
        let connected = tokio::time::timeout(LIMIT, async {
            let bus = Connection::system().await?;
            bus.call_method(Some(SERVICE), PATH, Some("org.freedesktop.DBus.Peer"), "Ping", &()).await?;
            Ok::<_, zbus::Error>(bus)
        });
        let bus = connected.await.map_err(|_| late())??;
        Ok(Self { bus, link: None })
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
        let link = index as i32;
        self.link = Some(link);
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
        self.call("SetLinkDomains", &(link, domains)).await?;
        self.call("SetLinkDefaultRoute", &(link, takes_all)).await?;
        for method in ["SetLinkLLMNR", "SetLinkMulticastDNS", "SetLinkDNSSEC", "SetLinkDNSOverTLS"] {
            // Older versions do not know all of them.
            if let Err(error) = self.call(method, &(link, "no")).await {
                tracing::debug!(%error, method);
            }
        }
        self.call("FlushCaches", &()).await
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
