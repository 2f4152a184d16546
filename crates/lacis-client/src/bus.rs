//! The bus: what happens in the daemon, told to everybody who watches.

use std::sync::Arc;

use lacis_wire::local::Notify;
use tokio::sync::broadcast;

/// Events that a slow watcher may be behind before it loses some.
const BEHIND: usize = 128;

/// Publishes to all watchers of the local API.
#[derive(Clone, Debug)]
pub(crate) struct Bus(broadcast::Sender<Arc<Notify>>);

impl Default for Bus {
    fn default() -> Self {
        Self(broadcast::channel(BEHIND).0)
    }
}

impl Bus {
    pub(crate) fn publish(&self, notify: Notify) {
        // Without watchers there is nobody to tell.
        let _ = self.0.send(Arc::new(notify));
    }

    pub(crate) fn watch(&self) -> broadcast::Receiver<Arc<Notify>> {
        self.0.subscribe()
    }
}
