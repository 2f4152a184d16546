//! How much a relay carries: clients in pairs over a loopback TLS relay, all in this process.
//!
//! `cargo run --release -p lacis-relay --example throughput -- [SECONDS [PACKET_BYTES [PAIRS [plain|tls [HOST:PORT]]]]]`
//!
//! With HOST:PORT the relay is another one (any DERP relay, its certificate is not looked at), to compare with.
//!
//! Each pair's sender keeps its queue filled with buffers of 45 packets, as the packet path makes them. Printed
//! are delivered packets and bits (payload only), what the relay dropped, and the CPU time of the whole process:
//! two clients and the relay for each pair, kernel included.
#![allow(clippy::print_stdout)] // a benchmark's output is its purpose

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use lacis_relay::client::{
    Batch, CertCheck, DialOptions, RegionId, RelayClient, RelayClientConfig, RelayEvent, RelayHandler,
    RelayNode, RelayRegion, SEND_QUEUE_BYTES,
};
use lacis_relay::server::{Everybody, Limits, Relay};
use lacis_serve::tls::Certificate;
use lacis_wire::derp::Frame;
use lacis_wire::key::{NodePrivateKey, RelayPrivateKey};
use tokio_util::sync::CancellationToken;

/// What one read of the TUN gives.
const PACKETS_PER_BUFFER: usize = 45;

#[derive(Default)]
struct Count {
    packets: AtomicU64,
    bytes: AtomicU64,
    batches: AtomicU64,
}

struct Counter(Arc<Count>);

impl RelayHandler for Counter {
    fn packets(&self, _: RegionId, batch: Batch) -> Option<BoxFuture<'static, ()>> {
        let bytes: usize = batch.iter().map(|(_, data)| data.len()).sum();
        self.0.packets.fetch_add(batch.len() as u64, Ordering::Relaxed);
        self.0.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.0.batches.fetch_add(1, Ordering::Relaxed);
        None
    }

    fn event(&self, _: RegionId, _: RelayEvent) {}
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| args.get(at).map_or(Ok(default), |text| text.parse());
    let (seconds, size, pairs) = (number(0, 5)?, number(1, 1300)?, number(2, 1)?);
    let plain = args.get(3).is_some_and(|kind| kind == "plain");

    let directory = tempfile::tempdir()?;
    let stop = CancellationToken::new();
    let relay = Relay::new(RelayPrivateKey::generate(), Arc::new(Everybody), Limits::default());
    let (address, server) = if let Some(address) = args.get(4) {
        (address.parse()?, None)
    } else {
        let tls = if plain { None } else { Some(certificate(directory.path())?) };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address: SocketAddr = listener.local_addr()?;
        let serve = lacis_relay::serve::http(listener, tls, relay.router(), stop.clone());
        (address, Some(tokio::spawn(serve)))
    };

    let count = Arc::new(Count::default());
    let client = |key: &NodePrivateKey| {
        let mut node = RelayNode::new(address.ip().to_string(), address.port());
        node.cert = CertCheck::Insecure;
        let config = RelayClientConfig {
            region: RelayRegion { id: 900, nodes: vec![node] },
            node_key: key.clone(),
            home: true,
            dial: DialOptions { plain_http: plain, ..DialOptions::default() },
            send_queue_bytes: SEND_QUEUE_BYTES,
        };
        RelayClient::start(config, Arc::new(Counter(Arc::clone(&count))))
    };
    let mut clients = Vec::new();
    for _ in 0..pairs {
        let (from, to) = (NodePrivateKey::generate(), NodePrivateKey::generate());
        let mut wire = BytesMut::new();
        for _ in 0..PACKETS_PER_BUFFER {
            Frame::SendPacket { dst: to.public(), data: Bytes::from(vec![4; size]) }.encode(&mut wire);
        }
        clients.push((client(&from), client(&to), wire.freeze()));
    }
    while clients.iter().any(|(from, to, _)| !from.is_connected() || !to.is_connected()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let (started, cpu) = (Instant::now(), cpu_seconds());
    let end = started + Duration::from_secs(seconds as u64);
    // a thread of its own, as the packet path is
    let clients = tokio::task::spawn_blocking(move || {
        while Instant::now() < end {
            for (from, _, wire) in &clients {
                while from.queued_bytes() + wire.len() <= SEND_QUEUE_BYTES {
                    from.send(wire.clone());
                }
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        clients
    })
    .await?;
    let elapsed = started.elapsed().as_secs_f64();
    let cpu = cpu_seconds() - cpu;
    let (packets, bytes) = (count.packets.load(Ordering::Relaxed), count.bytes.load(Ordering::Relaxed));
    let sent: u64 = clients.iter().map(|(from, ..)| from.stats().packets_sent).sum();
    println!(
        "{} pairs={pairs} size={size}: {:.2} Gb/s, {:.0} packets/s, {:.1} packets a batch, {:.2} % lost in the relay, \
         {:.2} cores, {:.3} core-s/Gb",
        if plain { "plain" } else { "tls" },
        bytes as f64 * 8e-9 / elapsed,
        packets as f64 / elapsed,
        packets as f64 / count.batches.load(Ordering::Relaxed).max(1) as f64,
        sent.saturating_sub(packets) as f64 * 100.0 / sent.max(1) as f64,
        cpu / elapsed,
        cpu / (bytes as f64 * 8e-9),
    );
    stop.cancel();
    relay.shutdown().await;
    if let Some(server) = server {
        server.await?;
    }
    Ok(())
}

fn certificate(directory: &std::path::Path) -> anyhow::Result<Arc<rustls::ServerConfig>> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let (cert, key) = (directory.join("cert.pem"), directory.join("key.pem"));
    std::fs::write(&cert, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    Ok(Certificate::load(&cert, &key)?.server_config()?)
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 =
        after_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    ticks as f64 / 100.0
}
