//! `lacis-lab shell HOST`: a shell on a host of a run that was kept up.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::boot::{Job, LAB};

/// What the command line says.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The host's name
    pub host: String,
    /// What to run there instead of a shell
    #[arg(trailing_var_arg = true)]
    pub command: Vec<String>,
    /// Which run, if several are up: its folder in target/lab
    #[arg(long)]
    pub run: Option<PathBuf>,
}

/// Replaces this process by one on the host.
pub fn shell(arguments: &Arguments) -> Result<ExitCode> {
    let own = std::env::current_exe()?;
    let base = own.ancestors().nth(2).context("this program is in no target folder")?.join("lab");
    let runs = match &arguments.run {
        Some(run) => running(run).into_iter().collect(),
        None => fs::read_dir(&base)
            .map(|entries| entries.flatten().filter_map(|entry| running(&entry.path())).collect::<Vec<_>>())
            .unwrap_or_default(),
    };
    let with_host: Vec<&(u32, Job)> =
        runs.iter().filter(|(_, job)| job.plan.nodes.contains_key(&arguments.host)).collect();
    let [(process, _)] = with_host.as_slice() else {
        if with_host.is_empty() {
            bail!("no run with a host {} is up: start one with --keep", arguments.host);
        }
        bail!("several runs with a host {} are up: say which one with --run target/lab/NAME", arguments.host);
    };
    let error = Command::new("nsenter")
        .args(enter(*process))
        .arg("sh")
        .arg(Path::new(LAB).join("enter"))
        .arg(&arguments.host)
        .args(&arguments.command)
        .exec();
    Err(error).context("cannot run nsenter")
}

/// Arguments of nsenter that lead into a run.
fn enter(process: u32) -> Vec<String> {
    let mut arguments = vec!["-t".to_owned(), process.to_string(), "-a".to_owned()];
    if !rustix::process::getuid().is_root() {
        arguments.push("--preserve-credentials".to_owned());
    }
    arguments
}

/// The first process and the job of a run, if it is up.
fn running(folder: &Path) -> Option<(u32, Job)> {
    let process: u32 = fs::read_to_string(folder.join("pid")).ok()?.trim().parse().ok()?;
    let command = fs::read(format!("/proc/{process}/cmdline")).ok()?;
    if !String::from_utf8_lossy(&command).contains("inside") {
        return None;
    }
    Some((process, Job::load(&folder.join("job.json")).ok()?))
}
