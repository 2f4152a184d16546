//! Counters: of each peer and of the whole thread, written without locks by the packet thread.
//!
//! The packet thread is the only writer, except for the few that other threads add to; so its additions are a load
//! and a store, not a locked instruction for each packet.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// One counter with a single usual writer.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds as the only writer.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Adds as one of several writers.
    pub(crate) fn add_shared(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The live counters.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        /// A reading of all counters since the start. Packets unless the name says otherwise.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            pub(crate) fn read(&self) -> Stats {
                Stats { $($name: self.$name.get(),)* }
            }
        }

        impl Stats {
            /// Names and values, for metrics.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Packets from the host, after segmentation.
    tun_read,
    /// Reads from the device: fewer than packets when the kernel hands over super-packets.
    tun_reads,
    /// Packets given to the host, before merging.
    tun_written,
    /// Writes to the device.
    tun_writes,
    /// WireGuard datagrams sent by UDP.
    udp_sent,
    /// UDP send calls.
    udp_sends,
    /// Datagrams received by UDP.
    udp_received,
    /// UDP receive calls that returned something.
    udp_receives,
    /// WireGuard packets handed to the relay output.
    relay_sent,
    /// WireGuard packets received by relay.
    relay_received,
    /// Dropped: the relay output was full.
    relay_full,
    /// Dropped: more relayed packets waited for the packet thread than it takes.
    relay_in_full,
    /// Lost: datagrams, packets and orders of the client, since too much waited for the packet thread.
    commands_full,
    /// Dropped: the output for STUN and disco datagrams was full.
    udp_output_full,
    /// Packets to the resolver that were answered on the packet thread.
    quad100_answered,
    /// Dropped: the output to the resolver was full.
    quad100_full,
    /// Events lost: the output was full.
    events_full,
    /// Dropped from the host: not an IP packet, or cut short.
    out_malformed,
    /// Dropped from the host: multicast, link-local or TSMP.
    out_filtered,
    /// Dropped from the host: no peer has this destination.
    out_no_route,
    /// Dropped from the host: the peer has no path.
    out_no_path,
    /// Dropped: no node key has been set yet.
    no_identity,
    /// Failed UDP sends.
    udp_send_errors,
    /// Sends that had to be repeated one datagram at a time.
    udp_gso_fallbacks,
    /// Dropped by UDP: not WireGuard, STUN or disco.
    udp_unknown,
    /// Dropped: WireGuard packet for no session of ours, or not from the peer it claims.
    in_no_session,
    /// Dropped: did not open (bad tag, replay, malformed).
    in_invalid,
    /// Dropped: handshakes over the limit.
    in_handshake_limited,
    /// Dropped: handshakes stamped no later than one before, by a peer whose clock was set back or by a replay.
    in_stale_handshake,
    /// Dropped: handshakes from keys that are no peer.
    in_unknown_peer,
    /// Dropped: inner source address does not belong to the peer.
    in_wrong_source,
    /// Dropped by the packet filter: no rule allows it.
    in_filtered,
    /// Dropped by the packet filter: destination is not ours.
    in_not_local,
    /// Dropped by the packet filter: not an IP packet, cut short, source-routed, or a fragment that could overwrite
    /// what another was judged by.
    in_malformed,
    /// Dropped by the packet filter: from an address that nobody in a mesh can have.
    in_bad_source,
    /// Dropped by the packet filter: to a multicast group.
    in_multicast,
    /// Dropped by the packet filter: to a link-local address.
    in_link_local,
    /// Dropped by the packet filter: a later fragment of a packet that was not let in.
    in_fragment,
    /// Dropped by the packet filter: an ICMP error about nothing that this node has sent to the peer.
    in_stray_error,
    /// Packets of peers to 4via6 routes that were translated.
    via_in,
    /// Packets of this host that were translated for peers.
    via_out,
    /// Not translated: fragments of packets that are not whole yet, and what has no counterpart in the other family.
    via_dropped,
    /// In-tunnel messages and ping answers taken out of the stream.
    in_consumed,
    /// Failed writes to the device (it is not up, or gone).
    tun_write_errors,
}

/// The live counters of a peer.
#[derive(Debug, Default)]
pub(crate) struct PeerCounters {
    pub(crate) rx_bytes: Counter,
    pub(crate) tx_bytes: Counter,
    pub(crate) rx_packets: Counter,
    pub(crate) tx_packets: Counter,
    /// Milliseconds since the Unix epoch, 0 for never; so the next two.
    pub(crate) last_handshake: Counter,
    pub(crate) last_send: Counter,
    pub(crate) last_receive: Counter,
}

/// A reading of a peer's counters. Bytes are those of WireGuard datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerStats {
    /// Bytes of packets received and opened.
    pub rx_bytes: u64,
    /// Bytes of packets sealed and sent.
    pub tx_bytes: u64,
    /// Packets received and opened.
    pub rx_packets: u64,
    /// Packets sealed and sent.
    pub tx_packets: u64,
    /// When the last session began to work.
    pub last_handshake: Option<SystemTime>,
    /// When this host last sent it a data packet.
    pub last_send: Option<SystemTime>,
    /// When a packet of it last opened.
    pub last_receive: Option<SystemTime>,
}

fn time(counter: &Counter) -> Option<SystemTime> {
    let millis = counter.get();
    (millis != 0).then(|| SystemTime::UNIX_EPOCH + Duration::from_millis(millis))
}

/// Milliseconds since the Unix epoch, the form of the times above.
pub(crate) fn unix_millis() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

impl PeerCounters {
    pub(crate) fn read(&self) -> PeerStats {
        PeerStats {
            rx_bytes: self.rx_bytes.get(),
            tx_bytes: self.tx_bytes.get(),
            rx_packets: self.rx_packets.get(),
            tx_packets: self.tx_packets.get(),
            last_handshake: time(&self.last_handshake),
            last_send: time(&self.last_send),
            last_receive: time(&self.last_receive),
        }
    }
}
