//! Commands of the node this runs on: each asks `lacisd` over the local API.

pub(crate) mod debug;
pub(crate) mod down;
pub(crate) mod exit_node;
pub(crate) mod ip;
pub(crate) mod netcheck;
pub(crate) mod ping;
pub(crate) mod prefs;
pub(crate) mod set;
pub(crate) mod status;
pub(crate) mod up;
pub(crate) mod version;
pub(crate) mod whois;

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::bail;
use http::Method;
use lacis_wire::local::{self, MaskedPrefs, PeerStatus, Prefs, Status};
use serde::Serialize;

use crate::http::{Error, Server};
use crate::output;

/// The daemon.
#[derive(Clone, Debug)]
pub(crate) struct Daemon(pub(crate) Server);

impl Daemon {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(Server {
            path,
            what: "lacisd",
            host: local::HOST,
            start: "is it running? try `systemctl status lacisd`, or name its --socket",
            permission: "use root, or let root name you with `lacis set --operator=USER`",
            flags: String::new(),
        })
    }

    pub(crate) async fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.0.json(Method::GET, &format!("{}{path}", local::PREFIX), Vec::new()).await
    }

    pub(crate) async fn post<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.0.json(Method::POST, &format!("{}{path}", local::PREFIX), Vec::new()).await
    }

    pub(crate) async fn post_json(&self, path: &str, body: &impl Serialize) -> Result<(), Error> {
        let body = lacis_wire::control::to_json(body);
        self.0.empty(Method::POST, &format!("{}{path}", local::PREFIX), body).await
    }

    pub(crate) async fn post_empty(&self, path: &str) -> Result<(), Error> {
        self.0.empty(Method::POST, &format!("{}{path}", local::PREFIX), Vec::new()).await
    }

    pub(crate) async fn status(&self, peers: bool) -> Result<Status, Error> {
        self.get(if peers { "status" } else { "status?peers=false" }).await
    }

    pub(crate) async fn prefs(&self) -> Result<Prefs, Error> {
        self.get("prefs").await
    }

    pub(crate) async fn edit_prefs(&self, change: &MaskedPrefs) -> Result<Prefs, Error> {
        let body = lacis_wire::control::to_json(change);
        self.0.json(Method::PATCH, &format!("{}prefs", local::PREFIX), body).await
    }
}

/// `lacis logout`. Says what the daemon could not do: a key that the coordinator has not expired.
pub(crate) async fn logout(daemon: &Daemon) -> Result<(), Error> {
    daemon.post_empty("logout").await?;
    for problem in daemon.status(false).await?.health {
        output::note(format_args!("Warning: {problem}"));
    }
    Ok(())
}

/// A node's short name: the first label, or the host's own name where it has none.
pub(crate) fn short_name(node: &PeerStatus) -> &str {
    let label = node.dns_name.split('.').next().unwrap_or_default();
    if label.is_empty() { &node.host_name } else { label }
}

/// The node of a name or an address, if there is one. The second value: it is this node.
///
/// # Errors
/// When several nodes are called so.
pub(crate) fn meant<'a>(status: &'a Status, who: &str) -> anyhow::Result<Option<(&'a PeerStatus, bool)>> {
    let peers = status.peer.iter().flat_map(|peers| peers.values());
    let nodes: Vec<_> =
        std::iter::once((&status.self_status, true)).chain(peers.map(|node| (node, false))).collect();
    if let Ok(ip) = who.parse::<IpAddr>() {
        return Ok(nodes.into_iter().find(|(node, _)| node.tailscale_ips.contains(&ip)));
    }
    let wanted = who.trim_end_matches('.').to_ascii_lowercase();
    // What a host calls itself comes after the names that the network gave: any peer can take another's.
    let ways: [fn(&PeerStatus) -> &str; 3] =
        [|node| node.dns_name.trim_end_matches('.'), short_name, |node| &node.host_name];
    for name in ways {
        let is = |node: &PeerStatus| !wanted.is_empty() && name(node).eq_ignore_ascii_case(&wanted);
        let found: Vec<_> = nodes.iter().filter(|(node, _)| is(node)).copied().collect();
        match found.as_slice() {
            [] => {}
            [one] => return Ok(Some(*one)),
            several => {
                let names: Vec<_> =
                    several.iter().map(|(node, _)| node.dns_name.trim_end_matches('.')).collect();
                bail!("{who:?} is the name of several nodes: use one of {names:?}, or an address");
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use lacis_wire::key::NodePrivateKey;

    use super::*;

    fn node(dns_name: &str, host_name: &str) -> PeerStatus {
        PeerStatus { dns_name: dns_name.into(), host_name: host_name.into(), ..PeerStatus::default() }
    }

    #[test]
    fn a_name_of_the_network_comes_before_what_a_host_calls_itself_and_several_are_refused() {
        let peers = [
            node("evil.lab.example.org.", "web"),
            node("web.lab.example.org.", "host"),
            node("db.lab.example.org.", "host"),
            node("db.other.example.org.", "only"),
        ];
        let peer = peers.map(|node| (NodePrivateKey::generate().public(), node)).into();
        let status =
            Status { self_status: node("me.lab.example.org.", "me"), peer: Some(peer), ..Status::default() };
        let found = |who| meant(&status, who).unwrap().map(|(node, own)| (node.dns_name.as_str(), own));
        assert_eq!(found("Web"), Some(("web.lab.example.org.", false)));
        assert_eq!(found("me"), Some(("me.lab.example.org.", true)));
        assert_eq!(found("only"), Some(("db.other.example.org.", false)));
        assert_eq!(found("db.lab.example.org"), Some(("db.lab.example.org.", false)));
        assert_eq!((found("nobody"), found("")), (None, None));
        for several in ["db", "host"] {
            let error = meant(&status, several).unwrap_err().to_string();
            assert!(error.contains("db.lab.example.org") && error.contains("address"), "{error}");
        }
    }
}
