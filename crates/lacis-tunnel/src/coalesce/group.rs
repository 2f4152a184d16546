//! One group of packets that become one write: what may join it, and the headers it gets.

use std::net::IpAddr;
use std::ops::Range;

use crate::checksum;
use crate::packet::{IPV4_HEADER, IPV6_HEADER, Parsed, TCP_ACK, TCP_PSH, protocol};
use crate::segment::{GSO_TCP4, GSO_TCP6, GSO_UDP, NEEDS_CSUM, TCP_CSUM, UDP_CSUM, VnetHeader};
use crate::sys::tun::{MAX_PACKET, VNET_LEN};

/// Packets in one write: what all kernels take as one UDP super-packet.
pub(crate) const MAX_PIECES: usize = 64;

/// Payload of a packet that joined a group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) start: usize,
    pub(super) len: usize,
    /// The next one of the same group.
    pub(super) next: usize,
}

/// What makes a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    ports: (u16, u16),
    proto: u8,
    src: IpAddr,
    dst: IpAddr,
}

#[derive(Clone, Debug)]
pub(super) struct Group {
    /// `None` for what has no ports.
    pub(super) flow: Option<Flow>,
    /// Nothing may join.
    pub(super) closed: bool,
    pub(super) headers: usize,
    /// Payload of the first packet, which is the segment size.
    pub(super) payload: usize,
    pub(super) first_piece: Option<usize>,
    pub(super) last_piece: Option<usize>,
    start: usize,
    l4: usize,
    total: usize,
    count: usize,
    next_seq: u32,
    push: bool,
    verified: bool,
}

impl Group {
    /// A group of the one packet at `start`.
    pub(super) fn new(buffer: &[u8], start: usize, parsed: &Parsed, tcp: bool, udp: bool) -> Self {
        let packet = &buffer[start..start + parsed.len];
        let transport = !parsed.fragment && matches!(parsed.proto, protocol::TCP | protocol::UDP);
        let mut group = Self {
            flow: transport.then_some(Flow {
                ports: (parsed.src_port, parsed.dst_port),
                proto: parsed.proto,
                src: parsed.src,
                dst: parsed.dst,
            }),
            closed: true,
            headers: parsed.len,
            payload: 0,
            first_piece: None,
            last_piece: None,
            start,
            l4: parsed.l4,
            total: parsed.len,
            count: 1,
            next_seq: 0,
            push: false,
            verified: false,
        };
        let plain_ip = parsed.l4 == if parsed.src.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER };
        if !transport || !plain_ip {
            return group;
        }
        let body = &packet[parsed.l4..];
        if parsed.proto == protocol::TCP {
            let header = usize::from(body[12] >> 4) * 4;
            // No SYN, FIN, RST, URG, nor congestion marks: only plain data.
            if !tcp || header < 20 || header >= body.len() || parsed.flags & !TCP_PSH != TCP_ACK {
                return group;
            }
            group.headers = parsed.l4 + header;
            group.payload = body.len() - header;
            let seq = u32::from_be_bytes([body[4], body[5], body[6], body[7]]);
            group.next_seq = seq.wrapping_add(group.payload as u32);
            group.push = parsed.flags & TCP_PSH != 0;
            group.closed = group.push;
        } else {
            let length = usize::from(u16::from_be_bytes([body[4], body[5]]));
            // Without a checksum there is nothing to verify, so it goes alone.
            if !udp || length != body.len() || length == 8 || body[6..8] == [0, 0] {
                return group;
            }
            group.headers = parsed.l4 + 8;
            group.payload = body.len() - 8;
            group.closed = false;
        }
        group
    }

    /// Takes in the packet of `new` if it continues this group. The caller links the payload.
    pub(super) fn append(&mut self, buffer: &[u8], new: &Self) -> bool {
        if self.closed
            || new.payload == 0
            || new.payload > self.payload
            || new.headers != self.headers
            || self.count >= MAX_PIECES
            || self.total + new.payload > MAX_PACKET
            || !self.same_headers(buffer, new)
        {
            return false;
        }
        if self.is_tcp() && new.next_seq.wrapping_sub(new.payload as u32) != self.next_seq {
            return false;
        }
        if !self.verified && !self.verify(buffer) {
            return false;
        }
        self.verified = true;
        if !new.verify(buffer) {
            return false;
        }
        self.total += new.payload;
        self.count += 1;
        self.next_seq = new.next_seq;
        self.push |= new.push;
        // A shorter one ends a super-packet, since all but the last have the same size.
        self.closed = new.payload < self.payload || new.push;
        true
    }

    fn is_tcp(&self) -> bool {
        self.flow.is_some_and(|flow| flow.proto == protocol::TCP)
    }

    pub(super) fn is_udp(&self) -> bool {
        self.flow.is_some_and(|flow| flow.proto == protocol::UDP)
    }

    /// Everything but lengths, numbers and checksums is equal, so that one header can stand for both.
    fn same_headers(&self, buffer: &[u8], new: &Self) -> bool {
        let ours = &buffer[self.start..self.start + self.headers];
        let theirs = &buffer[new.start..new.start + new.headers];
        let same = |range: Range<usize>| ours[range.clone()] == theirs[range];
        let l4 = self.l4;
        let ip = if l4 == IPV4_HEADER {
            // type of service; fragment flags and TTL
            same(0..2) && same(6..9)
        } else {
            // class and flow label; next header and hop limit
            same(0..4) && same(6..8)
        };
        // acknowledgement and length; window; options (flags are those of plain data in both)
        ip && (!self.is_tcp()
            || (same(l4 + 8..l4 + 13) && same(l4 + 14..l4 + 16) && same(l4 + 18..self.headers)))
    }

    /// Whether the transport checksum of the (first) packet is right.
    fn verify(&self, buffer: &[u8]) -> bool {
        let Some(flow) = self.flow else { return false };
        let packet = &buffer[self.start..self.start + self.headers + self.payload];
        let body = &packet[self.l4..];
        if self.l4 == IPV4_HEADER && checksum::fold(checksum::sum(&packet[..self.l4])) != 0xffff {
            return false;
        }
        let sum = checksum::pseudo_of(packet, flow.proto, body.len()) + checksum::sum(body);
        checksum::fold(sum) == 0xffff
    }

    /// Writes the device's header and, for a merged group, the headers of the whole. Returns where the first piece lies.
    pub(super) fn finish(&self, buffer: &mut [u8]) -> Range<usize> {
        let front = self.start - VNET_LEN;
        let (vnet, packet) = buffer[front..].split_at_mut(VNET_LEN);
        let Some(flow) = self.flow.filter(|_| self.count > 1) else {
            vnet.copy_from_slice(&super::plain_header());
            return front..self.start + self.total;
        };
        let l4 = self.l4;
        let tcp = flow.proto == protocol::TCP;
        let body = self.total - l4;
        if l4 == IPV4_HEADER {
            packet[2..4].copy_from_slice(&(self.total as u16).to_be_bytes());
            packet[10..12].fill(0);
            let value = !checksum::fold(checksum::sum(&packet[..IPV4_HEADER]));
            packet[10..12].copy_from_slice(&value.to_be_bytes());
        } else {
            packet[4..6].copy_from_slice(&(body as u16).to_be_bytes());
        }
        // The kernel adds the rest to the pseudo-header's sum, which is therefore not complemented.
        let sum = checksum::fold(checksum::pseudo_of(packet, flow.proto, body));
        let csum_offset = if tcp { TCP_CSUM } else { UDP_CSUM };
        packet[l4 + csum_offset..l4 + csum_offset + 2].copy_from_slice(&sum.to_be_bytes());
        if tcp {
            if self.push {
                packet[l4 + 13] |= TCP_PSH;
            }
        } else {
            packet[l4 + 4..l4 + 6].copy_from_slice(&(body as u16).to_be_bytes());
        }
        VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: match (tcp, l4 == IPV4_HEADER) {
                (true, true) => GSO_TCP4,
                (true, false) => GSO_TCP6,
                (false, _) => GSO_UDP,
            },
            header_len: self.headers as u16,
            gso_size: self.payload as u16,
            csum_start: l4 as u16,
            csum_offset: csum_offset as u16,
        }
        .write(vnet);
        front..self.start + self.headers + self.payload
    }
}
