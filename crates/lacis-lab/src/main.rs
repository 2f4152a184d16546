//! `lacis-lab`: runs scenarios, opens shells on their hosts, generates load.
#![allow(clippy::print_stdout, clippy::print_stderr)] // Its output is its purpose.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lacis_lab::{boot, hostile, load, matrix, run, shell, sys};

/// Networks of namespaces with the real programs in them.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a scenario
    Run(run::Arguments),
    /// Measure: run a scenario of benches/
    Bench(run::BenchArguments),
    /// Measure every pair of NAT kinds and print the table
    Matrix(matrix::Arguments),
    /// Open a shell on a host of a run that was kept up
    Shell(shell::Arguments),
    /// Drive a coordinator with simulated clients
    Load(load::Arguments),
    /// Attack a coordinator, as the scenario `hostile` does
    Hostile(hostile::Arguments),
    /// (internal) Make the namespaces of a run
    #[command(hide = true)]
    Confine { job: PathBuf },
    /// (internal) Run a job in its namespaces
    #[command(hide = true)]
    Inside { job: PathBuf },
    /// (internal) Boot a host
    #[command(hide = true)]
    Boot {
        host: String,
        #[arg(long)]
        again: bool,
    },
    /// (internal) A host's first process
    #[command(hide = true)]
    FirstProcess,
}

fn main() -> ExitCode {
    sys::end_with_reader();
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Bench(arguments) => run::bench(&arguments),
        Command::Matrix(arguments) => matrix::run(&arguments),
        Command::Shell(arguments) => shell::shell(&arguments),
        Command::Load(arguments) => load::run(&arguments),
        Command::Hostile(arguments) => hostile::run(&arguments),
        Command::Confine { job } => run::confine(&job),
        Command::Inside { job } => boot::inside(&job),
        Command::Boot { host, again } => boot::host(&host, again),
        Command::FirstProcess => boot::first_process(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("lacis-lab: {error:#}");
        ExitCode::FAILURE
    })
}
