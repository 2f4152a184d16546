//! `lacis`: what a person types. Every command asks a daemon over its Unix socket and prints the answer; commands,
//! flags, words and JSON are Tailscale's where there is a counterpart (the client dossier, sections 5 and 13).
//!
//! [`node`] has the commands of the node this runs on, [`admin`] those of the coordinator, [`policy`] those that need
//! neither.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

mod admin;
mod http;
mod node;
pub mod output;
mod policy;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "lacis", version, about = "Joins this machine to a mesh, and administers one")]
pub struct Arguments {
    /// Socket of the daemon
    #[arg(long, value_name = "PATH", default_value = lacis_wire::local::DEFAULT_SOCKET, env = "LACIS_SOCKET")]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Connect to the network, logging in if needed
    Up(node::up::Up),
    /// Disconnect; the login stays
    Down(node::down::Down),
    /// Disconnect and end the login, at the coordinator too
    Logout,
    /// Change preferences
    Set(node::set::Set),
    /// Print preferences
    Get(node::set::Get),
    /// Show this node and its peers
    Status(node::status::StatusArgs),
    /// Show addresses of this node or a peer
    Ip(node::ip::Ip),
    /// Ping a peer through the mesh, and say which way it is reached
    Ping(node::ping::Ping),
    /// Nodes that everything can be sent through
    #[command(subcommand)]
    ExitNode(node::exit_node::ExitNode),
    /// Show how this host is connected to the internet
    Netcheck(node::netcheck::Netcheck),
    /// Show which node and user an address belongs to
    Whois(node::whois::Whois),
    /// Show versions
    Version(node::version::Version),
    /// Helpers for setting up networks
    #[command(subcommand)]
    Debug(node::debug::Debug),
    /// Check, explain and compare policies
    Policy(policy::Policy),
    /// Administer a coordinator on this machine
    Admin(admin::Admin),
}

/// How a command ends when not well.
#[derive(Debug)]
pub enum Failure {
    /// To be printed.
    Error(anyhow::Error),
    /// To be printed, by a command for which 1 is an answer: there was none.
    Unanswered(anyhow::Error),
    /// Everything is said already.
    Quiet,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// An error with its causes, each told once: some name their cause themselves.
pub fn one_line(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| {
        if text.is_empty() {
            cause
        } else if text.contains(&cause) {
            text
        } else {
            format!("{text}: {cause}")
        }
    })
}

/// Runs one command.
pub async fn run(arguments: Arguments) -> Result<(), Failure> {
    let daemon = node::Daemon::new(arguments.socket);
    match arguments.command {
        Command::Up(up) => up.run(&daemon).await,
        Command::Down(down) => down.run(&daemon).await,
        Command::Logout => Ok(node::logout(&daemon).await?),
        Command::Set(set) => set.run(&daemon).await,
        Command::Get(get) => get.run(&daemon).await,
        Command::Status(status) => status.run(&daemon).await,
        Command::Ip(ip) => ip.run(&daemon).await,
        Command::Ping(ping) => ping.run(&daemon).await,
        Command::ExitNode(exit_node) => exit_node.run(&daemon).await,
        Command::Netcheck(netcheck) => netcheck.run(&daemon).await,
        Command::Whois(whois) => whois.run(&daemon).await,
        Command::Version(version) => version.run(&daemon).await,
        Command::Debug(debug) => debug.run(),
        Command::Policy(policy) => policy.run().await,
        Command::Admin(admin) => admin.run().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn json_of_netcheck_is_asked_for_in_two_ways_but_not_in_both() {
        let parses = |flags: &[&str]| Arguments::try_parse_from([&["lacis", "netcheck"], flags].concat());
        assert!(parses(&["--json"]).is_ok());
        assert!(parses(&["--format=json"]).is_ok());
        assert!(parses(&["--json", "--format=json-line"]).unwrap_err().use_stderr());
    }

    #[test]
    fn the_command_of_the_registration_page_is_one() {
        let command = "lacis admin registrations approve ID --tailnet NETWORK --user NAME";
        assert!(Arguments::try_parse_from(command.split(' ')).is_ok());
    }

    #[test]
    fn a_cause_is_told_once() {
        let cause = std::io::Error::other("no file");
        let text = anyhow::Error::new(cause).context("reading x: no file (try y)").context("starting");
        assert_eq!(one_line(&text), "starting: reading x: no file (try y)");
    }
}
