//! What the daemon changes on its host: addresses of the device, a routing table with the rules that lead to it, and
//! the resolver. [`Host::apply`] compares what should be with what the kernel has and changes the difference;
//! [`Host::revert`] leaves nothing behind (the client dossier, sections 2, 4 and 10).

mod direct;
mod network;
mod resolvconf;
mod resolved;
mod resolver;

use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use lacis_dns::OsDns;

use network::Network;
use resolver::OsResolver;

/// How to reach the parts of the host.
#[derive(Clone, Debug)]
pub struct HostOptions {
    pub tun_name: String,
    /// The mark of the daemon's own packets, and the bits of it that count.
    pub fwmark: u32,
    pub fwmark_mask: u32,
    pub table: u32,
    /// Where the host's own resolver configuration is kept meanwhile.
    pub state_dir: PathBuf,
    pub resolv_conf: PathBuf,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            tun_name: "lacis0".to_owned(),
            fwmark: 0x80000,
            fwmark_mask: 0xff_0000,
            table: 52,
            state_dir: PathBuf::from("/var/lib/lacis"),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
        }
    }
}

/// What the host should look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    pub addresses: Vec<IpNet>,
    /// Destinations that lead into the device.
    pub routes: Vec<IpNet>,
    /// `None`: the host's resolver is left as it is.
    pub dns: Option<OsDns>,
}

/// What was done, as far as somebody should know.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What did not work and does not stop the rest.
    pub warnings: Vec<String>,
    /// Changes made to addresses, routes and rules.
    pub changes: usize,
}

/// Why the host cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("netlink cannot be opened: {0}")]
    Open(std::io::Error),
    #[error("{doing} failed: {source} (lacisd needs CAP_NET_ADMIN)")]
    Netlink { doing: String, source: rtnetlink::Error },
    #[error("there is no device {0}")]
    NoDevice(String),
}

/// The host.
#[derive(Debug)]
pub struct Host {
    network: Network,
    resolver: OsResolver,
    applied: Option<HostState>,
    /// What the resolver was told, with success.
    told: Option<OsDns>,
}

impl Host {
    /// Looks around; repairs what a daemon that crashed left behind.
    ///
    /// # Errors
    /// When netlink is out of reach.
    pub async fn new(options: HostOptions) -> Result<Self, HostError> {
        let resolver = OsResolver::detect(&options).await;
        tracing::info!(resolver = resolver.name(), "this host's resolver");
        Ok(Self { network: Network::open(options)?, resolver, applied: None, told: None })
    }

    /// Makes the host look like this. Doing it twice changes nothing.
    ///
    /// # Errors
    /// When addresses, routes or rules cannot be set. Trouble with the resolver is a warning.
    pub async fn apply(&mut self, state: &HostState) -> Result<Report, HostError> {
        let mut report = self.network.apply(&state.addresses, &state.routes).await?;
        if let Err(error) = self.tell_resolver(state.dns.as_ref()).await {
            report.warnings.push(format!("this host's resolver is not set up for the mesh: {error}"));
        }
        self.applied = Some(state.clone());
        Ok(report)
    }

    async fn tell_resolver(&mut self, dns: Option<&OsDns>) -> Result<(), String> {
        if self.told.as_ref() == dns {
            return Ok(());
        }
        let index = self.network.index().await.map_err(|error| error.to_string())?;
        // Until it is done, what is there is neither the old nor the new.
        self.told = Some(OsDns::default());
        let done = match dns {
            Some(dns) => self.resolver.set(index, dns).await,
            None => self.resolver.revert().await,
        };
        done.map_err(|error| error.to_string())?;
        self.told = dns.cloned();
        Ok(())
    }

    /// Puts back what other programs have changed meanwhile.
    pub async fn repair(&mut self) {
        let Some(state) = self.applied.clone() else { return };
        match self.network.apply(&state.addresses, &state.routes).await {
            Ok(report) if report.changes > 0 => {
                tracing::warn!(
                    changes = report.changes,
                    "another program had changed addresses, routes or rules"
                );
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "addresses, routes and rules are not as they should be"),
        }
        if let Some(dns) = &state.dns {
            self.resolver.repair(dns).await;
        }
    }

    /// Undoes everything. Goes on whatever fails: there is nobody left to ask.
    pub async fn revert(&mut self) {
        self.applied = None;
        self.told = None;
        if let Err(error) = self.resolver.revert().await {
            tracing::warn!(%error, "this host's resolver is not as it was");
        }
        self.network.revert().await;
    }

    /// The resolvers that the host has without us.
    pub fn base_resolvers(&self) -> Vec<SocketAddr> {
        self.resolver.base_resolvers()
    }
}
