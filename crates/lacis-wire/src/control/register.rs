//! Joining, joining again and leaving: the register request and its reply.

use serde::{Deserialize, Deserializer, Serialize};
use time::OffsetDateTime;

use super::bounded::{Text, text};
use super::json::{is_default, nullable, optional_key, optional_time};
use super::{Hostinfo, UserId};
use crate::key::{LockKey, NodeKey};

/// `POST /machine/register`.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RegisterRequest {
    pub version: u16,
    pub node_key: NodeKey,
    /// All zero where no key is replaced.
    #[serde(deserialize_with = "nullable")]
    pub old_node_key: NodeKey,
    #[serde(rename = "NLKey", skip_serializing_if = "Option::is_none", deserialize_with = "optional_key")]
    pub nl_key: Option<LockKey>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth: Option<RegisterAuth>,
    /// Far past: log out. `None`: nothing asked.
    #[serde(with = "optional_time")]
    pub expiry: Option<OffsetDateTime>,
    #[serde(deserialize_with = "url")]
    pub followup: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostinfo: Option<Hostinfo>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub ephemeral: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub tailnet: String,
}

/// What proves that the node may join.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RegisterAuth {
    #[serde(deserialize_with = "text")]
    pub auth_key: String,
}

/// Characters of the URL of a page to sign in.
const MAX_URL: usize = 2048;

fn url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = Option::<Text<MAX_URL>>::deserialize(deserializer)?;
    Ok(text.map(|text| text.0).unwrap_or_default())
}

impl std::fmt::Debug for RegisterAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegisterAuth([redacted])")
    }
}

impl std::fmt::Debug for RegisterRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegisterRequest")
            .field("version", &self.version)
            .field("node_key", &self.node_key)
            .field("old_node_key", &self.old_node_key)
            .field("auth", &self.auth)
            .field("expiry", &self.expiry)
            .field("followup", &self.followup)
            .finish_non_exhaustive()
    }
}

/// The reply. Every member is always sent: one client has no defaults for them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RegisterResponse {
    #[serde(deserialize_with = "nullable")]
    pub user: User,
    #[serde(deserialize_with = "nullable")]
    pub login: Login,
    pub node_key_expired: bool,
    pub machine_authorized: bool,
    #[serde(rename = "AuthURL", deserialize_with = "nullable")]
    pub auth_url: String,
    /// Always `null` from us: there is no tailnet lock.
    pub node_key_signature: Option<String>,
    #[serde(deserialize_with = "nullable")]
    pub error: String,
}

/// The user as the registration names them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct User {
    #[serde(rename = "ID")]
    pub id: UserId,
    #[serde(deserialize_with = "nullable")]
    pub display_name: String,
    #[serde(rename = "ProfilePicURL", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub profile_pic_url: String,
}

/// The way that user signed in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Login {
    #[serde(rename = "ID")]
    pub id: UserId,
    #[serde(deserialize_with = "nullable")]
    pub provider: String,
    #[serde(deserialize_with = "nullable")]
    pub login_name: String,
    #[serde(deserialize_with = "nullable")]
    pub display_name: String,
    #[serde(rename = "ProfilePicURL", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub profile_pic_url: String,
}
