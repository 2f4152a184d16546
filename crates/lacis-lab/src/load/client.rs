//! One simulated client: registers, reads its map stream, reports new endpoints. It has no tunnel and no relay.
//!
//! A client keeps nothing of the maps that it reads, so that thousands fit in one process: it counts their bytes and
//! looks for the text of the change that is being watched ([`Shared::watch`]).

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use http_body_util::BodyExt as _;
use lacis_wire::control;
use lacis_wire::key::{MachineKey, MachinePrivateKey};
use tokio::sync::{Notify, oneshot};

use crate::node::{self, Node};

/// What all clients of a run share.
#[derive(Debug)]
pub(super) struct Shared {
    url: String,
    auth_key: String,
    server_key: MachineKey,
    received: AtomicU64,
    ended: AtomicUsize,
    watched: RwLock<Option<Arc<Watch>>>,
    /// Who has seen which change last: the number of the watch, for each client.
    seen: Vec<AtomicU64>,
    watches: AtomicU64,
}

/// A change that is being watched.
#[derive(Debug)]
pub(super) struct Watch {
    number: u64,
    marker: String,
    author: Option<usize>,
    left: AtomicUsize,
    last: Mutex<Option<Instant>>,
    whole: Notify,
}

/// How far a change came.
#[derive(Debug)]
pub(super) struct Outcome {
    /// When the last client saw it; `None` if some did not.
    pub(super) last: Option<Duration>,
    /// How many did not.
    pub(super) missing: usize,
}

impl Shared {
    pub(super) fn new(url: String, auth_key: String, server_key: MachineKey, nodes: usize) -> Self {
        Self {
            url,
            auth_key,
            server_key,
            received: AtomicU64::new(0),
            ended: AtomicUsize::new(0),
            watched: RwLock::new(None),
            seen: (0..nodes).map(|_| AtomicU64::new(0)).collect(),
            watches: AtomicU64::new(0),
        }
    }

    /// Bytes of map streams that all clients have received, as they came over HTTP.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Map streams that are no more.
    pub(super) fn ended(&self) -> usize {
        self.ended.load(Ordering::Relaxed)
    }

    /// Watches for a text in everybody's map stream (but the author's), instead of what was watched before.
    pub(super) fn watch(&self, marker: String, author: Option<usize>, clients: usize) -> Arc<Watch> {
        let watch = Arc::new(Watch {
            number: self.watches.fetch_add(1, Ordering::Relaxed) + 1,
            marker,
            author,
            left: AtomicUsize::new(clients),
            last: Mutex::new(None),
            whole: Notify::new(),
        });
        *self.watched.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&watch));
        watch
    }

    /// A client has read a message.
    fn read(&self, client: usize, message: &[u8]) {
        let watched = self.watched.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(watch) = watched.filter(|watch| watch.author != Some(client)) else { return };
        if !str::from_utf8(message).is_ok_and(|text| text.contains(&watch.marker)) {
            return;
        }
        if self
            .seen
            .get(client)
            .is_some_and(|seen| seen.swap(watch.number, Ordering::Relaxed) != watch.number)
        {
            *watch.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            if watch.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                watch.whole.notify_one();
            }
        }
    }
}

impl Watch {
    /// Waits until everybody has seen it.
    pub(super) async fn wait(&self, began: Instant, patience: Duration) -> Outcome {
        let all = tokio::time::timeout(patience, self.whole.notified()).await.is_ok();
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        Outcome {
            last: last.filter(|_| all).map(|last| last.duration_since(began)),
            missing: self.left.load(Ordering::Acquire),
        }
    }
}

/// One client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) number: usize,
    shared: Arc<Shared>,
    node: Node,
}

/// An endpoint for every number up to some millions, each once.
pub(super) fn endpoint(number: usize) -> SocketAddr {
    let [.., a, b] = (number as u32 / 50_000).to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(198, 18, a, b), 10_000 + (number % 50_000) as u16))
}

impl Client {
    /// Dials and registers with the auth key.
    pub(super) async fn register(number: usize, shared: Arc<Shared>) -> Result<Arc<Self>> {
        let machine = MachinePrivateKey::generate();
        let node =
            Node::dial(&shared.url, machine, Some(shared.server_key), format!("load-{number}")).await?;
        node.register(&shared.auth_key).await?;
        Ok(Arc::new(Self { number, shared, node }))
    }

    /// Opens the map stream; returns when the first map is here. Reads on by itself.
    pub(super) async fn stream(self: &Arc<Self>) -> Result<()> {
        let body = self.node.stream(endpoint(self.number)).await?;
        let (first, here) = oneshot::channel();
        let client = Arc::clone(self);
        tokio::spawn(async move {
            let mut first = Some(first);
            let shared = &client.shared;
            let received = |bytes| {
                shared.received.fetch_add(bytes as u64, Ordering::Relaxed);
            };
            let ended = node::read(body, received, |message| {
                if let Some(first) = first.take() {
                    let _ = first.send(());
                }
                shared.read(client.number, message);
            });
            if let Err(error) = ended.await {
                tracing::debug!(number = client.number, %error, "map stream failed");
            }
            shared.ended.fetch_add(1, Ordering::Relaxed);
        });
        here.await
            .with_context(|| format!("the map stream of client {} ended before its first map", self.number))
    }

    /// Reports a new endpoint, in a request of its own as clients do.
    pub(super) async fn report(&self, endpoint: SocketAddr) -> Result<()> {
        let request = self.node.map_request(endpoint, true);
        self.node.answer("/machine/map", control::to_json(&request)).await?.collect().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_an_endpoint_of_its_own() {
        assert_eq!(endpoint(0).to_string(), "198.18.0.0:10000");
        assert_eq!(endpoint(49_999).to_string(), "198.18.0.0:59999");
        assert_eq!(endpoint(50_000).to_string(), "198.18.0.1:10000");
    }

    #[tokio::test]
    async fn a_change_is_whole_when_each_client_but_its_author_has_seen_it_once() {
        let shared = Shared::new(String::new(), String::new(), MachinePrivateKey::generate().public(), 3);
        let began = Instant::now();
        let watch = shared.watch("198.18.0.0:1".into(), Some(0), 2);
        for client in [0, 1, 1] {
            shared.read(client, b"{\"Endpoints\":[\"198.18.0.0:1\"]}");
        }
        let outcome = watch.wait(began, Duration::from_millis(1)).await;
        assert_eq!((outcome.last, outcome.missing), (None, 1));
        shared.read(2, b"198.18.0.0:1");
        let outcome = watch.wait(began, Duration::from_secs(5)).await;
        assert!(outcome.last.is_some() && outcome.missing == 0);
    }
}
