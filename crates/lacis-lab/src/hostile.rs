//! `lacis-lab hostile`: what the scenario `hostile` attacks with, over the real wire.
//!
//! [`node`] has what a node of the network can do, [`stranger`] what anybody can who reaches the port. Each attack says
//! on standard output what it does and how it is answered, as one JSON object a line, and ends after `--seconds`.

#![allow(clippy::print_stdout)] // The scenario's script reads it.

mod node;
mod stranger;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use lacis_wire::key::MachinePrivateKey;
use serde_json::Value;

use crate::node::Node;
use crate::sys;

/// What the command line says.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    attack: Attack,
    /// The coordinator
    #[arg(long, global = true, default_value = "https://mesh.example.org")]
    url: String,
    /// A file with an auth key, for those that are nodes
    #[arg(long, global = true, default_value = "/tmp/auth-key")]
    auth_key_file: PathBuf,
    /// The name of the node
    #[arg(long, global = true, default_value = "mallory")]
    name: String,
    /// Ends by itself after so many seconds
    #[arg(long, global = true, default_value_t = 60)]
    seconds: u64,
}

#[derive(Debug, clap::Subcommand)]
enum Attack {
    /// A node that only says what it is sent of its peers
    Watch,
    /// A node whose host facts no peer can read
    Hostinfo,
    /// A node with more endpoints than any host has, which change all the time
    Endpoints,
    /// A node that announces the disco key of another one
    Disco {
        /// The first label of that node's name
        victim: String,
    },
    /// A node that stays at its relays and asks for maps whatever it is answered
    Stay,
    /// Registrations with large bodies that wait for approval
    Followups,
    /// More registrations than anybody approves
    Registrations,
    /// Noise sessions that never become a node's
    Sessions {
        #[arg(long, default_value_t = 1200)]
        count: usize,
    },
    /// Connections that say nothing, or a byte a second
    Connections {
        /// HOST:PORT, any number of them
        #[arg(required = true)]
        targets: Vec<String>,
        /// To each of them
        #[arg(long, default_value_t = 4600)]
        count: usize,
    },
}

/// Runs it.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let limit = Duration::from_secs(arguments.seconds);
    runtime.block_on(async { tokio::time::timeout(limit, attack(arguments)).await.unwrap_or(Ok(())) })?;
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}

async fn attack(arguments: &Arguments) -> Result<()> {
    let url = arguments.url.as_str();
    match &arguments.attack {
        Attack::Watch => node::watch(join(arguments).await?).await,
        Attack::Hostinfo => node::hostinfo(join(arguments).await?).await,
        Attack::Endpoints => node::endpoints(join(arguments).await?).await,
        Attack::Disco { victim } => node::disco(join(arguments).await?, victim).await,
        Attack::Stay => node::stay(join(arguments).await?).await,
        Attack::Followups => stranger::followups(url).await,
        Attack::Registrations => stranger::registrations(url).await,
        Attack::Sessions { count } => {
            sys::raise_descriptors(*count as u64)?;
            stranger::sessions(url, *count).await
        }
        Attack::Connections { targets, count } => {
            sys::raise_descriptors((targets.len() * count) as u64)?;
            stranger::connections(targets, *count).await
        }
    }
}

/// A node that has joined with the auth key.
async fn join(arguments: &Arguments) -> Result<Node> {
    let (file, name) = (&arguments.auth_key_file, &arguments.name);
    let key = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let node = Node::dial(&arguments.url, MachinePrivateKey::generate(), None, name.clone()).await?;
    node.register(key.trim()).await?;
    say(&serde_json::json!({ "joined": name }));
    Ok(node)
}

fn say(line: &Value) {
    println!("{line}");
}

/// An endpoint that nothing answers at.
fn endpoint(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(198, 18, 0, 1), port))
}
