//! Tags of nodes: by an auth key, by asking for them (where the policy's `tagOwners` let the user), or by hand. A node
//! with tags belongs to nobody, and its key does not expire.

use lacis_wire::admin::NodeInfo;
use lacis_wire::control::{UserId, display_text};

use super::Core;
use super::admin::AdminError;
use super::record::NodeRecord;
use super::registration::Refused;
use super::tailnet::{Tailnet, What};

pub(super) fn is_tag(tag: &str) -> bool {
    let Some(name) = tag.strip_prefix("tag:") else { return false };
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

/// Sorted, each once.
pub(super) fn normal(tags: &[String]) -> Vec<String> {
    let mut tags = tags.to_vec();
    tags.sort();
    tags.dedup();
    tags
}

impl Tailnet {
    /// The tags that an administrator gives, to a node or by a key: sorted, each once.
    ///
    /// # Errors
    /// When one is no tag, or the policy does not know it. Without a policy none means anything yet.
    pub(super) fn known_tags(&self, tags: &[String]) -> Result<Vec<String>, AdminError> {
        if let Some(bad) = tags.iter().find(|tag| !is_tag(tag)) {
            return Err(AdminError::BadTag(display_text(bad)));
        }
        if let Some(unknown) = tags.iter().find(|tag| self.lacks_tag(tag)) {
            return Err(AdminError::UnknownTag(unknown.clone()));
        }
        Ok(normal(tags))
    }

    /// The tags that a user's node gets when it asks for these: all, or it is refused.
    pub(super) fn tags_for(&self, user: UserId, asked: &[String]) -> Result<Vec<String>, Refused> {
        let snapshot = self.snapshot();
        let network = &snapshot.network;
        let user = network.users().iter().find(|one| one.id == user);
        let may = |tag: &str| is_tag(tag) && user.is_some_and(|user| network.policy().may_tag(user, tag));
        let refused: Vec<_> = asked.iter().filter(|tag| !may(tag)).map(|tag| display_text(tag)).collect();
        if refused.is_empty() { Ok(normal(asked)) } else { Err(Refused::Tags(refused.join(" "))) }
    }
}

impl Core {
    /// Gives a node these tags in place of its owner or of other tags.
    ///
    /// # Errors
    /// When there are none, or one is no tag or not the policy's; when it cannot be stored, or the node is gone.
    pub async fn set_tags(
        &self,
        tailnet: &Tailnet,
        node: &NodeRecord,
        tags: &[String],
    ) -> Result<NodeInfo, AdminError> {
        if tags.is_empty() {
            return Err(AdminError::NoTags);
        }
        let tags = tailnet.known_tags(tags)?;
        let locked = self.lock_node(tailnet, node.id).await.ok_or_else(|| AdminError::no_node(&node.name))?;
        let tagged = |of: &NodeRecord| NodeRecord {
            user: None,
            tags: tags.clone(),
            key_expiry: if of.expired { of.key_expiry } else { None },
            ..of.clone()
        };
        let node = locked.change(What::Whole, tagged).await?;
        Ok(self.node_info(tailnet, &node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_begin_with_a_letter() {
        assert!(is_tag("tag:web-1"));
        for bad in ["tag:", "tag:1", "web", "tag:a b", "TAG:a"] {
            assert!(!is_tag(bad), "{bad}");
        }
    }
}
