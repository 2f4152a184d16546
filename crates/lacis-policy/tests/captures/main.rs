//! Does the engine agree with recorded answers of Tailscale's control plane? Its own program, because each record is a
//! case of its own.
//!
//! Reads the folder that `LACIS_POLICY_CAPTURES` names (seen from the workspace's root; by default
//! `../shared/conformance/policy`), whose README says what each field means and how to compare. Prints a line for each
//! family and the sum last; `--only TEXT` takes the cases whose id has that text. Without the folder it is skipped,
//! except where `CI` or the variable says that it should be there.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

mod compare;
mod filter;
mod record;
mod refusal;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use compare::Outcome;
use record::Record;

const VARIABLE: &str = "LACIS_POLICY_CAPTURES";
const DEFAULT: &str = "../shared/conformance/policy";
/// Lines of one case's difference that are shown.
const LINES: usize = 24;

/// What the command line asks for. `cargo test` hands everybody's flags to this program too: those that mean nothing
/// here are passed over.
struct Wish {
    only: String,
    list: bool,
}

impl Wish {
    fn read(mut arguments: impl Iterator<Item = String>) -> Self {
        let mut wish = Self { only: String::new(), list: false };
        while let Some(argument) = arguments.next() {
            if argument == "--only" {
                wish.only = arguments.next().unwrap_or_default();
            } else if let Some(text) = argument.strip_prefix("--only=") {
                text.clone_into(&mut wish.only);
            } else if argument == "--list" {
                wish.list = true;
            }
        }
        wish
    }
}

fn set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| !value.is_empty())
}

fn folder() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let root = root.canonicalize().unwrap_or(root);
    match std::env::var_os(VARIABLE) {
        Some(path) if !path.is_empty() => root.join(path),
        _ => root.join(DEFAULT),
    }
}

/// The families and their files, in order of names.
fn families(folder: &Path) -> std::io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "jsonl") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            found.push((name, path));
        }
    }
    found.sort();
    Ok(found)
}

fn compare(record: &Record) -> Outcome {
    catch_unwind(AssertUnwindSafe(|| compare::compare(record)))
        .unwrap_or_else(|_| vec!["the engine panicked".to_owned()].into())
}

/// What came of cases.
#[derive(Default)]
struct Sum {
    passed: usize,
    failed: usize,
    /// Views that were recorded before an approval had spread, and the cases that have some.
    early: (usize, usize),
}

/// Runs the cases of one file.
fn run(path: &Path, wish: &Wish) -> Result<Sum, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut sum = Sum::default();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let record: Record =
            serde_json::from_str(line).map_err(|error| format!("{}:{}: {error}", path.display(), at + 1))?;
        if !record.id.contains(&wish.only) {
            continue;
        }
        let outcome = compare(&record);
        sum.early.0 += outcome.early;
        sum.early.1 += usize::from(outcome.early > 0);
        let found = outcome.differences;
        if found.is_empty() {
            sum.passed += 1;
            continue;
        }
        sum.failed += 1;
        println!("FAILED {}", record.id);
        for line in found.iter().take(LINES) {
            println!("    {line}");
        }
        if found.len() > LINES {
            println!("    … and {} more", found.len() - LINES);
        }
    }
    Ok(sum)
}

fn main() -> ExitCode {
    let wish = Wish::read(std::env::args().skip(1));
    if wish.list {
        println!("captures: test");
        return ExitCode::SUCCESS;
    }
    let folder = folder();
    if !folder.is_dir() {
        println!("captures: there is no folder {} ({VARIABLE} names another)", folder.display());
        if set("CI") || set(VARIABLE) {
            return ExitCode::FAILURE;
        }
        println!("captures: skipped");
        return ExitCode::SUCCESS;
    }
    let files = match families(&folder) {
        Ok(files) if !files.is_empty() => files,
        Ok(_) => {
            println!("captures: {} has no *.jsonl", folder.display());
            return ExitCode::FAILURE;
        }
        Err(error) => {
            println!("captures: reading {}: {error}", folder.display());
            return ExitCode::FAILURE;
        }
    };
    let mut all = Sum::default();
    let mut lines = Vec::new();
    for (family, path) in files {
        match run(&path, &wish) {
            Ok(sum) => {
                lines.push(format!("{family}: {} passed, {} failed", sum.passed, sum.failed));
                all.passed += sum.passed;
                all.failed += sum.failed;
                all.early.0 += sum.early.0;
                all.early.1 += sum.early.1;
            }
            Err(error) => {
                println!("captures: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    for line in lines {
        println!("{line}");
    }
    if all.early.0 > 0 {
        let (views, cases) = all.early;
        println!(
            "note: {views} views of {cases} cases were recorded before an approval had spread; their routes are not compared"
        );
    }
    println!("{} passed, {} failed", all.passed, all.failed);
    if all.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
