//! Records: a byte stream cut into sealed frames of at most 4096 bytes.
//!
//! Nonce = four zero bytes and a big-endian counter, one counter a direction; no associated data.

use std::ops::Range;

use chacha20poly1305::aead::{AeadInPlace, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce, Tag};

use super::{HEADER_LEN, MAX_FRAME, MAX_PLAINTEXT, NoiseError, TAG_LEN, TYPE_ERROR, TYPE_RECORD, error_text};

/// One direction's cipher and counter.
struct Direction {
    cipher: ChaCha20Poly1305,
    counter: u64,
}

impl Direction {
    fn new(key: &[u8; 32]) -> Self {
        Self { cipher: ChaCha20Poly1305::new(Key::from_slice(key)), counter: 0 }
    }

    fn next_nonce(&mut self) -> Result<Nonce, NoiseError> {
        if self.counter == u64::MAX {
            return Err(NoiseError::Exhausted);
        }
        let mut nonce = Nonce::default();
        nonce[4..].copy_from_slice(&self.counter.to_be_bytes());
        self.counter += 1;
        Ok(nonce)
    }
}

/// Seals what this side sends.
pub struct Sealer(Direction);

/// Opens what the other side sends.
pub struct Opener(Direction);

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sealer(record {})", self.0.counter)
    }
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Opener(record {})", self.0.counter)
    }
}

impl Sealer {
    /// Starts at counter 0 with this key.
    pub fn new(key: &[u8; 32]) -> Self {
        Self(Direction::new(key))
    }

    /// Bytes on the wire for so many bytes of plaintext.
    pub const fn sealed_len(plaintext: usize) -> usize {
        plaintext + plaintext.div_ceil(MAX_PLAINTEXT) * (HEADER_LEN + TAG_LEN)
    }

    /// Appends `plaintext` to `wire` as as many records as it needs (none for an empty one).
    pub fn seal(&mut self, plaintext: &[u8], wire: &mut Vec<u8>) -> Result<(), NoiseError> {
        wire.reserve(Self::sealed_len(plaintext.len()));
        for part in plaintext.chunks(MAX_PLAINTEXT) {
            self.seal_one(part, wire)?;
        }
        Ok(())
    }

    fn seal_one(&mut self, part: &[u8], wire: &mut Vec<u8>) -> Result<(), NoiseError> {
        let nonce = self.0.next_nonce()?;
        wire.push(TYPE_RECORD);
        wire.extend_from_slice(&((part.len() + TAG_LEN) as u16).to_be_bytes());
        let start = wire.len();
        wire.extend_from_slice(part);
        let tag = self
            .0
            .cipher
            .encrypt_in_place_detached(&nonce, &[], &mut wire[start..])
            .map_err(|_| NoiseError::Record)?;
        wire.extend_from_slice(&tag);
        Ok(())
    }
}

impl Opener {
    /// Starts at counter 0 with this key.
    pub fn new(key: &[u8; 32]) -> Self {
        Self(Direction::new(key))
    }

    /// The length of the frame that begins here, header included; `None` if the header is not
    /// complete yet. An error if no record can begin so.
    pub fn frame_len(start: &[u8]) -> Result<Option<usize>, NoiseError> {
        let [kind, high, low, body @ ..] = start else {
            return Ok(None);
        };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        match *kind {
            TYPE_RECORD if (TAG_LEN..=MAX_FRAME - HEADER_LEN).contains(&length) => {
                Ok(Some(HEADER_LEN + length))
            }
            TYPE_RECORD => Err(NoiseError::FrameLength { frame: "record", found: HEADER_LEN + length }),
            TYPE_ERROR => Err(NoiseError::Refused(error_text(&body[..body.len().min(length)]))),
            found => Err(NoiseError::FrameType { wanted: "record", found }),
        }
    }

    /// Opens one whole frame in place; gives where in it the plaintext stands (maybe empty: skip).
    pub fn open(&mut self, frame: &mut [u8]) -> Result<Range<usize>, NoiseError> {
        let end = match Self::frame_len(frame)? {
            Some(length) if length == frame.len() => length - TAG_LEN,
            _ => {
                return Err(NoiseError::FrameLength { frame: "record", found: frame.len() });
            }
        };
        let nonce = self.0.next_nonce()?;
        let (body, tag) = frame[HEADER_LEN..].split_at_mut(end - HEADER_LEN);
        self.0
            .cipher
            .decrypt_in_place_detached(&nonce, &[], body, Tag::from_slice(tag))
            .map_err(|_| NoiseError::Record)?;
        Ok(HEADER_LEN..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair() -> (Sealer, Opener) {
        (Sealer::new(&[9; 32]), Opener::new(&[9; 32]))
    }

    fn open_all(opener: &mut Opener, mut wire: &mut [u8]) -> Result<Vec<u8>, NoiseError> {
        let mut plain = Vec::new();
        while !wire.is_empty() {
            let Some(length) = Opener::frame_len(wire)? else {
                break;
            };
            if length > wire.len() {
                break;
            }
            let (frame, rest) = wire.split_at_mut(length);
            let range = opener.open(frame)?;
            plain.extend_from_slice(&frame[range]);
            wire = rest;
        }
        Ok(plain)
    }

    #[test]
    fn a_full_record_is_exactly_4096_bytes() {
        let (mut sealer, _) = pair();
        let mut wire = Vec::new();
        sealer.seal(&[0; MAX_PLAINTEXT], &mut wire).unwrap();
        assert_eq!(wire.len(), MAX_FRAME);
        wire.clear();
        sealer.seal(&[0; MAX_PLAINTEXT + 1], &mut wire).unwrap();
        assert_eq!(wire.len(), MAX_FRAME + HEADER_LEN + TAG_LEN + 1);
    }

    #[test]
    fn empty_records_open_to_nothing_and_count() {
        let (mut sealer, mut opener) = pair();
        let mut wire = Vec::new();
        sealer.seal_one(&[], &mut wire).unwrap();
        sealer.seal(b"x", &mut wire).unwrap();
        assert_eq!(open_all(&mut opener, &mut wire).unwrap(), b"x");
    }

    #[test]
    fn records_in_another_order_do_not_open() {
        let (mut sealer, mut opener) = pair();
        let (mut one, mut two) = (Vec::new(), Vec::new());
        sealer.seal(b"one", &mut one).unwrap();
        sealer.seal(b"two", &mut two).unwrap();
        assert!(opener.open(&mut two).is_err());
    }

    #[test]
    fn the_last_counter_is_never_used() {
        let (mut sealer, _) = pair();
        sealer.0.counter = u64::MAX;
        assert!(matches!(sealer.seal(b"x", &mut Vec::new()), Err(NoiseError::Exhausted)));
    }

    #[test]
    fn oversized_undersized_and_foreign_frames_are_refused() {
        assert!(Opener::frame_len(&[4, 0x0f, 0xfe]).is_err());
        assert!(Opener::frame_len(&[4, 0x0f, 0xfd]).unwrap() == Some(MAX_FRAME));
        assert!(Opener::frame_len(&[4, 0, 15]).is_err());
        assert!(Opener::frame_len(&[2, 0, 48]).is_err());
        assert!(Opener::frame_len(&[3, 0, 1, b'x']).is_err());
        assert!(Opener::frame_len(&[4, 0]).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn any_stream_comes_back_whole(parts in proptest::collection::vec(
            proptest::collection::vec(any::<u8>(), 0..9000), 0..5))
        {
            let (mut sealer, mut opener) = pair();
            let mut wire = Vec::new();
            for part in &parts {
                sealer.seal(part, &mut wire).unwrap();
            }
            prop_assert_eq!(open_all(&mut opener, &mut wire).unwrap(), parts.concat());
        }

        #[test]
        fn a_truncated_or_altered_record_never_opens_and_never_panics(
            plain in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..400, flip in 0usize..4000)
        {
            let (mut sealer, mut opener) = pair();
            let mut wire = Vec::new();
            sealer.seal_one(&plain, &mut wire).unwrap();
            let mut altered = wire.clone();
            let bit = flip % (wire.len() * 8);
            altered[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(opener.open(&mut altered).is_err());
            let (_, mut opener) = pair();
            let mut short = wire[..cut.min(wire.len() - 1)].to_vec();
            prop_assert!(opener.open(&mut short).is_err());
        }

        #[test]
        fn no_bytes_make_the_opener_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (_, mut opener) = pair();
            let _ = open_all(&mut opener, &mut bytes);
            let _ = opener.open(&mut bytes);
        }
    }
}
