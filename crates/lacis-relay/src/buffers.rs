//! Read buffers that connections borrow only while they poll, so that an idle connection holds none.

use std::sync::{Mutex, PoisonError};

/// Buffers kept for reuse; more than this many are polled at once only on very large machines.
const KEPT: usize = 32;

/// A stack of equal buffers.
#[derive(Debug)]
pub(crate) struct BufferPool {
    size: usize,
    free: Mutex<Vec<Box<[u8]>>>,
}

impl BufferPool {
    pub(crate) const fn new(size: usize) -> Self {
        Self { size, free: Mutex::new(Vec::new()) }
    }

    /// A buffer of the pool's size with arbitrary content.
    pub(crate) fn take(&self) -> Box<[u8]> {
        let kept = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(|| vec![0; self.size].into_boxed_slice())
    }

    /// Gives a buffer back.
    pub(crate) fn give(&self, buffer: Box<[u8]>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < KEPT {
            free.push(buffer);
        }
    }
}
