//! `resolvconf`, Debian's or openresolv: a record of ours beside those of other programs.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use lacis_dns::OsDns;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::repairs::Repairs;
use super::resolv_conf;
use super::resolver::{ResolverError, in_path};

/// It runs hooks of other programs, which may restart theirs.
const LIMIT: Duration = Duration::from_secs(10);
/// Where the records are: Debian's, those of openresolv since 3.14, and before.
const RECORDS: [&str; 3] =
    ["/run/resolvconf/interface", "/run/resolvconf/keys", "/run/resolvconf/interfaces"];

#[derive(Debug)]
pub(super) struct Resolvconf {
    /// openresolv knows exclusive records and priorities.
    openresolv: bool,
    record: String,
    set: bool,
    /// The servers that the host had before our record, which alone counts while it is there.
    before: Vec<SocketAddr>,
    records: [PathBuf; 3],
    repairs: Repairs,
}

impl Resolvconf {
    pub(super) fn find(tun_name: &str) -> Option<Self> {
        if !in_path("resolvconf") {
            return None;
        }
        let version = std::process::Command::new("resolvconf").arg("--version").stdin(Stdio::null()).output();
        let version = version.map(|output| output.stdout).unwrap_or_default();
        if version.starts_with(b"systemd") {
            // Another name of resolvectl, which knows devices and no records.
            return None;
        }
        let openresolv = version.starts_with(b"openresolv");
        let record = if openresolv { tun_name.to_owned() } else { format!("tun-{tun_name}.inet") };
        let (records, repairs) = (RECORDS.map(PathBuf::from), Repairs::default());
        Some(Self { openresolv, record, set: false, before: Vec::new(), records, repairs })
    }

    /// Removes the record that a daemon that crashed left.
    pub(super) async fn recover(&mut self) {
        if let Err(error) = self.remove().await {
            // Debian's complains of a record that is not there.
            tracing::debug!(%error, "there is no old record to remove");
        }
    }

    /// Where the records are.
    pub(super) fn records(&self) -> Option<&Path> {
        self.records.iter().map(PathBuf::as_path).find(|folder| folder.is_dir())
    }

    /// The servers of the host without us: those of other programs' records, also of those that ours outdoes; or else of
    /// its file, given those that this names now.
    pub(super) fn base_resolvers(&self, now: Vec<SocketAddr>) -> Vec<SocketAddr> {
        let others = self.other_records();
        if !others.is_empty() {
            return others;
        }
        if self.set && now.is_empty() { self.before.clone() } else { now }
    }

    fn other_records(&self) -> Vec<SocketAddr> {
        let entries = self.records().and_then(|folder| std::fs::read_dir(folder).ok());
        let mut files: Vec<PathBuf> =
            entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        files.retain(|file| file.file_name().is_some_and(|name| name != self.record.as_str()));
        files.sort();
        let texts = files.iter().filter_map(|file| std::fs::read_to_string(file).ok());
        let mut servers = Vec::new();
        for server in texts.flat_map(|text| resolv_conf::servers(&text)) {
            if !servers.contains(&server) {
                servers.push(server);
            }
        }
        servers
    }

    /// `now`: the servers that the host's configuration names.
    pub(super) async fn set(&mut self, dns: &OsDns, now: Vec<SocketAddr>) -> Result<(), ResolverError> {
        if !self.set {
            self.before = now;
        }
        let mut text = String::new();
        for server in &dns.servers {
            let _ = writeln!(text, "nameserver {server}");
        }
        if !dns.search.is_empty() {
            let _ = writeln!(text, "search {}", dns.search.join(" "));
        }
        let arguments: &[&str] = match (self.openresolv, dns.servers.is_empty()) {
            (true, false) => &["-m", "0", "-x", "-a"],
            (true, true) => &["-m", "0", "-a"],
            (false, _) => &["-a"],
        };
        // Said before it is done: a record that was made and not answered for is removed all the same.
        self.set = true;
        self.repairs.wrote(Instant::now());
        run(arguments, &self.record, &text).await
    }

    /// Makes the record again where the host's file, which is of this text, does not go by it.
    pub(super) async fn repair(&mut self, dns: &OsDns, file: &str) -> Result<(), ResolverError> {
        // A resolver of the host itself is given our servers by a hook.
        let goes_by_it = |ip: std::net::IpAddr| dns.servers.contains(&ip) || ip.is_loopback();
        if dns.servers.is_empty() || resolv_conf::first_server(file).is_some_and(goes_by_it) {
            self.repairs.stands();
            return Ok(());
        }
        if !self.repairs.is_due(Instant::now()) {
            return Ok(());
        }
        tracing::info!(record = %self.record, "the host's resolv.conf does not go by our record; making it again");
        self.set(dns, resolv_conf::servers(file)).await
    }

    /// When to look again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.repairs.due()
    }

    /// What the user should know.
    pub(super) fn complaint(&self) -> Option<String> {
        self.repairs.insists(Instant::now()).then(|| {
            format!(
                "resolvconf has the record {} and the host's resolv.conf does not go by it: names of the mesh do not resolve. Another program writes that file, or resolvconf's configuration gives other records precedence",
                self.record
            )
        })
    }

    pub(super) async fn revert(&mut self) -> Result<(), ResolverError> {
        if !std::mem::take(&mut self.set) {
            return Ok(());
        }
        self.remove().await
    }

    async fn remove(&self) -> Result<(), ResolverError> {
        let arguments: &[&str] = if self.openresolv { &["-f", "-d"] } else { &["-d"] };
        run(arguments, &self.record, "").await
    }
}

async fn run(arguments: &[&str], record: &str, input: &str) -> Result<(), ResolverError> {
    let late = || ResolverError::Resolvconf(format!("no end after {} s", LIMIT.as_secs()));
    timeout(LIMIT, execute(arguments, record, input)).await.unwrap_or_else(|_| Err(late()))
}

async fn execute(arguments: &[&str], record: &str, input: &str) -> Result<(), ResolverError> {
    let failed = |error: std::io::Error| ResolverError::Resolvconf(error.to_string());
    let mut child = Command::new("resolvconf")
        .args(arguments)
        .arg(record)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await.map_err(failed)?;
    }
    let output = child.wait_with_output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    Err(ResolverError::Resolvconf(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolvconf(dir: &Path) -> Resolvconf {
        Resolvconf {
            openresolv: true,
            record: "lacis0".into(),
            set: false,
            before: vec!["192.0.2.1:53".parse().unwrap()],
            records: [dir.join("none"), dir.to_owned(), dir.join("none")],
            repairs: Repairs::default(),
        }
    }

    #[test]
    fn the_servers_before_us_are_known_while_only_ours_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut resolvconf = resolvconf(dir.path());
        let before = resolvconf.before.clone();
        let other: SocketAddr = "192.0.2.2:53".parse().unwrap();
        assert!(resolvconf.base_resolvers(Vec::new()).is_empty());
        resolvconf.set = true;
        assert_eq!(resolvconf.base_resolvers(Vec::new()), before);
        assert_eq!(resolvconf.base_resolvers(vec![other]), [other]);
    }

    #[test]
    fn records_of_other_programs_count_while_ours_alone_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let mut resolvconf = resolvconf(dir.path());
        resolvconf.set = true;
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("lacis0", "nameserver 100.100.100.100\n");
        write("eth0.dhcp", "nameserver 192.0.2.7\nnameserver fe80::1%lo\n");
        write("wlan0", "nameserver 192.0.2.7\nnameserver 192.0.2.8\n");
        let servers = |resolvconf: &Resolvconf| -> Vec<String> {
            resolvconf.base_resolvers(Vec::new()).iter().map(ToString::to_string).collect()
        };
        assert_eq!(servers(&resolvconf), ["192.0.2.7:53", "[fe80::1%1]:53", "192.0.2.8:53"]);
        write("eth0.dhcp", "nameserver 192.0.2.9\n");
        assert_eq!(servers(&resolvconf), ["192.0.2.9:53", "192.0.2.7:53", "192.0.2.8:53"]);
    }

    #[tokio::test]
    async fn a_file_that_goes_by_our_record_or_by_a_resolver_of_the_host_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut resolvconf = resolvconf(dir.path());
        let dns = OsDns { servers: vec![lacis_dns::QUAD100_V4.into()], ..OsDns::default() };
        for file in ["nameserver 100.100.100.100\nnameserver 192.0.2.1\n", "nameserver 127.0.0.1\n"] {
            resolvconf.repair(&dns, file).await.unwrap();
            assert!(!resolvconf.set, "{file}");
        }
    }
}
