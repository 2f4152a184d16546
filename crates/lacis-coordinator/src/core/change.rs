//! The one place where a node that is stored changes.
//!
//! Whoever changes a node holds its lock from reading the record until what came of it is on disk and published: no two
//! changes begin with the same record, and none writes an old copy over a newer one. Rows that are written later
//! ([`super::janitor`]) are made under the same locks. What a node reports of itself (endpoints, facts of its host) is
//! published without them, so a change is made twice: of the record as it is, to be written, and of the record as it is
//! once that is on disk, to be published.

use std::sync::Arc;

use lacis_wire::control::{NodeId, PeerChange};
use time::OffsetDateTime;
use tokio::sync::{Mutex, MutexGuard};

use super::record::NodeRecord;
use super::tailnet::{Tailnet, What};
use super::{Core, now};
use crate::store::{self, Write};

/// Nodes whose ids share a lock wait for each other. So many changes can share one write to disk.
const NODE_LOCKS: usize = 64;

/// The locks of a network's nodes.
#[derive(Debug)]
pub(super) struct NodeLocks([Mutex<()>; NODE_LOCKS]);

impl Default for NodeLocks {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Mutex::new(())))
    }
}

impl NodeLocks {
    async fn one(&self, id: NodeId) -> MutexGuard<'_, ()> {
        self.0[id.0.unsigned_abs() as usize % NODE_LOCKS].lock().await
    }

    /// Every lock. Who holds one never waits for another, so this ends.
    pub(super) async fn all(&self) -> Vec<MutexGuard<'_, ()>> {
        let mut all = Vec::with_capacity(NODE_LOCKS);
        for lock in &self.0 {
            all.push(lock.lock().await);
        }
        all
    }
}

/// A node that only the holder of this changes.
pub(super) struct LockedNode<'a> {
    core: &'a Core,
    tailnet: &'a Tailnet,
    /// As it was when it was locked.
    read: Arc<NodeRecord>,
    _lock: MutexGuard<'a, ()>,
}

impl Core {
    /// Waits for the changes of this node that have begun; `None` when there is no such node.
    pub(super) async fn lock_node<'a>(&'a self, tailnet: &'a Tailnet, id: NodeId) -> Option<LockedNode<'a>> {
        let lock = tailnet.node_locks.one(id).await;
        let read = tailnet.snapshot().node(id).cloned()?;
        Some(LockedNode { core: self, tailnet, read, _lock: lock })
    }
}

impl LockedNode<'_> {
    /// The record as it is now. The node is there as long as this lives.
    pub(super) fn record(&self) -> Arc<NodeRecord> {
        self.tailnet.snapshot().node(self.read.id).map_or_else(|| Arc::clone(&self.read), Arc::clone)
    }

    /// Writes what `change` makes of the record, in one transaction with `writes`, which come first. What is written
    /// must then be published.
    ///
    /// # Errors
    /// When the database refuses; nothing has changed then.
    pub(super) async fn write(
        &self,
        mut writes: Vec<Write>,
        change: impl Fn(&NodeRecord) -> NodeRecord,
    ) -> Result<(), store::Error> {
        writes.push(Write::UpdateNode(change(&self.record()).row(&self.tailnet.settings.name)));
        self.core.0.store.commit(writes).await
    }

    /// Writes what `change` makes of the record, and publishes it as `what`.
    ///
    /// # Errors
    /// When the database refuses; nothing has changed then.
    pub(super) async fn change(
        &self,
        what: What,
        change: impl Fn(&NodeRecord) -> NodeRecord,
    ) -> Result<Arc<NodeRecord>, store::Error> {
        self.write(Vec::new(), &change).await?;
        let mut locked = self.tailnet.lock();
        let changed = change(&self.record());
        Ok(locked.put(changed, what))
    }

    /// Lets the node's key end at `at` (Unix seconds). A relay that is asked about it afterwards refuses it, and ours
    /// closes its connections.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub(super) async fn expire(&self, at: i64) -> Result<(), store::Error> {
        let patch = PeerChange {
            node_id: self.read.id,
            key_expiry: Some(OffsetDateTime::from_unix_timestamp(at).ok()),
            ..PeerChange::default()
        };
        let ended = |of: &NodeRecord| NodeRecord { key_expiry: Some(at), expired: at <= now(), ..of.clone() };
        let node = self.change(What::PatchAndSelf(patch), ended).await?;
        if node.expired {
            self.core.revoked(&node.node_key);
        }
        Ok(())
    }

    /// Takes the node out of its network.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub(super) async fn delete(self) -> Result<(), store::Error> {
        self.core.0.store.commit(vec![Write::DeleteNode(self.read.id.0)]).await?;
        let node = {
            let mut locked = self.tailnet.lock();
            let node = self.record();
            locked.remove(&node);
            node
        };
        self.core.index(|keys| {
            keys.remove(&node.node_key);
        });
        self.core.revoked(&node.node_key);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use lacis_wire::control::DerpMap;

    use super::*;
    use crate::core::policy::PolicySource;
    use crate::core::tailnet::tests::node;
    use crate::core::{CoreConfig, TailnetConfig, janitor};
    use crate::store::{Loaded, Store};

    /// A core with one node, whose database is in that folder.
    async fn core(folder: &std::path::Path) -> Core {
        let (store, _) = Store::open(folder.join("db.sqlite")).await.unwrap();
        store.commit(vec![Write::InsertNode(node(1, "a").row("lab"))]).await.unwrap();
        store.close().await.unwrap();
        let (store, loaded) = Store::open(folder.join("db.sqlite")).await.unwrap();
        let tailnet = TailnetConfig {
            name: "lab".to_owned(),
            domain: "lab.example.com".to_owned(),
            magic_dns: true,
            nameservers: Vec::new(),
            override_local_dns: false,
            split: std::collections::BTreeMap::new(),
            search_domains: Vec::new(),
            extra_records: Vec::new(),
            policy: PolicySource::Database,
        };
        let config = CoreConfig {
            server_url: "https://mesh.example.org".to_owned(),
            tailnets: vec![tailnet],
            derp_map: DerpMap::default(),
            node_expiry: None,
            ephemeral_timeout: Duration::from_mins(1),
        };
        Core::open(config, store, loaded).unwrap()
    }

    async fn stored(folder: &std::path::Path) -> Loaded {
        Store::open(folder.join("db.sqlite")).await.unwrap().1
    }

    #[tokio::test]
    async fn what_is_written_later_waits_for_a_change_and_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let core = core(folder.path()).await;
        let tailnet = Arc::clone(core.tailnet("lab").unwrap());
        let id = NodeId(1);
        let locked = core.lock_node(&tailnet, id).await.unwrap();
        tailnet.lock().state.dirty.insert(id);
        let mut flush = Box::pin(janitor::flush(&core));
        assert!(flush.as_mut().now_or_never().is_none(), "it waits");
        assert!(tailnet.lock().state.dirty.contains(&id), "and has read nothing yet");
        let renamed = |of: &NodeRecord| NodeRecord { name: "b".to_owned(), ..of.clone() };
        locked.change(What::Whole, renamed).await.unwrap();
        drop(locked);
        flush.await;
        assert_eq!(stored(folder.path()).await.nodes[0].name, "b");
    }

    #[tokio::test]
    async fn a_change_keeps_what_the_node_reported_while_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let core = core(folder.path()).await;
        let tailnet = Arc::clone(core.tailnet("lab").unwrap());
        let locked = core.lock_node(&tailnet, NodeId(1)).await.unwrap();
        let renamed = |of: &NodeRecord| NodeRecord { name: "b".to_owned(), ..of.clone() };
        let mut changing = Box::pin(locked.change(What::Whole, renamed));
        assert!(changing.as_mut().now_or_never().is_none(), "it is on its way to the disk");
        {
            let mut editing = tailnet.lock();
            let current = editing.snapshot().nodes[0].as_ref().clone();
            editing.note(NodeRecord { cap: 7, ..current });
            editing.state.dirty.insert(NodeId(1));
        }
        let node = changing.await.unwrap();
        assert_eq!((node.name.as_str(), node.cap), ("b", 7));
        drop(locked);
        core.close().await.unwrap();
        let row = stored(folder.path()).await.nodes.remove(0);
        assert_eq!((row.name.as_str(), row.record.cap), ("b", 7));
    }
}
