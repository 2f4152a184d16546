//! `lacis-relay`: a DERP relay with STUN, as a program of its own.
#![allow(clippy::print_stdout)] // `check` prints its finding

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lacis_relay::config::Config;
use lacis_relay::serve::Service;
use lacis_serve::log::DEFAULT_FILTER;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// `EX_CONFIG` of sysexits: trying again does not help.
const EXIT_CONFIG: u8 = 78;

/// Relays packets between the nodes of a mesh network that have no direct path, and tells them their public addresses.
#[derive(Debug, Parser)]
#[command(name = "lacis-relay", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the relay until it is told to stop
    Serve {
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Say whether a configuration can be used, without using it
    Check {
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let level =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| DEFAULT_FILTER.into());
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(level).with_ansi(colours).with_writer(std::io::stderr).init();
    let result = match args.command {
        Command::Check { config } => check(&config),
        Command::Serve { config } => match Config::load(&config) {
            Ok(config) => serve(&config),
            Err(error) => Err((EXIT_CONFIG, error.into())),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, error)) => {
            eprintln!("lacis-relay: {error:#}");
            ExitCode::from(code)
        }
    }
}

type Failure = (u8, anyhow::Error);

fn check(path: &std::path::Path) -> Result<(), Failure> {
    // The file alone: where it is checked (a build of NixOS) the certificate and the system's roots need not be.
    Config::load(path).map_err(|error| (EXIT_CONFIG, error.into()))?;
    println!("{}: the configuration can be used", path.display());
    Ok(())
}

fn serve(config: &Config) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| (1, anyhow::Error::new(error).context("cannot start the runtime")))?;
    runtime.block_on(async {
        let service = Service::start(config).map_err(|error| {
            let code = if is_config(&error) { EXIT_CONFIG } else { 1 };
            (code, error.into())
        })?;
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        let mut terminate = signal(SignalKind::terminate()).map_err(|error| (1, error.into()))?;
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            tracing::info!("stopping");
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
            stopping.cancel();
        });
        tracing::info!(
            listen = ?service.addresses(), tls = config.tls.is_some(), stun = ?config.stun,
            key = %service.relay().public_key(), "relay ready"
        );
        // without a service manager there is nobody to tell
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        service.run(stop).await.map_err(|error| (1, error.into()))
    })
}

/// Whether the error stays until somebody changes the configuration or the relay's key. A certificate may come later.
fn is_config(error: &lacis_relay::Error) -> bool {
    use lacis_relay::Error;
    use lacis_serve::Error as Serve;
    matches!(
        error,
        Error::Config { .. }
            | Error::Url { .. }
            | Error::Serve(Serve::KeyFile { .. } | Serve::Exposed { .. } | Serve::Tls(_))
    )
}
