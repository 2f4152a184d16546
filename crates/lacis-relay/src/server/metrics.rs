//! The relay's counters. The ones on the packet path are resolved once; labels are looked up only for rare events.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What was in a packet, as far as a relay can see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Kind {
    Disco,
    Other,
}

/// Why a packet was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Reason {
    /// Nobody of that key is here.
    UnknownDestination,
    /// The oldest in a full queue.
    QueueHead,
    /// Still queued when the connection ended.
    Gone,
    /// Longer than this receiver can take.
    TooLong,
}

/// Why a login failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Refusal {
    /// Not admitted.
    Denied,
    /// Broke the protocol, or another key than claimed.
    Protocol,
    /// Took too long, or left.
    Incomplete,
    /// Gave way to a newer connection.
    Crowded,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct DropLabels {
    reason: Reason,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RefusalLabels {
    reason: Refusal,
}

#[derive(Debug, Default)]
pub(super) struct Metrics {
    pub(super) accepts: Counter,
    pub(super) websocket_accepts: Counter,
    pub(super) logins: Counter,
    refused: Family<RefusalLabels, Counter>,
    pub(super) refused_later: Counter,
    pub(super) connections: Gauge,
    pub(super) home_connections: Gauge,
    pub(super) duplicate_connections: Gauge,
    pub(super) packets_received: Counter,
    pub(super) bytes_received: Counter,
    pub(super) packets_queued: Counter,
    pub(super) bytes_sent: Counter,
    drops: Family<DropLabels, Counter>,
    pub(super) peer_gone_disconnected: Counter,
    pub(super) peer_gone_not_here: Counter,
    pub(super) pings: Counter,
    pub(super) unknown_frames: Counter,
    pub(super) write_timeouts: Counter,
}

impl Metrics {
    /// Counts packets that nobody will receive.
    pub(super) fn dropped(&self, reason: Reason, kind: Kind, count: usize) {
        if count > 0 {
            self.drops.get_or_create(&DropLabels { reason, kind }).inc_by(count as u64);
        }
    }

    pub(super) fn refused(&self, reason: Refusal) {
        self.refused.get_or_create(&RefusalLabels { reason }).inc();
    }

    #[cfg(test)]
    pub(super) fn dropped_count(&self, reason: Reason, kind: Kind) -> u64 {
        self.drops.get_or_create(&DropLabels { reason, kind }).get()
    }

    #[cfg(test)]
    pub(super) fn refused_count(&self, reason: Refusal) -> u64 {
        self.refused.get_or_create(&RefusalLabels { reason }).get()
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("lacis_relay");
        r.register("accepts", "Connections upgraded to DERP", self.accepts.clone());
        r.register("websocket_accepts", "Of these, by WebSocket", self.websocket_accepts.clone());
        r.register("logins", "Clients admitted", self.logins.clone());
        r.register("logins_refused", "Connections that ended before they were clients", self.refused.clone());
        r.register(
            "refused_later",
            "Clients disconnected because the admission refused them when it was asked again",
            self.refused_later.clone(),
        );
        r.register("connections", "Clients connected now", self.connections.clone());
        r.register("home_connections", "Of these, at home here", self.home_connections.clone());
        r.register(
            "duplicate_connections",
            "Connections beyond the first of their node key",
            self.duplicate_connections.clone(),
        );
        r.register("packets_received", "Packets read from clients", self.packets_received.clone());
        r.register("bytes_received", "Bytes of these, with frame headers", self.bytes_received.clone());
        r.register("packets_queued", "Packets put into a client's queue", self.packets_queued.clone());
        r.register("bytes_sent", "Bytes written to clients", self.bytes_sent.clone());
        r.register("packets_dropped", "Packets not delivered", self.drops.clone());
        r.register(
            "peer_gone_disconnected",
            "Clients told that a peer has left",
            self.peer_gone_disconnected.clone(),
        );
        r.register(
            "peer_gone_not_here",
            "Clients told that a peer is not here",
            self.peer_gone_not_here.clone(),
        );
        r.register("pings", "Pings answered", self.pings.clone());
        r.register("unknown_frames", "Frames skipped", self.unknown_frames.clone());
        r.register("write_timeouts", "Clients closed because they took nothing", self.write_timeouts.clone());
    }
}
