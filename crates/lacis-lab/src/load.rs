//! `lacis-lab load`: simulated clients against a ts2021 server, and figures of how it bears them.
//!
//! All clients live in this one process ([`client`]); each has keys of its own, joins over real Noise and HTTP/2 and
//! reads its map stream. Against our own coordinator ([`server`]) nothing else is needed; any other server is given by
//! `--url`, with a reusable auth key. [`measure`] reads the server's CPU and memory from /proc.

#![allow(clippy::print_stdout)] // Figures are its purpose.

mod client;
mod measure;
mod server;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lacis_wire::io::ControlDialer;
use lacis_wire::key::MachinePrivateKey;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use client::{Client, Shared};
use measure::{Process, percentile};
use server::Own;

use crate::sys;

/// Nothing more than this many registrations at once: dialling must not be what is measured.
const PARALLEL: usize = 32;
/// What the last fan-outs of the joins need to settle before idleness is measured.
const SETTLE: Duration = Duration::from_secs(2);
/// A change that has not reached everybody by then counts as lost to the rest.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two changes, so that a server that batches does not get them in one batch.
const PAUSE: Duration = Duration::from_millis(50);

/// What the command line says.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How many clients
    #[arg(long, default_value_t = 400)]
    pub nodes: usize,
    /// The server's URL; without it our coordinator is started on the loopback
    #[arg(long, requires = "auth_key_file")]
    pub url: Option<String>,
    /// A file with a reusable auth key of that server
    #[arg(long, requires = "url")]
    pub auth_key_file: Option<PathBuf>,
    /// The server's process, to measure its CPU and memory
    #[arg(long, requires = "url")]
    pub pid: Option<u32>,
    /// How many changes of each kind
    #[arg(long, default_value_t = 40)]
    pub changes: usize,
    /// Seconds of idleness to measure
    #[arg(long, default_value_t = 10)]
    pub idle: u64,
    /// Register all clients before any opens its map stream
    #[arg(long)]
    pub register_first: bool,
}

/// Runs it.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    ensure!(arguments.nodes > 1, "--nodes must be at least 2: somebody has to see a change");
    ensure!(arguments.changes > 0, "--changes must be at least 1");
    sys::raise_descriptors(arguments.nodes as u64)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(load(arguments))?;
    Ok(ExitCode::SUCCESS)
}

async fn load(arguments: &Arguments) -> Result<()> {
    let own = if arguments.url.is_none() { Some(Own::start().await?) } else { None };
    let (url, key) = match (&arguments.url, &arguments.auth_key_file, &own) {
        (Some(url), Some(file), _) => {
            let key =
                std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
            (url.clone(), key.trim().to_owned())
        }
        (_, _, Some(own)) => (own.url.clone(), own.auth_key().await?),
        _ => anyhow::bail!("--url and --auth-key-file go together"),
    };
    let process = own.as_ref().map(Own::pid).or(arguments.pid).map(Process::new);
    let at_rest = process.as_ref().map(Process::rss_mib).transpose()?;
    let server_key = ControlDialer::new(&url, MachinePrivateKey::generate())?
        .fetch_key()
        .await
        .with_context(|| format!("is there a ts2021 server at {url}?"))?;
    println!("{} clients against {url}", arguments.nodes);

    let shared = Arc::new(Shared::new(url, key, server_key, arguments.nodes));
    let clients = join_all(arguments, &shared, process.as_ref()).await?;
    if let (Some(process), Some(at_rest)) = (&process, at_rest) {
        println!(
            "server's memory  {at_rest:.0} MiB before, {:.0} MiB with all streaming",
            process.rss_mib()?
        );
    }

    tokio::time::sleep(SETTLE).await;
    if let Some(process) = &process {
        let cpu = process.cpu()?;
        tokio::time::sleep(Duration::from_secs(arguments.idle)).await;
        let used = process.cpu()?.saturating_sub(cpu);
        println!(
            "idle             {:.1} % of a CPU over {} s, from {:.0} s after the last join",
            percent(used, Duration::from_secs(arguments.idle)),
            arguments.idle,
            SETTLE.as_secs_f64()
        );
    }

    endpoint_changes(arguments, &shared, &clients, process.as_ref()).await?;
    if let Some(own) = &own {
        renames(arguments, &shared, &clients, own).await?;
    }
    if let Some(process) = &process {
        println!(
            "server's memory  {:.0} MiB at the end, {:.0} MiB at most",
            process.rss_mib()?,
            process.peak_mib()?
        );
    }
    let ended = shared.ended();
    if ended > 0 {
        println!("{ended} map streams ended before the end");
    }
    Ok(())
}

/// Has every client join and waits until all read their maps.
async fn join_all(
    arguments: &Arguments,
    shared: &Arc<Shared>,
    process: Option<&Process>,
) -> Result<Vec<Arc<Client>>> {
    let cpu = process.map(Process::cpu).transpose()?;
    let began = Instant::now();
    let registrations = (0..arguments.nodes).map(|number| {
        let (shared, stream_at_once) = (Arc::clone(shared), !arguments.register_first);
        async move {
            let client = Client::register(number, shared).await?;
            if stream_at_once {
                client.stream().await?;
            }
            Ok(client)
        }
    });
    let clients = in_parallel(registrations).await?;
    if arguments.register_first {
        let seconds = began.elapsed().as_secs_f64();
        println!("registrations    {:.0} a second ({seconds:.2} s)", arguments.nodes as f64 / seconds);
        let streams = clients.iter().cloned().map(|client| async move { client.stream().await });
        in_parallel(streams).await?;
    }
    let took = began.elapsed();
    let words =
        if arguments.register_first { "registered, then streaming" } else { "registered and streaming" };
    println!(
        "joins            {:.0} a second, {words} ({:.2} s)",
        arguments.nodes as f64 / took.as_secs_f64(),
        took.as_secs_f64()
    );
    if let (Some(process), Some(cpu)) = (process, cpu) {
        let used = process.cpu()?.saturating_sub(cpu);
        println!(
            "                 {:.0} % of a CPU, {:.1} ms each",
            percent(used, took),
            used.as_secs_f64() * 1e3 / arguments.nodes as f64
        );
    }
    // The last joins still reach the first clients.
    tokio::time::sleep(SETTLE).await;
    println!(
        "bytes a client   {:.1} KiB of map until all had joined",
        shared.received() as f64 / 1024.0 / arguments.nodes as f64
    );
    Ok(clients)
}

/// Runs tasks, not too many at once; what they gave, in the order in which they ended.
async fn in_parallel<T, F>(tasks: impl Iterator<Item = F>) -> Result<Vec<T>>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let limit = Arc::new(Semaphore::new(PARALLEL));
    let mut running: JoinSet<Result<T>> = tasks
        .map(|task| {
            let limit = Arc::clone(&limit);
            async move {
                let _permit = limit.acquire_owned().await?;
                task.await
            }
        })
        .collect();
    let mut results = Vec::with_capacity(running.len());
    while let Some(result) = running.join_next().await {
        results.push(result??);
    }
    Ok(results)
}

/// A client reports a new endpoint; all others are to see it.
async fn endpoint_changes(
    arguments: &Arguments,
    shared: &Arc<Shared>,
    clients: &[Arc<Client>],
    process: Option<&Process>,
) -> Result<()> {
    let received = shared.received();
    let cpu = process.map(Process::cpu).transpose()?;
    let mut times = Vec::new();
    for number in 0..arguments.changes {
        let author = &clients[number % clients.len()];
        let endpoint = client::endpoint(10_000 + number);
        let watch = shared.watch(endpoint.to_string(), Some(author.number), clients.len() - 1);
        let began = Instant::now();
        author.report(endpoint).await?;
        times.push(watch.wait(began, PATIENCE).await);
        tokio::time::sleep(PAUSE).await;
    }
    tell_times("endpoint change", &times);
    let each = arguments.changes as f64 * arguments.nodes as f64;
    println!("bytes a client   {:.0} for each change", (shared.received() - received) as f64 / each);
    if let (Some(process), Some(cpu)) = (process, cpu) {
        let used = process.cpu()?.saturating_sub(cpu);
        println!(
            "                 {:.1} ms of the server's CPU each",
            used.as_secs_f64() * 1e3 / arguments.changes as f64
        );
    }
    Ok(())
}

/// An administrator renames a node; all are to see it.
async fn renames(
    arguments: &Arguments,
    shared: &Arc<Shared>,
    clients: &[Arc<Client>],
    own: &Own,
) -> Result<()> {
    let nodes = own.nodes().await?;
    let mut times = Vec::new();
    for number in 0..arguments.changes {
        let node = nodes.get(number % nodes.len()).context("the coordinator lists no nodes")?;
        let name = format!("renamed-{number}");
        // The trailing dot keeps renamed-1 apart from renamed-10.
        let watch = shared.watch(format!("{name}."), None, clients.len());
        let began = Instant::now();
        own.rename(node, &name).await?;
        times.push(watch.wait(began, PATIENCE).await);
        tokio::time::sleep(PAUSE).await;
    }
    tell_times("rename", &times);
    Ok(())
}

/// Prints how long changes took to reach the last client.
fn tell_times(what: &str, times: &[client::Outcome]) {
    let mut whole: Vec<Duration> = times.iter().filter_map(|outcome| outcome.last).collect();
    whole.sort();
    match (percentile(&whole, 0.5), percentile(&whole, 0.99)) {
        (Some(half), Some(most)) => println!(
            "{what:<16} seen by the last client after {} ms (p50), {} ms (p99), of {} changes",
            half.as_millis(),
            most.as_millis(),
            whole.len()
        ),
        _ => println!("{what:<16} no change reached everybody"),
    }
    let missing: usize = times.iter().map(|outcome| outcome.missing).sum();
    if missing > 0 {
        println!(
            "                 {missing} sightings of {} changes did not come within {} s",
            times.len(),
            PATIENCE.as_secs()
        );
    }
}

fn percent(used: Duration, of: Duration) -> f64 {
    100.0 * used.as_secs_f64() / of.as_secs_f64()
}
