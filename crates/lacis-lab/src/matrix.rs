//! `lacis-lab matrix`: runs the scenario that measures every pair of NAT kinds, and prints one table of what was
//! expected, what came, and how fast.
//!
//! The scenario (`tests/nat-matrix`) measures and judges; this module runs it as often as asked, each time on a fresh
//! network and, given Tailscale's programs, with those in the place of ours, and does the sums.

#![allow(clippy::print_stdout)] // The table is for the person who runs it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::run::{self, How, Outcome, Scenario, Strangers};
use crate::topology::{Service, Topology};

/// How many runs of a pair must come out as expected: a search among ports succeeds often, not always.
const ENOUGH: f64 = 0.9;

/// What the command line says.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Run it so many times, each on a fresh network: medians, 95th percentiles and shares
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub runs: u32,
    /// Only the pairs among these sides, such as cone,symmetric
    #[arg(long, value_delimiter = ',', value_name = "SIDES")]
    pub only: Vec<String>,
    /// Measure so many pairs at once
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub parallel: u32,
    /// Print JSON; what the runs say goes to standard error
    #[arg(long)]
    pub json: bool,
    /// Print every command of the script
    #[arg(long, short)]
    pub verbose: bool,
    /// Another scenario than tests/nat-matrix
    #[arg(long, value_name = "DIR")]
    pub scenario: Option<PathBuf>,
    #[command(flatten)]
    pub strangers: Strangers,
}

/// Who meets whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Clients {
    /// Ours on both sides.
    Lacisd,
    /// Tailscale's on both sides.
    Tailscaled,
    /// Ours on side a, Tailscale's on side b.
    Mixed,
}

/// What the script found out about one pair. Times are seconds.
#[derive(Debug, Clone, Deserialize)]
struct Measured {
    pair: (String, String),
    expected: String,
    got: String,
    /// From the first packet to the first answer.
    first_answer: Option<f64>,
    /// From the first packet until both sides have a direct path.
    direct_after: Option<f64>,
    /// Round trip over the relay.
    ping_before: Option<f64>,
    /// Round trip on the direct path.
    ping_after: Option<f64>,
    /// Packets that both sides spent on searches of ports.
    probes: Option<f64>,
    /// How often it was tried, on fresh hosts each time; this is of the last.
    tries: usize,
    /// What is not as it should be, in words.
    wrong: Vec<String>,
}

/// All runs of one pair.
#[derive(Debug, Serialize)]
struct Row {
    clients: Clients,
    pair: (String, String),
    expected: String,
    runs: usize,
    direct: usize,
    as_expected: usize,
    first_answer: Option<f64>,
    direct_after: Option<f64>,
    direct_after_p95: Option<f64>,
    ping_before: Option<f64>,
    ping_after: Option<f64>,
    probes: Option<f64>,
    tries: usize,
    wrong: Vec<String>,
}

impl Row {
    fn new(clients: Clients, measured: &[Measured]) -> Option<Self> {
        let first = measured.first()?;
        let all = |of: fn(&Measured) -> Option<f64>| {
            let mut values: Vec<f64> = measured.iter().filter_map(of).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let median = |of: fn(&Measured) -> Option<f64>| quantile(&all(of), 0.5);
        Some(Self {
            clients,
            pair: first.pair.clone(),
            expected: first.expected.clone(),
            runs: measured.len(),
            direct: measured.iter().filter(|one| one.got == "direct").count(),
            as_expected: measured.iter().filter(|one| one.wrong.is_empty()).count(),
            first_answer: median(|one| one.first_answer),
            direct_after: median(|one| one.direct_after),
            direct_after_p95: quantile(&all(|one| one.direct_after), 0.95),
            ping_before: median(|one| one.ping_before),
            ping_after: median(|one| one.ping_after),
            probes: median(|one| one.probes),
            tries: measured.iter().map(|one| one.tries).sum(),
            wrong: measured.iter().flat_map(|one| one.wrong.iter().cloned()).collect(),
        })
    }

    fn differs(&self) -> bool {
        (self.as_expected as f64) < ENOUGH * self.runs as f64
    }

    fn cells(&self) -> Vec<String> {
        let seconds = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2} s"));
        let milliseconds =
            |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{:.1} ms", value * 1e3));
        let got = match (self.direct, self.runs) {
            (0, _) => "relay".to_owned(),
            (direct, runs) if direct == runs => "direct".to_owned(),
            (direct, runs) => format!("direct {:.0} %", direct as f64 * 100.0 / runs as f64),
        };
        let mut cells = vec![
            format!("{} - {}", self.pair.0, self.pair.1),
            self.expected.clone(),
            got,
            seconds(self.direct_after),
        ];
        if self.runs > 1 {
            cells.push(seconds(self.direct_after_p95));
        }
        cells.extend([
            seconds(self.first_answer),
            milliseconds(self.ping_before),
            milliseconds(self.ping_after),
            self.probes.map_or("-".to_owned(), |probes| format!("{probes:.0}")),
            self.remark(),
        ]);
        cells
    }

    fn remark(&self) -> String {
        if self.differs() {
            format!("<- {}", self.wrong.join("; "))
        } else if self.tries > self.runs {
            "at the second try".to_owned()
        } else {
            String::new()
        }
    }
}

/// The value that so great a part of the sorted `values` is not above.
fn quantile(values: &[f64], part: f64) -> Option<f64> {
    let last = values.len().checked_sub(1)?;
    values.get((last as f64 * part).round() as usize).copied()
}

/// Runs the matrix and prints it.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let folder = match &arguments.scenario {
        Some(folder) => folder.clone(),
        None => run::project()?.join("tests/nat-matrix"),
    };
    let mut kinds = vec![Clients::Lacisd];
    if arguments.strangers.peers.is_some() || !arguments.strangers.peer.is_empty() {
        kinds.extend([Clients::Tailscaled, Clients::Mixed]);
    }
    let mut scenarios = Vec::new();
    for clients in kinds {
        let topology = variant(Topology::load(&folder)?, clients, &arguments.only)?;
        let Some(scenario) = Scenario::prepare(&folder, topology, &arguments.strangers)? else {
            bail!("the matrix needs it");
        };
        scenarios.push((clients, scenario));
    }
    let mut found: Vec<BTreeMap<(String, String), Vec<Measured>>> = vec![BTreeMap::new(); scenarios.len()];
    for number in 1..=arguments.runs {
        for ((clients, scenario), found) in scenarios.iter().zip(&mut found) {
            if !arguments.json {
                println!("{}, run {number} of {}", clients.words(), arguments.runs);
            }
            for one in once(scenario, *clients, number, arguments)? {
                found.entry(one.pair.clone()).or_default().push(one);
            }
        }
    }
    let mut rows: Vec<Row> = Vec::new();
    for ((clients, scenario), found) in scenarios.iter().zip(&found) {
        let sides = scenario.expect().map(|expect| expect.sides.as_slice()).unwrap_or_default();
        let position = |side: &String| sides.iter().position(|known| known == side);
        let mut own: Vec<Row> = found.values().filter_map(|runs| Row::new(*clients, runs)).collect();
        own.sort_by_key(|row| (position(&row.pair.0), position(&row.pair.1)));
        rows.extend(own);
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print(&rows);
    }
    let differences = rows.iter().filter(|row| row.differs()).count();
    Ok(if differences == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One run; what it measured.
fn once(scenario: &Scenario, clients: Clients, number: u32, arguments: &Arguments) -> Result<Vec<Measured>> {
    let wishes = serde_json::json!({
        "clients": clients,
        "parallel": arguments.parallel,
        "runs": arguments.runs,
    });
    let how = How {
        verbose: arguments.verbose,
        aside: arguments.json,
        environment: vec![("LACIS_LAB_MATRIX", wishes.to_string())],
        ..How::default()
    };
    let Outcome { status, logs, .. } = scenario.once(number, &how)?;
    ensure!(status == 0, "the run failed; logs: {}", logs.display());
    let path = logs.join("matrix.json");
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let measured: Vec<Measured> = serde_json::from_slice(&text)?;
    if measured.iter().all(|one| one.wrong.is_empty()) {
        let _ = fs::remove_dir_all(&logs);
    } else if !arguments.json {
        println!("logs: {}", logs.display());
    }
    Ok(measured)
}

/// The topology with other clients, and only with what some sides need.
fn variant(mut topology: Topology, clients: Clients, only: &[String]) -> Result<Topology> {
    let mut expect = topology.expect.take().context("this topology has no table [expect]")?;
    if !only.is_empty() {
        let kept = expect.only(only)?;
        let hosts: BTreeSet<String> = kept.hosts().collect();
        for name in expect.hosts().filter(|name| !hosts.contains(name)) {
            topology.hosts.remove(&name);
        }
        let mut used = BTreeSet::new();
        for host in topology.hosts.values() {
            let mut next = host.site.clone();
            while let Some(name) = next {
                next = topology.sites.get(&name).and_then(|site| site.behind.clone());
                used.insert(name);
            }
        }
        topology.sites.retain(|name, _| used.contains(name));
        expect = kept;
    }
    for (number, name) in expect.hosts().enumerate() {
        let replaced =
            clients == Clients::Tailscaled || (clients == Clients::Mixed && !number.is_multiple_of(2));
        let Some(host) = topology.hosts.get_mut(&name).filter(|_| replaced) else { continue };
        for service in &mut host.services {
            if *service == Service::Lacisd {
                *service = Service::Tailscaled;
            }
        }
    }
    topology.expect = Some(expect);
    Ok(topology)
}

impl Clients {
    fn words(self) -> &'static str {
        match self {
            Self::Lacisd => "lacisd - lacisd",
            Self::Tailscaled => "tailscaled - tailscaled",
            Self::Mixed => "lacisd - tailscaled",
        }
    }
}

fn print(rows: &[Row]) {
    for clients in [Clients::Lacisd, Clients::Tailscaled, Clients::Mixed] {
        let own: Vec<&Row> = rows.iter().filter(|row| row.clients == clients).collect();
        let Some(first) = own.first() else { continue };
        let mut heads = vec![clients.words(), "expected", "got", "direct after"];
        if first.runs > 1 {
            heads.push("p95");
        }
        heads.extend(["first answer", "ping before", "after", "probes", ""]);
        let mut table = vec![heads.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        table.extend(own.iter().map(|row| row.cells()));
        println!();
        for line in aligned(&table) {
            println!("{line}");
        }
        let differences = own.iter().filter(|row| row.differs()).count();
        println!("{} pairs, {} as expected, {differences} not", own.len(), own.len() - differences);
    }
}

fn aligned(table: &[Vec<String>]) -> Vec<String> {
    let width = |column: usize| table.iter().filter_map(|row| row.get(column)).map(String::len).max();
    let line = |row: &Vec<String>| {
        let cells = row.iter().enumerate();
        let cells = cells.map(|(column, cell)| format!("{cell:0$}", width(column).unwrap_or(0)));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    table.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(got: &str, after: Option<f64>) -> Measured {
        Measured {
            pair: ("cone".into(), "symmetric".into()),
            expected: "direct".into(),
            got: got.into(),
            first_answer: Some(0.01),
            direct_after: after,
            ping_before: Some(0.002),
            ping_after: None,
            probes: None,
            tries: 1,
            wrong: if got == "direct" { vec![] } else { vec!["relay, not direct".into()] },
        }
    }

    #[test]
    fn one_run_that_is_not_as_expected_is_a_difference_and_one_of_twenty_is_none() {
        let bad = measured("relay", None);
        assert!(Row::new(Clients::Lacisd, std::slice::from_ref(&bad)).unwrap().differs());
        let mut runs: Vec<Measured> = (0..19).map(|n| measured("direct", Some(f64::from(n)))).collect();
        runs.push(bad);
        let row = Row::new(Clients::Lacisd, &runs).unwrap();
        assert!(!row.differs());
        assert_eq!((row.direct_after, row.direct_after_p95), (Some(9.0), Some(17.0)));
        assert_eq!(row.cells()[2], "direct 95 %");
    }

    #[test]
    fn a_second_try_is_told() {
        let again = Measured { tries: 2, ..measured("direct", Some(1.0)) };
        let row = Row::new(Clients::Lacisd, &[again]).unwrap();
        assert_eq!(row.cells().last().unwrap(), "at the second try");
    }

    #[test]
    fn a_variant_has_other_clients_and_only_what_its_sides_need() {
        let text = "description = \"x\"\n[sites.at-a]\nbehind = \"c\"\n[sites.c]\n[sites.at-b]\n\
            [hosts.hub]\n[hosts.cone-a]\nsite = \"at-a\"\nservices = [\"lacisd\"]\n\
            [hosts.cone-b]\nservices = [\"lacisd\"]\n[hosts.open-a]\nsite = \"at-b\"\n[hosts.open-b]\n\
            [expect]\nsides = [\"open\", \"cone\"]\nlacisd = { open = \"d\", cone = \"d r\" }\n";
        let topology = Topology::parse(text).unwrap();
        let topology = variant(topology, Clients::Mixed, &["cone".to_owned()]).unwrap();
        assert_eq!(topology.hosts.keys().collect::<Vec<_>>(), ["cone-a", "cone-b", "hub"]);
        assert_eq!(topology.sites.keys().collect::<Vec<_>>(), ["at-a", "c"]);
        assert_eq!(topology.hosts["cone-a"].services, [Service::Lacisd]);
        assert_eq!(topology.hosts["cone-b"].services, [Service::Tailscaled]);
        assert_eq!(topology.expect.unwrap().lacisd["cone"], "r");
    }
}
