//! Many clients of one relay that do nothing: what does a connection cost the relay?
//!
//! `cargo run --release -p lacis-relay --example connections -- HOST PORT COUNT [SECONDS [PID [plain]]]`
//!
//! With the relay's PID, its resident memory before and after is printed.
#![allow(clippy::print_stdout)] // a benchmark's output is its purpose

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use lacis_relay::client::{
    Batch, CertCheck, DialOptions, RegionId, RelayClient, RelayClientConfig, RelayEvent, RelayHandler,
    RelayNode, RelayRegion,
};
use lacis_wire::key::NodePrivateKey;

struct Deaf;

impl RelayHandler for Deaf {
    fn packets(&self, _: RegionId, _: Batch) -> Option<BoxFuture<'static, ()>> {
        None
    }

    fn event(&self, _: RegionId, _: RelayEvent) {}
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [host, port, count, rest @ ..] = &args[..] else {
        anyhow::bail!("arguments: HOST PORT COUNT [SECONDS [PID [plain]]]");
    };
    let (port, count): (u16, usize) = (port.parse()?, count.parse()?);
    let seconds: u64 = rest.first().map_or(Ok(5), |text| text.parse())?;
    let pid = rest.get(1);
    let plain = rest.get(2).is_some_and(|kind| kind == "plain");
    let before = pid.map(|pid| resident(pid)).transpose()?;
    let started = Instant::now();
    let mut clients = Vec::new();
    for _ in 0..count {
        let mut node = RelayNode::new(host.clone(), port);
        node.cert = CertCheck::Insecure;
        let config = RelayClientConfig {
            region: RelayRegion { id: 900, nodes: vec![node] },
            node_key: NodePrivateKey::generate(),
            home: true,
            dial: DialOptions { plain_http: plain, ..DialOptions::default() },
            send_queue_bytes: 64 << 10,
        };
        clients.push(RelayClient::start(config, Arc::new(Deaf)));
    }
    while clients.iter().any(|client| !client.is_connected()) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let took = started.elapsed();
    println!("{count} clients logged in within {took:?}: {:.0} a second", count as f64 / took.as_secs_f64());
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    if let (Some(before), Some(pid)) = (before, pid) {
        let after = resident(pid)?;
        println!(
            "relay: {before} KiB before, {after} KiB with them, {:.1} KiB a connection",
            after.saturating_sub(before) as f64 / count as f64
        );
    }
    Ok(())
}

/// Resident memory in KiB.
fn resident(pid: &str) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    Ok(line.and_then(|line| line.split_whitespace().next()).unwrap_or("0").parse()?)
}
