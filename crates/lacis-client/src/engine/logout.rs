//! Leaving a network. The control server is asked to expire this node's key before anything is torn down, and again at
//! the next chance if it cannot be reached then: a copy of the key must not stay valid.

use std::sync::Arc;

use lacis_wire::key::NodeKey;
use lacis_wire::local::{Notify, Prefs};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Duration, Instant};

use super::Engine;
use crate::control::{self, ControlConfig, LogoutError};
use crate::hostinfo;
use crate::state::Departure;

/// Between attempts to reach a server, doubling up to the longest.
const MIN_PAUSE: Duration = Duration::from_secs(10);
const MAX_PAUSE: Duration = Duration::from_mins(10);
/// Keys that wait to be expired. The oldest go first.
const MAX_DEPARTURES: usize = 8;
/// A server that is gone for so long does not come back.
const MAX_AGE: time::Duration = time::Duration::days(30);

/// A request to expire a key, and what came of it.
pub(super) type Outcome = (Departure, Result<(), LogoutError>);

/// Logouts that are under way.
#[derive(Debug)]
pub(super) struct Logouts {
    /// Who waits for the end of the present login.
    waiting: Vec<oneshot::Sender<Result<(), String>>>,
    /// The key of the present login, while it ends.
    ending: Option<NodeKey>,
    sender: mpsc::Sender<Outcome>,
    /// Requests for earlier logins that have no outcome yet.
    retrying: usize,
    pause: Duration,
    next: Instant,
}

impl Logouts {
    pub(super) fn new() -> (Self, mpsc::Receiver<Outcome>) {
        let (sender, outcomes) = mpsc::channel(MAX_DEPARTURES);
        (
            Self {
                waiting: Vec::new(),
                ending: None,
                sender,
                retrying: 0,
                pause: MIN_PAUSE,
                next: Instant::now(),
            },
            outcomes,
        )
    }

    /// Is the present login ending?
    pub(super) fn is_pending(&self) -> bool {
        !self.waiting.is_empty()
    }
}

/// Adds a key to those that wait to be expired.
fn keep(departures: &mut Vec<Departure>, departure: Departure) {
    departures.retain(|known| known.node_key.public() != departure.node_key.public());
    if departures.len() >= MAX_DEPARTURES {
        let oldest = departures.remove(0);
        tracing::warn!(url = %oldest.control_url, key = %oldest.node_key.public(), "this old key is not expired at its server");
    }
    departures.push(departure);
}

impl Engine {
    /// Ends the login: at the server first, as long as that may take, then here in any case.
    pub(super) fn logout(&mut self, reply: oneshot::Sender<Result<(), String>>) {
        self.logouts.waiting.push(reply);
        if self.logouts.waiting.len() > 1 {
            return;
        }
        match self.departure() {
            Some(departure) => {
                self.logouts.ending = Some(departure.node_key.public());
                self.expire(departure);
            }
            None => self.log_out_here(),
        }
    }

    /// The present key and where it is valid.
    fn departure(&self) -> Option<Departure> {
        Some(Departure {
            control_url: self.saved.prefs.control_url.clone(),
            node_key: self.saved.node_key.clone()?,
            server_key: self.saved.server_key,
            server_address: self.saved.server_address,
            since: OffsetDateTime::now_utc().unix_timestamp(),
        })
    }

    fn expire(&self, departure: Departure) {
        let config = ControlConfig {
            url: departure.control_url.clone(),
            machine_key: self.saved.machine_key.clone(),
            node_key: departure.node_key.clone(),
            old_node_key: None,
            lock_key: self.saved.lock_key,
            auth_key: None,
            server_key: departure.server_key,
            accept_new_key: false,
            server_address: departure.server_address,
            fwmark: self.fwmark,
            proxies: Arc::clone(&self.proxies),
        };
        let facts = hostinfo::with_prefs(&self.host_facts, &self.saved.prefs);
        let sender = self.logouts.sender.clone();
        tokio::spawn(async move {
            let result = control::logout(config, facts).await;
            // The engine may have stopped.
            let _ = sender.send((departure, result)).await;
        });
    }

    /// The server has answered, or cannot be reached.
    pub(super) fn logout_outcome(&mut self, (departure, result): Outcome) {
        let key = departure.node_key.public();
        let url = departure.control_url.clone();
        let is_present = self.logouts.ending == Some(key);
        if !is_present {
            self.logouts.retrying = self.logouts.retrying.saturating_sub(1);
        }
        let mut refused = None;
        match result {
            Ok(()) => {
                tracing::info!(%url, %key, "the control server has expired this node's key");
                self.saved.departures.retain(|known| known.node_key.public() != key);
            }
            Err(LogoutError::Unreachable(error)) if is_present => {
                tracing::warn!(%url, %error, "logged out, but the control server does not know of it yet; trying again");
                keep(&mut self.saved.departures, departure);
                self.logouts.pause = MIN_PAUSE;
                self.logouts.next = Instant::now() + MIN_PAUSE;
            }
            Err(LogoutError::Unreachable(error)) => {
                tracing::debug!(%url, %error, "the control server does not know of the logout yet");
            }
            Err(error @ LogoutError::Refused(_)) => {
                tracing::warn!(%url, %key, %error, "the control server has not expired this node's key");
                self.saved.departures.retain(|known| known.node_key.public() != key);
                refused = Some(format!("{url} has not expired the key of this node's last login: {error}"));
            }
        }
        if is_present {
            self.log_out_here();
            self.trouble = refused;
        }
    }

    /// Gives up the present key without ending here: another network is entered.
    pub(super) fn depart(&mut self, control_url: String) {
        if let Some(departure) = self.departure() {
            keep(&mut self.saved.departures, Departure { control_url, ..departure });
            self.retry_logouts_now();
            self.retry_logouts();
        }
    }

    /// The network is another one: servers may be within reach again.
    pub(super) fn retry_logouts_now(&mut self) {
        self.logouts.pause = MIN_PAUSE;
        self.logouts.next = Instant::now();
    }

    /// Asks again where a server has not expired a key that this node has given up.
    pub(super) fn retry_logouts(&mut self) {
        if self.saved.departures.is_empty() || self.logouts.retrying > 0 || Instant::now() < self.logouts.next
        {
            return;
        }
        let oldest = (OffsetDateTime::now_utc() - MAX_AGE).unix_timestamp();
        self.saved.departures.retain(|departure| {
            let young = departure.since >= oldest;
            if !young {
                tracing::warn!(url = %departure.control_url, key = %departure.node_key.public(), "this old key is not expired at its server, which is given up");
            }
            young
        });
        self.logouts.next = Instant::now() + self.logouts.pause;
        self.logouts.pause = (self.logouts.pause * 2).min(MAX_PAUSE);
        self.logouts.retrying = self.saved.departures.len();
        for departure in self.saved.departures.clone() {
            self.expire(departure);
        }
    }

    /// What users should know of keys that are still valid.
    pub(super) fn valid_keys(&self) -> impl Iterator<Item = String> {
        self.saved.departures.iter().map(|departure| {
            format!(
                "{} could not be reached to end a login of this node: its key stays valid there until lacisd reaches it, or an administrator expires or deletes the node",
                departure.control_url
            )
        })
    }

    /// Forgets who this node was. Whoever waits for it is answered when that is on disk.
    fn log_out_here(&mut self) {
        self.login = None;
        self.auth_url = None;
        self.trouble = None;
        self.leave();
        self.saved.forget_login();
        // Another login is another node: it begins with the settings of one. Where the network is, and who may log in
        // to it, stays true of the host.
        self.saved.prefs = Prefs {
            control_url: std::mem::take(&mut self.saved.prefs.control_url),
            operator_user: std::mem::take(&mut self.saved.prefs.operator_user),
            logged_out: true,
            ..Prefs::default()
        };
        self.publish(Notify { prefs: Some(self.visible_prefs()), ..Notify::default() });
        self.save();
        self.logouts.ending = None;
        for reply in self.logouts.waiting.drain(..) {
            // Gone meanwhile.
            let _ = reply.send(Ok(()));
        }
    }
}

#[cfg(test)]
mod tests {
    use lacis_wire::key::NodePrivateKey;

    use super::*;

    #[test]
    fn few_keys_wait_to_be_expired_each_once_and_the_newest() {
        let departure = |url: usize| Departure {
            control_url: url.to_string(),
            node_key: NodePrivateKey::generate(),
            server_key: None,
            server_address: None,
            since: 0,
        };
        let mut kept = Vec::new();
        for number in 0..=MAX_DEPARTURES {
            let one = departure(number);
            keep(&mut kept, one.clone());
            keep(&mut kept, one);
        }
        let urls: Vec<_> = kept.iter().map(|one| one.control_url.parse::<usize>().unwrap()).collect();
        assert_eq!(urls, (1..=MAX_DEPARTURES).collect::<Vec<_>>());
    }
}
