//! The program `lacisd`: options, logging, signals. Everything else is in the library.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use lacis_client::{Error, Options, cleanup, run};
use lacis_wire::io::Proxies;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::format;

/// Joins this machine to a mesh. `lacis up` tells it which.
#[derive(Debug, Parser)]
#[command(name = "lacisd", version, after_help = ENVIRONMENT)]
struct Arguments {
    /// Where keys, preferences and the network map are kept (mode 0700)
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lacis")]
    state_dir: PathBuf,
    /// Where `lacis` finds this daemon
    #[arg(long, value_name = "PATH", default_value = lacis_wire::local::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Name of the network device
    #[arg(long, value_name = "NAME", default_value = "lacis0")]
    tun: String,
    /// UDP port for WireGuard; 0 is the one used last, or any
    #[arg(long, value_name = "N", default_value_t = 0)]
    port: u16,
    /// An address at which peers can reach this node, such as one that a router forwards; may be given again
    #[arg(long, value_name = "IP:PORT")]
    endpoint: Vec<SocketAddr>,
    /// Whether to ask the router to map the UDP port (UPnP, NAT-PMP, PCP)
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    port_mapping: bool,
    /// Whether to search for ports of peers' NATs: some hundred small packets each time
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    port_search: bool,
    /// What to log, such as `info` or `lacis_client=debug`
    #[arg(long, value_name = "FILTER", env = "LACIS_LOG", default_value = "info")]
    log: String,
    /// Puts this host back after a lacisd that was killed, and ends. With an exit node nothing leaves until then, or
    /// until lacisd is started again
    #[arg(long)]
    cleanup: bool,
}

/// What the environment says, beside options.
const ENVIRONMENT: &str = "\
Environment:
  HTTPS_PROXY, HTTP_PROXY, ALL_PROXY  http://[USER:PASSWORD@]HOST[:PORT], the proxy that leads to the control server and
                                      the relays; lower case goes before upper
  NO_PROXY                            What is reached without it: names and all below them, addresses, networks, each
                                      with :PORT if need be, or *";

/// A configuration that does not heal by trying again (`EX_CONFIG`).
const EXIT_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = match EnvFilter::try_new(format!("boringtun=off,rustls=error,{}", arguments.log)) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!(
                "lacisd: --log {:?} is no filter: {error} (try info or lacis_client=debug)",
                arguments.log
            );
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    let proxies = match Proxies::from_env(|name| std::env::var(name).ok()) {
        Ok(proxies) => Arc::new(proxies),
        Err(error) => {
            eprintln!("lacisd: {error}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    let terminal = std::io::stderr().is_terminal();
    // Peers, relays and servers have a say in what is logged: it is text, and one line.
    let fields = format::debug_fn(|writer, field, value| {
        let text = format!("{value:?}");
        let text = lacis_wire::text::plain(&text);
        match field.name() {
            "message" => write!(writer, "{text}"),
            name => write!(writer, "{name}={text}"),
        }
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .fmt_fields(fields.delimited(" "))
        .with_writer(std::io::stderr)
        .with_ansi(terminal)
        .init();
    // Two threads do: the packets have their own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(serve(arguments, proxies)),
        Err(error) => {
            eprintln!("lacisd: the runtime cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not by the log, which can be filtered.
            eprintln!("lacisd: {error}");
            let config = matches!(
                error,
                Error::StateDamaged { .. }
                    | Error::StateInUse { .. }
                    | Error::StateDirShared { .. }
                    | Error::NoSocket { .. }
            );
            if config { ExitCode::from(EXIT_CONFIG) } else { ExitCode::FAILURE }
        }
    }
}

async fn serve(arguments: Arguments, proxies: Arc<Proxies>) -> Result<(), Error> {
    let options = Options {
        state_dir: arguments.state_dir,
        socket: arguments.socket,
        tun: arguments.tun,
        port: arguments.port,
        endpoints: arguments.endpoint,
        port_mapping: arguments.port_mapping,
        port_search: arguments.port_search,
        proxies,
    };
    if arguments.cleanup {
        return cleanup(&options).await;
    }
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
    // A terminal that is closed must not leave its host half changed.
    let mut hangup = signal(SignalKind::hangup()).map_err(Error::Signals)?;
    tokio::spawn({
        let stop = stop.clone();
        async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {}, _ = hangup.recv() => {} }
            tracing::info!("stopping");
            notify(sd_notify::NotifyState::Stopping);
            stop.cancel();
        }
    });
    Box::pin(run(options, stop, || notify(sd_notify::NotifyState::Ready))).await
}

/// Tells systemd, where it listens.
fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "systemd is not told");
    }
}
