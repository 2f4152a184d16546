//! The resolver's TCP: a small user-space stack (smoltcp) behind which sit the resolver's two addresses.
//!
//! Everything that is no UDP goes through it, so it also answers pings and refuses other ports. Connections are few
//! and short: a fixed number of sockets listens, each carries length-prefixed questions one after the other.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr, IpEndpoint};

use crate::quad100::{QUAD100_V4, QUAD100_V6};

/// Connections at a time; the stack refuses more.
const SOCKETS: usize = 16;
/// Room for the largest question that is taken, and for a good part of an answer.
const RECEIVE: usize = 4096;
const SEND: usize = 16 * 1024;
/// Answers that may wait for a client that does not read; its next questions stay in the socket until then.
const BACKLOG: usize = 64 * 1024;
/// Questions longer than this are nobody's.
const LONGEST_QUESTION: usize = 4096 - 2;
const PORT: u16 = 53;
/// An idle connection is closed.
const IDLE: Duration = Duration::from_secs(45);
const MTU: usize = 1280;

/// Packets on their way into and out of the stack.
#[derive(Debug, Default)]
struct Wire {
    incoming: VecDeque<Bytes>,
    outgoing: Vec<Bytes>,
}

struct Incoming(Bytes);
struct Outgoing<'a>(&'a mut Vec<Bytes>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut packet = vec![0; length];
        let result = write(&mut packet);
        self.0.push(packet.into());
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let packet = self.incoming.pop_front()?;
        Some((Incoming(packet), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Self::TxToken<'_>> {
        Some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.max_transmission_unit = MTU;
        capabilities.medium = Medium::Ip;
        capabilities
    }
}

/// One socket and what is on its way through it.
struct Connection {
    handle: SocketHandle,
    /// The remote end of the connection that `pending` belongs to.
    remote: Option<IpEndpoint>,
    read: Vec<u8>,
    write: VecDeque<u8>,
    /// Questions that are being answered.
    asked: usize,
}

/// Names one connection, so that an answer that comes late does not reach the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionId {
    slot: usize,
    remote: IpEndpoint,
}

/// The stack. Sans-I/O but for its own clock.
#[allow(missing_debug_implementations)] // smoltcp's interface has none
pub struct Tcp {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    started: std::time::Instant,
}

impl Default for Tcp {
    fn default() -> Self {
        let mut wire = Wire::default();
        let mut config = Config::new(HardwareAddress::Ip);
        let nonce = lacis_wire::derp::random_nonce();
        config.random_seed = u64::from_le_bytes(nonce[..8].try_into().unwrap_or_default());
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            for address in [IpCidr::new(QUAD100_V4.into(), 0), IpCidr::new(QUAD100_V6.into(), 0)] {
                // There is room for two.
                let _ = addresses.push(address);
            }
        });
        let mut sockets = SocketSet::new(Vec::new());
        let connections = (0..SOCKETS)
            .map(|_| {
                let buffers =
                    (tcp::SocketBuffer::new(vec![0; RECEIVE]), tcp::SocketBuffer::new(vec![0; SEND]));
                let mut socket = tcp::Socket::new(buffers.0, buffers.1);
                socket.set_timeout(Some(IDLE.into()));
                let handle = sockets.add(socket);
                Connection { handle, remote: None, read: Vec::new(), write: VecDeque::new(), asked: 0 }
            })
            .collect();
        let mut stack = Self { wire, interface, sockets, connections, started: std::time::Instant::now() };
        stack.work();
        stack
    }
}

impl Tcp {
    fn now(&self) -> Instant {
        Instant::from_micros(i64::try_from(self.started.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    /// Takes in a packet of the host.
    pub fn packet(&mut self, packet: Bytes) -> Vec<(ConnectionId, Vec<u8>)> {
        self.wire.incoming.push_back(packet);
        self.work()
    }

    /// Puts an answer on its connection, if that still stands.
    pub fn answer(&mut self, to: ConnectionId, answer: Option<&[u8]>) {
        let connection = &mut self.connections[to.slot];
        if connection.remote != Some(to.remote) {
            return;
        }
        connection.asked = connection.asked.saturating_sub(1);
        if let Some(answer) = answer {
            connection.write.extend((answer.len() as u16).to_be_bytes());
            connection.write.extend(answer);
        }
    }

    /// Moves everything on, and gives the questions that are complete.
    pub fn work(&mut self) -> Vec<(ConnectionId, Vec<u8>)> {
        let now = self.now();
        let mut questions = Vec::new();
        loop {
            let mut moved = self.interface.poll(now, &mut self.wire, &mut self.sockets)
                == smoltcp::iface::PollResult::SocketStateChanged;
            for slot in 0..self.connections.len() {
                moved |= self.serve(slot, &mut questions);
            }
            if !moved {
                return questions;
            }
        }
    }

    fn serve(&mut self, slot: usize, questions: &mut Vec<(ConnectionId, Vec<u8>)>) -> bool {
        let connection = &mut self.connections[slot];
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(connection.handle);
        if !socket.is_open() {
            *connection = Connection {
                handle: connection.handle,
                remote: None,
                read: Vec::new(),
                write: VecDeque::new(),
                asked: 0,
            };
            // A socket that is closed can listen.
            return socket.listen(PORT).is_ok();
        }
        if connection.remote.is_none() {
            connection.remote = socket.remote_endpoint();
        }
        let Some(remote) = connection.remote else { return false };
        let mut moved = false;
        // Who asks and does not read is held back by TCP, and must not fill the memory.
        while socket.can_recv() && connection.write.len() < BACKLOG {
            let read = socket.recv(|data| (data.len(), data.to_vec())).unwrap_or_default();
            moved |= !read.is_empty();
            connection.read.extend(read);
        }
        while let Some(length) =
            connection.read.first_chunk::<2>().map(|two| usize::from(u16::from_be_bytes(*two)))
        {
            if length > LONGEST_QUESTION {
                socket.abort();
                return true;
            }
            let Some(question) = connection.read.get(2..2 + length) else { break };
            questions.push((ConnectionId { slot, remote }, question.to_vec()));
            connection.asked += 1;
            connection.read.drain(..2 + length);
        }
        while socket.can_send() && !connection.write.is_empty() {
            let (front, _) = connection.write.as_slices();
            let Ok(sent) = socket.send_slice(front) else { break };
            connection.write.drain(..sent);
            moved |= sent > 0;
        }
        // The other end has said all and heard all.
        if !socket.may_recv()
            && socket.state() == tcp::State::CloseWait
            && connection.asked == 0
            && connection.write.is_empty()
        {
            socket.close();
            moved = true;
        }
        moved
    }

    /// Packets for the host.
    pub fn take_packets(&mut self) -> Vec<Bytes> {
        std::mem::take(&mut self.wire.outgoing)
    }

    /// When [`Self::work`] must be called again at the latest.
    pub(crate) fn delay(&mut self) -> Option<Duration> {
        let now = self.now();
        self.interface.poll_delay(now, &self.sockets).map(Into::into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{PacketBuilder, PacketHeaders, TransportHeader};

    fn segment(seq: u32, ack: Option<u32>, payload: &[u8]) -> Bytes {
        let tcp = PacketBuilder::ipv4([100, 64, 0, 1], QUAD100_V4.octets(), 64).tcp(40000, PORT, seq, 64000);
        let mut packet = Vec::new();
        let tcp = if let Some(ack) = ack { tcp.ack(ack) } else { tcp.syn() };
        tcp.write(&mut packet, payload).unwrap();
        packet.into()
    }

    /// What must be acknowledged of a packet.
    fn end(packet: &[u8]) -> u32 {
        let headers = PacketHeaders::from_ip_slice(packet).unwrap();
        let Some(TransportHeader::Tcp(tcp)) = headers.transport else { panic!("no TCP") };
        tcp.sequence_number.wrapping_add(u32::from(tcp.syn) + headers.payload.slice().len() as u32)
    }

    #[test]
    fn who_asks_and_does_not_read_is_held_back_until_it_reads() {
        let questions = [0, 1, b'?'].repeat(400);
        let mut tcp = Tcp::default();
        tcp.packet(segment(100, None, &[]));
        let mut read = end(&tcp.take_packets()[0]);
        let asked = tcp.packet(segment(101, Some(read), &questions));
        assert_eq!(asked.len(), 400);
        for (from, _) in asked {
            tcp.answer(from, Some(&[0; 1000]));
        }
        let second = 101 + questions.len() as u32;
        assert!(tcp.packet(segment(second, Some(read), &questions)).is_empty());
        let mut rounds = 0;
        loop {
            read = tcp.take_packets().last().map_or(read, |packet| end(packet));
            let next = second + questions.len() as u32;
            let asked = tcp.packet(segment(next, Some(read), &[]));
            if !asked.is_empty() {
                assert_eq!(asked.len(), 400);
                break;
            }
            rounds += 1;
            assert!(rounds < 1000, "never asked again");
        }
    }
}
