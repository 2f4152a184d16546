//! The Internet checksum, quick enough to be computed for every packet.
//!
//! Sums are kept in the machine's byte order: the ones' complement sum does not mind, only [`fold`] has to turn
//! the result once.

use std::net::IpAddr;

/// The unfolded sum of some bytes that begin at an even offset.
#[inline]
pub(crate) fn sum(data: &[u8]) -> u64 {
    let (words, rest) = data.as_chunks::<4>();
    let mut total: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_ne_bytes(last));
    total
}

/// The 16-bit sum, not complemented.
#[inline]
pub(crate) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::from_be(sum as u16)
}

/// A 16-bit number as a part of a sum.
#[inline]
pub(crate) fn word(value: u16) -> u64 {
    u64::from(value.to_be())
}

/// The sum of the pseudo-header.
#[inline]
pub(crate) fn pseudo(src: IpAddr, dst: IpAddr, proto: u8, len: usize) -> u64 {
    let addresses = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => sum(&src.octets()) + sum(&dst.octets()),
        (IpAddr::V6(src), IpAddr::V6(dst)) => sum(&src.octets()) + sum(&dst.octets()),
        _ => 0,
    };
    addresses + word(u16::from(proto)) + word(len as u16)
}

/// The pseudo-header's sum taken from the bytes of an IP packet.
#[inline]
pub(crate) fn pseudo_of(packet: &[u8], proto: u8, len: usize) -> u64 {
    let addresses = if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] };
    sum(addresses) + word(u16::from(proto)) + word(len as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slow(data: &[u8]) -> u16 {
        let mut total = 0u32;
        for pair in data.chunks(2) {
            total += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }

    proptest! {
        #[test]
        fn the_sum_is_that_of_the_textbook(data in proptest::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert_eq!(fold(sum(&data)), slow(&data));
        }
    }
}
