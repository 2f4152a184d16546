//! What anybody can do who reaches the port: no auth key, no node.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use http_body_util::BodyExt as _;
use lacis_wire::control::{RegisterRequest, RegisterResponse, to_json};
use lacis_wire::io::{client_config, native_roots};
use lacis_wire::key::{MachinePrivateKey, NodePrivateKey};
use rustls::pki_types::ServerName;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;

use super::say;
use crate::node::Node;

/// Streams of one session that the server lets be open at once.
const STREAMS: usize = 128;
/// Sessions of one stranger, and the size of the bodies that each sends: what fits into the largest request, and what
/// fits into a registration.
const BODIES: [usize; 4] = [(1 << 20) - 4096, 60 << 10, 60 << 10, 60 << 10];
/// Machine keys, and registrations of each.
const MACHINES: usize = 8;
const REGISTRATIONS: usize = 140;
/// Handshakes at once.
const PARALLEL: usize = 32;
/// Connections made in each turn, and how long one takes: more would only be this machine's own load.
const CONNECTING: usize = 256;
const TURN: Duration = Duration::from_millis(100);
const REPORT: Duration = Duration::from_secs(1);
/// Before a request that was answered is sent again.
const AGAIN: Duration = Duration::from_secs(3);
/// Of the connections to one target, those that do a TLS handshake and then send a byte of a request now and then.
const TRICKLES: usize = 50;
const TRICKLE: Duration = Duration::from_millis(900);

/// A registration with a member that is small as text and large once decoded.
fn padded(request: &RegisterRequest, size: usize) -> Vec<u8> {
    let body = String::from_utf8(to_json(request)).unwrap_or_default();
    let filler = "{\"\":0},".repeat(size / 7);
    body.replacen("\"Hostinfo\":{", &format!("\"Hostinfo\":{{\"X\":[{filler}0],"), 1).into_bytes()
}

pub(super) async fn followups(url: &str) -> Result<()> {
    let (sent, answers) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(BTreeMap::new())));
    for size in BODIES {
        let node =
            Arc::new(Node::dial(url, MachinePrivateKey::generate(), None, "mallory".to_owned()).await?);
        let answer = node.answer("/machine/register", to_json(&node.register_request())).await?;
        let answer: RegisterResponse = serde_json::from_slice(&answer.collect().await?.to_bytes())?;
        let followup = RegisterRequest { followup: answer.auth_url, ..node.register_request() };
        let body = padded(&followup, size);
        for _ in 0..STREAMS {
            let (node, body, sent, answers) = (node.clone(), body.clone(), sent.clone(), answers.clone());
            tokio::spawn(async move {
                loop {
                    sent.fetch_add(1, Ordering::Relaxed);
                    let answer = match node.status("/machine/register", body.clone()).await {
                        Ok(status) => status.as_u16(),
                        Err(_) => 0,
                    };
                    *answers.lock().unwrap_or_else(PoisonError::into_inner).entry(answer).or_insert(0) += 1;
                    tokio::time::sleep(AGAIN).await;
                }
            });
        }
    }
    loop {
        tokio::time::sleep(REPORT).await;
        let answers = answers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        say(&json!({ "sent": sent.load(Ordering::Relaxed), "answers": answers }));
    }
}

pub(super) async fn registrations(url: &str) -> Result<()> {
    let mut refused = 0;
    for _ in 0..MACHINES {
        let node = Node::dial(url, MachinePrivateKey::generate(), None, "mallory".to_owned()).await?;
        for _ in 0..REGISTRATIONS {
            let node_key = NodePrivateKey::generate().public();
            let request = RegisterRequest { node_key, ..node.register_request() };
            match node.status("/machine/register", to_json(&request)).await {
                Ok(status) if status.is_success() => {}
                _ => refused += 1,
            }
        }
    }
    say(&json!({ "done": true, "registrations": MACHINES * REGISTRATIONS, "refused": refused }));
    std::future::pending().await
}

pub(super) async fn sessions(url: &str, count: usize) -> Result<()> {
    let (places, open) = (Arc::new(Semaphore::new(PARALLEL)), Arc::new(Mutex::new(Vec::new())));
    for _ in 0..count {
        let (url, places, open) = (url.to_owned(), Arc::clone(&places), Arc::clone(&open));
        tokio::spawn(async move {
            let _place = places.acquire_owned().await;
            let node = Node::dial(&url, MachinePrivateKey::generate(), None, "mallory".to_owned()).await?;
            // One question, so that the session is not one that never asked anything.
            node.status("/machine/nothing", Vec::new()).await?;
            open.lock().unwrap_or_else(PoisonError::into_inner).push(node);
            anyhow::Ok(())
        });
    }
    loop {
        tokio::time::sleep(REPORT).await;
        let (made, left) = {
            let open = open.lock().unwrap_or_else(PoisonError::into_inner);
            (open.len(), open.iter().filter(|node: &&Node| !node.is_closed()).count())
        };
        say(&json!({ "sessions": made, "open": left, "done": places.available_permits() == PARALLEL }));
    }
}

#[derive(Debug, Default)]
struct Counts {
    open: AtomicUsize,
    made: AtomicU64,
    /// The longest that one lasted which sends a byte now and then, in milliseconds.
    trickle: AtomicU64,
    trickles_ended: AtomicU64,
}

pub(super) async fn connections(targets: &[String], count: usize) -> Result<()> {
    let tls = TlsConnector::from(client_config(native_roots()?, &[])?);
    let connecting = Arc::new(Semaphore::new(CONNECTING));
    let mut all = Vec::new();
    for target in targets {
        let address = tokio::net::lookup_host(target).await?.next().context("no address")?;
        let host = target.rsplit_once(':').context("a target is HOST:PORT")?.0.to_owned();
        let name = ServerName::try_from(host)?;
        let counts = Arc::new(Counts::default());
        all.push((target.clone(), Arc::clone(&counts)));
        for number in 0..count {
            let (counts, connecting) = (Arc::clone(&counts), Arc::clone(&connecting));
            let (tls, name) = (tls.clone(), name.clone());
            tokio::spawn(async move {
                loop {
                    let stream = {
                        let _place = connecting.acquire().await;
                        tokio::time::sleep(TURN).await;
                        TcpStream::connect(address).await
                    };
                    if let Ok(stream) = stream {
                        counts.made.fetch_add(1, Ordering::Relaxed);
                        counts.open.fetch_add(1, Ordering::Relaxed);
                        if number < TRICKLES {
                            let began = Instant::now();
                            let _ = trickle(stream, &tls, name.clone()).await;
                            counts.trickle.fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
                            counts.trickles_ended.fetch_add(1, Ordering::Relaxed);
                        } else {
                            silent(stream).await;
                        }
                        counts.open.fetch_sub(1, Ordering::Relaxed);
                    }
                }
            });
        }
    }
    loop {
        tokio::time::sleep(REPORT).await;
        for (target, counts) in &all {
            let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
            say(&json!({
                "target": target,
                "open": counts.open.load(Ordering::Relaxed),
                "made": get(&counts.made),
                "longest_trickle": get(&counts.trickle),
                "trickles_ended": get(&counts.trickles_ended),
            }));
        }
    }
}

/// Waits until the server ends it.
async fn silent(mut stream: TcpStream) {
    let mut byte = [0];
    while matches!(stream.read(&mut byte).await, Ok(1..)) {}
}

/// A request's head, byte by byte, until the server ends it.
async fn trickle(stream: TcpStream, tls: &TlsConnector, name: ServerName<'static>) -> Result<()> {
    let (mut read, write) = tokio::io::split(tls.connect(name, stream).await?);
    let mut answer = [0; 1024];
    let ended = async { while matches!(read.read(&mut answer).await, Ok(1..)) {} };
    tokio::select! {
        sent = send_slowly(write) => Ok(sent?),
        () = ended => Ok(()),
    }
}

async fn send_slowly(mut write: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    write.write_all(b"GET / HTTP/1.1\r\nHost: mesh.example.org\r\nX-Slow: ").await?;
    loop {
        write.write_all(b"x").await?;
        write.flush().await?;
        tokio::time::sleep(TRICKLE).await;
    }
}
