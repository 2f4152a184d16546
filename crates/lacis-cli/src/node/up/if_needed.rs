//! `lacis up --if-needed`: for units that run at each boot, such as that of the NixOS module.
//!
//! A node that is in the network keeps its login and whatever is not mentioned, and the auth key is not even read. One
//! that is not, or is in another network, signs in.

use anyhow::{Context as _, bail};
use http::Uri;
use lacis_wire::local::{Prefs, Status};
use zeroize::Zeroizing;

use super::{Plan, Up, read_key};
use crate::node::Daemon;

impl Up {
    /// What has to be done, and the auth key where that takes one.
    pub(super) async fn prepare_if_needed(
        &self,
        daemon: &Daemon,
    ) -> anyhow::Result<(Plan, Option<Zeroizing<String>>)> {
        let status = daemon.status(true).await?;
        let prefs = daemon.prefs().await?;
        let plan = self.plan_if_needed(&status, &prefs)?;
        // Read before anything changes: without a key the node stays in the network that it is in.
        let auth_key = match (&plan, &self.auth_key) {
            (Plan::Login { wish, interactive: false }, Some(given)) if needs_login(&status, &prefs, wish) => {
                let key = read_key(given).with_context(|| {
                    format!("this node has to sign in to {} and needs an auth key", wish.control_url)
                })?;
                Some(key)
            }
            _ => None,
        };
        Ok((plan, auth_key))
    }

    fn plan_if_needed(&self, status: &Status, prefs: &Prefs) -> anyhow::Result<Plan> {
        let base = Prefs { identity: None, ..prefs.clone() };
        let mut wish = self.flags.change(&base, status)?.apply(&base)?;
        wish.want_running = true;
        wish.logged_out = false;
        match &self.login_server {
            // The same server in another spelling is no reason to leave it.
            Some(url) if !is_same_server(url, &prefs.control_url) => {
                url.trim_end_matches('/').clone_into(&mut wish.control_url);
            }
            None if prefs.control_url.is_empty() => {
                bail!("which network? Give the coordinator's URL with --login-server");
            }
            _ => {}
        }
        if needs_login(status, prefs, &wish) {
            return Ok(Plan::Login { wish, interactive: self.auth_key.is_none() });
        }
        if wish.advertise_tags != prefs.advertise_tags {
            // The coordinator has to agree.
            return Ok(Plan::Login { wish, interactive: false });
        }
        Ok(Plan::Edit(wish))
    }
}

/// Whether the node has no valid login at the server that it should be at.
fn needs_login(status: &Status, prefs: &Prefs, wish: &Prefs) -> bool {
    !status.have_node_key || status.backend_state == "NeedsLogin" || wish.control_url != prefs.control_url
}

fn is_same_server(one: &str, other: &str) -> bool {
    let parts = |text: &str| {
        let uri: Uri = text.trim_end_matches('/').parse().ok()?;
        let default = if uri.scheme_str()? == "http" { 80 } else { 443 };
        let host = uri.host()?.to_ascii_lowercase();
        Some((uri.scheme_str()?.to_owned(), host, uri.port_u16().unwrap_or(default)))
    };
    one == other || parts(one).is_some_and(|one| Some(one) == parts(other))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{in_state, known, up};
    use super::*;

    const URL: &str = "--login-server=https://mesh.example";

    fn plan(arguments: &[&str], state: &str, prefs: &Prefs) -> Plan {
        let arguments = [&["--if-needed", "--auth-key=file:/nowhere"], arguments].concat();
        up(&arguments).plan_if_needed(&in_state(state), prefs).unwrap()
    }

    #[test]
    fn a_node_that_is_in_the_network_is_only_given_the_settings_that_are_mentioned() {
        let before = Prefs {
            operator_user: "alice".into(),
            shields_up: true,
            advertise_tags: vec!["tag:web".into()],
            ..known()
        };
        for state in ["Running", "Starting", "Stopped", "NeedsMachineAuth"] {
            let plan = plan(&[URL, "--hostname=", "--accept-routes"], state, &before);
            let Plan::Edit(wish) = plan else { panic!("{state}: {plan:?}") };
            assert!(wish.want_running && wish.route_all && wish.shields_up && wish.hostname.is_empty());
            assert_eq!((wish.operator_user.as_str(), wish.advertise_tags), ("alice", vec!["tag:web".into()]));
        }
    }

    #[test]
    fn another_spelling_of_the_server_is_the_same_server() {
        for url in ["https://mesh.example/", "https://Mesh.Example:443"] {
            let plan = plan(&["--login-server", url], "Running", &known());
            assert!(matches!(plan, Plan::Edit(_)), "{url}: {plan:?}");
        }
        for url in ["https://mesh.example:8443", "http://mesh.example", "https://mesh.example.org"] {
            assert!(!is_same_server(url, "https://mesh.example"), "{url}");
        }
    }

    #[test]
    fn a_node_that_is_not_in_the_network_signs_in() {
        for (state, prefs, url) in [
            ("NeedsLogin", Prefs::default(), "https://mesh.example"),
            ("NeedsLogin", known(), "https://mesh.example"),
            ("Running", known(), "https://other.example"),
        ] {
            let plan = plan(&["--login-server", url], state, &prefs);
            let Plan::Login { wish, interactive: false } = plan else { panic!("{state}: {plan:?}") };
            assert_eq!(wish.control_url, url);
            assert!(needs_login(&in_state(state), &prefs, &wish));
        }
    }

    #[test]
    fn tags_are_asked_for_without_the_key() {
        let plan = plan(&[URL, "--advertise-tags=web"], "Running", &known());
        let Plan::Login { wish, interactive: false } = plan else { panic!("{plan:?}") };
        assert!(!needs_login(&in_state("Running"), &known(), &wish));
    }
}
