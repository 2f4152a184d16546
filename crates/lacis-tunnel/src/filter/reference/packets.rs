//! Packets for the comparison: all protocols, extension headers in any order, options, fragments, errors, and damage.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use proptest::sample::select;

const V4: [[u8; 4]; 9] = [
    [100, 64, 0, 1],
    [100, 64, 0, 2],
    [100, 64, 0, 3],
    [10, 7, 0, 9],
    [10, 8, 0, 1],
    [203, 0, 113, 9],
    [198, 51, 100, 1],
    [169, 254, 169, 254],
    [224, 0, 0, 1],
];
const V6: [&str; 9] = [
    "fd7a:115c:a1e0::1",
    "fd7a:115c:a1e0::2",
    "fd7a:115c:a1e0::3",
    "fd07::9",
    "fd08::1",
    "2001:db8:7::1",
    "2001:db8:8::1",
    "fe80::1",
    "ff02::1",
];
const PROTOCOLS: [u8; 13] = [6, 6, 17, 17, 17, 1, 58, 132, 99, 47, 50, 59, 135];
const PORTS: [u16; 5] = [0, 53, 80, 443, 5000];

/// How a packet is made.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// Sent by this host.
    pub(super) out: bool,
    six: bool,
    src: usize,
    dst: usize,
    proto: u8,
    ports: (u16, u16),
    /// TCP flags or type of ICMP.
    flags: u8,
    /// Source of the packet that an error quotes.
    about: usize,
    /// Kind, units of 8 bytes, third byte of the data.
    extensions: Vec<(u8, usize, u8)>,
    options: Vec<u8>,
    fragment: Option<(u16, bool, u16)>,
    body: usize,
    cut: Option<usize>,
    broken: Option<(usize, u8)>,
}

pub(super) fn shapes() -> impl Strategy<Value = Shape> {
    let options: [&[u8]; 6] =
        [&[], &[1, 1, 1, 0], &[7, 7, 4, 0, 0, 0, 0, 0], &[131, 3, 4, 0], &[148, 4, 0, 0], &[68, 9, 0, 0]];
    let header = (any::<bool>(), any::<bool>(), 0..V4.len(), prop_oneof![3 => Just(0), 2 => 0..V4.len()]);
    let transport = (
        select(&PROTOCOLS[..]),
        (select(&PORTS[..]), select(&PORTS[..])),
        prop_oneof![select(&[0u8, 2, 3, 4, 5, 8, 16, 18, 1, 128, 129][..]), any::<u8>()],
        prop_oneof![2 => Just(0), 1 => 0..V4.len()],
        prop_oneof![3 => 90usize..100, 1 => 0usize..100],
    );
    let extension = (select(&[0u8, 43, 60, 51, 44, 60][..]), 1usize..4, select(&[0u8, 0, 0, 1][..]));
    let extensions = prop_oneof![
        2 => Just(Vec::new()),
        2 => proptest::collection::vec(extension.clone(), 1..4),
        1 => proptest::collection::vec(extension, 7..11),
    ];
    let offset = select(&[0u16, 0, 0, 1, 9, 10, 11, 100][..]);
    let fragment = proptest::option::weighted(0.3, (offset, any::<bool>(), 1u16..3));
    let damage = (
        proptest::option::weighted(0.1, 0usize..120),
        proptest::option::weighted(0.1, (0usize..100, any::<u8>())),
    );
    (header, transport, extensions, select(options.to_vec()), fragment, damage).prop_map(
        |(
            (out, six, src, dst),
            (proto, ports, flags, about, body),
            extensions,
            options,
            fragment,
            damage,
        )| {
            let (src, dst) = if out { (dst, src) } else { (src, dst) };
            let (cut, broken) = damage;
            let options = options.to_vec();
            Shape {
                out,
                six,
                src,
                dst,
                proto,
                ports,
                flags,
                about,
                extensions,
                options,
                fragment,
                body,
                cut,
                broken,
            }
        },
    )
}

fn v4(number: usize) -> Ipv4Addr {
    V4[number].into()
}

fn v6(number: usize) -> Ipv6Addr {
    V6[number].parse().unwrap()
}

fn v4_header(src: usize, dst: usize, proto: u8, len: usize) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, proto, 0, 0];
    header[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    header.extend(v4(src).octets());
    header.extend(v4(dst).octets());
    header
}

fn v6_header(src: usize, dst: usize, proto: u8, len: usize) -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0, 0, 0, proto, 64];
    header[4..6].copy_from_slice(&(len as u16).to_be_bytes());
    header.extend(v6(src).octets());
    header.extend(v6(dst).octets());
    header
}

impl Shape {
    fn body(&self) -> Vec<u8> {
        let mut body = vec![0; self.body];
        let mut put = |at: usize, bytes: &[u8]| {
            for (at, byte) in (at..).zip(bytes).take_while(|(at, _)| *at < self.body) {
                body[at] = *byte;
            }
        };
        if matches!(self.proto, 1 | 58) {
            put(0, &[self.flags]);
            let quote = if self.six { v6_header } else { v4_header };
            put(8, &quote(self.about, self.src, 17, 28));
        } else {
            put(0, &self.ports.0.to_be_bytes());
            put(2, &self.ports.1.to_be_bytes());
            put(13, &[self.flags]);
        }
        body
    }

    pub(super) fn build(&self) -> Vec<u8> {
        let body = self.body();
        let mut packet = if self.six {
            let mut extensions = self.extensions.clone();
            if self.fragment.is_some() {
                extensions.push((44, 1, 0));
            }
            let mut chain = Vec::new();
            for (at, &(kind, units, third)) in extensions.iter().enumerate() {
                let next = extensions.get(at + 1).map_or(self.proto, |extension| extension.0);
                let mut extension = vec![0; if kind == 44 { 8 } else { units * 8 }];
                extension[0] = next;
                match kind {
                    44 => {
                        let (offset, more, id) = self.fragment.unwrap_or((0, third > 0, 1));
                        extension[2..4].copy_from_slice(&(offset << 3 | u16::from(more)).to_be_bytes());
                        extension[7] = id as u8;
                    }
                    51 => extension[1] = (units * 2) as u8 - 2,
                    _ => {
                        extension[1] = units as u8 - 1;
                        extension[3] = third;
                    }
                }
                chain.extend(extension);
            }
            let first = extensions.first().map_or(self.proto, |extension| extension.0);
            let mut packet = v6_header(self.src, self.dst, first, chain.len() + body.len());
            packet.extend(chain);
            packet
        } else {
            let len = 20 + self.options.len() + body.len();
            let mut packet = v4_header(self.src, self.dst, self.proto, len);
            packet[0] += (self.options.len() / 4) as u8;
            if let Some((offset, more, id)) = self.fragment {
                packet[6..8].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
                packet[5] = id as u8;
            }
            packet.extend(&self.options);
            packet
        };
        packet.extend(body);
        if let Some((at, byte)) = self.broken
            && let Some(place) = packet.get_mut(at)
        {
            *place = byte;
        }
        packet.truncate(self.cut.unwrap_or(usize::MAX));
        packet
    }
}
