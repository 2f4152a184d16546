//! SSH sessions that a rule with `action: check` holds back until somebody says that they are meant (control-protocol
//! dossier, section 9.3). Here an administrator does, with `lacis admin ssh-checks approve`. A decision in favour lasts
//! as long as the rule says, for that user on that pair of nodes, until the policy changes or the program ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use lacis_policy::SshVerdict;
use lacis_wire::admin::SshCheckInfo;
use lacis_wire::control::{NodeId, display_text};
use lacis_wire::key::MachineKey;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::sync::watch;

use super::admin::AdminError;
use super::tailnet::Tailnet;
use super::{Core, now};

/// As long as clients wait.
const LIFETIME_SECONDS: i64 = 30 * 60;
/// How long a decision lasts where the rule does not say.
const PERIOD_SECONDS: u64 = 12 * 3600;
/// Anybody whom a rule names can begin one: beyond this many the oldest gives way.
const LIMIT: usize = 1024;

/// A session as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Session {
    from: NodeId,
    to: NodeId,
    user: String,
}

#[derive(Debug)]
struct Waiting {
    session: Session,
    created: i64,
    verdict: watch::Sender<Option<bool>>,
}

#[derive(Debug, Default)]
struct State {
    /// By id.
    waiting: HashMap<String, Waiting>,
    /// When, and under which state of the rules.
    approved: HashMap<Session, (i64, String)>,
}

/// All checks.
#[derive(Debug, Default)]
pub(super) struct SshChecks(Mutex<State>);

impl SshChecks {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, session: Session, now: i64) -> Result<String, getrandom::Error> {
        let mut random = [0; 8];
        getrandom::fill(&mut random)?;
        let id = hex::encode(random);
        let mut state = self.lock();
        if state.waiting.len() >= LIMIT {
            let oldest = state.waiting.iter().min_by_key(|(_, one)| one.created).map(|(id, _)| id.clone());
            oldest.and_then(|id| state.waiting.remove(&id));
        }
        let one = Waiting { session, created: now, verdict: watch::Sender::default() };
        state.waiting.insert(id.clone(), one);
        Ok(id)
    }

    pub(super) fn forget_old(&self, now: i64) {
        self.lock().waiting.retain(|_, one| one.created + LIFETIME_SECONDS > now);
    }
}

fn accept() -> Value {
    json!({
        "accept": true,
        "allowAgentForwarding": true,
        "allowLocalPortForwarding": true,
        "allowRemotePortForwarding": true,
    })
}

fn reject(why: &str) -> Value {
    json!({ "reject": true, "message": format!("{why}\r\n") })
}

impl Core {
    /// What the node `to`, which asks over `machine`'s session, shall do with an SSH session from `from` as `user`;
    /// `None` when that is none of its business. Waits for the administrator where `check` names a session that waits.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub async fn ssh_action(
        &self,
        machine: &MachineKey,
        from: NodeId,
        to: NodeId,
        user: &str,
        check: Option<&str>,
    ) -> Result<Option<Value>, getrandom::Error> {
        let mine = |tailnet: &&Arc<Tailnet>| {
            let snapshot = tailnet.snapshot();
            let own = snapshot.node(to).is_some_and(|node| node.machine_key == *machine && !node.expired);
            own && snapshot.node(from).is_some_and(|node| !node.expired)
        };
        let Some(tailnet) = self.tailnets().find(mine) else { return Ok(None) };
        let session = Session { from, to, user: user.to_owned() };
        let verdict = || tailnet.snapshot().network.ssh_verdict(from, to, user);
        let period = match verdict() {
            None => return Ok(Some(reject("The policy does not let you in."))),
            Some(SshVerdict::Accept) => return Ok(Some(accept())),
            Some(SshVerdict::Check { period }) => period.unwrap_or(PERIOD_SECONDS),
        };
        let rules = tailnet.policy_text();
        let lasting = self
            .0
            .ssh_checks
            .lock()
            .approved
            .get(&session)
            .is_some_and(|(at, under)| *under == rules && at.saturating_add_unsigned(period) > now());
        if lasting {
            return Ok(Some(accept()));
        }
        let decided = check.and_then(|id| {
            let state = self.0.ssh_checks.lock();
            state.waiting.get(id).filter(|one| one.session == session).map(|one| one.verdict.subscribe())
        });
        if let Some(mut decided) = decided {
            let verdict = tokio::select! {
                verdict = decided.wait_for(Option::is_some) => verdict.ok().and_then(|verdict| *verdict),
                () = self.0.token.cancelled() => None,
            };
            return Ok(Some(match verdict {
                Some(true) => accept(),
                Some(false) => reject("The administrator has refused this session."),
                None => reject("Nobody has decided about this session."),
            }));
        }
        let id = self.0.ssh_checks.add(session, now())?;
        let url = format!(
            "{}/machine/ssh/action/$SRC_NODE_ID/to/$DST_NODE_ID?local_user=$LOCAL_USER&check={id}",
            tailnet.settings.server_url
        );
        let message = format!(
            "# This session waits until an administrator runs\r\n#   lacis admin ssh-checks approve {id}\r\n"
        );
        Ok(Some(json!({ "message": message, "holdAndDelegate": url })))
    }

    pub fn list_ssh_checks(&self) -> Vec<SshCheckInfo> {
        let state = self.0.ssh_checks.lock();
        let name = |id: NodeId| {
            let node = self.tailnets().find_map(|tailnet| tailnet.snapshot().node(id).cloned());
            node.map_or_else(|| id.to_string(), |node| node.name.clone())
        };
        let info = |(id, one): (&String, &Waiting)| SshCheckInfo {
            id: id.clone(),
            from: name(one.session.from),
            to: name(one.session.to),
            user: display_text(&one.session.user),
            created: OffsetDateTime::from_unix_timestamp(one.created).unwrap_or(OffsetDateTime::UNIX_EPOCH),
        };
        let mut all: Vec<_> = state.waiting.iter().map(info).collect();
        all.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        all
    }

    /// Lets a session begin, or refuses it.
    ///
    /// # Errors
    /// When nobody waits under this id.
    pub fn decide_ssh_check(&self, id: &str, approve: bool) -> Result<(), AdminError> {
        let mut state = self.0.ssh_checks.lock();
        let one = state
            .waiting
            .remove(id)
            .ok_or_else(|| AdminError::NotFound { what: "ssh-check", name: display_text(id) })?;
        let tailnet = self.tailnets().find(|tailnet| tailnet.snapshot().node(one.session.to).is_some());
        if let Some(tailnet) = tailnet.filter(|_| approve) {
            state.approved.insert(one.session, (now(), tailnet.policy_text()));
        }
        one.verdict.send_replace(Some(approve));
        Ok(())
    }
}
