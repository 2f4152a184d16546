//! The resolver's addresses inside the mesh: IP packets in, IP packets out.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
pub use lacis_wire::control::{QUAD100_V4, QUAD100_V6};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::packet::{self, Datagram};
use crate::resolver::{Resolver, Transport};
use crate::tcp::{ConnectionId, Tcp};

pub(crate) const PORT: u16 = 53;
/// Questions that are being passed on, by UDP and TCP together; what comes on top is dropped, and asked again by the
/// host. Each holds its text, its answer (64 KiB at most) and the sockets to its resolvers.
const FORWARDED: usize = 256;
/// When nothing is due, the TCP stack is looked at again after this.
const NEVER: Duration = Duration::from_hours(1);

/// Serves the resolver to the packets of the tunnel.
#[derive(Debug)]
pub struct Quad100;

type TcpAnswer = (ConnectionId, Option<Vec<u8>>);

impl Quad100 {
    /// Answers packets until told to stop. `inject` gives a packet to the host.
    pub async fn run(
        mut packets: mpsc::Receiver<Bytes>,
        inject: impl Fn(Bytes) + Send + Sync + 'static,
        resolver: Resolver,
        stop: CancellationToken,
    ) {
        let inject = Arc::new(inject);
        let slots = Arc::new(Semaphore::new(FORWARDED));
        let tasks = TaskTracker::new();
        let (answers, mut answered) = mpsc::channel::<TcpAnswer>(FORWARDED);
        let mut tcp = Tcp::default();
        loop {
            let delay = tcp.delay().unwrap_or(NEVER);
            let mut questions = Vec::new();
            tokio::select! {
                () = stop.cancelled() => return,
                packet = packets.recv() => match packet {
                    None => return,
                    Some(packet) if packet::protocol(&packet) == Some(packet::UDP) => {
                        serve_udp(&packet, &inject, &resolver, &slots, &tasks);
                    }
                    Some(packet) => questions = tcp.packet(packet),
                },
                Some((to, answer)) = answered.recv() => {
                    tcp.answer(to, answer.as_deref());
                    questions = tcp.work();
                }
                () = tokio::time::sleep(delay) => questions = tcp.work(),
            }
            while !questions.is_empty() {
                for (from, question) in std::mem::take(&mut questions) {
                    match resolver.answer_here(&question, Transport::Tcp) {
                        Ok(answer) => tcp.answer(from, answer.as_deref()),
                        Err(question) => match Arc::clone(&slots).try_acquire_owned() {
                            Ok(slot) => {
                                let (resolver, answers) = (resolver.clone(), answers.clone());
                                tasks.spawn(async move {
                                    let answer = resolver.pass_on(question).await;
                                    // At a stop nobody listens.
                                    let _ = answers.send((from, answer)).await;
                                    drop(slot);
                                });
                            }
                            Err(_) => tcp.answer(from, None),
                        },
                    }
                }
                questions = tcp.work();
            }
            for packet in tcp.take_packets() {
                inject(packet);
            }
        }
    }
}

fn serve_udp<F: Fn(Bytes) + Send + Sync + 'static>(
    packet: &Bytes,
    inject: &Arc<F>,
    resolver: &Resolver,
    slots: &Arc<Semaphore>,
    tasks: &TaskTracker,
) {
    let Some(datagram) = packet::parse(packet).filter(|datagram| datagram.destination_port == PORT) else {
        return;
    };
    let (source, destination, source_port) = (datagram.source, datagram.destination, datagram.source_port);
    let reply = move |answer: &[u8]| {
        packet::build(&Datagram {
            source: destination,
            destination: source,
            source_port: PORT,
            destination_port: source_port,
            payload: answer,
        })
    };
    match resolver.answer_here(datagram.payload, Transport::Udp) {
        Ok(answer) => {
            if let Some(packet) = answer.and_then(|answer| reply(&answer)) {
                inject(packet);
            }
        }
        Err(question) => {
            let Ok(slot) = Arc::clone(slots).try_acquire_owned() else {
                tracing::debug!("too many questions at once: one is dropped");
                return;
            };
            let (resolver, inject) = (resolver.clone(), Arc::clone(inject));
            tasks.spawn(async move {
                if let Some(packet) = resolver.pass_on(question).await.and_then(|answer| reply(&answer)) {
                    inject(packet);
                }
                drop(slot);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::net::IpAddr;

    use etherparse::PacketBuilder;
    use hickory_proto::op::{Message, Query};
    use hickory_proto::rr::{Name, RecordType};

    use crate::resolver::Options;
    use crate::state::{DnsState, Upstream};

    const HOST: [u8; 4] = [100, 64, 0, 1];

    fn question() -> Vec<u8> {
        question_for("bob.lab.")
    }

    fn question_for(name: &str) -> Vec<u8> {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message.to_vec().unwrap()
    }

    fn in_datagram(query: &[u8]) -> Bytes {
        let datagram = Datagram {
            source: HOST.into(),
            destination: QUAD100_V4.into(),
            source_port: 5555,
            destination_port: 53,
            payload: query,
        };
        packet::build(&datagram).unwrap()
    }

    /// A resolver to send packets to, and what it injects.
    fn served() -> (mpsc::Sender<Bytes>, mpsc::UnboundedReceiver<Bytes>) {
        served_with(Vec::new())
    }

    fn served_with(resolvers: Vec<Upstream>) -> (mpsc::Sender<Bytes>, mpsc::UnboundedReceiver<Bytes>) {
        let resolver = Resolver::new(Options::default());
        let hosts = HashMap::from([("bob.lab".to_owned(), vec![IpAddr::from([100, 64, 0, 2])])]);
        resolver.set_state(Arc::new(DnsState { hosts, resolvers, has_ipv4: true, ..DnsState::default() }));
        let (packets, inbox) = mpsc::channel(16);
        let (out, injected) = mpsc::unbounded_channel();
        let inject = move |packet| drop(out.send(packet));
        tokio::spawn(Quad100::run(inbox, inject, resolver, CancellationToken::new()));
        (packets, injected)
    }

    fn with_payload(builder: etherparse::PacketBuilderStep<etherparse::TcpHeader>, payload: &[u8]) -> Bytes {
        let mut packet = Vec::new();
        builder.write(&mut packet, payload).unwrap();
        packet.into()
    }

    #[tokio::test]
    async fn a_question_in_a_datagram_is_answered_in_one() {
        let (packets, mut injected) = served();
        packets.send(in_datagram(&question())).await.unwrap();
        let reply = injected.recv().await.unwrap();
        let reply = packet::parse(&reply).unwrap();
        assert_eq!((reply.source, reply.source_port), (QUAD100_V4.into(), 53));
        assert_eq!((reply.destination, reply.destination_port), (HOST.into(), 5555));
        assert_eq!(Message::from_vec(reply.payload).unwrap().answers[0].data.to_string(), "100.64.0.2");
    }

    #[tokio::test]
    async fn questions_that_wait_for_a_resolver_are_few_and_the_rest_is_dropped() {
        let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (packets, mut injected) = served_with(vec![Upstream::from(silent.local_addr().unwrap())]);
        let asked = tokio::spawn(async move {
            let mut buffer = [0; 512];
            for _ in 0..FORWARDED {
                silent.recv(&mut buffer).await.unwrap();
            }
            silent
        });
        for number in 0..FORWARDED + 100 {
            packets.send(in_datagram(&question_for(&format!("n{number}.example.")))).await.unwrap();
        }
        let silent = asked.await.unwrap();
        // What the mesh itself knows is answered all the same, and everything before it was looked at.
        packets.send(in_datagram(&question())).await.unwrap();
        let reply = injected.recv().await.unwrap();
        let reply = Message::from_vec(packet::parse(&reply).unwrap().payload).unwrap();
        assert_eq!(reply.answers.len(), 1);
        assert!(silent.try_recv(&mut [0; 512]).is_err(), "one question too many");
    }

    #[tokio::test]
    async fn pings_are_answered() {
        let (packets, mut injected) = served();
        let mut ping = Vec::new();
        let builder = PacketBuilder::ipv4(HOST, QUAD100_V4.octets(), 64).icmpv4_echo_request(7, 9);
        builder.write(&mut ping, b"hello").unwrap();
        packets.send(ping.into()).await.unwrap();
        let reply = injected.recv().await.unwrap();
        let headers = etherparse::PacketHeaders::from_ip_slice(&reply).unwrap();
        let Some(etherparse::TransportHeader::Icmpv4(icmp)) = headers.transport else { panic!("no ICMP") };
        assert!(
            matches!(icmp.icmp_type, etherparse::Icmpv4Type::EchoReply(echo) if echo.id == 7 && echo.seq == 9)
        );
    }

    #[tokio::test]
    async fn questions_over_tcp_are_answered_and_other_ports_refused() {
        let (packets, mut injected) = served();
        let segment =
            |seq: u32| PacketBuilder::ipv4(HOST, QUAD100_V4.octets(), 64).tcp(40000, 53, seq, 64000);
        packets.send(with_payload(segment(100).syn(), &[])).await.unwrap();
        let syn_ack = injected.recv().await.unwrap();
        let tcp = |packet: &Bytes| match etherparse::PacketHeaders::from_ip_slice(packet).unwrap().transport {
            Some(etherparse::TransportHeader::Tcp(tcp)) => tcp,
            other => panic!("{other:?}"),
        };
        let header = tcp(&syn_ack);
        assert!(header.syn && header.ack && header.acknowledgment_number == 101);
        let mut framed = (question().len() as u16).to_be_bytes().to_vec();
        framed.extend(question());
        let next = header.sequence_number + 1;
        packets.send(with_payload(segment(101).ack(next), &framed)).await.unwrap();
        let answer = loop {
            let packet = injected.recv().await.unwrap();
            let headers = etherparse::PacketHeaders::from_ip_slice(&packet).unwrap();
            let payload = headers.payload.slice().to_vec();
            if !payload.is_empty() {
                break payload;
            }
        };
        assert_eq!(Message::from_vec(&answer[2..]).unwrap().answers[0].data.to_string(), "100.64.0.2");
        let other = PacketBuilder::ipv4(HOST, QUAD100_V4.octets(), 64).tcp(40001, 22, 1, 64000).syn();
        packets.send(with_payload(other, &[])).await.unwrap();
        let refused = loop {
            let header = tcp(&injected.recv().await.unwrap());
            if header.source_port == 22 {
                break header;
            }
        };
        assert!(refused.rst);
    }
}
