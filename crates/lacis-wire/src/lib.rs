//! Bytes to types and back, for everything Lacis puts on a wire.
//!
//! Every other crate of the workspace stands on this one; it depends on none of them. It opens no
//! sockets and reads no clock: codecs and handshakes are plain functions and state machines.
//! With the feature `io` it also has [`io::NoiseStream`], which runs the Noise transport over any
//! `AsyncRead + AsyncWrite`, and [`io::ControlDialer`], the client's way into a control server.

pub mod admin;
pub mod control;
pub mod derp;
pub mod disco;
pub mod key;
pub mod local;
pub mod mapframe;
pub mod noise;
pub mod stun;
pub mod text;
pub mod via;

#[cfg(feature = "io")]
pub mod io;

/// The capability version our client speaks: it names the behaviours a server may rely on.
///
/// 113 is the oldest version that every current server (Headscale included) still accepts, and it
/// promises nothing that Lacis does not do.
pub const CURRENT_CAPABILITY_VERSION: u16 = 113;

/// The oldest capability version the coordinator accepts: Tailscale 1.80 (January 2025).
pub const MIN_CAPABILITY_VERSION: u16 = 113;
