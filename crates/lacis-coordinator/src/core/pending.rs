//! Nodes that wait for an administrator: they came without a key and were sent to a page.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use lacis_wire::control::Hostinfo;
use lacis_wire::key::{MachineKey, NodeKey};
use tokio::sync::watch;

/// After this nobody waits any more, and the client asks for a new page.
const LIFETIME_SECONDS: i64 = 15 * 60;
/// Anybody can begin a registration: beyond this many the oldest gives way, and of each only little is kept.
const LIMIT: usize = 1024;
/// The longest text of a host that is kept.
const TEXT: usize = 255;
/// Tags that are kept.
const TAGS: usize = 32;

/// One that waits.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub id: String,
    pub machine: MachineKey,
    pub node_key: NodeKey,
    pub hostinfo: Hostinfo,
    pub version: u16,
    pub created: i64,
    approved: watch::Sender<bool>,
}

/// All that wait, by id.
#[derive(Debug, Default)]
pub(super) struct Pending(Mutex<HashMap<String, Waiting>>);

impl Pending {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a registration and gives its id. A machine that asks again for the same key gets the same one.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub(super) fn add(
        &self,
        machine: MachineKey,
        node_key: NodeKey,
        hostinfo: Hostinfo,
        version: u16,
        now: i64,
    ) -> Result<String, getrandom::Error> {
        let mut waiting = self.lock();
        if let Some(same) = waiting.values().find(|one| one.machine == machine && one.node_key == node_key) {
            return Ok(same.id.clone());
        }
        if waiting.len() >= LIMIT
            && let Some(oldest) = waiting.values().min_by_key(|one| one.created).map(|one| one.id.clone())
        {
            waiting.remove(&oldest);
        }
        let mut random = [0; 12];
        getrandom::fill(&mut random)?;
        let id = format!("lacis-reg-{}", hex::encode(random));
        let one = Waiting {
            id: id.clone(),
            machine,
            node_key,
            // The rest comes with the first map request.
            hostinfo: Hostinfo {
                hostname: hostinfo.hostname.chars().take(TEXT).collect(),
                os: hostinfo.os.chars().take(TEXT).collect(),
                // One that is too long is no tag, and refused.
                request_tags: hostinfo
                    .request_tags
                    .iter()
                    .take(TAGS)
                    .map(|tag| tag.chars().take(TEXT).collect())
                    .collect(),
                ..Hostinfo::default()
            },
            version,
            created: now,
            approved: watch::Sender::default(),
        };
        waiting.insert(id.clone(), one);
        Ok(id)
    }

    pub(super) fn get(&self, id: &str) -> Option<Waiting> {
        self.lock().get(id).cloned()
    }

    pub(super) fn list(&self) -> Vec<Waiting> {
        let mut all: Vec<_> = self.lock().values().cloned().collect();
        all.sort_by_key(|one| one.created);
        all
    }

    /// Ends the wait.
    pub(super) fn approve(&self, id: &str) {
        if let Some(one) = self.lock().remove(id) {
            one.approved.send_replace(true);
        }
    }

    /// Waits until somebody decides, or nobody will.
    pub(super) async fn wait(&self, id: &str, machine: &MachineKey) {
        let approved =
            self.lock().get(id).filter(|one| one.machine == *machine).map(|one| one.approved.subscribe());
        if let Some(mut approved) = approved {
            // The sender goes when the registration is forgotten.
            let _ = approved.wait_for(|approved| *approved).await;
        }
    }

    pub(super) fn forget_old(&self, now: i64) {
        self.lock().retain(|_, one| one.created + LIFETIME_SECONDS > now);
    }
}
