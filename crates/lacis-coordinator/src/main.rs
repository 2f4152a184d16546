//! `lacis-coordinator`: the control plane as a program.
#![allow(clippy::print_stdout)] // `check` and `schema` print what they are asked for

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use lacis_coordinator::Error;
use lacis_coordinator::config::{Config, schema};
use lacis_coordinator::core;
use lacis_coordinator::core::policy::{self, PolicyError, PolicySource};
use lacis_coordinator::serve::Service;
use lacis_serve::log::DEFAULT_FILTER;
use lacis_serve::tls::Certificate;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// `EX_CONFIG` of sysexits: trying again does not help.
const EXIT_CONFIG: u8 = 78;
/// Everything waits on sockets; two threads serve thousands of clients and keep memory small.
const WORKERS: usize = 2;

/// Decides who is in the mesh network: keys, addresses, names and rules.
#[derive(Debug, Parser)]
#[command(name = "lacis-coordinator", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the coordinator until it is told to stop
    Serve {
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Make a new database or key where the state directory has only the other one
        #[arg(long)]
        init: bool,
    },
    /// Say whether a configuration can be used, without using it
    Check {
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Print the JSON Schema of the configuration
    Schema,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.command {
        Command::Serve { config, init } => serve(&config, init),
        Command::Check { config } => check(&config),
        Command::Schema => print(&format!("{:#}", schema())),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error.to_string().lines() {
                eprintln!("lacis-coordinator: {line}");
            }
            ExitCode::from(if error.is_config() { EXIT_CONFIG } else { 1 })
        }
    }
}

/// Prints a line; a reader that has gone away (`| head`) is no error.
fn print(text: &str) -> Result<(), Error> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(source) if source.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::System { doing: "print", source })
        }
        _ => Ok(()),
    }
}

fn check(path: &Path) -> Result<(), Error> {
    let config = Config::load(path)?;
    for tailnet in config.core().tailnets {
        let PolicySource::File(file) = tailnet.policy else { continue };
        match policy::read_file(&file) {
            Ok(_) => {}
            // It may be checked on another machine than its own.
            Err(PolicyError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                print(&format!("{}: is not on this machine and was not checked", file.display()))?;
            }
            Err(error) => return Err(core::Error::Policy { tailnet: tailnet.name, error }.into()),
        }
    }
    for warning in config.warnings() {
        print(&format!("{}: warning: {warning}", path.display()))?;
    }
    print(&format!("{}: the configuration can be used", path.display()))
}

fn serve(path: &Path, init: bool) -> Result<(), Error> {
    let level =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| DEFAULT_FILTER.into());
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(level).with_writer(std::io::stderr).with_ansi(colours).init();
    let config = Config::load(path)?;
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .map_err(|source| Error::System { doing: "start the runtime", source })?;
    runtime.block_on(run(path, &config, init))
}

async fn run(path: &Path, config: &Config, init: bool) -> Result<(), Error> {
    let stop = CancellationToken::new();
    let service = if init {
        Service::init(config, stop.clone()).await?
    } else {
        Service::start(config, stop.clone()).await?
    };
    let on = |kind| signal(kind).map_err(|source| Error::System { doing: "wait for signals", source });
    let (mut terminate, mut interrupt) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
    let mut hangup = on(SignalKind::hangup())?;
    let (certificate, core) = (service.certificate(), service.core().clone());
    let path = path.to_owned();
    // Policies are the part of the configuration that can change while the program runs.
    core.read_configuration_by(move || {
        Config::load(&path).map(|config| config.core().tailnets).map_err(|error| error.to_string())
    });
    let stopping = stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => {
                    // The service manager waits for the end of it.
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Reloading]);
                    reload(certificate.as_ref());
                    core.reload_policies().await;
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
                }
            }
        }
        tracing::info!("stopping");
        // Without a service manager there is nobody to tell.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        stopping.cancel();
    });
    tracing::info!(
        server_url = %config.server_url, listen = ?service.addresses(), tls = config.tls.is_some(),
        embedded_relay = config.embedded().is_some(), admin_socket = %config.admin_socket().display(),
        "coordinator ready"
    );
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    service.run().await
}

fn reload(certificate: Option<&Arc<Certificate>>) {
    let Some(certificate) = certificate else { return };
    match certificate.reload() {
        Ok(()) => tracing::info!("certificate read again"),
        Err(error) => tracing::error!(%error, "the new certificate cannot be used, the old one stays"),
    }
}

/// Each client holds one descriptor or more; the usual soft limit of 1024 is for programs that use select().
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
