//! Name resolution as the server wants it on the node.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::json::{is_default, nullable};

/// A complete replacement of what was there before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DnsConfig {
    /// Used for everything that no route names.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub resolvers: Vec<DnsResolver>,
    /// Suffix without a leading dot to its resolvers; an empty list is answered locally.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "routes")]
    pub routes: BTreeMap<String, Vec<DnsResolver>>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub fallback_resolvers: Vec<DnsResolver>,
    /// Search domains, without a trailing dot.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub domains: Vec<String>,
    /// MagicDNS on.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub proxied: bool,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub cert_domains: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub extra_records: Vec<DnsRecord>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub exit_node_filtered_set: Vec<String>,
}

fn routes<'de, D: serde::Deserializer<'de>>(d: D) -> Result<BTreeMap<String, Vec<DnsResolver>>, D::Error> {
    let routes = Option::<BTreeMap<String, Option<Vec<DnsResolver>>>>::deserialize(d)?.unwrap_or_default();
    Ok(routes.into_iter().map(|(suffix, resolvers)| (suffix, resolvers.unwrap_or_default())).collect())
}

/// An upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DnsResolver {
    /// [`super::ResolverAddr`] reads it.
    #[serde(deserialize_with = "nullable")]
    pub addr: String,
    /// Addresses of the URL's host.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub bootstrap_resolution: Vec<IpAddr>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub use_with_exit_node: bool,
}

/// A record beside the nodes' names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DnsRecord {
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Empty, `A` or `AAAA`; others are ignored by clients.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub r#type: String,
    #[serde(deserialize_with = "nullable")]
    pub value: String,
}
