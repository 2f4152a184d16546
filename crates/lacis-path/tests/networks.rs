//! Thousands of simulated networks: data always flows, and directly whenever it can.
//!
//! A test target without libtest, so that its line of results is always seen. `cargo test -p lacis-path --test
//! networks -- --count 50000 --seed 7` runs others, with `--all` every failure is told in a line instead of a few with
//! a smaller scenario each; `--one SEED` or `--one 'SCENARIO'` tells all that happens in one.
//! What has failed once is in `regressions.txt` and runs first.
#![allow(clippy::print_stdout)] // its results are what it is for

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lacis_path::sim::{
    Failure, Outcome, Property, Scenario, Verdict, check, generate, run, shrink, trace, verdict,
};

/// Networks in a usual run.
const NETWORKS: u64 = 10_240;
/// One network of so many runs twice, to see that nothing but its seed matters.
const TWICE: u64 = 64;
/// Failures that are shrunk and shown; the others are counted.
const SHOWN: usize = 3;

/// What the reference model leaves to luck, but not entirely: so many of a hundred have to be direct, where nothing
/// has happened to them before.
const RATES: [(&str, u64); 2] = [("symmetric to cone", 95), ("symmetric-symmetric, both Linux", 90)];
/// Fewer flows of such a kind say nothing.
const ENOUGH: u64 = 20;

const REGRESSIONS: &str = include_str!("regressions.txt");

struct Arguments {
    seed: u64,
    count: u64,
    all: bool,
    one: Option<Scenario>,
}

/// Results, by the reference model's reason.
#[derive(Default)]
struct Results {
    networks: u64,
    exchanged: u64,
    flows: BTreeMap<(Verdict, &'static str), Row>,
    /// Packets of control: the most in any minute, and those in the last one, of each node.
    packets: [Vec<u32>; 2],
    /// Flows of each of [`RATES`], and how many of them are direct.
    rates: [(u64, u64); RATES.len()],
    /// Those that are not.
    unlucky: Vec<(u64, &'static str)>,
    failed: u64,
    failures: Vec<(Scenario, Failure)>,
}

#[derive(Default)]
struct Row {
    flows: u64,
    direct: u64,
    times: Vec<Duration>,
}

fn main() -> ExitCode {
    let arguments = match Arguments::read(std::env::args().skip(1)) {
        Ok(Some(arguments)) => arguments,
        Ok(None) => return ExitCode::SUCCESS,
        Err(problem) => {
            println!("{problem}");
            return ExitCode::FAILURE;
        }
    };
    std::panic::set_hook(Box::new(|info| PANIC.set(info.to_string())));
    if let Some(scenario) = &arguments.one {
        return tell(scenario);
    }
    let began = Instant::now();
    let regressions = REGRESSIONS.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let regressions: Vec<Scenario> = match regressions.map(str::parse).collect() {
        Ok(regressions) => regressions,
        Err(problem) => {
            println!("tests/regressions.txt: {problem}");
            return ExitCode::FAILURE;
        }
    };
    let results = Mutex::new(Results::default());
    let next = AtomicU64::new(0);
    let first = regressions.len() as u64;
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let scenario = match number.checked_sub(first) {
                        None => regressions[number as usize].clone(),
                        Some(number) if number < arguments.count => generate(arguments.seed + number),
                        Some(_) => break,
                    };
                    let again = number.is_multiple_of(TWICE);
                    let (outcome, failures) = play(&scenario, again);
                    results.lock().expect("no thread has panicked").add(&scenario, outcome, failures);
                }
            });
        }
    });
    results.into_inner().expect("no thread has panicked").show(began.elapsed(), arguments.all)
}

thread_local! {
    /// What the last panic of this thread said.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs a scenario, a second time too if `again`.
fn play(scenario: &Scenario, again: bool) -> (Option<Outcome>, Vec<Failure>) {
    let sane = |what| vec![Failure { property: Property::Sane, what }];
    let played = catch_unwind(AssertUnwindSafe(|| {
        let base = Instant::now();
        let outcome = run(scenario, base);
        let same = !again || run(scenario, base + Duration::from_secs(1)).happened == outcome.happened;
        (outcome, same)
    }));
    match played {
        Ok((outcome, same)) => {
            let mut failures = check(scenario, &outcome);
            if !same {
                failures.extend(sane("a second run went otherwise".to_owned()));
            }
            (Some(outcome), failures)
        }
        Err(_) => (None, sane(PANIC.take().replace('\n', " "))),
    }
}

/// Everything that happens in one scenario.
fn tell(scenario: &Scenario) -> ExitCode {
    println!("{scenario}");
    let Ok((outcome, lines)) = catch_unwind(AssertUnwindSafe(|| trace(scenario, Instant::now()))) else {
        println!("{}", PANIC.take());
        return ExitCode::FAILURE;
    };
    for line in lines {
        println!("{line}");
    }
    for flow in &outcome.flows {
        println!("{flow:?} {:?}", verdict(scenario, flow.from, flow.to));
    }
    for (node, counts) in outcome.nodes.iter().enumerate() {
        let most = counts.most_in_a_minute();
        println!("node {node}: at most {most} packets a minute, {} sockets at once", counts.most_sockets);
    }
    let failures = check(scenario, &outcome);
    for failure in &failures {
        println!("{failure}");
    }
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Arguments {
    /// `None` if there is nothing to run.
    fn read(mut words: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let mut arguments = Self { seed: 0, count: NETWORKS, all: false, one: None };
        while let Some(word) = words.next() {
            let mut number =
                || -> Result<String, String> { words.next().ok_or(format!("{word} needs a value")) };
            let wrong = |value: &str| format!("{word}: {value} is no number");
            match word.as_str() {
                "--seed" => arguments.seed = number().and_then(|it| it.parse().map_err(|_| wrong(&it)))?,
                "--count" => arguments.count = number().and_then(|it| it.parse().map_err(|_| wrong(&it)))?,
                "--one" => {
                    let what = number()?;
                    let scenario = what.parse().map(generate).or_else(|_| what.parse());
                    arguments.one = Some(scenario.map_err(|problem| problem.to_string())?);
                }
                "--all" => arguments.all = true,
                "--list" => {
                    println!("networks: test");
                    return Ok(None);
                }
                // A filter for the names of tests, given to all test programs.
                filter if !filter.starts_with('-') && !"networks".contains(filter) => return Ok(None),
                _ => {}
            }
        }
        Ok(Some(arguments))
    }
}

impl Results {
    fn add(&mut self, scenario: &Scenario, outcome: Option<Outcome>, failures: Vec<Failure>) {
        self.networks += 1;
        if let Some(outcome) = &outcome {
            self.exchanged += u64::from(outcome.flows.iter().all(|flow| flow.answered > 0));
            let end = scenario.end() as usize / 1000;
            for node in &outcome.nodes {
                self.packets[0].push(node.most_in_a_minute());
                self.packets[1].push(node.sent(end - 60, end));
            }
            for flow in &outcome.flows {
                let expected = verdict(scenario, flow.from, flow.to);
                let row = self.flows.entry((expected.verdict, expected.why)).or_default();
                row.flows += 1;
                let last = Duration::from_millis(scenario.last_change().into());
                if flow.direct_since.is_some() {
                    row.direct += 1;
                    row.times.extend(flow.direct_again.map(|direct| direct.saturating_sub(last)));
                }
                let rate = RATES.iter().position(|(why, _)| *why == expected.why);
                if let Some(rate) = rate.filter(|_| scenario.events.is_empty()) {
                    let direct = flow.direct_since.is_some();
                    self.rates[rate].0 += 1;
                    self.rates[rate].1 += u64::from(direct);
                    self.unlucky.extend((!direct).then_some((scenario.seed, expected.why)));
                }
            }
        }
        self.failed += u64::from(!failures.is_empty());
        if let Some(failure) = failures.into_iter().next() {
            self.failures.push((scenario.clone(), failure));
        }
    }

    fn show(mut self, took: Duration, all: bool) -> ExitCode {
        println!(
            "{:55} {:>7} {:>7} {:>9} {:>9}",
            "pair (by the reference model)", "flows", "direct", "median", "p95"
        );
        let (mut must, mut met, mut total, mut direct) = (0, 0, 0, 0);
        for ((verdict, why), row) in self.flows.iter_mut().rev() {
            row.times.sort_unstable();
            let part = |percent: usize| match row.times.get(row.times.len() * percent / 100) {
                Some(time) => format!("{:.2} s", time.as_secs_f64()),
                None => "-".to_owned(),
            };
            let name = format!("{verdict:?}: {why}");
            println!("{name:55} {:>7} {:>7} {:>9} {:>9}", row.flows, row.direct, part(50), part(95));
            total += row.flows;
            direct += row.direct;
            if *verdict == Verdict::Must {
                must += row.flows;
                met += row.direct;
            }
        }
        for (when, packets) in ["any minute", "the last minute"].iter().zip(&mut self.packets) {
            packets.sort_unstable();
            let part = |permille: usize| {
                packets.get((packets.len() * permille / 1000).min(packets.len().saturating_sub(1)))
            };
            let [half, most, nearly, all] =
                [500, 950, 990, 1000].map(|part_of| part(part_of).copied().unwrap_or(0));
            println!("packets of control in {when}: median {half}, p95 {most}, p99 {nearly}, most {all}");
        }
        let mut rates_hold = true;
        for ((why, percent), (flows, direct)) in RATES.into_iter().zip(self.rates) {
            let holds = flows < ENOUGH || direct * 100 >= percent * flows;
            rates_hold &= holds;
            let verdict = if holds { "" } else { ": too few" };
            println!("{why}, undisturbed: {direct} of {flows} direct, {percent} % have to be{verdict}");
        }
        let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
        for (_, failure) in &self.failures {
            *kinds.entry(format!("{:?}", failure.property)).or_default() += 1;
        }
        self.failures.sort_by_key(|(scenario, _)| (scenario.events.len(), scenario.seed));
        self.unlucky.sort_unstable();
        for (seed, why) in self.unlucky.iter().filter(|_| all) {
            println!("seed {seed}: not direct, unluckily: {why}");
        }
        let mut shown: Vec<Property> = Vec::new();
        for (scenario, failure) in &self.failures {
            if all {
                println!("seed {}: {failure}", scenario.seed);
                continue;
            }
            let again = shown.iter().filter(|property| **property == failure.property).count();
            if shown.len() == 4 * SHOWN || again == SHOWN {
                continue;
            }
            shown.push(failure.property);
            let fails = |candidate: &Scenario| {
                play(candidate, false).1.iter().any(|other| other.property == failure.property)
            };
            let small = shrink(scenario, fails);
            let failure = play(&small, false).1.into_iter().find(|other| other.property == failure.property);
            println!("\nseed {} fails, and so does (--one '…')\n  {small}", scenario.seed);
            println!("  {}", failure.map(|failure| failure.to_string()).unwrap_or_default());
        }
        let kinds: Vec<_> = kinds.iter().map(|(property, count)| format!("{property} {count}")).collect();
        println!(
            "{} networks: {} exchanged data; {met} pairs are direct of {must} that must be, {direct} of {total} in all; \
             {} failed {}; {:.0} s",
            self.networks,
            self.exchanged,
            self.failed,
            kinds.join(", "),
            took.as_secs_f64()
        );
        if self.failed == 0 && rates_hold { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
