//! Map streams: who listens, from when to when, and what each is sent next.

use std::sync::Arc;

use bytes::Bytes;
use lacis_wire::control::{NodeId, PeerChange};
use lacis_wire::key::NodeKey;
use lacis_wire::mapframe::{self, Compression};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::record::NodeRecord;
use super::tailnet::{Since, Tailnet, What};
use super::{Core, frames, now};

/// A client that reconnects within this was never away.
const GRACE_SECONDS: i64 = 5;

/// One open map stream. While it lives its node is online.
pub struct Subscription {
    core: Core,
    tailnet: Arc<Tailnet>,
    node: NodeId,
    node_key: NodeKey,
    compression: Compression,
    cursor: u64,
    head: watch::Receiver<u64>,
    token: CancellationToken,
}

impl std::fmt::Debug for Subscription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscription")
            .field("node", &self.node)
            .field("cursor", &self.cursor)
            .finish_non_exhaustive()
    }
}

/// What a stream does next.
#[derive(Debug)]
pub enum Next {
    Frame(Bytes),
    /// The node is gone, or another key took its place: the client must find out by asking anew.
    End,
}

impl Core {
    /// Opens a stream, marks the node online, and gives the first frame; `None` when the node has just gone or
    /// has another key by now.
    ///
    /// # Errors
    /// When the frame cannot be encoded.
    pub fn subscribe(
        &self,
        tailnet: &Arc<Tailnet>,
        node: &NodeRecord,
        compression: Compression,
    ) -> Result<Option<(Subscription, Bytes)>, mapframe::Error> {
        let mut locked = tailnet.lock();
        *locked.state.sessions.entry(node.id).or_default() += 1;
        locked.state.leaving.remove(&node.id);
        self.0.streams.inc();
        // From here on the node is counted; the subscription's end undoes it, whatever happens below.
        let mut subscription = Subscription {
            core: self.clone(),
            tailnet: Arc::clone(tailnet),
            node: node.id,
            node_key: node.node_key,
            compression,
            cursor: 0,
            head: tailnet.watch(),
            token: self.0.token.clone(),
        };
        let current = locked.snapshot().node(node.id).filter(|now| now.node_key == node.node_key).cloned();
        if let Some(current) = current.filter(|current| !current.online) {
            let online = NodeRecord { online: true, ..(*current).clone() };
            let patch = PeerChange { node_id: node.id, online: Some(true), ..PeerChange::default() };
            locked.put(online, What::Patch(patch));
        }
        drop(locked);
        let first = subscription.whole()?;
        Ok(first.map(|first| (subscription, first)))
    }

    /// One frame with everything, without a stream.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn whole_map(
        &self,
        tailnet: &Tailnet,
        node: &NodeRecord,
        with_peers: bool,
        compression: Compression,
    ) -> Result<Bytes, mapframe::Error> {
        frames::first(&tailnet.settings, &tailnet.snapshot(), node, with_peers, compression)
    }
}

impl Subscription {
    fn whole(&mut self) -> Result<Option<Bytes>, mapframe::Error> {
        let snapshot = self.tailnet.snapshot();
        self.cursor = snapshot.head;
        let Some(node) = snapshot.node(self.node).filter(|node| node.node_key == self.node_key) else {
            return Ok(None);
        };
        self.core.0.frames.inc();
        frames::first(&self.tailnet.settings, &snapshot, node, true, self.compression).map(Some)
    }

    /// Waits for something to tell. May be cancelled at any await without losing anything.
    ///
    /// # Errors
    /// When a frame cannot be encoded.
    pub async fn next(&mut self) -> Result<Next, mapframe::Error> {
        loop {
            let head = self.cursor;
            tokio::select! {
                changed = self.head.wait_for(|now| *now > head) => {
                    if changed.is_err() {
                        return Ok(Next::End);
                    }
                }
                () = self.token.cancelled() => return Ok(Next::End),
            }
            let frame = match self.tailnet.since(self.cursor) {
                // Clients take a list without peers for "as before": where all have gone, only a new stream says so.
                Since::Lost if self.tailnet.snapshot().nodes.len() < 2 => return Ok(Next::End),
                Since::Lost => match self.whole()? {
                    Some(frame) => Some(frame),
                    None => return Ok(Next::End),
                },
                Since::Changes(changes, snapshot) => {
                    self.cursor = snapshot.head;
                    if snapshot.node(self.node).is_none_or(|node| node.node_key != self.node_key) {
                        return Ok(Next::End);
                    }
                    let tailnet = &self.tailnet;
                    frames::delta(
                        &tailnet.settings,
                        &tailnet.frames,
                        &changes,
                        &snapshot,
                        self.node,
                        self.compression,
                    )?
                }
            };
            if let Some(frame) = frame {
                self.core.0.frames.inc();
                return Ok(Next::Frame(frame));
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.core.0.streams.dec();
        let mut locked = self.tailnet.lock();
        if let Some(open) = locked.state.sessions.get_mut(&self.node) {
            *open -= 1;
            if *open == 0 {
                locked.state.sessions.remove(&self.node);
                locked.state.leaving.insert(self.node, now() + GRACE_SECONDS);
            }
        }
    }
}
