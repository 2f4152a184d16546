//! Who this node is to the control server: logging in and out, preferences, and the state that follows.

use std::sync::Arc;

use ipnet::IpNet;
use lacis_wire::control::{RegisterResponse, UserProfile};
use lacis_wire::io::ControlUrl;
use lacis_wire::key::{NodeKey, NodePrivateKey};
use lacis_wire::local::{MaskedPrefs, Notify, Prefs, StartOptions, State};
use lacis_wire::via::{self, Via};
use time::OffsetDateTime;
use tokio::time::{Duration, Instant};

use super::Engine;
use crate::control::{AuthKey, Control, ControlConfig, ControlEvent};
use crate::netmap::{Session, is_expired};
use crate::routing::{is_default_route, wants_exit};

/// A server that refuses a node it knew is asked again after this.
const RETRY_REFUSED: Duration = Duration::from_secs(30);
/// Whoever logs in is told after this that the control server is out of reach; it may be the wrong URL.
const LOGIN_PATIENCE: Duration = Duration::from_secs(5);
/// For so long `login-interactive` belongs to the `start` before it.
const REAUTH: Duration = Duration::from_secs(5);
/// A name in DNS.
const HOSTNAME: usize = 253;
const LABEL: usize = 63;

/// A login that is under way.
#[derive(Debug)]
pub(super) struct Login {
    auth_key: Option<AuthKey>,
    /// The key it is for is new, and replaces the one in use only when the server agrees.
    new_key: bool,
    /// It was made for this login: another would fare no better.
    unused_key: bool,
    began: Instant,
    /// Whoever waits for it was told that the server is out of reach.
    complained: bool,
}

/// Refuses preferences that cannot work.
pub(super) fn check_prefs(prefs: &Prefs) -> Result<(), String> {
    if !prefs.control_url.is_empty() {
        ControlUrl::parse(&prefs.control_url).map_err(|error| error.to_string())?;
    }
    if prefs.run_ssh {
        return Err("SSH is not served by lacisd; use the host's own SSH server over the mesh".to_owned());
    }
    if !prefs.hostname.is_empty() && !is_hostname(&prefs.hostname) {
        return Err(format!(
            "{:?} is no host name: use letters, digits and hyphens, at most {LABEL} in a label",
            prefs.hostname
        ));
    }
    let bad_tag = |tag: &&String| {
        let name = tag.strip_prefix("tag:").unwrap_or_default();
        !name.starts_with(|c: char| c.is_ascii_alphabetic())
            || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    if let Some(tag) = prefs.advertise_tags.iter().find(bad_tag) {
        return Err(format!("{tag:?} is no tag: tags look like tag:web"));
    }
    if let Some(route) = prefs.advertise_routes.iter().find(|route| route.trunc() != **route) {
        return Err(format!("{route} has bits set after its prefix; did you mean {}?", route.trunc()));
    }
    for route in &prefs.advertise_routes {
        if let IpNet::V6(route) = route
            && via::RANGE.contains(&route.addr())
        {
            Via::try_from(*route).map_err(|error| error.to_string())?;
        }
    }
    if !prefs.exit_node_ip.is_empty() && prefs.exit_node_ip.parse::<std::net::IpAddr>().is_err() {
        return Err(format!("the exit node {:?} is no address", prefs.exit_node_ip));
    }
    if !prefs.exit_node_name.is_empty() && !is_hostname(prefs.exit_node_name.trim_end_matches('.')) {
        return Err(format!("the exit node {:?} is no name of a node", prefs.exit_node_name));
    }
    let offered: Vec<_> = prefs.advertise_routes.iter().filter(|route| is_default_route(route)).collect();
    if offered.iter().any(|one| one.addr().is_ipv4()) != offered.iter().any(|one| one.addr().is_ipv6()) {
        return Err("0.0.0.0/0 and ::/0 go together: use --advertise-exit-node".to_owned());
    }
    if !offered.is_empty() && wants_exit(prefs) {
        return Err(
            "this node cannot use an exit node and be one: end one of them with --exit-node= or --advertise-exit-node=false"
                .to_owned(),
        );
    }
    Ok(())
}

/// Whoever names an exit node in one way takes back what was said in the others, also if he does not know of them.
fn one_exit_node(change: &MaskedPrefs, prefs: &mut Prefs) {
    let names = |field: &str| change.0.get(&format!("{field}Set")) == Some(&serde_json::Value::Bool(true));
    let (id, ip, name) = (names("ExitNodeID"), names("ExitNodeIP"), names("ExitNodeName"));
    if !id && (ip || name) {
        prefs.exit_node_id.clear();
    }
    if !ip && (id || name) {
        prefs.exit_node_ip.clear();
    }
    if !name && (id || ip) {
        prefs.exit_node_name.clear();
    }
}

fn is_hostname(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= LABEL
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= HOSTNAME && name.split('.').all(label)
}

/// What to do about a refusal, as far as its words tell.
fn way_out(reason: &str) -> &'static str {
    if reason.contains("authkey") || reason.contains("auth key") {
        " (make a new key: `lacis admin keys create` on the coordinator)"
    } else {
        ""
    }
}

impl Engine {
    pub(super) fn visible_prefs(&self) -> Prefs {
        let identity = lacis_wire::local::Identity {
            user_profile: self.saved.profile.clone(),
            node_id: self.saved.stable_id.clone(),
        };
        Prefs { identity: Some(identity), ..self.saved.prefs.clone() }
    }

    /// Should this node be in its network?
    pub(super) fn is_on(&self) -> bool {
        self.saved.prefs.want_running && self.saved.is_logged_in()
    }

    fn set_prefs(&mut self, prefs: Prefs) {
        let before = std::mem::replace(&mut self.saved.prefs, Prefs { identity: None, ..prefs });
        if before == self.saved.prefs {
            return;
        }
        if before.control_url != self.saved.prefs.control_url && !before.control_url.is_empty() {
            // Another server is another network: what was known of the old one is not true there.
            self.depart(before.control_url);
            self.leave();
            self.saved.forget_login();
            self.saved.server_key = None;
            self.saved.server_address = None;
        }
        self.publish(Notify { prefs: Some(self.visible_prefs()), ..Notify::default() });
        self.apply_all();
    }

    pub(super) fn edit_prefs(&mut self, change: &MaskedPrefs) -> Result<Prefs, String> {
        let mut prefs = change.apply(&self.saved.prefs).map_err(|error| error.to_string())?;
        one_exit_node(change, &mut prefs);
        check_prefs(&prefs)?;
        if prefs.control_url != self.saved.prefs.control_url && self.saved.is_logged_in() {
            return Err("log out before going to another --login-server, or use --force-reauth".to_owned());
        }
        let turned_on = prefs.want_running && change.0.get("WantRunningSet").is_some();
        if !prefs.want_running {
            self.trouble = None;
        }
        self.set_prefs(prefs);
        if turned_on {
            self.retry_at = None;
            // Who turns it on waits to hear of it, even if it is on already or waits for an administrator.
            self.publish(Notify { state: Some(self.state), ..Notify::default() });
        }
        Ok(self.visible_prefs())
    }

    /// Logs in if need be, with the preferences and the auth key given.
    pub(super) fn start(&mut self, options: StartOptions) -> Result<(), String> {
        self.check_not_leaving()?;
        if let Some(prefs) = options.update_prefs {
            check_prefs(&prefs)?;
            self.set_prefs(prefs);
        }
        if self.saved.prefs.control_url.is_empty() {
            return Err("no control server is known yet: give its URL with --login-server".to_owned());
        }
        self.was_ready = false;
        self.trouble = None;
        self.retry_at = None;
        self.accept_new_key = options.force_reauth;
        // An expired key is not offered again: an auth key that can be used once would be spent on it.
        let expired = self.map.as_ref().is_some_and(|map| is_expired(&map.node, OffsetDateTime::now_utc()));
        if !options.auth_key.is_empty() {
            let new_key = options.force_reauth || self.saved.node_key.is_none() || expired;
            self.login(Some(AuthKey::new(options.auth_key)), new_key);
            self.reauth_began = options.force_reauth.then(Instant::now);
        } else if self.saved.node_key.is_some() {
            // Ask the server again: it may want more than before.
            self.login(None, expired);
        }
        Ok(())
    }

    /// Signs in anew, even if this node is signed in.
    pub(super) fn login_interactive(&mut self) -> Result<(), String> {
        self.check_not_leaving()?;
        // `up --force-reauth` asks for this right after `start`, which has done it, and may be through with it: the
        // auth key must not be lost.
        let done = self.reauth_began.take().is_some_and(|at| at.elapsed() < REAUTH);
        // So with the login that `start` began for a node without a key.
        if done || self.login.as_ref().is_some_and(|login| login.new_key) {
            return Ok(());
        }
        let auth_key = self.login.take().and_then(|login| login.auth_key);
        self.login(auth_key, true);
        Ok(())
    }

    /// A login that began now would end with the one before.
    fn check_not_leaving(&self) -> Result<(), String> {
        if self.logouts.is_pending() {
            return Err("this node is being logged out: try again in a moment".to_owned());
        }
        Ok(())
    }

    fn login(&mut self, auth_key: Option<AuthKey>, new_key: bool) {
        let unused_key = new_key && self.saved.pending_key.is_none();
        if unused_key {
            self.saved.pending_key = Some(NodePrivateKey::generate());
        }
        self.saved.prefs.want_running = true;
        self.saved.prefs.logged_out = false;
        self.auth_url = None;
        self.retry_at = None;
        self.login = Some(Login { auth_key, new_key, unused_key, began: Instant::now(), complained: false });
        self.control = None;
    }

    /// The key that the control session is for.
    fn control_key(&self) -> Option<NodePrivateKey> {
        match &self.login {
            Some(login) if login.new_key => self.saved.pending_key.clone(),
            _ => self.saved.node_key.clone(),
        }
    }

    fn control_config(&self, node_key: NodePrivateKey) -> ControlConfig {
        let replaced = self.saved.node_key.as_ref().map(NodePrivateKey::public);
        ControlConfig {
            url: self.saved.prefs.control_url.clone(),
            machine_key: self.saved.machine_key.clone(),
            old_node_key: replaced.or(self.saved.old_node_key).filter(|old| *old != node_key.public()),
            node_key,
            lock_key: self.saved.lock_key,
            auth_key: self.login.as_ref().and_then(|login| login.auth_key.clone()),
            server_key: self.saved.server_key,
            accept_new_key: self.accept_new_key,
            server_address: self.saved.server_address,
            fwmark: self.fwmark,
            proxies: Arc::clone(&self.proxies),
        }
    }

    /// Connects to or leaves control server, relays and network, as the user wishes.
    pub(super) fn follow_wishes(&mut self) {
        let wanted = self.saved.prefs.want_running
            && (self.login.is_some() || self.saved.is_logged_in())
            && !self.saved.prefs.control_url.is_empty()
            && self.retry_at.is_none()
            && !self.logouts.is_pending();
        if !wanted {
            self.control = None;
            self.streaming = false;
        } else if self.control.is_none()
            && let Some(key) = self.control_key()
        {
            self.streaming = false;
            self.announced_home = 0;
            self.control = Some(Control::start(self.control_config(key), self.announcement()));
        }
        self.follow_network();
    }

    pub(super) fn heard(&mut self, event: ControlEvent) {
        match event {
            ControlEvent::Connected { server_key, address } => {
                self.saved.server_key = Some(server_key);
                self.accept_new_key = false;
                if let Some(address) = address {
                    self.saved.server_address = Some(address.ip());
                }
                self.trouble = None;
            }
            ControlEvent::Registered(reply) => self.registered(&reply),
            ControlEvent::AuthUrl(url) => {
                tracing::info!(%url, "sign in to join the network");
                self.publish(Notify { browse_to_url: Some(url.clone()), ..Notify::default() });
                self.auth_url = Some(url);
            }
            ControlEvent::Refused(reason) => self.refused(&reason),
            ControlEvent::KeyExpired => self.key_expired(),
            ControlEvent::StreamStarted => {
                self.session = Session::default();
                self.streaming = true;
            }
            ControlEvent::Frame(frame) => {
                // Before the server's time in it is compared with a clock that was just set.
                self.follow_clock();
                self.frame(*frame);
            }
            ControlEvent::Announced { home } => {
                if home != 0 {
                    self.announced_home = home;
                }
            }
            ControlEvent::Trouble { error, hopeless } => {
                self.streaming = false;
                self.announced_home = 0;
                let is_new = self.trouble.as_ref() != Some(&error);
                if is_new {
                    tracing::warn!(%error, "no control session; trying again");
                }
                if hopeless && is_new {
                    self.publish(Notify { err_message: Some(error.clone()), ..Notify::default() });
                } else {
                    self.login_delayed(&error);
                }
                self.trouble = Some(error);
            }
        }
    }

    /// The control server is out of reach during a login.
    fn login_delayed(&mut self, error: &str) {
        let Some(login) = &mut self.login else { return };
        if login.complained || login.began.elapsed() < LOGIN_PATIENCE {
            return;
        }
        let expired = self.map.as_ref().is_none_or(|map| is_expired(&map.node, OffsetDateTime::now_utc()));
        if !login.new_key && !expired {
            // This node is logged in, and goes on by what it knows. The session brings the rest when it can.
            self.login = None;
            return;
        }
        login.complained = true;
        let text = format!("{error} (lacisd goes on trying)");
        self.publish(Notify { err_message: Some(text), ..Notify::default() });
    }

    fn registered(&mut self, reply: &RegisterResponse) {
        if let Some(login) = self.login.take() {
            if login.new_key {
                let before = self.saved.node_key.as_ref().map(NodePrivateKey::public);
                self.saved.node_key = self.saved.pending_key.take();
                self.saved.old_node_key = None;
                tracing::info!(replaced = ?before, "logged in");
            }
            self.publish(Notify { login_finished: Some(serde_json::json!({})), ..Notify::default() });
        }
        self.saved.prefs.logged_out = false;
        self.auth_url = None;
        if !reply.login.login_name.is_empty() {
            self.saved.profile = UserProfile {
                id: reply.user.id,
                login_name: reply.login.login_name.clone(),
                display_name: reply.login.display_name.clone(),
                profile_pic_url: reply.login.profile_pic_url.clone(),
            };
        }
    }

    fn refused(&mut self, reason: &str) {
        let text = format!("the control server refuses this node: {reason}{}", way_out(reason));
        tracing::warn!(error = %text);
        self.control = None;
        self.auth_url = None;
        self.publish(Notify { err_message: Some(text.clone()), ..Notify::default() });
        self.trouble = Some(text);
        if self.login.take().is_none() {
            // It knew us before: it may again.
            self.retry_at = Some(Instant::now() + RETRY_REFUSED);
        }
    }

    /// The key that was offered is dead, or belongs to another node. A login goes on with a new one, once.
    fn key_expired(&mut self) {
        self.control = None;
        let offered_new = self.login.as_ref().is_some_and(|login| login.new_key);
        if offered_new {
            // The key in use, if there is one, was not asked about.
            self.saved.pending_key = None;
        } else {
            let expired = self.saved.node_key.take().map(|key| key.public());
            self.saved.old_node_key = expired.or(self.saved.old_node_key);
        }
        match self.login.take() {
            Some(login) if login.unused_key => {
                self.login = Some(login);
                self.refused("it says that a new key has expired");
            }
            Some(login) => {
                // One that waits from an earlier login may be as dead.
                self.saved.pending_key = None;
                self.login(login.auth_key, true);
            }
            None => tracing::warn!("this node's key has expired: sign in again"),
        }
    }

    /// Out of the network, for good.
    pub(super) fn leave(&mut self) {
        self.control = None;
        self.map = None;
        self.session = Session::default();
        self.map_unsaved = false;
        self.map_saved = None;
        self.announced_home = 0;
        self.was_ready = false;
        // Regions of another network are others, whatever their numbers.
        self.relays.set_home(0);
        self.fail_netchecks("this node has left its network");
        self.dir.remove_netmap();
    }

    /// The state that users see follows from everything else.
    pub(super) fn update_state(&mut self) {
        let state = self.computed_state();
        if state == self.state {
            return;
        }
        tracing::info!(from = self.state.as_str(), to = state.as_str(), "state");
        self.state = state;
        self.publish(Notify { state: Some(state), ..Notify::default() });
    }

    fn computed_state(&mut self) -> State {
        let node = self.map.as_ref().map(|map| &map.node);
        let own_key = self.saved.node_key.as_ref().map(NodePrivateKey::public);
        let expired = node.is_some_and(|node| is_expired(node, OffsetDateTime::now_utc()));
        if !self.saved.prefs.want_running {
            self.was_ready = false;
            return if self.saved.is_logged_in() { State::Stopped } else { State::NeedsLogin };
        }
        if !self.saved.is_logged_in() || self.auth_url.is_some() || expired {
            self.was_ready = false;
            return State::NeedsLogin;
        }
        let Some(node) = node.filter(|node| Some(node.key) == own_key) else { return State::Starting };
        if !node.machine_authorized {
            self.was_ready = false;
            return State::NeedsMachineAuth;
        }
        self.was_ready |= self.is_ready();
        if self.was_ready { State::Running } else { State::Starting }
    }

    /// Can peers reach this node, and do they know how?
    fn is_ready(&self) -> bool {
        let home = self.relays.home();
        // From the cache peers are reached at once; so they are while nobody is there to be told.
        let told = self.announced_home == home || self.session.map().is_none() || self.trouble.is_some();
        self.login.is_none() && self.host_ready && home != 0 && told && self.relays.is_connected(home)
    }

    pub(super) fn own_key(&self) -> Option<NodeKey> {
        self.saved.node_key.as_ref().map(NodePrivateKey::public)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_node_named_in_one_way_ends_the_others() {
        let before = Prefs { exit_node_id: "n2".into(), exit_node_name: "gate".into(), ..Prefs::default() };
        let after = |field: &str, value: &str| {
            let change = MaskedPrefs::default().set(field, value);
            let mut prefs = change.apply(&before).unwrap();
            one_exit_node(&change, &mut prefs);
            (prefs.exit_node_id, prefs.exit_node_ip, prefs.exit_node_name)
        };
        let all = |id: &str, ip: &str, name: &str| (id.to_owned(), ip.to_owned(), name.to_owned());
        assert_eq!(after("ExitNodeIP", "100.64.0.9"), all("", "100.64.0.9", ""));
        assert_eq!(after("ExitNodeID", "n9"), all("n9", "", ""));
        assert_eq!(after("ExitNodeName", "door"), all("", "", "door"));
        assert_eq!(after("Hostname", "x"), all("n2", "", "gate"));
    }

    fn refusal(change: impl FnOnce(&mut Prefs)) -> String {
        let mut prefs = Prefs::default();
        change(&mut prefs);
        check_prefs(&prefs).unwrap_err()
    }

    #[test]
    fn preferences_that_cannot_work_are_refused_with_the_way_out() {
        assert!(refusal(|p| p.control_url = "mesh.example".into()).contains("mesh.example"));
        assert!(refusal(|p| p.hostname = "a b".into()).contains("letters"));
        assert!(refusal(|p| p.hostname = "a..b".into()).contains("letters"));
        assert!(refusal(|p| p.advertise_tags = vec!["web".into()]).contains("tag:web"));
        assert!(refusal(|p| p.advertise_routes = vec!["10.0.0.1/8".parse().unwrap()]).contains("10.0.0.0/8"));
        assert!(refusal(|p| p.run_ssh = true).contains("SSH"));
        assert!(refusal(|p| p.exit_node_ip = "bob".into()).contains("bob"));
        assert!(refusal(|p| p.exit_node_name = "no node".into()).contains("no node"));
        let routes = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
        assert!(refusal(|p| p.advertise_routes = routes(&["::/0"])).contains("--advertise-exit-node"));
        let both = |p: &mut Prefs| {
            p.advertise_routes = routes(&["0.0.0.0/0", "::/0"]);
            p.exit_node_id = "n7".into();
        };
        assert!(refusal(both).contains("--exit-node="));
        assert!(check_prefs(&Prefs::default()).is_ok());
    }
}
