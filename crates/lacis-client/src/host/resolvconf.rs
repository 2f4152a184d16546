//! `resolvconf`, Debian's or openresolv: a record of ours beside those of other programs.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use lacis_dns::OsDns;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::resolver::{ResolverError, in_path};

/// It runs hooks of other programs, which may restart theirs.
const LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Resolvconf {
    /// openresolv knows exclusive records and priorities.
    openresolv: bool,
    record: String,
    set: bool,
    /// The servers that the host had before our record, which alone counts while it is there.
    before: Vec<SocketAddr>,
}

impl Resolvconf {
    pub(super) fn find(tun_name: &str) -> Option<Self> {
        if !in_path("resolvconf") {
            return None;
        }
        let version = std::process::Command::new("resolvconf").arg("--version").stdin(Stdio::null()).output();
        let openresolv = version.is_ok_and(|output| output.stdout.starts_with(b"openresolv"));
        let record = if openresolv { tun_name.to_owned() } else { format!("tun-{tun_name}.inet") };
        Some(Self { openresolv, record, set: false, before: Vec::new() })
    }

    /// Removes the record that a daemon that crashed left.
    pub(super) async fn recover(&mut self) {
        if let Err(error) = self.remove().await {
            // Debian's complains of a record that is not there.
            tracing::debug!(%error, "there is no old record to remove");
        }
    }

    /// The servers of the host without us, given those that its configuration names now.
    pub(super) fn base_resolvers(&self, now: Vec<SocketAddr>) -> Vec<SocketAddr> {
        if self.set && now.is_empty() { self.before.clone() } else { now }
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
        let arguments: &[&str] = if self.openresolv { &["-m", "0", "-x", "-a"] } else { &["-a"] };
        // Said before it is done: a record that was made and not answered for is removed all the same.
        self.set = true;
        run(arguments, &self.record, &text).await
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

    #[test]
    fn the_servers_before_us_are_known_while_only_ours_are_named() {
        let before: SocketAddr = "192.0.2.1:53".parse().unwrap();
        let other: SocketAddr = "192.0.2.2:53".parse().unwrap();
        let mut resolvconf =
            Resolvconf { openresolv: true, record: "x".into(), set: false, before: vec![before] };
        assert!(resolvconf.base_resolvers(Vec::new()).is_empty());
        resolvconf.set = true;
        assert_eq!(resolvconf.base_resolvers(Vec::new()), [before]);
        assert_eq!(resolvconf.base_resolvers(vec![other]), [other]);
    }
}
