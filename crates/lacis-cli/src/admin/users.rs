//! `lacis admin users`: people, their email addresses and what they are in the network.

use clap::Subcommand;
use http::Method;
use lacis_wire::admin::{ChangeUser, CreateUser, UserInfo};

use super::{Coordinator, moment};
use crate::http::escaped;

/// What there is to be, as help texts list it. The coordinator decides.
const ROLE: &str = "owner, admin, network-admin, it-admin, billing-admin or auditor";

#[derive(Debug, Subcommand)]
pub(super) enum Users {
    /// Add a user
    Create {
        name: String,
        #[arg(long)]
        display_name: Option<String>,
        /// Email address, by which policies may call them as well
        #[arg(long, value_name = "ADDRESS")]
        email: Option<String>,
        #[arg(long = "role", value_name = "ROLE", value_delimiter = ',', help = ROLE)]
        roles: Vec<String>,
    },
    /// Change a user's email address or roles
    #[command(group = clap::ArgGroup::new("change").required(true).multiple(true))]
    Set {
        name: String,
        /// Email address; '' for none
        #[arg(long, value_name = "ADDRESS", group = "change")]
        email: Option<String>,
        /// In place of the roles they have
        #[arg(
            long = "role",
            value_name = "ROLE",
            value_delimiter = ',',
            group = "change",
            help = format!("{ROLE}: these and no others")
        )]
        roles: Vec<String>,
        /// Take all roles away
        #[arg(long, group = "change", conflicts_with = "roles")]
        no_roles: bool,
    },
    /// Show users
    List,
    /// Remove a user who has no nodes
    Delete { name: String },
}

impl Coordinator {
    pub(super) async fn users(&self, command: Users) -> anyhow::Result<()> {
        match command {
            Users::Create { name, display_name, email, roles } => {
                let wish = CreateUser { name, display_name, email, roles };
                let user: UserInfo = self.post(&self.path("/users").await?, &wish).await?;
                self.one(&user, || format!("user {} has the id {}", user.name, user.id))
            }
            Users::Set { name, email, roles, no_roles } => {
                let roles = (no_roles || !roles.is_empty()).then_some(roles);
                let path = self.path(&format!("/users/{}", escaped(&name))).await?;
                let user: UserInfo =
                    self.send_json(Method::PATCH, &path, &ChangeUser { email, roles }).await?;
                self.one(&user, || described(&user))
            }
            Users::List => {
                let all: Vec<UserInfo> = self.get(&self.path("/users").await?).await?;
                let titles = ["ID", "NAME", "EMAIL", "ROLES", "DISPLAY NAME", "NODES", "CREATED"];
                self.list(&titles, &all, |user| {
                    vec![
                        user.id.to_string(),
                        user.name.clone(),
                        user.email.clone().unwrap_or_else(|| "-".to_owned()),
                        roles(user),
                        user.display_name.clone(),
                        user.nodes.to_string(),
                        moment(Some(user.created)),
                    ]
                })
            }
            Users::Delete { name } => {
                self.send(Method::DELETE, &self.path(&format!("/users/{}", escaped(&name))).await?).await?;
                self.done(format!("user {name} is deleted"))
            }
        }
    }
}

fn roles(user: &UserInfo) -> String {
    if user.roles.is_empty() { "-".to_owned() } else { user.roles.join(",") }
}

fn described(user: &UserInfo) -> String {
    let email = user.email.as_deref().unwrap_or("none");
    let roles = if user.roles.is_empty() { "none".to_owned() } else { user.roles.join(", ") };
    format!("user {}: email address {email}; roles {roles}", user.name)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(subcommand)]
        command: Users,
    }

    fn set(arguments: &[&str]) -> Result<(Option<String>, Vec<String>, bool), clap::error::ErrorKind> {
        let line = Line::try_parse_from([&["users", "set", "ada"], arguments].concat());
        match line.map_err(|error| error.kind())?.command {
            Users::Set { email, roles, no_roles, .. } => Ok((email, roles, no_roles)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_change_is_of_something_and_not_of_roles_both_ways() {
        use clap::error::ErrorKind;
        assert_eq!(set(&[]), Err(ErrorKind::MissingRequiredArgument));
        assert_eq!(set(&["--role", "admin", "--no-roles"]), Err(ErrorKind::ArgumentConflict));
        let roles = vec!["admin".to_owned(), "auditor".to_owned()];
        assert_eq!(set(&["--role", "admin", "--role", "auditor"]), Ok((None, roles.clone(), false)));
        assert_eq!(set(&["--email", "", "--role=admin,auditor"]), Ok((Some(String::new()), roles, false)));
        assert_eq!(
            set(&["--email", "a@b.org", "--no-roles"]),
            Ok((Some("a@b.org".into()), Vec::new(), true))
        );
    }
}
