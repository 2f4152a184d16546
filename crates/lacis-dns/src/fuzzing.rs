//! For `fuzz/`: readers of what the network sends that nobody else outside this crate calls.

use bytes::Bytes;

pub use crate::packet::Datagram;
pub use crate::tcp::{ConnectionId, Tcp};
use crate::{Resolver, forward, inline, packet};

/// Is this an answer to that question, with this id?
pub fn is_answer(question: &[u8], answer: &[u8], id: u16) -> bool {
    forward::answers(question, answer, id)
}

/// Name of a message's first question, and its type and class.
pub fn first_question(message: &[u8]) -> Option<(&[u8], &[u8])> {
    forward::question(message)
}

/// What the packet thread answers to a message.
pub fn answer_inline(resolver: &Resolver, question: &[u8]) -> Option<Vec<u8>> {
    let mut space = [0; 1280];
    let length = inline::answer(&resolver.state(), question, &mut space)?;
    Some(space[..length].to_vec())
}

/// Takes a UDP packet apart.
pub fn parse_udp(packet: &[u8]) -> Option<Datagram<'_>> {
    packet::parse(packet)
}

/// Puts a UDP packet together.
pub fn build_udp(datagram: &Datagram<'_>) -> Option<Bytes> {
    packet::build(datagram)
}
