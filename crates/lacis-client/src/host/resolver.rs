//! What programs of this host ask for names, and how to have it ask us: systemd-resolved, resolvconf, or the file
//! `/etc/resolv.conf`. It may be another after each change of that file, so it is looked at again each time.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Instant;

use lacis_dns::OsDns;

use super::HostOptions;
use super::direct::Direct;
use super::repairs::Repairs;
use super::resolv_conf;
use super::resolvconf::Resolvconf;
use super::resolved::Resolved;

/// Where systemd-resolved listens.
const STUBS: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(127, 0, 0, 54)];
const NSSWITCH: &str = "/etc/nsswitch.conf";

/// This host's resolver.
#[derive(Debug)]
pub(super) struct OsResolver {
    options: HostOptions,
    direct: Direct,
    way: Way,
    /// The mesh's device, once it was set.
    index: u32,
    /// Paces the changes from one way to another.
    switches: Repairs,
}

/// The ways there are.
#[derive(Debug)]
enum Way {
    Resolved(Resolved),
    Resolvconf(Resolvconf),
    Direct,
}

/// Why the resolver could not be set.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResolverError {
    #[error("{doing} failed: {source}")]
    File { doing: String, source: io::Error },
    #[error(
        "{} was written by an earlier lacisd, and what was there before is missing from it: write one with a line `nameserver ADDRESS`",
        .0.display()
    )]
    Incomplete(PathBuf),
    #[error("systemd-resolved: {0}")]
    Bus(#[from] zbus::Error),
    #[error("resolvconf failed: {0}")]
    Resolvconf(String),
}

/// What programs ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Resolved,
    Resolvconf,
    File,
}

/// Decides it from the texts of `/etc/resolv.conf` and `/etc/nsswitch.conf`.
///
/// The first server is asked, the others stand in for it. systemd-resolved's list of uplinks names servers that are not
/// its own: programs ask it only where the C library does so without the file (nss-resolve).
fn asked(resolv_conf: &str, nsswitch: &str) -> Asked {
    let stub = |ip| matches!(ip, IpAddr::V4(ip) if STUBS.contains(&ip));
    let owner = resolv_conf::owner(resolv_conf);
    if resolv_conf::first_server(resolv_conf).is_some_and(stub)
        || owner == "systemd-resolved" && resolve_is_first(nsswitch)
    {
        return Asked::Resolved;
    }
    if owner == "resolvconf" { Asked::Resolvconf } else { Asked::File }
}

/// Is `resolve` asked for host names before `dns` (nsswitch.conf(5))?
fn resolve_is_first(nsswitch: &str) -> bool {
    let hosts = nsswitch.lines().filter_map(|line| line.trim().strip_prefix("hosts:")).next_back();
    let services = hosts.unwrap_or_default().split('#').next().unwrap_or_default();
    services.split_ascii_whitespace().find(|word| ["resolve", "dns"].contains(word)) == Some("resolve")
}

impl OsResolver {
    pub(super) async fn detect(options: &HostOptions) -> Self {
        let mut direct = Direct::new(&options.resolv_conf);
        direct.recover();
        let (options, switches) = (options.clone(), Repairs::default());
        let mut resolver = Self { options, direct, way: Way::Direct, index: 0, switches };
        if let Some(way) = resolver.other_way().await {
            resolver.way = way;
        }
        if let Way::Resolvconf(resolvconf) = &mut resolver.way {
            resolvconf.recover().await;
        }
        resolver
    }

    pub(super) fn name(&self) -> &'static str {
        match self.way {
            Way::Resolved(_) => "systemd-resolved",
            Way::Resolvconf(_) => "resolvconf",
            Way::Direct => "resolv.conf",
        }
    }

    /// The way that is right now, if it is another.
    async fn other_way(&self) -> Option<Way> {
        let nsswitch = std::fs::read_to_string(NSSWITCH).unwrap_or_default();
        match asked(&self.direct.in_force(), &nsswitch) {
            Asked::Resolved if matches!(self.way, Way::Resolved(_)) => return None,
            Asked::Resolved => match Resolved::connect().await {
                Ok(resolved) => return Some(Way::Resolved(resolved)),
                // It is asked again with each look, and need not be there: containers of one network share it.
                Err(error) => tracing::debug!(%error, "programs ask systemd-resolved, which does not answer"),
            },
            Asked::Resolvconf if matches!(self.way, Way::Resolvconf(_)) => return None,
            Asked::Resolvconf => {
                if let Some(resolvconf) = Resolvconf::find(&self.options.tun_name) {
                    return Some(Way::Resolvconf(resolvconf));
                }
            }
            Asked::File => {}
        }
        (!matches!(self.way, Way::Direct)).then_some(Way::Direct)
    }

    /// Takes the way that is right now. Returns whether it is another than before.
    async fn switch(&mut self) -> bool {
        let Some(way) = self.other_way().await else {
            self.switches.stands();
            return false;
        };
        let now = Instant::now();
        if !self.switches.is_due(now) {
            return false;
        }
        self.switches.wrote(now);
        if let Err(error) = self.revert().await {
            tracing::warn!(%error, "what was set before is not put back");
        }
        self.way = way;
        tracing::info!(resolver = self.name(), "programs of this host ask another resolver than before");
        true
    }

    /// `index`: of the mesh's device.
    pub(super) async fn set(&mut self, index: u32, dns: &OsDns) -> Result<(), ResolverError> {
        self.index = index;
        self.switch().await;
        self.set_here(dns).await
    }

    async fn set_here(&mut self, dns: &OsDns) -> Result<(), ResolverError> {
        match &mut self.way {
            Way::Resolved(resolved) => resolved.set(self.index, dns).await,
            Way::Resolvconf(resolvconf) => resolvconf.set(dns, self.direct.base_resolvers()).await,
            Way::Direct => self.direct.set(dns),
        }
    }

    pub(super) async fn revert(&mut self) -> Result<(), ResolverError> {
        match &mut self.way {
            Way::Resolved(resolved) => resolved.revert().await,
            Way::Resolvconf(resolvconf) => resolvconf.revert().await,
            Way::Direct => self.direct.revert(),
        }
    }

    /// Sets it again if another program wrote over it, the service was restarted, or programs ask another one.
    pub(super) async fn repair(&mut self, dns: &OsDns) -> Result<(), ResolverError> {
        if self.switch().await {
            return self.set_here(dns).await;
        }
        match &mut self.way {
            Way::Resolved(resolved) => resolved.repair(dns).await,
            Way::Resolvconf(resolvconf) => resolvconf.repair(dns, &self.direct.in_force()).await,
            Way::Direct => self.direct.repair(dns),
        }
    }

    /// When to look again, whatever happens.
    pub(super) fn due(&self) -> Option<Instant> {
        let due = match &self.way {
            Way::Resolved(resolved) => resolved.due(),
            Way::Resolvconf(resolvconf) => resolvconf.due(),
            Way::Direct => self.direct.due(),
        };
        due.into_iter().chain(self.switches.due()).min()
    }

    /// What the user should know of other programs.
    pub(super) fn complaint(&self) -> Option<String> {
        match &self.way {
            Way::Resolved(resolved) => resolved.complaint(),
            Way::Resolvconf(resolvconf) => resolvconf.complaint(),
            Way::Direct => self.direct.complaint(),
        }
    }

    /// Files that say who is asked, and which servers the host has without us.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let mut files = self.direct.files();
        files.push(NSSWITCH.into());
        files.push(super::resolved::FOLDER.into());
        if let Way::Resolvconf(resolvconf) = &self.way {
            files.extend(resolvconf.records().map(Path::to_owned));
        }
        files
    }

    pub(super) fn base_resolvers(&self) -> Vec<SocketAddr> {
        match &self.way {
            Way::Resolved(_) => Resolved::base_resolvers(),
            Way::Resolvconf(resolvconf) => resolvconf.base_resolvers(self.direct.base_resolvers()),
            Way::Direct => self.direct.base_resolvers(),
        }
    }
}

/// Where a program is that is run by its name.
pub(super) fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    std::env::split_paths(&path).any(|folder: PathBuf| Path::new(&folder).join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STUB: &str = "# This is /run/systemd/resolve/stub-resolv.conf managed by man:systemd-resolved(8).\n\
                        nameserver 127.0.0.53\noptions edns0 trust-ad\n";
    const UPLINKS: &str = "# This is /run/systemd/resolve/resolv.conf managed by man:systemd-resolved(8).\n\
                           nameserver 192.168.1.1\n";
    const DNS: &str = "passwd: files systemd\nhosts: files dns\n";
    const RESOLVE: &str = "hosts:  mymachines resolve [!UNAVAIL=return] files myhostname dns # dns\n";

    #[test]
    fn what_programs_ask_decides() {
        for (resolv_conf, nsswitch, expected) in [
            (STUB, DNS, Asked::Resolved),
            (STUB, RESOLVE, Asked::Resolved),
            (UPLINKS, RESOLVE, Asked::Resolved),
            // Its comments name it, and nobody asks it.
            (UPLINKS, DNS, Asked::File),
            (UPLINKS, "", Asked::File),
            (UPLINKS, "hosts: files dns resolve\n", Asked::File),
            // It is asked, whoever wrote that.
            ("nameserver 127.0.0.53\n", DNS, Asked::Resolved),
            ("# Generated by NetworkManager\nnameserver 127.0.0.54\n", "", Asked::Resolved),
            ("nameserver 192.168.1.1\nnameserver 127.0.0.53\n", DNS, Asked::File),
            // It reads the file itself there: what is in the file serves both.
            ("# Generated by NetworkManager\nnameserver 192.168.1.1\n", RESOLVE, Asked::File),
            ("# Generated by resolvconf\nnameserver 192.168.1.1\n", DNS, Asked::Resolvconf),
            ("# Generated by resolvconf\nnameserver 127.0.0.53\n", DNS, Asked::Resolved),
            ("", "", Asked::File),
        ] {
            assert_eq!(asked(resolv_conf, nsswitch), expected, "{resolv_conf:?} with {nsswitch:?}");
        }
    }
}
