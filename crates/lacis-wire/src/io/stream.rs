//! [`NoiseStream`]: a Noise session as an ordinary byte stream.
//!
//! Buffers exist only while bytes are in them, so that an idle session costs next to nothing. Large
//! writes leave as many records in one system call. Whatever fails to verify ends the stream for
//! good: every later call gives the same kind of error.

use std::future::Future as _;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

use crate::noise::{MAX_FRAME, MAX_PLAINTEXT, NoiseError, Opener, Sealer, Session};

/// Room for reading: four records a system call.
const READ_ROOM: usize = 4 * MAX_FRAME;
/// Above this much unsent ciphertext no more plaintext is accepted.
const WRITE_LIMIT: usize = 64 * 1024;
/// The most plaintext taken in one call: sixteen records.
const WRITE_CHUNK: usize = 16 * MAX_PLAINTEXT;

/// One side of a Noise session over the stream `S`.
#[derive(Debug)]
pub struct NoiseStream<S> {
    inner: S,
    sealer: Sealer,
    opener: Opener,
    /// What was read: opened plaintext at `plain`, then unopened bytes from `raw` on.
    read: Vec<u8>,
    plain: Range<usize>,
    raw: usize,
    /// Sealed and not yet sent, from `sent` on.
    write: Vec<u8>,
    sent: usize,
    /// Set once the peer's bytes did not verify.
    broken: bool,
}

impl<S> NoiseStream<S> {
    /// A stream on `inner` with a finished handshake's keys.
    ///
    /// `leftover` are bytes that were read from `inner` together with the handshake (often none).
    pub fn new(inner: S, session: Session, leftover: &[u8]) -> Self {
        Self {
            inner,
            sealer: session.sealer,
            opener: session.opener,
            read: leftover.to_vec(),
            plain: 0..0,
            raw: 0,
            write: Vec::new(),
            sent: 0,
            broken: false,
        }
    }

    /// Puts clear bytes in front of everything that is sent: the server's handshake response, so
    /// that it leaves in one segment with the first records. Call it before anything is written.
    pub fn prepend_clear(&mut self, bytes: &[u8]) {
        debug_assert!(self.write.is_empty(), "called before anything is written");
        self.write.extend_from_slice(bytes);
    }

    /// The stream below.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    fn fail(&mut self, error: NoiseError) -> io::Error {
        self.broken = true;
        self.read = Vec::new();
        self.plain = 0..0;
        self.raw = 0;
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    fn check(&self) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the Noise session ended with an error"));
        }
        Ok(())
    }

    /// Opens the next whole record that is buffered. `false`: more bytes are needed.
    fn open_next(&mut self) -> Result<bool, NoiseError> {
        loop {
            let unopened = &self.read[self.raw..];
            let length = match Opener::frame_len(unopened)? {
                Some(length) if length <= unopened.len() => length,
                _ => return Ok(false),
            };
            let start = self.raw;
            let range = self.opener.open(&mut self.read[start..start + length])?;
            self.raw += length;
            if !range.is_empty() {
                self.plain = start + range.start..start + range.end;
                return Ok(true);
            }
        }
    }

    /// Moves the unopened bytes to the front and makes room for a read.
    fn make_room(&mut self) {
        let left = self.read.len() - self.raw;
        self.read.copy_within(self.raw.., 0);
        self.read.truncate(left);
        self.raw = 0;
        self.plain = 0..0;
        if self.read.capacity() - left < MAX_FRAME {
            self.read.reserve_exact(READ_ROOM);
        }
    }
}

impl<S: AsyncWrite + Unpin> NoiseStream<S> {
    /// Sends what is sealed, as far as the stream below takes it.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.write.len() {
            let n = ready!(Pin::new(&mut self.inner).poll_write(cx, &self.write[self.sent..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += n;
        }
        self.write = Vec::new();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// Makes sure that a write may be accepted.
    fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        if self.write.len() - self.sent >= WRITE_LIMIT {
            ready!(self.poll_drain(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    fn seal(&mut self, plaintext: &[u8]) -> io::Result<()> {
        self.sealer.seal(plaintext, &mut self.write).map_err(|error| self.fail(error))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for NoiseStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.check()?;
        let before = buf.filled().len();
        loop {
            if !this.plain.is_empty() {
                let n = this.plain.len().min(buf.remaining());
                buf.put_slice(&this.read[this.plain.start..this.plain.start + n]);
                this.plain.start += n;
            }
            if buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            match this.open_next() {
                Ok(true) => continue,
                Ok(false) => {}
                // What was opened before is delivered first; the error comes with the next call,
                // for the bad record stays where it is.
                Err(_) if buf.filled().len() > before => return Poll::Ready(Ok(())),
                Err(error) => return Poll::Ready(Err(this.fail(error))),
            }
            if buf.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
            this.make_room();
            let old = this.read.len();
            // The future holds nothing but the two borrows, so it may be made anew for every poll.
            let n = match pin!(this.inner.read_buf(&mut this.read)).poll(cx) {
                Poll::Pending => {
                    if this.read.is_empty() {
                        this.read = Vec::new();
                    }
                    return Poll::Pending;
                }
                Poll::Ready(result) => result?,
            };
            if n == 0 {
                if old != 0 {
                    this.broken = true;
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for NoiseStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_writable(cx))?;
        let n = buf.len().min(WRITE_CHUNK);
        this.seal(&buf[..n])?;
        // Try at once, so that a caller who never flushes is served too; what does not fit now is
        // kept for the next call.
        match this.poll_drain(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(n)),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_writable(cx))?;
        let total: usize = bufs.iter().map(|b| b.len()).sum();
        let taken = total.min(WRITE_CHUNK);
        // Small pieces (an HTTP/2 frame's head and its body) share records.
        if let [one] = bufs {
            this.seal(&one[..taken])?;
        } else {
            let mut plain = Vec::with_capacity(taken);
            for buf in bufs {
                let n = buf.len().min(taken - plain.len());
                plain.extend_from_slice(&buf[..n]);
            }
            this.seal(&plain)?;
        }
        match this.poll_drain(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(taken)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::MachinePrivateKey;
    use crate::noise::{Initiator, Responder};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    fn sessions() -> (Session, Session) {
        let (client, server) = (MachinePrivateKey::generate(), MachinePrivateKey::generate());
        let (initiator, frame) = Initiator::new(&client, &server.public(), 113).unwrap();
        let (response, server) = Responder::read(&server, &frame).unwrap().respond().unwrap();
        (initiator.finish(&response).unwrap(), server)
    }

    fn pair(room: usize) -> (NoiseStream<DuplexStream>, NoiseStream<DuplexStream>) {
        let (one, two) = duplex(room);
        let (client, server) = sessions();
        (NoiseStream::new(one, client, &[]), NoiseStream::new(two, server, &[]))
    }

    #[tokio::test]
    async fn a_large_stream_passes_through_a_narrow_pipe_both_ways() {
        let (mut one, mut two) = pair(1000);
        let sent: Vec<u8> = (0..300_000_u32).map(|i| (i * 7 % 251) as u8).collect();
        let expected = sent.clone();
        let echo = tokio::spawn(async move {
            let mut got = vec![0; expected.len()];
            two.read_exact(&mut got).await.unwrap();
            two.write_all(&got).await.unwrap();
            two.shutdown().await.unwrap();
            got == expected
        });
        let (mut reader, mut writer) = tokio::io::split(&mut one);
        let mut back = Vec::new();
        let (write, read) = tokio::join!(
            async {
                writer.write_all(&sent).await?;
                writer.flush().await
            },
            reader.read_to_end(&mut back)
        );
        write.unwrap();
        read.unwrap();
        assert!(echo.await.unwrap());
        assert_eq!(back, sent);
    }

    #[tokio::test]
    async fn leftover_bytes_of_the_handshake_are_read_first() {
        let (mut client, server) = sessions();
        let mut wire = Vec::new();
        client.sealer.seal(b"early ", &mut wire).unwrap();
        client.sealer.seal(b"bird", &mut wire).unwrap();
        let (mut far, near) = duplex(4096);
        let cut = wire.len() - 5;
        let mut stream = NoiseStream::new(near, server, &wire[..cut]);
        far.write_all(&wire[cut..]).await.unwrap();
        let mut got = [0; 10];
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"early bird");
    }

    #[tokio::test]
    async fn clear_bytes_leave_together_with_the_first_record() {
        let (mut far, near) = duplex(4096);
        let (_, server) = sessions();
        let mut stream = NoiseStream::new(near, server, &[]);
        stream.prepend_clear(b"clear");
        stream.write_all(b"sealed").await.unwrap();
        let mut got = [0; 100];
        let n = far.read(&mut got).await.unwrap();
        assert_eq!(n, 5 + 19 + 6);
        assert_eq!(&got[..5], b"clear");
    }

    #[tokio::test]
    async fn garbage_ends_the_stream_after_what_was_good() {
        let (mut client, server) = sessions();
        let (mut far, near) = duplex(4096);
        let mut wire = Vec::new();
        client.sealer.seal(b"good", &mut wire).unwrap();
        wire.extend_from_slice(b"GET / HTTP/1.1\r\n");
        far.write_all(&wire).await.unwrap();
        let mut stream = NoiseStream::new(near, server, &[]);
        let mut got = [0; 100];
        assert_eq!(stream.read(&mut got).await.unwrap(), 4);
        assert!(stream.read(&mut got).await.is_err());
        assert!(stream.read(&mut got).await.is_err());
        assert!(stream.write(b"x").await.is_err());
    }

    #[tokio::test]
    async fn the_end_within_a_record_is_an_error_and_between_records_is_not() {
        let (mut client, server) = sessions();
        let (mut far, near) = duplex(4096);
        let mut wire = Vec::new();
        client.sealer.seal(b"good", &mut wire).unwrap();
        far.write_all(&wire[..10]).await.unwrap();
        drop(far);
        let mut stream = NoiseStream::new(near, server, &[]);
        let error = stream.read(&mut [0; 9]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);

        let (one, mut two) = pair(100);
        drop(one);
        assert_eq!(two.read(&mut [0; 9]).await.unwrap(), 0);
    }
}
