//! `lacis policy`: policies as code. Checks, explains and compares them without a server, for a population from a file;
//! or for that of a running coordinator.
//!
//! Problems are printed as `FILE:LINE:COLUMN: …`. It ends with 0 when all is well, with 1 when a policy is refused, and
//! with 2 when there was no way to tell: a file that cannot be read, a name that nobody has.

mod access;
mod check;
mod diff;
mod explain;
mod fmt;
mod input;
mod reach;
mod show;
mod who;

use clap::Subcommand;

use crate::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct Policy {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Say whether a policy can be used: syntax, references, and its own tests where it is known who there is
    Check(check::Check),
    /// Say which rule lets one reach another, or why none does
    Explain(explain::Explain),
    /// Say who gains or loses access from one policy to another
    Diff(diff::Diff),
    /// Show what a policy comes to for one node
    Show(show::Show),
    /// Print a policy in one spelling, without comments, as JSON or YAML
    Fmt(fmt::Fmt),
}

/// How a question about policies was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Yes,
    /// What was wrong has been printed.
    No,
}

impl Policy {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let answer = match self.command {
            PolicyCommand::Check(check) => check.run().await,
            PolicyCommand::Explain(explain) => explain.run().await,
            PolicyCommand::Diff(diff) => diff.run().await,
            PolicyCommand::Show(show) => show.run().await,
            PolicyCommand::Fmt(fmt) => fmt.run(),
        };
        match answer {
            Ok(Answer::Yes) => Ok(()),
            Ok(Answer::No) => Err(Failure::Quiet),
            Err(error) => Err(match error.downcast::<input::Refused>() {
                Ok(refused) => {
                    eprintln!("{refused}");
                    Failure::Quiet
                }
                Err(error) => Failure::Unanswered(error),
            }),
        }
    }
}
