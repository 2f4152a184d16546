//! The program `lacis`: the command line of the node it runs on, and of the coordinator's administrator.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use std::process::ExitCode;

use clap::Parser;
use lacis_cli::{Arguments, Failure, one_line, output, run};

/// How a command ends whose question could not be answered, where 1 would be an answer.
const NO_ANSWER: u8 = 2;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(answer) => {
            // Help and versions are wanted, all else is a wrong command line: an error like any other (clap's own
            // code would be 2). Nobody reads a pipe that is closed.
            let _ = answer.print();
            return if answer.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::note(format_args!("lacis: {error}"));
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Quiet) => ExitCode::FAILURE,
        Err(Failure::Error(error)) => {
            output::note(format_args!("lacis: {}", one_line(&error)));
            ExitCode::FAILURE
        }
        Err(Failure::Unanswered(error)) => {
            output::note(format_args!("lacis: {}", one_line(&error)));
            ExitCode::from(NO_ANSWER)
        }
    }
}
