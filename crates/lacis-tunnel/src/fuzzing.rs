//! For `fuzz/`: readers of what peers send that nobody else outside this crate calls.

use std::net::IpAddr;

use crate::Parsed;
use crate::tsmp;
pub use crate::tsmp::{MAX_LEN as MAX_TSMP, Message as TsmpMessage};

/// Reads the message of a packet with protocol 99.
pub fn parse_tsmp(packet: &[u8], parsed: &Parsed) -> Option<TsmpMessage> {
    tsmp::parse(packet, parsed)
}

/// Writes a message into a packet and gives its length; `None` where the families of the addresses differ.
pub fn build_tsmp(
    out: &mut [u8; MAX_TSMP],
    src: IpAddr,
    dst: IpAddr,
    message: &TsmpMessage,
) -> Option<usize> {
    tsmp::build(out, src, dst, message)
}
