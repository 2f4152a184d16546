//! Framing of a map stream: a little-endian length, then one JSON message, plain or as a zstd frame of its own.
//!
//! The request's `Compress` decides for the whole stream; each block stands alone (no dictionary, no shared window).
//! Control-protocol dossier, section 6.3.

use std::io::Read as _;

use bytes::{Buf as _, Bytes, BytesMut};

/// The fastest level: maps are sent once and read once.
const ZSTD_LEVEL: i32 = 1;
const HEADER: usize = 4;
/// The largest block: a peer that claims more is broken.
pub const MAX_BLOCK: usize = 16 << 20;
/// What a block may become: the map of about 50,000 nodes. Bounds what a small frame can make us allocate.
pub const MAX_MESSAGE: usize = 64 << 20;
/// The same for the decoder's window, as the base-2 logarithm of bytes.
const MAX_WINDOW_LOG: u32 = 26;

/// How the blocks of a stream are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    #[default]
    Plain,
    Zstd,
}

impl Compression {
    /// What a request's `Compress` asks for.
    pub fn requested(compress: &str) -> Self {
        if compress == "zstd" { Self::Zstd } else { Self::Plain }
    }
}

/// A stream that cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a map frame of {length} bytes; at most {MAX_BLOCK}, and {MAX_MESSAGE} unpacked, are accepted")]
    TooLong { length: usize },
    #[error("a map frame is not valid zstd, or larger than {MAX_MESSAGE} bytes when unpacked")]
    Zstd(#[source] std::io::Error),
}

/// One block, length included.
///
/// # Errors
/// When the message is too long for any client, or zstd has no memory.
pub fn encode(message: &[u8], compression: Compression) -> Result<Bytes, Error> {
    if message.len() > MAX_MESSAGE {
        return Err(Error::TooLong { length: message.len() });
    }
    let mut out = Vec::with_capacity(HEADER + message.len().min(64 << 10));
    out.extend_from_slice(&[0; HEADER]);
    match compression {
        Compression::Plain => out.extend_from_slice(message),
        Compression::Zstd => {
            let packed = zstd::bulk::compress(message, ZSTD_LEVEL).map_err(Error::Zstd)?;
            out.extend_from_slice(&packed);
        }
    }
    let length = out.len() - HEADER;
    if length > MAX_BLOCK {
        return Err(Error::TooLong { length });
    }
    out[..HEADER].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(out.into())
}

/// Takes the bytes of a stream as they come and gives back messages.
#[derive(Debug)]
pub struct Decoder {
    compression: Compression,
    buffer: BytesMut,
}

impl Decoder {
    pub fn new(compression: Compression) -> Self {
        Self { compression, buffer: BytesMut::new() }
    }

    /// Adds what was received.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, if it is there.
    ///
    /// # Errors
    /// When the stream cannot be read on.
    pub fn next_message(&mut self) -> Result<Option<Bytes>, Error> {
        let Some(header) = self.buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let length = u32::from_le_bytes(*header) as usize;
        if length > MAX_BLOCK {
            return Err(Error::TooLong { length });
        }
        if self.buffer.len() < HEADER + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        let block = self.buffer.split_to(length).freeze();
        match self.compression {
            Compression::Plain => Ok(Some(block)),
            Compression::Zstd => {
                let mut reader = zstd::stream::read::Decoder::with_buffer(&block[..]).map_err(Error::Zstd)?;
                reader.window_log_max(MAX_WINDOW_LOG).map_err(Error::Zstd)?;
                let mut message = Vec::new();
                let read =
                    reader.take(MAX_MESSAGE as u64 + 1).read_to_end(&mut message).map_err(Error::Zstd)?;
                if read > MAX_MESSAGE {
                    return Err(Error::Zstd(std::io::ErrorKind::FileTooLarge.into()));
                }
                Ok(Some(message.into()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_plain_keep_alive_has_these_bytes() {
        let block = encode(br#"{"KeepAlive":true}"#, Compression::Plain).unwrap();
        assert_eq!(&block[..], b"\x12\0\0\0{\"KeepAlive\":true}");
    }

    #[test]
    fn a_block_that_claims_too_much_ends_the_stream() {
        let mut decoder = Decoder::new(Compression::Plain);
        decoder.push(&u32::MAX.to_le_bytes());
        assert!(matches!(decoder.next_message(), Err(Error::TooLong { .. })));
    }

    #[test]
    fn a_plain_block_in_a_zstd_stream_is_an_error() {
        let mut decoder = Decoder::new(Compression::Zstd);
        decoder.push(&encode(b"{}", Compression::Plain).unwrap());
        assert!(matches!(decoder.next_message(), Err(Error::Zstd(_))));
    }

    proptest! {
        #[test]
        fn messages_come_back_however_the_bytes_are_cut(
            messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..5),
            cut in 1_usize..50,
            zstd in any::<bool>(),
        ) {
            let compression = if zstd { Compression::Zstd } else { Compression::Plain };
            let stream: Vec<u8> =
                messages.iter().flat_map(|message| encode(message, compression).unwrap()).collect();
            let mut decoder = Decoder::new(compression);
            let mut got = Vec::new();
            for piece in stream.chunks(cut) {
                decoder.push(piece);
                while let Some(message) = decoder.next_message().unwrap() {
                    got.push(message.to_vec());
                }
            }
            prop_assert_eq!(got, messages);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), zstd in any::<bool>()) {
            let mut decoder = Decoder::new(if zstd { Compression::Zstd } else { Compression::Plain });
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_message() {}
        }
    }
}
