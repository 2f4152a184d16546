//! The Noise transport over real streams (feature `io`).
//!
//! [`NoiseStream`] is one side's byte stream over any `AsyncRead + AsyncWrite`; [`EarlyStream`]
//! takes the server's early payload off its front; [`ControlDialer`] is the client's way from a
//! control URL to such a stream (`GET /key`, then `POST /ts2021`), through a [`Proxy`] where one leads there; [`ControlClient`] speaks HTTP/2
//! on it. Documents: the control protocol's sections on the upgrade, Noise and HTTP/2.

mod dial;
mod early;
mod error;
mod http2;
mod proxy;
mod stream;
mod tls;

pub use dial::{ControlDialer, ControlStream, ControlUrl};
pub use early::{EarlyPayload, EarlyStream, encode_early};
pub use error::{DialError, tls_error};
pub use http2::ControlClient;
pub use proxy::{Proxies, Proxy, ProxyError};
pub use stream::NoiseStream;
pub use tls::{client_config, native_roots};

/// Any connected stream: plain TCP, TLS, or an upgraded HTTP connection.
pub trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Stream for T {}

/// A [`Stream`] of a kind that does not matter.
pub type BoxStream = Box<dyn Stream>;
