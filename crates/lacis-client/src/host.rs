//! What the daemon changes on its host: addresses of the device, a routing table with the rules that lead to it, tables
//! of the firewall, and the resolver. [`Host::apply`] compares what should be with what the kernel has and changes the difference;
//! [`Host::revert`] leaves nothing behind (the client dossier, sections 2, 3, 4 and 10).

mod direct;
mod firewall;
pub(crate) mod forwarding;
mod monitor;
mod network;
mod nft;
mod repairs;
mod resolv_conf;
mod resolvconf;
mod resolved;
mod resolver;
mod rules;
mod watch;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use lacis_dns::OsDns;
use tokio::sync::Notify;

pub use firewall::{Firewall, Mode};
use network::Network;
use nft::Nft;
use resolver::OsResolver;
pub(crate) use watch::FileWatch;

const VALID_MARK: &str = "/proc/sys/net/ipv4/conf/all/src_valid_mark";

/// How to reach the parts of the host.
#[derive(Clone, Debug)]
pub struct HostOptions {
    pub tun_name: String,
    /// The mark of the daemon's own packets, and the bits of it that count.
    pub fwmark: u32,
    pub fwmark_mask: u32,
    pub table: u32,
    /// The table that refuses what should leave by an exit node, and would not.
    pub guard_table: u32,
    /// The MTU that the tunnel gives its device.
    pub mtu: u32,
    pub resolv_conf: PathBuf,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            tun_name: "lacis0".to_owned(),
            fwmark: 0x80000,
            fwmark_mask: 0xff_0000,
            table: 52,
            guard_table: 5252,
            mtu: lacis_tunnel::DEFAULT_MTU.into(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
        }
    }
}

/// What the host should look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    pub addresses: Vec<IpNet>,
    pub routes: Routes,
    pub firewall: Firewall,
    /// `None`: the host's resolver is left as it is.
    pub dns: Option<OsDns>,
}

/// The contents of the mesh's routing table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// Destinations that lead into the device.
    pub device: Vec<IpNet>,
    /// Destinations for which the host's other tables are asked, whatever leads into the device.
    pub thrown: Vec<IpNet>,
    /// An exit node is in use: what does not leave by the device, and is not thrown, does not leave.
    pub guard: bool,
}

/// What was done, as far as somebody should know.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What did not work and does not stop the rest.
    pub warnings: Vec<String>,
    /// What the host itself lacks, or other programs have done to it, and how to mend it.
    pub missing: Vec<String>,
    /// Changes made to addresses, routes, rules and the firewall.
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
    #[error("the device {name} is called {now} now: `ip link set {now} name {name}`")]
    Renamed { name: String, now: String },
}

/// Has a running daemon opened the device?
///
/// # Errors
/// When netlink is out of reach.
pub async fn is_in_use(options: &HostOptions) -> Result<bool, HostError> {
    Ok(Network::open(options.clone())?.is_in_use().await)
}

/// The host.
#[derive(Debug)]
pub struct Host {
    network: Network,
    firewall: Nft,
    resolver: OsResolver,
    device: String,
    applied: Option<HostState>,
    /// What it lacks, without its resolver.
    missing: Vec<String>,
    /// What the resolver was told, with success.
    told: Option<OsDns>,
    /// The firewall is not as it should be, and that was said where it is of no great harm.
    said_unguarded: bool,
    /// The daemon has made marks count in reverse-path filters.
    set_valid_mark: bool,
}

impl Host {
    /// Looks around. What a daemon that was killed has left stays until it is known what is wanted, so that an exit
    /// node's guard has no gap; only the resolver is put back.
    ///
    /// # Errors
    /// When netlink is out of reach.
    pub async fn new(options: HostOptions) -> Result<Self, HostError> {
        let resolver = OsResolver::detect(&options).await;
        tracing::info!(resolver = resolver.name(), "this host's resolver");
        let firewall = Nft::new(&options.tun_name, options.fwmark, options.fwmark_mask);
        let set_valid_mark = firewall.has_set_valid_mark().await;
        Ok(Self {
            device: options.tun_name.clone(),
            network: Network::open(options)?,
            firewall,
            resolver,
            applied: None,
            missing: Vec::new(),
            told: None,
            said_unguarded: false,
            set_valid_mark,
        })
    }

    /// The tunnel has opened the device with this index. The notification is sent whenever another program may have
    /// changed what is ours; then it is time to [`Host::repair`].
    pub fn watch(&mut self, device: u32) -> Arc<Notify> {
        self.network.watch(device, self.firewall.table())
    }

    /// Makes the host look like this. Doing it twice changes nothing.
    ///
    /// # Errors
    /// When addresses, routes or rules cannot be set; the rest is done nevertheless. What fails of the firewall and
    /// the resolver is a warning.
    pub async fn apply(&mut self, state: &HostState) -> Result<Report, HostError> {
        self.applied = Some(state.clone());
        self.follow(state).await
    }

    async fn follow(&mut self, state: &HostState) -> Result<Report, HostError> {
        let mut done = self.apply_network(state).await;
        let mut lost = Report::default();
        self.follow_resolver(state.dns.as_ref(), done.as_mut().unwrap_or(&mut lost)).await;
        done
    }

    async fn apply_network(&mut self, state: &HostState) -> Result<Report, HostError> {
        let network = self.network.apply(&state.addresses, &state.routes).await;
        let mut report = Report::default();
        self.guard(state, &mut report).await;
        let network = network?;
        report.changes += network.changes;
        self.missing.extend(network.missing);
        Ok(report)
    }

    /// The firewall, and what else stands in the way of forwarded packets.
    async fn guard(&mut self, state: &HostState, report: &mut Report) {
        let mut wish = state.firewall.clone();
        if wish.guard.is_some() && wish.mode != Mode::Off {
            wish.neighbours = self.network.neighbours().await;
            wish.bridges = forwarding::filtered_bridges();
        }
        let marks_count = || std::fs::read_to_string(VALID_MARK).is_ok_and(|text| text.trim() != "0");
        wish.sets_valid_mark = wish.needs_valid_mark() && (self.set_valid_mark || !marks_count());
        let applied = match self.firewall.apply(&wish).await {
            Ok(changed) => {
                report.changes += usize::from(changed);
                self.said_unguarded = false;
                wish.mode != Mode::Off
            }
            Err(error) => {
                let text = format!("this host's firewall is not set up for the mesh: {error}");
                if wish.is_needed() {
                    report.warnings.push(text);
                } else if !std::mem::replace(&mut self.said_unguarded, true) {
                    tracing::warn!("{text}");
                }
                false
            }
        };
        let marks_kept = applied && wish.keep_marks;
        if !wish.needs_valid_mark() {
            self.put_valid_mark_back();
        } else if marks_kept && wish.sets_valid_mark && !marks_count() {
            self.set_valid_mark = write_valid_mark("1");
        }
        self.missing = self.missing(state, marks_kept).await;
    }

    fn put_valid_mark_back(&mut self) {
        if std::mem::take(&mut self.set_valid_mark) {
            write_valid_mark("0");
        }
    }

    /// What the host lacks, in words.
    async fn missing(&mut self, state: &HostState, marks_kept: bool) -> Vec<String> {
        let wish = &state.firewall;
        let mut missing = Vec::new();
        if !wish.routed.is_empty() {
            let (v4, v6) = (wish.routes(false), wish.routes(true));
            missing.extend(forwarding::switched_off(v4, v6, forwarding::read_sysctl));
            let drops = self.firewall.forward_drops().await;
            missing.extend(forwarding::dropped(&self.device, v4, v6, drops));
            if wish.mode != Mode::Off && wish.masquerade && v6 && !self.firewall.has_nat6() {
                missing.push(
                    "this kernel does not masquerade IPv6: networks that are routed need a way back to the mesh's addresses"
                        .to_owned(),
                );
            }
        }
        if state.routes.device.iter().any(|net| net.prefix_len() == 0) {
            let devices = forwarding::devices();
            let read = forwarding::read_sysctl;
            missing.extend(forwarding::reverse_path(&self.device, marks_kept, &devices, read));
        }
        missing
    }

    /// Sets the host's resolver, or repairs it where it was set so.
    async fn follow_resolver(&mut self, dns: Option<&OsDns>, report: &mut Report) {
        if let Err(error) = self.set_resolver(dns).await {
            report.warnings.push(format!("this host's resolver is not set up for the mesh: {error}"));
        }
        let complaint = dns.and_then(|_| self.resolver.complaint());
        report.missing = self.missing.iter().cloned().chain(complaint).collect();
    }

    async fn set_resolver(&mut self, dns: Option<&OsDns>) -> Result<(), String> {
        if self.told.as_ref() == dns {
            let Some(dns) = dns else { return Ok(()) };
            let repaired = self.resolver.repair(dns).await;
            if repaired.is_err() {
                // What is there is not known any more: the next attempt sets it again.
                self.told = Some(OsDns::default());
            }
            return repaired.map_err(|error| error.to_string());
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
    ///
    /// # Errors
    /// When addresses, routes or rules cannot be set; the rest is done nevertheless.
    pub async fn repair(&mut self) -> Result<Report, HostError> {
        let Some(state) = self.applied.clone() else { return Ok(Report::default()) };
        self.follow(&state).await
    }

    /// Follows a change of the files that say whom programs of this host ask, and only that.
    pub async fn repair_resolver(&mut self) -> Report {
        let mut report = Report::default();
        if let Some(state) = self.applied.clone() {
            self.follow_resolver(state.dns.as_ref(), &mut report).await;
        }
        report
    }

    /// Notices such changes from now on.
    pub(crate) fn watch_resolver(&self) -> FileWatch {
        FileWatch::new(&self.resolver.files())
    }

    /// When the resolver is to be looked at again without any change.
    pub(crate) fn resolver_due(&self) -> Option<Instant> {
        self.applied.as_ref().and_then(|_| self.resolver.due())
    }

    /// Undoes everything, also what an earlier daemon has left. Goes on whatever fails.
    pub async fn revert(&mut self) {
        self.applied = None;
        self.missing.clear();
        self.told = None;
        if let Err(error) = self.resolver.revert().await {
            tracing::warn!(%error, "this host's resolver is not as it was");
        }
        self.network.revert().await;
        self.put_valid_mark_back();
        self.firewall.clean().await;
    }

    /// The daemon has failed and will be started again: as [`Host::revert`], unless an exit node is in use. Then all
    /// stays, and nothing leaves beside it meanwhile.
    pub async fn abandon(&mut self) {
        if self.applied.as_ref().is_some_and(|state| state.routes.guard) {
            tracing::warn!(
                "an exit node is in use: nothing leaves this host until lacisd runs again, or `lacisd --cleanup` has put it back"
            );
        } else {
            self.revert().await;
        }
    }

    /// The resolvers that the host has without us.
    pub fn base_resolvers(&self) -> Vec<SocketAddr> {
        self.resolver.base_resolvers()
    }
}

/// Whether reverse-path filters see marks. Returns whether that could be set.
fn write_valid_mark(value: &str) -> bool {
    let done = std::fs::write(VALID_MARK, value);
    if let Err(error) = &done {
        // Of no consequence unless a filter is strict, and then the user is told what to do.
        tracing::debug!(%error, "{VALID_MARK} cannot be set to {value}");
    }
    done.is_ok()
}
