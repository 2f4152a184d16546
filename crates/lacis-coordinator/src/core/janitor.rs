//! What happens by itself: nodes that went away, keys that expire, ephemeral nodes, and writing what may wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lacis_wire::control::PeerChange;
use lacis_wire::key::NodeKey;
use time::OffsetDateTime;

use super::record::NodeRecord;
use super::tailnet::{Tailnet, What};
use super::{Core, now, presence, streams, update};
use crate::store::{self, Write};

/// Expiry and absence are known in seconds.
const TICK: Duration = Duration::from_secs(1);
/// What nodes say of themselves is written this often.
const FLUSH_EVERY: Duration = Duration::from_secs(5);

pub(super) async fn run(core: Core) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let timeout = i64::try_from(core.0.config.ephemeral_timeout.as_secs()).unwrap_or(i64::MAX);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = core.0.token.cancelled() => return,
        }
        for tailnet in core.0.tailnets.values() {
            let Ended { gone, expired } = sweep(tailnet, timeout, now());
            for key in expired {
                core.revoked(&key);
            }
            presence::look_after_routers(tailnet, Instant::now());
            streams::look_for_copies(tailnet, core.log(), Instant::now());
            update::take_over_waiting(tailnet, Instant::now());
            for node in gone {
                if let Err(error) = delete_if_gone(&core, tailnet, &node, timeout).await {
                    tracing::warn!(node = %node.name, %error, "deleting an ephemeral node");
                }
            }
        }
        core.0.pending.forget_old(now());
        core.0.ssh_checks.forget_old(now());
    }
}

/// Deletes an ephemeral node, unless it came back while others were deleted or signed in again before its turn.
async fn delete_if_gone(
    core: &Core,
    tailnet: &Tailnet,
    node: &NodeRecord,
    timeout: i64,
) -> Result<(), store::Error> {
    let Some(locked) = core.lock_node(tailnet, node.id).await else { return Ok(()) };
    let left = tailnet.lock().state.leaving.get(&node.id).copied();
    let gone = left.is_some_and(|at| at.saturating_add(timeout) <= now());
    if gone && locked.record().ephemeral { locked.delete().await } else { Ok(()) }
}

/// Writes what may wait, apart from the rest: a slow disk must not keep a router from being passed over.
pub(super) async fn write_back(core: Core) {
    let mut tick = tokio::time::interval(FLUSH_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => flush(&core).await,
            () = core.0.token.cancelled() => return,
        }
    }
}

/// What has come to its end, as [`sweep`] found it.
#[derive(Debug, Default)]
pub(super) struct Ended {
    /// Ephemeral nodes that were away too long.
    pub(super) gone: Vec<Arc<NodeRecord>>,
    /// Keys that have just expired.
    pub(super) expired: Vec<NodeKey>,
}

/// Marks what is away or expired, and returns what follows from it.
pub(super) fn sweep(tailnet: &Tailnet, timeout: i64, now: i64) -> Ended {
    let mut ended = Ended::default();
    let mut locked = tailnet.lock();
    let snapshot = locked.snapshot();
    let left: Vec<_> =
        locked.state.leaving.iter().filter(|(_, at)| **at <= now).map(|(id, at)| (*id, *at)).collect();
    for (id, at) in left {
        let Some(node) = snapshot.node(id) else {
            locked.state.leaving.remove(&id);
            continue;
        };
        if node.online || node.routing {
            let mut patch = PeerChange { node_id: id, ..PeerChange::default() };
            let mut away = NodeRecord { online: false, routing: false, ..(**node).clone() };
            if node.online {
                patch.online = Some(false);
                patch.last_seen = OffsetDateTime::from_unix_timestamp(now).ok();
                away.last_seen = Some(now);
            }
            locked.put(away, What::Patch(patch));
            locked.state.dirty.insert(id);
        }
        if !node.ephemeral {
            locked.state.leaving.remove(&id);
        } else if at.saturating_add(timeout) <= now {
            ended.gone.push(Arc::clone(node));
        }
    }
    for node in &locked.snapshot().nodes {
        if !node.expired && node.is_expired_at(now) {
            let key_expiry = node.key_expiry.and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
            let patch =
                PeerChange { node_id: node.id, key_expiry: Some(key_expiry), ..PeerChange::default() };
            locked.put(NodeRecord { expired: true, ..(**node).clone() }, What::PatchAndSelf(patch));
            ended.expired.push(node.node_key);
        }
    }
    ended
}

/// Notes when the nodes that are here were last seen: they will find no server in a moment.
pub(super) fn note_last_seen(core: &Core) {
    for tailnet in core.0.tailnets.values() {
        let mut locked = tailnet.lock();
        for node in locked.snapshot().nodes.iter().filter(|node| node.online) {
            locked.note(NodeRecord { last_seen: Some(now()), ..(**node).clone() });
            locked.state.dirty.insert(node.id);
        }
    }
}

/// Writes what nodes said of themselves since the last time.
pub(super) async fn flush(core: &Core) {
    for tailnet in core.0.tailnets.values() {
        // A row that is made before a change must not be written after it.
        let _locks = tailnet.node_locks.all().await;
        let (dirty, writes) = {
            let mut locked = tailnet.lock();
            let dirty = std::mem::take(&mut locked.state.dirty);
            let snapshot = locked.snapshot();
            let rows = dirty.iter().filter_map(|id| snapshot.node(*id));
            let writes: Vec<_> =
                rows.map(|node| Write::UpdateNode(node.row(&tailnet.settings.name))).collect();
            (dirty, writes)
        };
        if !writes.is_empty()
            && let Err(error) = core.0.store.commit(writes).await
        {
            // They are tried again next time.
            tailnet.lock().state.dirty.extend(dirty);
            tracing::warn!(tailnet = tailnet.settings.name, %error, "what nodes said of themselves was not written");
        }
    }
}
