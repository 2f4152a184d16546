//! Commands of the node this runs on: each asks `lacisd` over the local API.

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

use http::Method;
use lacis_wire::local::{self, MaskedPrefs, PeerStatus, Prefs, Status};
use serde::Serialize;

use crate::http::{Error, Server};

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

/// A node's short name: the first label, or the host's own name where it has none.
pub(crate) fn short_name(node: &PeerStatus) -> &str {
    let label = node.dns_name.split('.').next().unwrap_or_default();
    if label.is_empty() { &node.host_name } else { label }
}

/// The node that a person means by a name or an address. The second value: it is this node.
pub(crate) fn meant<'a>(status: &'a Status, who: &str) -> Option<(&'a PeerStatus, bool)> {
    let wanted = who.trim_end_matches('.').to_ascii_lowercase();
    let address: Option<IpAddr> = who.parse().ok();
    let matches = |node: &PeerStatus| match address {
        Some(ip) => node.tailscale_ips.contains(&ip),
        None => {
            let name = node.dns_name.trim_end_matches('.');
            name == wanted || short_name(node) == wanted || node.host_name.to_ascii_lowercase() == wanted
        }
    };
    if matches(&status.self_status) {
        return Some((&status.self_status, true));
    }
    status.peer.iter().flat_map(|peers| peers.values()).find(|node| matches(node)).map(|node| (node, false))
}
