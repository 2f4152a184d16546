//! Frames of a map stream: the first, and those that tell what changed.
//!
//! Each viewer is told of the peers that the policy lets it see, as it sees them, and of its own filter. Most changes
//! are the same for many: a frame of changes is encoded (and compressed) once for all that are owed the same ([`Owed`]);
//! only a viewer that is told of itself gets one of its own.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use lacis_policy::SshRule;
use lacis_wire::control::{FilterRule, NodeId, PeerChange, UserId, UserProfile};
use lacis_wire::mapframe::{self, Compression};
use serde::Serialize;
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::owed::{Before, Owed};
use super::record::{NodeRecord, Shown};
use super::tailnet::{Change, Settings, Snapshot, What};

/// Frames that are kept: listeners wake within moments of each other, and the policy divides them into groups.
const CACHED: usize = 64;

/// A frame that is being made, or is.
type Slot = Arc<Mutex<Option<Bytes>>>;

/// The latest shared frames.
#[derive(Debug, Default)]
pub(super) struct FrameCache(Mutex<VecDeque<(Key, Slot)>>);

/// What a frame says, and how it is written.
#[derive(Debug, PartialEq)]
struct Key {
    from: u64,
    to: u64,
    compression: Compression,
    owed: Owed,
}

impl FrameCache {
    /// The frame for these changes, made by `build` if it is not there. Others that are owed the same wait for it
    /// instead of making it too.
    fn get(
        &self,
        key: Key,
        build: impl FnOnce(&Owed) -> Result<Bytes, mapframe::Error>,
    ) -> Result<Bytes, mapframe::Error> {
        let mut frames = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = frames.iter().rev().find(|(of, _)| *of == key).map(|(_, slot)| Arc::clone(slot));
        let Some(slot) = known else {
            let owed = key.owed.clone();
            let slot = Slot::default();
            // Nobody else has it: this does not wait.
            let mut made = slot.lock().unwrap_or_else(PoisonError::into_inner);
            if frames.len() == CACHED {
                frames.pop_front();
            }
            frames.push_back((key, Arc::clone(&slot)));
            drop(frames);
            let frame = build(&owed)?;
            *made = Some(frame.clone());
            return Ok(frame);
        };
        drop(frames);
        let mut made = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(frame) = &*made {
            return Ok(frame.clone());
        }
        // Whoever began failed.
        let frame = build(&key.owed)?;
        *made = Some(frame.clone());
        Ok(frame)
    }
}

#[derive(Serialize)]
struct SshPolicy {
    rules: Vec<serde_json::Value>,
}

impl SshPolicy {
    fn of(rules: &[SshRule], settings: &Settings) -> Self {
        Self { rules: rules.iter().map(|rule| rule.to_wire(&settings.server_url)).collect() }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct First<'a> {
    control_time: String,
    node: lacis_wire::control::Node,
    #[serde(rename = "DERPMap")]
    derp_map: &'a RawValue,
    #[serde(rename = "DNSConfig")]
    dns_config: &'a RawValue,
    domain: &'a str,
    collect_services: bool,
    packet_filters: BTreeMap<&'static str, &'a [FilterRule]>,
    #[serde(rename = "SSHPolicy", skip_serializing_if = "Option::is_none")]
    ssh_policy: Option<SshPolicy>,
    user_profiles: Vec<UserProfile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    health: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers: Vec<Cow<'a, RawValue>>,
    debug: Switches,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Switches {
    disable_log_tail: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Delta<'a> {
    control_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<lacis_wire::control::Node>,
    #[serde(skip_serializing_if = "Option::is_none")]
    packet_filters: Option<BTreeMap<&'static str, &'a [FilterRule]>>,
    #[serde(rename = "SSHPolicy", skip_serializing_if = "Option::is_none")]
    ssh_policy: Option<SshPolicy>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    user_profiles: Vec<UserProfile>,
    /// Sent with the node itself; none clears what was sent before.
    #[serde(skip_serializing_if = "Option::is_none")]
    health: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers_changed: Vec<Cow<'a, RawValue>>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    peers_removed: &'a [NodeId],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers_changed_patch: Vec<PeerChange>,
}

/// Sent in every frame that says anything: clients correct their clocks by it, and it keeps every frame longer than a
/// keep-alive (a client takes a frame of exactly that length for one).
fn control_time() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}

fn encode<T: Serialize>(message: &T, compression: Compression) -> Result<Bytes, mapframe::Error> {
    mapframe::encode(&lacis_wire::control::to_json(message), compression)
}

/// The name under which clients keep the filter.
const FILTER: &str = "base";

/// What a frame that says everything is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whole {
    /// A client that knows nothing.
    First,
    /// The same, and peers do not interest it.
    Alone,
    /// In the middle of a stream: what it is not told stays as it was.
    Again,
}

/// Everything `viewer` may know: only itself, once its key has expired.
pub(super) fn whole(
    settings: &Settings,
    snapshot: &Snapshot,
    viewer: &NodeRecord,
    whole: Whole,
    compression: Compression,
) -> Result<Bytes, mapframe::Error> {
    let network = &snapshot.network;
    let mut users = vec![viewer.user];
    let mut peers = Vec::new();
    if whole != Whole::Alone && !viewer.expired {
        for node in network.peers(viewer.id).filter_map(|id| snapshot.node(id)) {
            users.push(node.user);
            peers.push(node.peer_json(&settings.domain, network, &Shown::of(network, viewer.id, node.id)));
        }
    }
    let (filter, ssh) = if viewer.expired {
        (Vec::new(), Vec::new())
    } else {
        (network.filter(viewer.id), network.ssh_rules(viewer.id))
    };
    encode(
        &First {
            control_time: control_time(),
            node: viewer.self_node(&settings.domain, network),
            derp_map: &settings.derp_map,
            dns_config: &settings.dns,
            domain: &settings.domain,
            collect_services: false,
            packet_filters: BTreeMap::from([(FILTER, filter.as_slice())]),
            ssh_policy: (whole == Whole::Again || !ssh.is_empty()).then(|| SshPolicy::of(&ssh, settings)),
            user_profiles: profiles(snapshot, users),
            health: (whole == Whole::Again || !viewer.copies.is_empty()).then(|| viewer.health()),
            peers,
            debug: Switches { disable_log_tail: true },
        },
        compression,
    )
}

fn profiles(snapshot: &Snapshot, mut users: Vec<Option<UserId>>) -> Vec<UserProfile> {
    users.sort_unstable();
    users.dedup();
    users.into_iter().map(|user| snapshot.profile(user)).collect()
}

fn merge(into: &mut PeerChange, from: &PeerChange) {
    macro_rules! take {
        ($($field:ident),*) => { $( if from.$field.is_some() { into.$field.clone_from(&from.$field); } )* };
    }
    take!(cap_map, endpoints, key, disco_key, online, last_seen, key_expiry);
    if from.online == Some(true) {
        // A node that is there and was last seen some time ago confuses clients.
        into.last_seen = None;
    }
    if from.derp_region != 0 {
        into.derp_region = from.derp_region;
    }
    if from.cap != 0 {
        into.cap = from.cap;
    }
}

/// What the patches of each of these nodes amount to, where that is anything.
fn patches(changes: &[Arc<Change>], nodes: &[NodeId]) -> Vec<PeerChange> {
    let mut sums: BTreeMap<NodeId, PeerChange> =
        nodes.iter().map(|id| (*id, PeerChange { node_id: *id, ..PeerChange::default() })).collect();
    for change in changes {
        if let Change::Node { node, what: What::Patch(patch) | What::PatchAndSelf(patch) } = &**change
            && let Some(sum) = sums.get_mut(node)
        {
            merge(sum, patch);
        }
    }
    sums.retain(|id, sum| *sum != PeerChange { node_id: *id, ..PeerChange::default() });
    sums.into_values().collect()
}

/// The frame for these changes as `viewer` is to be sent it; `None` when nothing of them concerns it. What it knew
/// before is `before`.
pub(super) fn delta(
    settings: &Settings,
    cache: &FrameCache,
    changes: &[Arc<Change>],
    before: &Before,
    snapshot: &Snapshot,
    viewer: NodeId,
    compression: Compression,
) -> Result<Option<Bytes>, mapframe::Error> {
    let Some(owed) = Owed::find(changes, before, snapshot, viewer) else { return Ok(None) };
    let itself = if owed.itself { snapshot.node(viewer) } else { None };
    let build = |owed: &Owed| {
        // It may be somebody else's now.
        let mut users: Vec<_> = itself.map(|node| node.user).into_iter().collect();
        let mut peers_changed = Vec::with_capacity(owed.changed.len());
        for (id, shown) in &owed.changed {
            if let Some(node) = snapshot.node(*id) {
                users.push(node.user);
                peers_changed.push(node.peer_json(&settings.domain, &snapshot.network, shown));
            }
        }
        let frame = Delta {
            control_time: control_time(),
            node: itself.map(|node| node.self_node(&settings.domain, &snapshot.network)),
            packet_filters: owed.filter.as_ref().map(|rules| BTreeMap::from([(FILTER, rules.as_slice())])),
            ssh_policy: owed.ssh.as_deref().map(|rules| SshPolicy::of(rules, settings)),
            user_profiles: profiles(snapshot, users),
            health: itself.map(|node| node.health()),
            peers_changed,
            peers_removed: &owed.removed,
            peers_changed_patch: patches(changes, &owed.patched),
        };
        encode(&frame, compression)
    };
    if itself.is_some() {
        return build(&owed).map(Some);
    }
    let from = snapshot.head - changes.len() as u64;
    cache.get(Key { from, to: snapshot.head, compression, owed }, build).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_came_back_has_not_been_seen_some_time_ago() {
        let away = PeerChange {
            online: Some(false),
            last_seen: Some(OffsetDateTime::UNIX_EPOCH),
            derp_region: 7,
            ..PeerChange::default()
        };
        let mut sum = away.clone();
        merge(&mut sum, &PeerChange { online: Some(true), ..PeerChange::default() });
        assert_eq!((sum.online, sum.last_seen, sum.derp_region), (Some(true), None, 7));
        merge(&mut sum, &away);
        assert_eq!(sum, away);
    }
}
