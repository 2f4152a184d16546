//! What a node says of itself in a map request, and who must hear of it.

use std::sync::Arc;

use lacis_wire::control::{Hostinfo, MapRequest, PeerChange};

use super::Core;
use super::record::{NodeRecord, cap_for_peers};
use super::registration::{follow_name, merged};
use super::tailnet::{Tailnet, What};

impl Core {
    /// Takes over host facts, endpoints, disco key and version. Peers hear of what concerns them, at once.
    pub fn update(&self, tailnet: &Arc<Tailnet>, node: &NodeRecord, request: MapRequest) {
        let mut locked = tailnet.lock();
        let snapshot = locked.snapshot();
        let Some(current) = snapshot.node(node.id).filter(|current| current.node_key == node.node_key) else {
            return;
        };
        let hostinfo = request.hostinfo.map(|new| merged(&current.hostinfo, new));
        let mut patch = PeerChange { node_id: node.id, ..PeerChange::default() };
        let mut next = (**current).clone();
        let mut whole = false;
        let mut only_kept = false;
        if let Some(hostinfo) = hostinfo.filter(|new| *new != *current.hostinfo) {
            let home = hostinfo.net_info.as_ref().map_or(0, |info| info.preferred_derp);
            if home != 0 && home != current.home_derp() {
                patch.derp_region = home;
            }
            whole |= without_net_info(&hostinfo) != without_net_info(&current.hostinfo);
            // Latencies and the like are kept, and nobody is told.
            only_kept = true;
            next.name = follow_name(&mut locked.state.names, current, &hostinfo.hostname);
            next.hostinfo = Arc::new(hostinfo);
        }
        if let Some(endpoints) = request.endpoints.filter(|new| *new != current.endpoints) {
            patch.endpoints = Some(endpoints.clone());
            next.endpoints = endpoints;
        }
        if let Some(disco) = request.disco_key.filter(|new| current.disco_key != Some(*new)) {
            patch.disco_key = Some(disco);
            next.disco_key = Some(disco);
        }
        if request.version != current.cap {
            patch.cap = cap_for_peers(request.version, &next.hostinfo);
            next.cap = request.version;
        }
        let nothing = PeerChange { node_id: node.id, ..PeerChange::default() };
        if whole {
            locked.put(next, What::Whole);
        } else if patch != nothing {
            locked.put(next, What::Patch(patch));
        } else if only_kept {
            locked.note(next);
        } else {
            return;
        }
        locked.state.dirty.insert(node.id);
    }
}

fn without_net_info(hostinfo: &Hostinfo) -> Hostinfo {
    Hostinfo { net_info: None, ..hostinfo.clone() }
}
