//! What a map stream owes its viewer after some changes: which peers have appeared, changed and gone in its eyes, and
//! what of its own is new. Two viewers that are owed the same are sent the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lacis_policy::{Network, SshRule};
use lacis_wire::control::{FilterRule, NodeId, PeerChange};

use super::record::Shown;
use super::tailnet::{Change, Snapshot, What};

/// What a viewer knew when it was last sent something.
#[derive(Clone, Debug)]
pub(super) struct Before {
    pub(super) network: Network,
    /// The number of that network in its [`Snapshot`].
    pub(super) rules: u64,
    /// Its key had expired: it knew itself only.
    pub(super) expired: bool,
}

impl Before {
    pub(super) fn of(snapshot: &Snapshot, viewer: NodeId) -> Self {
        Self {
            network: snapshot.network.clone(),
            rules: snapshot.rules,
            expired: snapshot.has_expired(viewer),
        }
    }

    /// Does it say the same of `viewer` as that snapshot would?
    pub(super) fn is_of(&self, snapshot: &Snapshot, viewer: NodeId) -> bool {
        self.rules == snapshot.rules && self.expired == snapshot.has_expired(viewer)
    }
}

/// What one viewer is to be told.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Owed {
    /// Peers to be sent whole, in the order of their ids.
    pub(super) changed: Vec<(NodeId, Shown)>,
    pub(super) removed: Vec<NodeId>,
    /// Peers of which only patches are to be sent.
    pub(super) patched: Vec<NodeId>,
    pub(super) filter: Option<Vec<FilterRule>>,
    pub(super) ssh: Option<Vec<SshRule>>,
    /// The viewer itself, whole.
    pub(super) itself: bool,
}

impl Owed {
    /// What `viewer` is to be told of these changes, the last of which made `snapshot`; `None` for nothing.
    pub(super) fn find(
        changes: &[Arc<Change>],
        before: &Before,
        snapshot: &Snapshot,
        viewer: NodeId,
    ) -> Option<Self> {
        if snapshot.has_expired(viewer) {
            return Self::of_expired(changes, before, viewer);
        }
        let network = &snapshot.network;
        let mut changed: BTreeSet<NodeId> = BTreeSet::new();
        let mut removed: BTreeSet<NodeId> = BTreeSet::new();
        // Whether only patches were seen of it.
        let mut touched: BTreeMap<NodeId, bool> = BTreeMap::new();
        let mut itself = false;
        for change in changes {
            let Change::Node { node, what } = &**change else { continue };
            if *node == viewer {
                itself |= !matches!(what, What::Patch(_));
                continue;
            }
            match what {
                // Only the policy's view of it has changed, which the difference has, or what only the node itself is sent.
                What::Patch(patch) | What::PatchAndSelf(patch)
                    if *patch == (PeerChange { node_id: *node, ..PeerChange::default() }) => {}
                What::Patch(_) | What::PatchAndSelf(_) => {
                    touched.entry(*node).or_insert(true);
                }
                What::Whole | What::Removed => {
                    touched.insert(*node, false);
                }
            }
        }
        let (mut filter, mut ssh) = (None, None);
        if before.rules != snapshot.rules {
            let difference = network.difference(&before.network, viewer);
            changed.extend(difference.appeared);
            changed.extend(difference.altered);
            removed.extend(difference.vanished);
            itself |= difference.attributes || difference.itself;
            filter = difference.filter.then(|| network.filter(viewer));
            ssh = difference.ssh.then(|| network.ssh_rules(viewer));
        }
        let mut patched = Vec::new();
        for (node, patch) in touched {
            if snapshot.node(node).is_none() || !network.sees(viewer, node) {
                continue;
            }
            if !patch {
                changed.insert(node);
            } else if !changed.contains(&node) {
                patched.push(node);
            }
        }
        let nothing = changed.is_empty()
            && removed.is_empty()
            && patched.is_empty()
            && filter.is_none()
            && ssh.is_none()
            && !itself;
        let shown = |id| (id, Shown::of(network, viewer, id));
        (!nothing).then(|| Self {
            changed: changed.into_iter().map(shown).collect(),
            removed: removed.into_iter().collect(),
            patched,
            filter,
            ssh,
            itself,
        })
    }

    /// What a viewer is sent whose key has expired: at that moment that it has neither peers nor rules any more, and
    /// from then on only what changes of itself.
    fn of_expired(changes: &[Arc<Change>], before: &Before, viewer: NodeId) -> Option<Self> {
        let ends = !before.expired;
        let own = |change: &Arc<Change>| matches!(&**change, Change::Node { node, what } if *node == viewer && !matches!(what, What::Patch(_)));
        (ends || changes.iter().any(own)).then(|| Self {
            changed: Vec::new(),
            removed: if ends { before.network.peers(viewer).collect() } else { Vec::new() },
            patched: Vec::new(),
            filter: ends.then(Vec::new),
            ssh: ends.then(Vec::new),
            itself: true,
        })
    }
}
