//! Large reads under TLS. The TLS library asks its socket for 4 KiB at a time; this asks the kernel for 64 KiB and
//! keeps the rest at hand, so that a busy connection makes a sixteenth of the system calls. The buffer exists only while it
//! holds something.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What one system call may bring.
const SIZE: usize = 64 << 10;
/// Reads that ask for more than this go straight to the socket.
const DIRECT: usize = SIZE / 2;

/// See the module's description.
#[derive(Debug)]
pub struct ReadAhead<S> {
    inner: S,
    buffer: Vec<u8>,
    taken: usize,
}

impl<S> ReadAhead<S> {
    /// Reads ahead of what is asked of `inner`.
    pub const fn new(inner: S) -> Self {
        Self { inner, buffer: Vec::new(), taken: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.taken == this.buffer.len() {
            if out.remaining() >= DIRECT {
                return Pin::new(&mut this.inner).poll_read(cx, out);
            }
            this.taken = 0;
            this.buffer.clear();
            this.buffer.reserve(SIZE);
            let poll = tokio_util::io::poll_read_buf(Pin::new(&mut this.inner), cx, &mut this.buffer);
            if !matches!(poll, Poll::Ready(Ok(n)) if n > 0) {
                this.buffer = Vec::new();
            }
            ready!(poll)?;
        }
        let len = out.remaining().min(this.buffer.len() - this.taken);
        out.put_slice(&this.buffer[this.taken..this.taken + len]);
        this.taken += len;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
