//! Map streams: who listens, from when to when, and what each is sent next.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use lacis_wire::control::{NodeId, PeerChange, to_json};
use lacis_wire::key::NodeKey;
use lacis_wire::mapframe::{self, Compression};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::frames::Whole;
use super::owed::Before;
use super::record::NodeRecord;
use super::streams::Origin;
use super::tailnet::{Since, Tailnet, What};
use super::{Core, frames, now, presence};

/// A client that reconnects within this was never away.
pub(super) const GRACE_SECONDS: i64 = 5;
/// The same for routers, for whom others may stand in: with the janitor's second it is at most three.
const ROUTER_GRACE_SECONDS: i64 = 2;

/// One open map stream. While it lives its node is online.
pub struct Subscription {
    core: Core,
    tailnet: Arc<Tailnet>,
    node: NodeId,
    node_key: NodeKey,
    compression: Compression,
    cursor: u64,
    head: watch::Receiver<u64>,
    /// What the policy made of the network when the last frame was sent.
    before: Before,
    /// Whether the client is still there.
    questions: watch::Receiver<u64>,
    /// Among the node's streams, with the number of the latest.
    number: u64,
    latest: watch::Receiver<u64>,
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
        origin: Origin,
        compression: Compression,
    ) -> Result<Option<(Subscription, Bytes)>, mapframe::Error> {
        let mut locked = tailnet.lock();
        let presence = locked.state.sessions.entry(node.id).or_default();
        let (number, latest) = presence.open(origin, Instant::now());
        let questions = presence.questions();
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
            before: Before::of(&tailnet.snapshot(), node.id),
            questions,
            number,
            latest,
            token: self.0.token.clone(),
        };
        let current = locked.snapshot().node(node.id).filter(|now| now.node_key == node.node_key).cloned();
        if let Some(current) = current.filter(|current| !current.online || !current.routing) {
            let online = NodeRecord { online: true, routing: true, ..(*current).clone() };
            let mut patch = PeerChange { node_id: node.id, ..PeerChange::default() };
            patch.online = (!current.online).then_some(true);
            locked.put(online, What::Patch(patch));
            if !current.hostinfo.routable_ips.is_empty() {
                // That it was there is asked at the next start.
                locked.state.dirty.insert(node.id);
            }
        }
        drop(locked);
        let first = subscription.whole(Whole::First)?;
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
        let whole = if with_peers { Whole::First } else { Whole::Alone };
        frames::whole(&tailnet.settings, &tailnet.snapshot(), node, whole, compression)
    }
}

impl Subscription {
    fn whole(&mut self, whole: Whole) -> Result<Option<Bytes>, mapframe::Error> {
        let snapshot = self.tailnet.snapshot();
        self.cursor = snapshot.head;
        self.before = Before::of(&snapshot, self.node);
        let Some(node) = snapshot.node(self.node).filter(|node| node.node_key == self.node_key) else {
            return Ok(None);
        };
        self.core.0.frames.inc();
        frames::whole(&self.tailnet.settings, &snapshot, node, whole, self.compression).map(Some)
    }

    /// Everything once more, in the middle of the stream; `None` where the stream must end instead: clients take a list
    /// without peers for "as before", so that there are none any more only a new stream says.
    fn again(&mut self) -> Result<Option<Bytes>, mapframe::Error> {
        let snapshot = self.tailnet.snapshot();
        if snapshot.has_expired(self.node) || snapshot.network.peers(self.node).next().is_none() {
            return Ok(None);
        }
        self.whole(Whole::Again)
    }

    /// Waits for something to tell. May be cancelled at any await without losing anything.
    ///
    /// # Errors
    /// When a frame cannot be encoded.
    pub async fn next(&mut self) -> Result<Next, mapframe::Error> {
        loop {
            let (head, successor) = (self.cursor, self.number + presence::MAX_STREAMS);
            tokio::select! {
                changed = self.head.wait_for(|now| *now > head) => {
                    if changed.is_err() {
                        return Ok(Next::End);
                    }
                }
                number = asked(&mut self.questions) => {
                    let question = presence::question(&self.tailnet.settings.server_url, self.node, number, self.number);
                    return mapframe::encode(&to_json(&question), self.compression).map(Next::Frame);
                }
                _ = self.latest.wait_for(|latest| *latest >= successor) => return Ok(Next::End),
                () = self.token.cancelled() => return Ok(Next::End),
            }
            let frame = match self.tailnet.since(self.cursor) {
                Since::Lost => match self.again()? {
                    Some(frame) => Some(frame),
                    None => return Ok(Next::End),
                },
                // It signed in again: everything is new to it.
                Since::Changes(_, snapshot) if self.before.expired && !snapshot.has_expired(self.node) => {
                    match self.again()? {
                        Some(frame) => Some(frame),
                        None => return Ok(Next::End),
                    }
                }
                Since::Changes(changes, snapshot) => {
                    self.cursor = snapshot.head;
                    if snapshot.node(self.node).is_none_or(|node| node.node_key != self.node_key) {
                        return Ok(Next::End);
                    }
                    let tailnet = &self.tailnet;
                    let frame = frames::delta(
                        &tailnet.settings,
                        &tailnet.frames,
                        &changes,
                        &self.before,
                        &snapshot,
                        self.node,
                        self.compression,
                    )?;
                    if !self.before.is_of(&snapshot, self.node) {
                        self.before = Before::of(&snapshot, self.node);
                    }
                    frame
                }
            };
            if let Some(frame) = frame {
                self.core.0.frames.inc();
                return Ok(Next::Frame(frame));
            }
        }
    }
}

/// Waits for the next question.
async fn asked(questions: &mut watch::Receiver<u64>) -> u64 {
    match questions.changed().await {
        Ok(()) => *questions.borrow_and_update(),
        // The node is gone, and the stream ends by that.
        Err(_) => std::future::pending().await,
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.core.0.streams.dec();
        let mut locked = self.tailnet.lock();
        if let Some(presence) = locked.state.sessions.get_mut(&self.node) {
            presence.streams.close(self.number);
            if presence.streams.is_empty() {
                locked.state.sessions.remove(&self.node);
                let router = !locked.snapshot().network.approved(self.node).is_empty();
                let grace = if router { ROUTER_GRACE_SECONDS } else { GRACE_SECONDS };
                locked.state.leaving.insert(self.node, now() + grace);
            }
        }
    }
}
