//! `lacis up`: connect, and log in if need be.
//!
//! The order of the requests is that of Tailscale's command (the client dossier, sections 5.4 and 12.5), so both can
//! talk to both daemons: look, refuse what would lose settings, listen on the bus, start, wait for "Running".

mod if_needed;

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use http::Method;
use http_body_util::BodyExt as _;
use lacis_wire::local::{self, Notify, Prefs, StartOptions, State, Status};
use serde_json::json;
use tokio::time::{Instant, timeout};
use zeroize::Zeroizing;

use super::Daemon;
use super::prefs::PrefFlags;
use crate::output::quoted;
use crate::{Failure, output};

/// Whoever waits hears now and then why.
const HINT: Duration = Duration::from_secs(10);
/// Whose values are auth keys.
const KEY_FLAGS: [&str; 2] = ["--auth-key", "--authkey"];
/// How the keys of this server and of others begin.
const KEY_PREFIXES: [&str; 3] = ["lacis-auth-", "tskey-", "hskey-"];
/// Longer keys are none.
const KEY_LIMIT: u64 = 4096;

#[derive(Debug, clap::Args)]
pub(crate) struct Up {
    /// URL of the coordinator
    #[arg(long, value_name = "URL")]
    login_server: Option<String>,
    /// Auth key: file:PATH, or file:- for standard input
    #[arg(long, value_name = "file:PATH", alias = "authkey")]
    auth_key: Option<String>,
    #[command(flatten)]
    flags: PrefFlags,
    /// Settings that are not mentioned go back to their defaults
    #[arg(long)]
    reset: bool,
    /// Log in anew even if logged in
    #[arg(long)]
    force_reauth: bool,
    /// Log in only where this node is not in the network yet; settings that are not mentioned stay as they are
    #[arg(long, conflicts_with_all = ["reset", "force_reauth"])]
    if_needed: bool,
    /// How long to wait for the connection; 0s is for ever
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Accepted for scripts
    #[arg(long, value_name = "RISK", hide = true)]
    accept_risk: Option<String>,
}

impl Up {
    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        let _ = &self.accept_risk;
        let (plan, auth_key) = if self.if_needed {
            self.prepare_if_needed(daemon).await?
        } else {
            let auth_key = self.auth_key.as_deref().map(read_key).transpose()?;
            let status = daemon.status(true).await?;
            (self.plan(&status, &daemon.prefs().await?)?, auth_key)
        };
        let work = async {
            self.carry_out(daemon, plan, auth_key).await?;
            self.flags.warn(daemon).await;
            anyhow::Ok(())
        };
        if self.timeout.is_zero() {
            return Ok(work.await?);
        }
        match timeout(self.timeout, work).await {
            Ok(done) => Ok(done?),
            Err(_) => Err(self.late(daemon).await.into()),
        }
    }

    /// Says what it was that did not come.
    async fn late(&self, daemon: &Daemon) -> anyhow::Error {
        let waited = humantime::format_duration(self.timeout);
        let Some(why) = missing(daemon).await else { return anyhow!("not connected after {waited}") };
        anyhow!("not connected after {waited}: {why} (lacisd goes on trying)")
    }

    fn plan(&self, status: &Status, prefs: &Prefs) -> anyhow::Result<Plan> {
        let login_name =
            prefs.identity.as_ref().map_or("", |identity| identity.user_profile.login_name.as_str());
        let bare = self.flags.is_empty()
            && self.login_server.is_none()
            && self.auth_key.is_none()
            && !self.reset
            && !self.force_reauth;
        let logged_in = !login_name.is_empty() && status.backend_state != "NeedsLogin";
        if bare && logged_in {
            return Ok(Plan::Resume);
        }
        let configured = !prefs.control_url.is_empty();
        if configured && !self.reset {
            let mut missing = self.flags.unmentioned(prefs);
            if self.login_server.is_none() {
                missing.insert(0, format!("--login-server={}", prefs.control_url));
            }
            // The server alone is no setting that anybody would lose.
            if missing.iter().any(|flag| !flag.starts_with("--login-server")) {
                bail!(
                    "this would lose settings that are not mentioned. Name them, or use --reset:\n\n\tlacis up {}",
                    whole_command(std::env::args(), missing)
                );
            }
        }
        let base = Prefs { identity: None, ..prefs.clone() };
        let base = if configured && !self.reset { base } else { Prefs::default() };
        let mut wish = self.flags.change(&base, status)?.apply(&base)?;
        wish.want_running = true;
        wish.logged_out = false;
        wish.control_url = match &self.login_server {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None if configured => prefs.control_url.clone(),
            None => bail!("which network? Give the coordinator's URL with --login-server"),
        };
        let same_place = wish.control_url == prefs.control_url && wish.advertise_tags == prefs.advertise_tags;
        if status.backend_state == "Running" && same_place && self.auth_key.is_none() && !self.force_reauth {
            return Ok(Plan::Edit(wish));
        }
        if status.backend_state == "Running" && wish.control_url != prefs.control_url && !self.force_reauth {
            bail!(
                "this node is in the network of {}: add --force-reauth to leave it, or log out first",
                prefs.control_url
            );
        }
        Ok(Plan::Login { wish, interactive: self.force_reauth || !status.have_node_key })
    }

    async fn carry_out(
        &self,
        daemon: &Daemon,
        plan: Plan,
        auth_key: Option<Zeroizing<String>>,
    ) -> anyhow::Result<()> {
        if let Plan::Edit(wish) = plan {
            daemon.edit_prefs(&whole_change(&wish)?).await?;
            return Ok(());
        }
        let path = format!("{}watch-ipn-bus?mask=0", local::PREFIX);
        let bus = daemon.0.send(Method::GET, &path, Vec::new()).await?;
        match plan {
            Plan::Edit(_) => {}
            Plan::Resume => {
                daemon.edit_prefs(&local::MaskedPrefs::default().set("WantRunning", true)).await?;
            }
            Plan::Login { wish, interactive } => {
                let with_key = auth_key.is_some();
                let options = StartOptions {
                    update_prefs: Some(wish),
                    auth_key: auth_key.map(|key| key.to_string()).unwrap_or_default(),
                    force_reauth: self.force_reauth,
                };
                daemon.post_json("start", &options).await?;
                if interactive && (!with_key || self.force_reauth) {
                    daemon.post_empty("login-interactive").await?;
                }
            }
        }
        self.wait(daemon, bus).await
    }

    async fn wait(&self, daemon: &Daemon, bus: http::Response<hyper::body::Incoming>) -> anyhow::Result<()> {
        let mut body = bus.into_body();
        let mut pending = Vec::new();
        let mut hints = tokio::time::interval_at(Instant::now() + HINT, HINT);
        let mut said = None;
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                _ = hints.tick() => {
                    let why = missing(daemon).await;
                    if let Some(text) = why.as_ref().filter(|_| why != said) {
                        output::note(format_args!("Still waiting: {text}"));
                    }
                    said = why;
                    continue;
                }
            };
            let Some(frame) = frame else { bail!("lacisd has ended") };
            let Ok(data) = frame.context("lacisd has ended")?.into_data() else { continue };
            pending.extend_from_slice(&data);
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let notify: Notify = serde_json::from_slice(&line).context("lacisd's news make no sense")?;
                if self.heard(notify)? {
                    return Ok(());
                }
            }
        }
    }

    /// True when all is done.
    fn heard(&self, notify: Notify) -> anyhow::Result<bool> {
        if let Some(error) = notify.err_message {
            bail!("{error}");
        }
        if let Some(url) = notify.browse_to_url {
            if self.json {
                output::json(&json!({ "AuthURL": url, "BackendState": State::NeedsLogin.as_str() }))?;
            } else {
                output::note(format_args!("\nTo sign in, visit:\n\n\t{url}\n"));
            }
        }
        match notify.state {
            Some(State::NeedsMachineAuth) => {
                output::note("\nThis node waits for an administrator's approval.\n");
                Ok(false)
            }
            Some(State::Running) => {
                if self.json {
                    output::json(&json!({ "BackendState": State::Running.as_str() }))?;
                }
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// What it is that does not come.
async fn missing(daemon: &Daemon) -> Option<String> {
    let status = daemon.status(false).await.ok()?;
    Some(match (status.health.first(), status.auth_url.is_empty()) {
        (_, false) => format!("somebody must sign in at {}", status.auth_url),
        (Some(problem), _) => problem.clone(),
        (None, _) => format!("the state is still {}", status.backend_state),
    })
}

/// The words after `up` as they would have to be, for a shell. An auth key that was given in person is not repeated:
/// the text may end up in a log.
fn whole_command(given: impl Iterator<Item = String>, missing: Vec<String>) -> String {
    let mut words = Vec::new();
    let mut given = given.skip_while(|word| word != "up").skip(1);
    while let Some(word) = given.next() {
        let (flag, value) = match word.split_once('=') {
            Some((flag, value)) => (flag, Some(value.to_owned())),
            None => (word.as_str(), None),
        };
        if !KEY_FLAGS.contains(&flag) {
            words.push(word);
            continue;
        }
        let value = value.or_else(|| given.next()).unwrap_or_default();
        let shown = if is_key(&value) { "file:PATH" } else { &value };
        words.push(format!("{flag}={shown}"));
    }
    words.extend(missing);
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// Is this (or is it probably meant as) a key, and not where one is?
fn is_key(text: &str) -> bool {
    text.strip_prefix("file:").is_none_or(|path| KEY_PREFIXES.iter().any(|prefix| path.starts_with(prefix)))
}

/// What `up` comes down to.
#[derive(Debug, PartialEq)]
enum Plan {
    /// On again, as it was.
    Resume,
    /// On already: only preferences change.
    Edit(Prefs),
    Login {
        wish: Prefs,
        interactive: bool,
    },
}

/// A change that sets every preference.
fn whole_change(prefs: &Prefs) -> anyhow::Result<local::MaskedPrefs> {
    let serde_json::Value::Object(all) = serde_json::to_value(prefs)? else {
        bail!("preferences are no object")
    };
    // Those that are left out while they are empty are changed as well.
    let empty = local::MaskedPrefs::default().set("OperatorUser", "").set("ProfileName", "");
    Ok(all.into_iter().fold(empty, |change, (name, value)| change.set(&name, value)))
}

/// An auth key from a file, from standard input, or as it is (which other users of the host can see).
fn read_key(text: &str) -> anyhow::Result<Zeroizing<String>> {
    let key = match text.strip_prefix("file:") {
        Some("-") => {
            let mut key = Zeroizing::new(String::new());
            std::io::stdin().take(KEY_LIMIT).read_to_string(&mut key).context("reading the auth key")?;
            key
        }
        Some(_) if is_key(text) => {
            bail!("--auth-key=file: is followed by the path of a file with the key, not by the key")
        }
        Some(path) => {
            let mut key = Zeroizing::new(String::new());
            std::fs::File::open(Path::new(path))
                .and_then(|file| file.take(KEY_LIMIT).read_to_string(&mut key))
                .with_context(|| format!("reading the auth key from {path}"))?;
            key
        }
        None => Zeroizing::new(text.to_owned()),
    };
    let key = Zeroizing::new(key.trim().to_owned());
    if key.is_empty() {
        bail!("the auth key is empty");
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use lacis_wire::control::UserProfile;
    use lacis_wire::local::Identity;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        up: Up,
    }

    pub(super) fn up(arguments: &[&str]) -> Up {
        Line::parse_from([&["up"], arguments].concat()).up
    }

    pub(super) fn known() -> Prefs {
        let profile = UserProfile { login_name: "alice".into(), ..UserProfile::default() };
        Prefs {
            control_url: "https://mesh.example".into(),
            hostname: "bob".into(),
            identity: Some(Identity { user_profile: profile, node_id: "n1".into() }),
            ..Prefs::default()
        }
    }

    pub(super) fn in_state(state: &str) -> Status {
        Status { backend_state: state.into(), have_node_key: state != "NeedsLogin", ..Status::default() }
    }

    #[test]
    fn without_flags_a_node_that_is_logged_in_goes_on_as_it_was() {
        assert_eq!(up(&[]).plan(&in_state("Stopped"), &known()).unwrap(), Plan::Resume);
        assert!(
            up(&[])
                .plan(&in_state("NeedsLogin"), &Prefs::default())
                .unwrap_err()
                .to_string()
                .contains("--login-server")
        );
    }

    #[test]
    fn settings_that_would_be_lost_are_named() {
        let error = up(&["--accept-routes"]).plan(&in_state("Running"), &known()).unwrap_err().to_string();
        assert!(error.contains("--hostname=bob"), "{error}");
        let Plan::Edit(wish) =
            up(&["--accept-routes", "--reset"]).plan(&in_state("Running"), &known()).unwrap()
        else {
            panic!("no edit")
        };
        assert!(wish.route_all && wish.hostname.is_empty());
        assert_eq!(wish.control_url, "https://mesh.example");
    }

    #[test]
    fn the_command_that_is_proposed_has_no_key_in_it_and_can_be_pasted() {
        let proposed = |given: &str| {
            let words = given.split('|').map(ToOwned::to_owned);
            whole_command(words, vec!["--hostname=bob".to_owned()])
        };
        for (given, expected) in [
            ("lacis|up|--auth-key=secret", "--auth-key=file:PATH"),
            ("lacis|up|--auth-key|secret", "--auth-key=file:PATH"),
            ("lacis|up|--authkey=lacis-auth-1-secret", "--authkey=file:PATH"),
            ("lacis|up|--authkey|tskey-auth-secret|--accept-routes", "--authkey=file:PATH --accept-routes"),
            ("lacis|up|--auth-key=file:lacis-auth-1-secret", "--auth-key=file:PATH"),
            ("lacis|up|--auth-key=file:/root/key", "--auth-key=file:/root/key"),
            ("lacis|up|--auth-key|file:-", "--auth-key=file:-"),
            ("lacis|--socket|/x|up|--auth-key", "--auth-key=file:PATH"),
            ("lacis|up|--hostname=it's me", "'--hostname=it'\\''s me'"),
        ] {
            assert_eq!(proposed(given), format!("{expected} --hostname=bob"), "{given}");
        }
    }

    #[test]
    fn a_key_that_was_meant_as_a_path_is_not_repeated() {
        let error = read_key("file:tskey-auth-secret").unwrap_err();
        assert!(!format!("{error:#}").contains("secret"), "{error:#}");
        let error = read_key("file:/no/such/file").unwrap_err();
        assert!(format!("{error:#}").contains("/no/such/file"), "{error:#}");
    }

    #[test]
    fn a_whole_change_empties_what_it_does_not_have() {
        let before = Prefs {
            operator_user: "alice".into(),
            exit_node_name: "gate".into(),
            hostname: "bob".into(),
            ..Prefs::default()
        };
        let wish = Prefs { hostname: "robert".into(), ..Prefs::default() };
        assert_eq!(whole_change(&wish).unwrap().apply(&before).unwrap(), wish);
    }

    #[test]
    fn another_server_needs_to_be_meant() {
        let flags = ["--login-server=https://other.example", "--hostname=bob"];
        let error = up(&flags).plan(&in_state("Running"), &known()).unwrap_err().to_string();
        assert!(error.contains("--force-reauth"), "{error}");
    }

    #[test]
    fn a_new_node_logs_in() {
        let up = up(&["--login-server=https://mesh.example/", "--auth-key=file:/x", "--accept-dns=false"]);
        let Plan::Login { wish, interactive } = up.plan(&in_state("NeedsLogin"), &Prefs::default()).unwrap()
        else {
            panic!("no login")
        };
        assert!(interactive && wish.want_running && !wish.corp_dns);
        assert_eq!(wish.control_url, "https://mesh.example");
    }
}
