//! The control protocol's Noise transport, without I/O.
//!
//! `Noise_IK_25519_ChaChaPoly_BLAKE2s` with the prologue `Tailscale Control Protocol v<version>`:
//! an [`Initiator`] (client) or a [`Responder`] (server) makes the handshake, frame by frame, and
//! ends as a [`Session`] whose [`Sealer`] and [`Opener`] carry a byte stream in records. The frames
//! are those of the control protocol (initiation 101 bytes, response 51, records of at most 4096).
//! `snow` makes the handshake; the records are ours, because their counters are big-endian.

mod handshake;
mod record;

pub use handshake::{Initiator, Responder, Session, error_frame};
pub use record::{Opener, Sealer};

/// Bytes of the client's first frame: header of 5, ephemeral, sealed static key, tag.
pub const INITIATION_LEN: usize = 101;
/// Bytes of the server's answer: header of 3, ephemeral, tag.
pub const RESPONSE_LEN: usize = 51;
/// The largest record, header included; a larger one is fatal to every implementation.
pub const MAX_FRAME: usize = 4096;
/// Type byte and length of a record (and of a response or error).
pub const HEADER_LEN: usize = 3;
/// Poly1305 tag.
pub const TAG_LEN: usize = 16;
/// The largest plaintext of one record.
pub const MAX_PLAINTEXT: usize = MAX_FRAME - HEADER_LEN - TAG_LEN;

/// Frame types; there are no others.
const TYPE_INITIATION: u8 = 1;
const TYPE_RESPONSE: u8 = 2;
const TYPE_ERROR: u8 = 3;
const TYPE_RECORD: u8 = 4;

/// Longest text of an error frame that is kept: it comes from an unauthenticated peer.
const MAX_ERROR_TEXT: usize = 200;

/// Why a handshake or a record was refused. All of these end the connection.
#[derive(Debug, thiserror::Error)]
pub enum NoiseError {
    /// The frame is not the one that may come now.
    #[error("expected a Noise {wanted} frame and got type {found}")]
    FrameType {
        /// What may come now.
        wanted: &'static str,
        /// The type byte that came.
        found: u8,
    },
    /// A frame's length does not fit its type.
    #[error("Noise {frame} frame of {found} bytes")]
    FrameLength {
        /// Which frame.
        frame: &'static str,
        /// The length that was found.
        found: usize,
    },
    /// The peer sent an error frame instead of going on.
    #[error("the other side refused the Noise handshake: {0}")]
    Refused(String),
    /// A public key of low order: with it the session would be secret from nobody.
    #[error("the other side's {0} key is of low order")]
    LowOrder(&'static str),
    /// The handshake does not verify: another server key, another version, or tampering.
    #[error("the Noise handshake does not verify (another server key, or altered on the way)")]
    Handshake(#[source] snow::Error),
    /// A record's tag is wrong.
    #[error("a Noise record does not verify (altered on the way)")]
    Record,
    /// 2^64 - 1 records were sent; cannot happen in practice.
    #[error("the Noise session has used all its counters")]
    Exhausted,
}

/// The text of an error frame's body, made safe to print.
fn error_text(body: &[u8]) -> String {
    String::from_utf8_lossy(&body[..body.len().min(MAX_ERROR_TEXT)])
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
