//! `resolvconf`, Debian's or openresolv: a record of ours beside those of other programs.

use std::fmt::Write as _;
use std::process::Stdio;

use lacis_dns::OsDns;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::resolver::{ResolverError, in_path};

#[derive(Debug)]
pub(super) struct Resolvconf {
    /// openresolv knows exclusive records and priorities.
    openresolv: bool,
    record: String,
    set: bool,
}

impl Resolvconf {
    pub(super) fn find(tun_name: &str) -> Option<Self> {
        if !in_path("resolvconf") {
            return None;
        }
        let version = std::process::Command::new("resolvconf").arg("--version").stdin(Stdio::null()).output();
        let openresolv = version.is_ok_and(|output| output.stdout.starts_with(b"openresolv"));
        let record = if openresolv { tun_name.to_owned() } else { format!("tun-{tun_name}.inet") };
        Some(Self { openresolv, record, set: false })
    }

    pub(super) async fn set(&mut self, dns: &OsDns) -> Result<(), ResolverError> {
        let mut text = String::new();
        for server in &dns.servers {
            let _ = writeln!(text, "nameserver {server}");
        }
        if !dns.search.is_empty() {
            let _ = writeln!(text, "search {}", dns.search.join(" "));
        }
        let arguments: &[&str] = if self.openresolv { &["-m", "0", "-x", "-a"] } else { &["-a"] };
        run(arguments, &self.record, &text).await?;
        self.set = true;
        Ok(())
    }

    pub(super) async fn revert(&mut self) -> Result<(), ResolverError> {
        if !std::mem::take(&mut self.set) {
            return Ok(());
        }
        let arguments: &[&str] = if self.openresolv { &["-f", "-d"] } else { &["-d"] };
        run(arguments, &self.record, "").await
    }
}

async fn run(arguments: &[&str], record: &str, input: &str) -> Result<(), ResolverError> {
    let failed = |error: std::io::Error| ResolverError::Resolvconf(error.to_string());
    let mut child = Command::new("resolvconf")
        .args(arguments)
        .arg(record)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
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
