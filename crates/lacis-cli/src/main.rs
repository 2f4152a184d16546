//! The program `lacis`: the command line of the node it runs on, and of the coordinator's administrator.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use std::process::ExitCode;

use clap::Parser;
use lacis_cli::{Arguments, Failure, one_line, run};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("lacis: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Quiet) => ExitCode::FAILURE,
        Err(Failure::Error(error)) => {
            eprintln!("lacis: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}
