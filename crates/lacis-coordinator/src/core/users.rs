//! Users: how they come and go, by which addresses policies may call them, and what they are in the network.

use std::sync::Arc;

use lacis_policy::Role;
use lacis_wire::admin::{ChangeUser, CreateUser, UserInfo};
use lacis_wire::control::{UserId, display_text};

use super::admin::{AdminError, moment, not_found};
use super::record::UserRecord;
use super::tailnet::{Snapshot, Tailnet};
use super::{Core, now};
use crate::store::{UserRow, Write};

const NAME: usize = 100;
/// The longest that mail can be sent to.
const EMAIL: usize = 254;

/// Sorted, each once.
fn roles(names: &[String]) -> Result<Vec<Role>, AdminError> {
    let role = |name: &String| {
        Role::named(name).ok_or_else(|| AdminError::BadRole {
            name: display_text(name),
            known: Role::NAMES.map(|(known, _)| known).join(", "),
        })
    };
    let mut roles = names.iter().map(role).collect::<Result<Vec<_>, _>>()?;
    roles.sort_unstable();
    roles.dedup();
    Ok(roles)
}

fn role_names(roles: &[Role]) -> Vec<String> {
    roles.iter().map(|role| role.name().to_owned()).collect()
}

fn is_plain(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || "._-+@".contains(c))
}

fn is_email(text: &str) -> bool {
    let parts = text.split_once('@');
    text.len() <= EMAIL
        && is_plain(text)
        && parts.is_some_and(|(local, host)| !local.is_empty() && !host.is_empty() && !host.contains('@'))
}

impl Snapshot {
    /// An address that a user, other than `but`, has as their email address or their name: a policy that says it would
    /// mean them both.
    fn owner_of(&self, address: &str, but: Option<UserId>) -> Option<&Arc<UserRecord>> {
        self.users.values().filter(|user| Some(user.id) != but).find(|user| {
            user.name.eq_ignore_ascii_case(address)
                || user.email.as_deref().is_some_and(|email| email.eq_ignore_ascii_case(address))
        })
    }

    /// The email address that a user, this one if they are there already, may have; an empty one is none.
    fn email(&self, email: &str, of: Option<UserId>) -> Result<Option<String>, AdminError> {
        if email.is_empty() {
            return Ok(None);
        }
        if !is_email(email) {
            return Err(AdminError::BadEmail(display_text(email)));
        }
        match self.owner_of(email, of) {
            Some(owner) => Err(AdminError::EmailTaken { email: email.to_owned(), owner: owner.name.clone() }),
            None => Ok(Some(email.to_owned())),
        }
    }
}

impl Core {
    pub fn list_users(&self, tailnet: &Tailnet) -> Vec<UserInfo> {
        let snapshot = tailnet.snapshot();
        snapshot.users.values().map(|user| user_info(&snapshot, user)).collect()
    }

    /// Adds a user.
    ///
    /// # Errors
    /// When the name or the email address is bad or taken, a role is none, or it cannot be stored.
    pub async fn create_user(&self, tailnet: &Tailnet, wish: &CreateUser) -> Result<UserInfo, AdminError> {
        let name = wish.name.as_str();
        if name.is_empty() || name.len() > NAME || !is_plain(name) {
            return Err(AdminError::BadUserName { name: display_text(name), longest: NAME });
        }
        let roles = roles(&wish.roles)?;
        let _turn = tailnet.users_turn.lock().await;
        let snapshot = tailnet.snapshot();
        let is_address = |user: &Arc<UserRecord>| {
            user.email.as_deref().is_some_and(|email| email.eq_ignore_ascii_case(name))
        };
        if snapshot.user_named(name).is_some() {
            return Err(AdminError::Exists { what: "user", name: name.to_owned() });
        }
        if let Some(owner) = snapshot.users.values().find(|user| is_address(user)) {
            return Err(AdminError::EmailTaken { email: name.to_owned(), owner: owner.name.clone() });
        }
        let row = UserRow {
            id: self.next_user().0,
            tailnet: tailnet.settings.name.clone(),
            name: name.to_owned(),
            display_name: display_text(wish.display_name.as_deref().unwrap_or(name)),
            email: snapshot.email(wish.email.as_deref().unwrap_or_default(), None)?,
            roles,
            created: now(),
        };
        self.0.store.commit(vec![Write::InsertUser(row.clone())]).await?;
        Ok(put(tailnet, UserRecord::from(row)))
    }

    /// Gives a user another email address or other roles. What the policy makes of it is in force at once.
    ///
    /// # Errors
    /// When there is no such user, the address is bad or another's, a role is none, or it cannot be stored.
    pub async fn change_user(
        &self,
        tailnet: &Tailnet,
        name: &str,
        wish: &ChangeUser,
    ) -> Result<UserInfo, AdminError> {
        let _turn = tailnet.users_turn.lock().await;
        let snapshot = tailnet.snapshot();
        let user = snapshot.user_named(name).ok_or_else(|| not_found("user", name))?;
        let email = match &wish.email {
            Some(email) => snapshot.email(email, Some(user.id))?,
            None => user.email.clone(),
        };
        let roles = match &wish.roles {
            Some(names) => roles(names)?,
            None => user.roles.clone(),
        };
        if email == user.email && roles == user.roles {
            return Ok(user_info(&snapshot, user));
        }
        let write = Write::ChangeUser { id: user.id.0, email: email.clone(), roles: roles.clone() };
        self.0.store.commit(vec![write]).await?;
        Ok(put(tailnet, UserRecord { email, roles, ..(**user).clone() }))
    }

    /// Takes out a user who has no nodes any more, and their keys.
    ///
    /// # Errors
    /// When there is no such user, or they have nodes.
    pub async fn delete_user(&self, tailnet: &Tailnet, name: &str) -> Result<(), AdminError> {
        let _turn = tailnet.users_turn.lock().await;
        let snapshot = tailnet.snapshot();
        let user = snapshot.user_named(name).ok_or_else(|| not_found("user", name))?;
        let nodes = nodes_of(&snapshot, user);
        if nodes > 0 {
            return Err(AdminError::HasNodes { name: name.to_owned(), nodes });
        }
        self.0.store.commit(vec![Write::DeleteUser(user.id.0)]).await?;
        self.auth_keys().retain(|_, key| key.user != Some(user.id.0));
        tailnet.lock().edit_users(|users| {
            users.remove(&user.id);
        });
        Ok(())
    }
}

fn put(tailnet: &Tailnet, user: UserRecord) -> UserInfo {
    let user = Arc::new(user);
    let mut locked = tailnet.lock();
    locked.edit_users(|users| {
        users.insert(user.id, Arc::clone(&user));
    });
    user_info(&locked.snapshot(), &user)
}

fn nodes_of(snapshot: &Snapshot, user: &UserRecord) -> usize {
    snapshot.nodes.iter().filter(|node| node.user == Some(user.id)).count()
}

fn user_info(snapshot: &Snapshot, user: &UserRecord) -> UserInfo {
    UserInfo {
        id: user.id,
        name: user.name.clone(),
        display_name: user.display_name.clone(),
        email: user.email.clone(),
        roles: role_names(&user.roles),
        nodes: nodes_of(snapshot, user),
        created: moment(user.created),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_those_of_policies_and_an_unknown_one_is_told_which_there_are() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let sorted = roles(&names(&["auditor", "admin", "auditor"])).unwrap();
        assert_eq!(sorted, [Role::Admin, Role::Auditor]);
        assert_eq!(role_names(&sorted), ["admin", "auditor"]);
        let error = roles(&names(&["root"])).unwrap_err().to_string();
        assert!(error.contains("\"root\"") && error.contains("owner, admin, network-admin"), "{error}");
        // As policies and stored rows write them.
        for (name, role) in Role::NAMES {
            assert_eq!(serde_json::to_value(role).unwrap(), name);
        }
    }

    #[test]
    fn email_addresses_have_one_at_between_two_parts() {
        assert!(is_email("ada+mesh@example.org"));
        for bad in ["", "ada", "@example.org", "ada@", "a@b@c", "a b@c", "*@example.org", "ada@exämple.org"]
        {
            assert!(!is_email(bad), "{bad}");
        }
        assert!(!is_email(&format!("{}@example.org", "a".repeat(EMAIL))));
    }
}
