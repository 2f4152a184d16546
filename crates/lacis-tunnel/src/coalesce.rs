//! Merges the decrypted packets of a batch into super-packets, so that the host's stack is entered once for many.
//!
//! Packets are decrypted straight into the buffer here, each with room for the device's header before it. Packets
//! of one TCP or UDP flow that follow one another form a group, which is written by one `writev` of its pieces.
//! Merged writes are not verified by the kernel, so checksums are verified here before anything is merged; single
//! packets go as they are and the kernel verifies them. The order within a flow is kept.

mod group;
#[cfg(test)]
mod tests;

use std::io::IoSlice;

use crate::packet::Parsed;
use crate::segment::VnetHeader;
use crate::sys::tun::VNET_LEN;

pub(crate) use group::MAX_PIECES;
use group::{Group, Piece};

/// Room for two full receive batches, so that the last packets of one need not begin a write of their own.
const BUFFER: usize = 192 << 10;

/// Where a finished packet goes: pieces of one write and the number of packets in it.
pub(crate) trait Sink {
    fn write(&mut self, pieces: &[IoSlice<'_>], packets: u64, merged_udp: bool);
}

#[derive(Debug)]
pub(crate) struct Coalescer {
    buffer: Box<[u8]>,
    used: usize,
    groups: Vec<Group>,
    pieces: Vec<Piece>,
    tcp: bool,
    udp: bool,
}

impl Coalescer {
    /// `tcp`, `udp`: what the device takes as super-packets.
    pub(crate) fn new(tcp: bool, udp: bool) -> Self {
        Self {
            buffer: vec![0; BUFFER].into_boxed_slice(),
            used: 0,
            groups: Vec::with_capacity(128),
            pieces: Vec::with_capacity(256),
            tcp,
            udp,
        }
    }

    /// Never merge UDP again: the device has refused it.
    pub(crate) fn stop_merging_udp(&mut self) {
        self.udp = false;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Whether [`Self::space`] would give `len` bytes.
    pub(crate) fn has_room(&self, len: usize) -> bool {
        self.used + VNET_LEN + len <= self.buffer.len()
    }

    /// Where the next packet may be written: at least `len` bytes, or fewer when there is no room.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        let start = (self.used + VNET_LEN).min(self.buffer.len());
        &mut self.buffer[start..]
    }

    /// Takes over the packet that was written to [`Self::space`] with the length that its IP header has.
    pub(crate) fn push(&mut self, parsed: &Parsed) {
        let start = self.used + VNET_LEN;
        self.used = start + parsed.len;
        let new = Group::new(&self.buffer, start, parsed, self.tcp, self.udp);
        if let Some(flow) = new.flow
            && let Some(index) = self.groups.iter().rposition(|group| group.flow == Some(flow))
        {
            let group = &mut self.groups[index];
            if group.append(&self.buffer, &new) {
                let piece = self.pieces.len();
                self.pieces.push(Piece { start: start + new.headers, len: new.payload, next: usize::MAX });
                match group.last_piece {
                    Some(last) => self.pieces[last].next = piece,
                    None => group.first_piece = Some(piece),
                }
                group.last_piece = Some(piece);
                return;
            }
            group.closed = true;
        }
        self.groups.push(new);
    }

    /// Writes everything out and begins anew.
    pub(crate) fn flush(&mut self, sink: &mut impl Sink) {
        for group in &self.groups {
            let first = group.finish(&mut self.buffer);
            let mut slices = [IoSlice::new(&[]); MAX_PIECES];
            slices[0] = IoSlice::new(&self.buffer[first]);
            let mut count = 1;
            let mut piece = group.first_piece;
            while let Some(index) = piece
                && let Some(Piece { start, len, next }) = self.pieces.get(index).copied()
                && count < MAX_PIECES
            {
                slices[count] = IoSlice::new(&self.buffer[start..start + len]);
                count += 1;
                piece = Some(next);
            }
            sink.write(&slices[..count], count as u64, count > 1 && group.is_udp());
        }
        self.groups.clear();
        self.pieces.clear();
        self.used = 0;
    }
}

/// Writes the header of a packet that goes alone.
pub(crate) fn plain_header() -> [u8; VNET_LEN] {
    let mut bytes = [0; VNET_LEN];
    VnetHeader::default().write(&mut bytes);
    bytes
}
