//! What the packet filter costs a packet, for policies of different length: `cargo bench -p lacis-tunnel`.
#![allow(clippy::unwrap_used)] // every input is our own

use std::hint::black_box;
use std::net::Ipv4Addr;

use divan::Bencher;
use divan::counter::ItemsCount;
use etherparse::PacketBuilder;
use ipnet::IpNet;
use lacis_tunnel::{Filter, Flows, Parsed};
use lacis_wire::control::{FilterRule, NetPortRange, PortRange};

const RULES: [u16; 4] = [10, 200, 1000, 5000];
const US: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
/// Members of a rule's group of sources.
const SOURCES: u16 = 20;
const PACKETS: u16 = 1024;

fn main() {
    divan::main();
}

fn peer(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(100, 65, high, low)
}

/// Each rule lets twenty peers reach one port of ours.
fn rules(count: u16) -> Vec<FilterRule> {
    let rule = |number: u16| FilterRule {
        src_ips: (0..SOURCES)
            .map(|more| peer((number + more * 37) % 4096).to_string())
            .collect::<Vec<_>>()
            .into(),
        dst_ports: vec![NetPortRange {
            ip: US.to_string(),
            ports: PortRange { first: 1000 + number, last: 1000 + number },
        }],
        ..FilterRule::default()
    };
    (0..count).map(rule).collect()
}

fn local() -> [IpNet; 1] {
    ["100.64.0.1/32".parse().unwrap()]
}

fn packet(src: Ipv4Addr, dst: Ipv4Addr, tcp: bool, ports: (u16, u16)) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4(src.octets(), dst.octets(), 64);
    if tcp {
        builder.tcp(ports.0, ports.1, 1, 1000).syn().write(&mut packet, &[0; 32]).unwrap();
    } else {
        builder.udp(ports.0, ports.1).write(&mut packet, &[0; 32]).unwrap();
    }
    packet
}

/// Packets of as many flows, spread over the rules; one of two is allowed.
fn flows(count: u16, tcp: bool) -> Vec<Vec<u8>> {
    let flow = |number: u16| {
        let rule = (u32::from(number) * 7919 % u32::from(count)) as u16;
        packet(peer(rule % 4096 + number % 2 * 9), US, tcp, (20_000 + number, 1000 + rule))
    };
    (0..PACKETS).map(flow).collect()
}

fn judge(bencher: Bencher<'_, '_>, filter: &Filter, packets: &[Vec<u8>]) {
    let mut memory = Flows::default();
    bencher.counter(ItemsCount::new(packets.len())).bench_local(|| {
        for packet in packets {
            let parsed = Parsed::new(black_box(packet)).unwrap();
            black_box(filter.inbound(&parsed, &mut memory, false));
        }
    });
}

#[divan::bench(args = RULES)]
fn compile(bencher: Bencher<'_, '_>, count: u16) {
    let rules = rules(count);
    bencher.bench_local(|| Filter::compile(black_box(&rules), &local()));
}

#[divan::bench(args = RULES)]
fn new_connections(bencher: Bencher<'_, '_>, count: u16) {
    judge(bencher, &Filter::compile(&rules(count), &local()), &flows(count, true));
}

#[divan::bench(args = RULES)]
fn refused_udp(bencher: Bencher<'_, '_>, count: u16) {
    let packets: Vec<_> = (0..PACKETS).map(|port| packet(peer(port), US, false, (port, 99))).collect();
    judge(bencher, &Filter::compile(&rules(count), &local()), &packets);
}

/// Packets of 512 flows of peers in turn.
#[divan::bench(args = RULES)]
fn established_udp_of_peers(bencher: Bencher<'_, '_>, count: u16) {
    let packets: Vec<_> = flows(count, false).into_iter().step_by(2).collect();
    judge(bencher, &Filter::compile(&rules(count), &local()), &packets);
}

/// Answers to 512 flows of ours in turn; the questions are counted too.
#[divan::bench(args = RULES)]
fn established_udp_of_ours(bencher: Bencher<'_, '_>, count: u16) {
    let filter = Filter::compile(&rules(count), &local());
    let pairs: Vec<_> = (0..512)
        .map(|port| {
            (
                packet(US, peer(port), false, (30_000 + port, 53)),
                packet(peer(port), US, false, (53, 30_000 + port)),
            )
        })
        .collect();
    let mut memory = Flows::default();
    bencher.counter(ItemsCount::new(2 * pairs.len())).bench_local(|| {
        for (question, answer) in &pairs {
            filter.outbound(&Parsed::new(black_box(question)).unwrap(), &mut memory);
            black_box(filter.inbound(&Parsed::new(black_box(answer)).unwrap(), &mut memory, false));
        }
    });
}

/// One stream of TCP.
#[divan::bench(args = RULES)]
fn established_tcp(bencher: Bencher<'_, '_>, count: u16) {
    let mut packet = packet(peer(1), US, true, (20_000, 1001));
    packet[33] = 16;
    judge(bencher, &Filter::compile(&rules(count), &local()), &vec![packet; usize::from(PACKETS)]);
}

#[divan::bench]
fn read_ipv6_with_extensions(bencher: Bencher<'_, '_>) {
    let mut packet = vec![0u8; 40 + 8 + 24 + 8];
    packet[..7].copy_from_slice(&[0x60, 0, 0, 0, 0, 40, 0]);
    packet[40..42].copy_from_slice(&[60, 0]);
    packet[48..50].copy_from_slice(&[17, 2]);
    bencher.bench_local(|| Parsed::new(black_box(&packet)).unwrap());
}
