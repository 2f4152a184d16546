//! The program `nft`, which puts the rules of [`super::firewall`] into the kernel: whole transactions by standard
//! input, so nothing is ever half done.
//!
//! Whether another program has changed them (a reload of the host's own firewall may flush everything) is told by the
//! kernel's generation number, which is asked by netlink and costs next to nothing. Only if that has moved the rules
//! are read again.

use std::io::{self, Read as _, Write as _};
use std::process::Stdio;

use serde::Deserialize;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::{Duration, timeout};

use super::firewall::{self, Firewall, Mode, Names};

/// Where distributions have it, also for services whose PATH is short.
const PLACES: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];
/// A ruleset is changed in milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

const NETLINK_NETFILTER: i32 = 12;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN`, and the attribute of the answer.
const GET_GENERATION: u16 = 10 << 8 | 16;
const GENERATION_ID: u16 = 1;
const NLM_F_REQUEST: u16 = 1;

/// Why the rules are not as they should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum NftError {
    #[error(
        "there is no program nft: install the package nftables, or leave the firewall alone with `lacis set --netfilter-mode=off`"
    )]
    Missing,
    #[error("nft cannot be run: {0}")]
    Run(#[from] io::Error),
    #[error("nft refuses the rules: {0}")]
    Refused(String),
    #[error("nft does not end")]
    Late,
    #[error("rules cannot name the device {0:?}: call it something plain, such as lacis0")]
    Device(String),
}

/// What the firewall has of ours.
#[derive(Debug)]
pub(super) struct Nft {
    names: Option<Names>,
    device: String,
    applied: Option<Applied>,
    /// An earlier daemon may have left tables.
    is_unknown: bool,
    /// The kernel has refused to masquerade IPv6.
    no_nat6: bool,
    /// What [`Nft::forward_drops`] found, and at which generation.
    drops: (Option<u32>, Vec<ForwardDrop>),
}

#[derive(Debug)]
struct Applied {
    wish: Firewall,
    /// As `nft` lists it.
    listing: String,
    generation: Option<u32>,
}

impl Nft {
    pub(super) fn new(device: &str, fwmark: u32, mask: u32) -> Self {
        let names = Names::new(device, fwmark, mask);
        Self {
            names,
            device: device.to_owned(),
            applied: None,
            is_unknown: true,
            no_nat6: false,
            drops: (None, Vec::new()),
        }
    }

    /// The name of our tables.
    pub(super) fn table(&self) -> Option<String> {
        self.names.as_ref().map(|names| names.table.clone())
    }

    /// Has an earlier daemon, which could not put it back, set `src_valid_mark`?
    pub(super) async fn has_set_valid_mark(&self) -> bool {
        let Some(names) = &self.names else { return false };
        run(&["list", "chain", "inet", &names.table, firewall::SET_VALID_MARK], "").await.is_ok()
    }

    /// Does this host masquerade IPv6?
    pub(super) fn has_nat6(&self) -> bool {
        !self.no_nat6
    }

    /// Makes the rules so. Returns whether something was changed.
    pub(super) async fn apply(&mut self, wish: &Firewall) -> Result<bool, NftError> {
        if wish.mode == Mode::Off {
            let had = self.applied.is_some();
            if had || self.is_unknown {
                self.clean().await;
            }
            return Ok(had);
        }
        let names = self.names.clone().ok_or_else(|| NftError::Device(self.device.clone()))?;
        if self.is_applied(wish, &names).await {
            return Ok(false);
        }
        let with_nat6 = !self.no_nat6;
        let done = run(&[], &firewall::script(wish, &names, with_nat6)).await;
        match done {
            Err(NftError::Refused(why)) if with_nat6 && wish.masquerade && wish.routes(true) => {
                run(&[], &firewall::script(wish, &names, false)).await?;
                self.no_nat6 = true;
                tracing::warn!(%why, "this kernel does not masquerade IPv6");
            }
            other => drop(other?),
        }
        let generation = generation();
        let listing = listing(wish, &names, !self.no_nat6).await?;
        self.applied = Some(Applied { wish: wish.clone(), listing, generation });
        self.is_unknown = false;
        Ok(true)
    }

    async fn is_applied(&mut self, wish: &Firewall, names: &Names) -> bool {
        let with_nat6 = !self.no_nat6;
        let Some(applied) = self.applied.as_mut().filter(|applied| applied.wish == *wish) else {
            return false;
        };
        let now = generation();
        if now.is_some() && now == applied.generation {
            return true;
        }
        let same = listing(wish, names, with_nat6).await.is_ok_and(|listing| listing == applied.listing);
        if same {
            applied.generation = now;
        }
        same
    }

    /// Takes away what is ours, also what a daemon that crashed has left. Chains that the administrator has put into
    /// our tables stay, and find ours empty.
    pub(super) async fn clean(&mut self) {
        let Some(names) = &self.names else { return };
        let had = self.applied.take().is_some();
        self.is_unknown = false;
        let tables = match run(&["list", "tables"], "").await {
            Ok(tables) => tables,
            // Then it has not put anything there either.
            Err(NftError::Missing) if !had => return,
            Err(error) => {
                tracing::debug!(%error, "the firewall's tables are not known");
                return;
            }
        };
        let mut script: Vec<String> = Vec::new();
        for family in ["inet", "ip", "ip6"] {
            let table = format!("{family} {}", names.table);
            if !tables.lines().any(|line| line.strip_prefix("table ") == Some(table.as_str())) {
                continue;
            }
            let listing = run(&["list", "table", family, &names.table], "").await.unwrap_or_default();
            let chains =
                || listing.lines().filter_map(|line| line.trim().strip_prefix("chain ")?.strip_suffix(" {"));
            if chains().all(firewall::is_ours) {
                script.push(format!("delete table {table}"));
            } else {
                let ours = chains().filter(|chain| firewall::is_ours(chain));
                script.extend(ours.map(|chain| format!("flush chain {table} {chain}")));
            }
        }
        if script.is_empty() {
            return;
        }
        if let Err(error) = run(&[], &script.join("\n")).await {
            tracing::warn!(%error, "rules of the mesh are left in this host's firewall");
        }
    }

    /// [`forward_drops`], looked for only when something has changed.
    pub(super) async fn forward_drops(&mut self) -> &[ForwardDrop] {
        let now = generation();
        if now.is_none() || now != self.drops.0 {
            self.drops = (now, forward_drops(&self.device).await);
        }
        &self.drops.1
    }
}

/// A chain through which nothing is forwarded unless a rule says so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct ForwardDrop {
    /// `ip`, `ip6` or `inet`.
    pub(super) family: String,
    pub(super) table: String,
    pub(super) name: String,
    pub(super) hook: String,
    pub(super) policy: String,
}

/// Base chains that drop what is forwarded, such as `ip filter FORWARD`, of tables without a word about the device.
pub(super) async fn forward_drops(device: &str) -> Vec<ForwardDrop> {
    let chains = run(&["-j", "list", "chains"], "").await.unwrap_or_default();
    let mut drops = Vec::new();
    for found in dropping_chains(&chains) {
        let rules = run(&["list", "table", &found.family, &found.table], "").await.unwrap_or_default();
        if !rules.contains(&format!("\"{device}\"")) {
            drops.push(found);
        }
    }
    drops
}

fn dropping_chains(json: &str) -> Vec<ForwardDrop> {
    #[derive(Deserialize)]
    struct Listing {
        nftables: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        chain: Option<ForwardDrop>,
    }
    let Ok(listing) = serde_json::from_str::<Listing>(json) else { return Vec::new() };
    let chains = listing.nftables.into_iter().filter_map(|item| item.chain);
    let ip = |chain: &ForwardDrop| matches!(chain.family.as_str(), "ip" | "ip6" | "inet");
    chains.filter(|chain| chain.hook == "forward" && chain.policy == "drop" && ip(chain)).collect()
}

/// Our tables as they are. One after the other: `nft` mixes up several in one run.
async fn listing(wish: &Firewall, names: &Names, with_nat6: bool) -> Result<String, NftError> {
    let mut text = String::new();
    for family in firewall::tables(wish, with_nat6) {
        text += &run(&["list", "table", family, &names.table], "").await?;
    }
    Ok(text)
}

/// Runs `nft` with these arguments; without any it reads `script`. Returns what it prints.
async fn run(arguments: &[&str], script: &str) -> Result<String, NftError> {
    let arguments = if arguments.is_empty() { &["-f", "-"] } else { arguments };
    let start = |program: &str| {
        Command::new(program)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
    };
    let mut child = Err(NftError::Missing);
    for program in PLACES {
        match start(program) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => {
                child = other.map_err(NftError::Run);
                break;
            }
        }
    }
    let mut child = child?;
    let work = async {
        if let Some(mut input) = child.stdin.take() {
            input.write_all(script.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = timeout(PATIENCE, work).await.map_err(|_| NftError::Late)??;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(NftError::Refused(errors.lines().next().unwrap_or("no reason given").to_owned()))
}

/// A number that grows with every change of the kernel's rules. Unknown where it may not be asked.
fn generation() -> Option<u32> {
    // libc's AF_NETLINK has the type of a C int on all Linux systems.
    let domain = Domain::from(libc::AF_NETLINK);
    let mut socket = Socket::new(domain, Type::RAW, Some(Protocol::from(NETLINK_NETFILTER))).ok()?;
    socket.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    socket.write_all(&generation_request()).ok()?;
    let mut answer = [0; 256];
    let length = socket.read(&mut answer).ok()?;
    parse_generation(answer.get(..length)?)
}

fn generation_request() -> Vec<u8> {
    // A netlink header of 16 bytes, and netfilter's own of 4.
    let mut request = Vec::with_capacity(20);
    request.extend(20_u32.to_ne_bytes());
    request.extend(GET_GENERATION.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend([0; 12]);
    request
}

fn parse_generation(answer: &[u8]) -> Option<u32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    // NFT_MSG_NEWGEN comes before the question's own number.
    if kind != GET_GENERATION - 1 {
        return None;
    }
    let mut rest = answer.get(20..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let attribute = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        if attribute == GENERATION_ID {
            return Some(u32::from_be_bytes(rest.get(4..8)?.try_into().ok()?));
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_drop_what_is_forwarded_are_found() {
        let json = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 1, "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "ip", "table": "filter", "name": "INPUT", "hook": "input", "policy": "drop"}},
            {"chain": {"family": "inet", "table": "mine", "name": "x", "hook": "forward", "policy": "accept"}},
            {"chain": {"family": "bridge", "table": "mine", "name": "x", "hook": "forward", "policy": "drop"}},
            {"chain": {"family": "inet", "table": "mine", "name": "plain"}}]}"#;
        let found = dropping_chains(json);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].family.as_str(), found[0].name.as_str()), ("ip", "FORWARD"));
        assert!(dropping_chains("no json").is_empty());
    }

    #[test]
    fn a_generation_is_read_and_garbage_is_not() {
        let mut answer = vec![0; 20];
        answer[4..6].copy_from_slice(&(GET_GENERATION - 1).to_ne_bytes());
        for (attribute, value) in [(9_u16, 1_u32), (GENERATION_ID, 77)] {
            answer.extend(8_u16.to_ne_bytes());
            answer.extend(attribute.to_ne_bytes());
            answer.extend(value.to_be_bytes());
        }
        assert_eq!(parse_generation(&answer), Some(77));
        assert_eq!(parse_generation(&answer[..30]), None);
        answer[4] = 2;
        assert_eq!(parse_generation(&answer), None);
        assert_eq!(parse_generation(&[]), None);
    }
}
