//! Frames of a map stream: the first, and those that tell what changed.
//!
//! A frame of changes is the same for all who see the same, so it is encoded (and compressed) once and shared; only a
//! viewer that is itself among the changed gets one of its own.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use lacis_wire::control::{FilterRule, NodeId, PeerChange, UserProfile};
use lacis_wire::mapframe::{self, Compression};
use serde::Serialize;
use serde_json::value::RawValue;
use std::collections::{BTreeMap, VecDeque};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::record::NodeRecord;
use super::tailnet::{Change, Settings, Snapshot, What};

/// Frames that are kept: listeners wake within moments of each other.
const CACHED: usize = 16;

/// Which changes, and how they are written.
type Span = (u64, u64, Compression);

/// The latest shared frames.
#[derive(Debug, Default)]
pub(super) struct FrameCache(Mutex<VecDeque<(Span, Bytes)>>);

impl FrameCache {
    /// The frame for these changes, made by `build` if it is not there. The lock is held while it is made: the others
    /// that wake for the same change wait for it instead of making it too.
    fn get(
        &self,
        span: Span,
        build: impl FnOnce() -> Result<Bytes, mapframe::Error>,
    ) -> Result<Bytes, mapframe::Error> {
        let mut frames = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, frame)) = frames.iter().find(|(of, _)| *of == span) {
            return Ok(frame.clone());
        }
        let frame = build()?;
        if frames.len() == CACHED {
            frames.pop_front();
        }
        frames.push_back((span, frame.clone()));
        Ok(frame)
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
    packet_filters: BTreeMap<&'static str, Vec<FilterRule>>,
    user_profiles: Vec<UserProfile>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers: Vec<&'a RawValue>,
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
    #[serde(skip_serializing_if = "Vec::is_empty")]
    user_profiles: Vec<UserProfile>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers_changed: Vec<&'a RawValue>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers_removed: Vec<NodeId>,
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

/// Everything `viewer` may know.
pub(super) fn first(
    settings: &Settings,
    snapshot: &Snapshot,
    viewer: &NodeRecord,
    with_peers: bool,
    compression: Compression,
) -> Result<Bytes, mapframe::Error> {
    let mut users: Vec<_> = snapshot.nodes.iter().map(|node| node.user).collect();
    users.sort_unstable();
    users.dedup();
    let peers = snapshot.nodes.iter().filter(|node| with_peers && node.id != viewer.id);
    encode(
        &First {
            control_time: control_time(),
            node: viewer.self_node(&settings.domain),
            derp_map: &settings.derp_map,
            dns_config: &settings.dns,
            domain: &settings.domain,
            collect_services: false,
            packet_filters: BTreeMap::from([("base", vec![FilterRule::allow_all()])]),
            user_profiles: users.into_iter().map(|user| snapshot.profile(user)).collect(),
            peers: peers.map(|node| node.peer_json(&settings.domain)).collect(),
            debug: Switches { disable_log_tail: true },
        },
        compression,
    )
}

/// What one node's changes amount to.
enum Sum {
    Whole,
    Removed,
    Patch(PeerChange),
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

/// The frame for these changes as `viewer` is to be sent it.
pub(super) fn delta(
    settings: &Settings,
    cache: &FrameCache,
    changes: &[Change],
    snapshot: &Arc<Snapshot>,
    viewer: NodeId,
    compression: Compression,
) -> Result<Option<Bytes>, mapframe::Error> {
    let own = changes.iter().any(|change| change.node == viewer);
    if own && changes.iter().all(|change| change.node == viewer && matches!(change.what, What::Patch(_))) {
        return Ok(None);
    }
    let build = || {
        let mut sums: BTreeMap<NodeId, Sum> = BTreeMap::new();
        let mut tell_itself = false;
        for Change { node, what } in changes {
            if *node == viewer {
                tell_itself |= !matches!(what, What::Patch(_));
                continue;
            }
            let sum = match (what, sums.remove(node)) {
                (What::Removed, _) => Sum::Removed,
                (What::Whole, _) | (_, Some(Sum::Whole | Sum::Removed)) => Sum::Whole,
                (What::Patch(patch) | What::PatchAndSelf(patch), None) => Sum::Patch(patch.clone()),
                (What::Patch(patch) | What::PatchAndSelf(patch), Some(Sum::Patch(mut sum))) => {
                    merge(&mut sum, patch);
                    Sum::Patch(sum)
                }
            };
            sums.insert(*node, sum);
        }
        let itself = snapshot.node(viewer).filter(|_| tell_itself);
        let mut frame = Delta {
            control_time: control_time(),
            node: itself.map(|node| node.self_node(&settings.domain)),
            user_profiles: Vec::new(),
            peers_changed: Vec::new(),
            peers_removed: Vec::new(),
            peers_changed_patch: Vec::new(),
        };
        // It may be somebody else's now.
        let mut users: Vec<_> = itself.map(|node| node.user).into_iter().collect();
        for (id, sum) in sums {
            match (sum, snapshot.node(id)) {
                (Sum::Whole, Some(node)) => {
                    users.push(node.user);
                    frame.peers_changed.push(node.peer_json(&settings.domain));
                }
                (Sum::Patch(patch), Some(_)) => {
                    let nothing = PeerChange { node_id: id, ..PeerChange::default() };
                    if patch != nothing {
                        frame.peers_changed_patch.push(patch);
                    }
                }
                (Sum::Removed | Sum::Whole | Sum::Patch(_), _) => frame.peers_removed.push(id),
            }
        }
        users.sort_unstable();
        users.dedup();
        frame.user_profiles = users.into_iter().map(|user| snapshot.profile(user)).collect();
        encode(&frame, compression)
    };
    if own {
        return build().map(Some);
    }
    let cursor = snapshot.head - changes.len() as u64;
    cache.get((cursor, snapshot.head, compression), build).map(Some)
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
