//! Whether the coordinator can do its work: is the disk there, and does it take what is written?
//!
//! Anybody may ask, and each answer costs a write to disk: those who ask while one is on its way share the next.

use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use super::Core;
use crate::store::{self, Write};

/// Between the begins of two writes.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// When the last write began, and what came of it.
#[derive(Debug, Default)]
pub(super) struct Health(Mutex<Option<(Instant, Result<(), store::Error>)>>);

impl Core {
    /// Can the database be written? Finds out by writing.
    ///
    /// # Errors
    /// When it cannot: the disk is full or read-only, or the writer has stopped.
    pub async fn health(&self) -> Result<(), store::Error> {
        let asked = Instant::now();
        let mut last = self.0.health.0.lock().await;
        if let Some((began, result)) = &*last {
            if *began >= asked {
                return result.clone();
            }
            tokio::time::sleep_until(*began + MIN_INTERVAL).await;
        }
        let began = Instant::now();
        let result = self.0.store.commit(vec![Write::Probe]).await;
        *last = Some((began, result.clone()));
        result
    }
}
