//! What the blocks of a map stream may make a client allocate.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use lacis_wire::mapframe::{Compression, Decoder, Error, MAX_MESSAGE, encode};

fn decode(block: &[u8]) -> Result<Option<bytes::Bytes>, Error> {
    let mut decoder = Decoder::new(Compression::Zstd);
    decoder.push(block);
    decoder.next_message()
}

#[test]
fn a_small_block_that_unpacks_to_too_much_ends_the_stream() {
    let packed = zstd::bulk::compress(&vec![b' '; MAX_MESSAGE + 1], 1).unwrap();
    assert!(packed.len() < 1 << 20);
    let mut bomb = (packed.len() as u32).to_le_bytes().to_vec();
    bomb.extend(packed);
    assert!(matches!(decode(&bomb), Err(Error::Zstd(_))));
    let largest = encode(&vec![b' '; MAX_MESSAGE], Compression::Zstd).unwrap();
    assert_eq!(decode(&largest).unwrap().unwrap().len(), MAX_MESSAGE);
}

/// A frame (RFC 8878, section 3.1.1) that asks for a window of 2^`log` bytes and has one of content.
fn with_window(log: u8) -> Vec<u8> {
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3, 0x09, 0, 0, b'x'];
    let mut block = (frame.len() as u32).to_le_bytes().to_vec();
    block.extend(frame);
    block
}

#[test]
fn a_block_that_asks_for_a_giant_window_ends_the_stream() {
    assert_eq!(decode(&with_window(23)).unwrap().unwrap(), "x");
    assert!(matches!(decode(&with_window(27)), Err(Error::Zstd(_))));
}
