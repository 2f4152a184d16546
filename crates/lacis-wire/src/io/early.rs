//! The early payload: what a server may say inside Noise before any byte of HTTP/2.
//!
//! Five bytes of magic, a u32 (big-endian) length and JSON (`{"nodeKeyChallenge": …}`). It is
//! optional, and a server may wait for the client's HTTP/2 preface before it sends anything; so the
//! client does not wait for it either: [`EarlyStream`] looks at the first nine bytes when they come
//! and takes the payload out of the stream, or lets them through as the HTTP/2 frame they are.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

const MAGIC: [u8; 5] = [0xff, 0xff, 0xff, b'T', b'S'];
/// Magic and length: as long as an HTTP/2 frame's head, so these bytes always come.
const HEADER: usize = 9;
/// The payload is a single key today; this leaves room for what may be added.
const MAX_PAYLOAD: usize = 64 * 1024;

/// The early payload's JSON once it has come; empty before that, and for servers that send none.
pub type EarlyPayload = Arc<OnceLock<Vec<u8>>>;

/// Magic, length and `json`, to be sent as the first bytes of a session.
pub fn encode_early(json: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + json.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&(json.len() as u32).to_be_bytes());
    bytes.extend_from_slice(json);
    bytes
}

#[derive(Debug)]
enum State {
    /// Gathering the first nine bytes.
    Header(Vec<u8>),
    /// Gathering a payload of so many bytes.
    Payload(Vec<u8>, usize),
    /// No payload: these bytes belong to HTTP/2 and come first.
    Replay(Vec<u8>, usize),
    Done,
}

/// A client's stream without the server's early payload.
#[derive(Debug)]
pub struct EarlyStream<S> {
    inner: S,
    state: State,
    payload: EarlyPayload,
}

impl<S> EarlyStream<S> {
    /// Watches the first bytes of `inner`.
    pub fn new(inner: S) -> Self {
        Self { inner, state: State::Header(Vec::new()), payload: EarlyPayload::default() }
    }

    /// Where the payload will be once the stream is read.
    pub fn payload(&self) -> EarlyPayload {
        Arc::clone(&self.payload)
    }

    /// The stream below.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

/// Reads into `bytes` until it has `wanted`; `false` at the stream's end.
fn poll_gather<S: AsyncRead + Unpin>(
    inner: &mut S,
    cx: &mut Context<'_>,
    bytes: &mut Vec<u8>,
    wanted: usize,
) -> Poll<io::Result<bool>> {
    let mut room = [0; 512];
    while bytes.len() < wanted {
        let n = (wanted - bytes.len()).min(room.len());
        let mut buf = ReadBuf::new(&mut room[..n]);
        ready!(Pin::new(&mut *inner).poll_read(cx, &mut buf))?;
        if buf.filled().is_empty() {
            return Poll::Ready(Ok(false));
        }
        bytes.extend_from_slice(buf.filled());
    }
    Poll::Ready(Ok(true))
}

impl<S: AsyncRead + Unpin> AsyncRead for EarlyStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            this.state = match &mut this.state {
                State::Header(bytes) => {
                    let whole = ready!(poll_gather(&mut this.inner, cx, bytes, HEADER))?;
                    if whole && bytes.starts_with(&MAGIC) {
                        let length = [bytes[5], bytes[6], bytes[7], bytes[8]];
                        let length = u32::from_be_bytes(length) as usize;
                        if length > MAX_PAYLOAD {
                            return Poll::Ready(Err(io::Error::new(
                                io::ErrorKind::InvalidData,
                                format!("the server announces an early payload of {length} bytes"),
                            )));
                        }
                        State::Payload(Vec::new(), length)
                    } else {
                        State::Replay(std::mem::take(bytes), 0)
                    }
                }
                State::Payload(bytes, length) => {
                    if !ready!(poll_gather(&mut this.inner, cx, bytes, *length))? {
                        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                    }
                    // Set only here, once.
                    let _ = this.payload.set(std::mem::take(bytes));
                    State::Done
                }
                State::Replay(bytes, at) if *at < bytes.len() => {
                    let n = (bytes.len() - *at).min(buf.remaining());
                    buf.put_slice(&bytes[*at..*at + n]);
                    *at += n;
                    return Poll::Ready(Ok(()));
                }
                State::Replay(..) => State::Done,
                State::Done => return Pin::new(&mut this.inner).poll_read(cx, buf),
            };
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for EarlyStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    async fn read(bytes: &[u8]) -> (io::Result<Vec<u8>>, Option<Vec<u8>>) {
        let mut stream = EarlyStream::new(bytes);
        let payload = stream.payload();
        let mut got = Vec::new();
        let result = stream.read_to_end(&mut got).await.map(|_| got);
        (result, payload.get().cloned())
    }

    #[tokio::test]
    async fn a_payload_is_taken_out_and_kept() {
        let mut bytes = encode_early(b"{}");
        bytes.extend_from_slice(b"http/2 goes on here");
        let (rest, payload) = read(&bytes).await;
        assert_eq!(rest.unwrap(), b"http/2 goes on here");
        assert_eq!(payload.unwrap(), b"{}");
    }

    #[tokio::test]
    async fn without_a_payload_every_byte_comes_through() {
        let (rest, payload) = read(b"\0\0\x06\x04\0\0\0\0\0settings").await;
        assert_eq!(rest.unwrap(), b"\0\0\x06\x04\0\0\0\0\0settings");
        assert!(payload.is_none());
        assert_eq!(read(b"abc").await.0.unwrap(), b"abc");
        assert_eq!(read(b"").await.0.unwrap(), b"");
    }

    #[tokio::test]
    async fn a_giant_or_cut_payload_is_an_error() {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[0xff; 4]);
        assert!(read(&bytes).await.0.is_err());
        let cut = &encode_early(b"{\"nodeKeyChallenge\":1}")[..15];
        assert!(read(cut).await.0.is_err());
    }
}
