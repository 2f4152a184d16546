//! `lacis-lab run` and `bench`: finds programs, makes namespaces, runs a scenario in them, and says how it went.

#![allow(clippy::print_stdout)] // What it says is for the person who runs it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};

use crate::boot::Job;
use crate::expect::Expect;
use crate::plan::Plan;
use crate::sys;
use crate::topology::{Service, Topology};

/// Programs of the system that every run uses, and the Debian package of each.
const TOOLS: [(&str, &str); 6] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("conntrack", "conntrack"),
    ("ping", "iputils-ping"),
    ("nsenter", "util-linux"),
    ("python3", "python3"),
];
/// Where such programs are that an ordinary user's PATH lacks.
const SYSTEM_PATHS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// What the command line says.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The scenario's folder, such as tests/demo
    pub scenario: PathBuf,
    #[command(flatten)]
    pub options: Options,
}

/// What the command line says of a scenario in `benches/`.
#[derive(Debug, clap::Args)]
pub struct BenchArguments {
    /// What to measure, such as tunnel (a folder of benches/, or a path)
    pub name: String,
    #[command(flatten)]
    pub options: Options,
}

/// How a scenario is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Leave everything up after the script, until Ctrl-C
    #[arg(long)]
    pub keep: bool,
    /// Print every command of the script
    #[arg(long, short)]
    pub verbose: bool,
    /// Run it so many times, and stop at the first failure
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub runs: u32,
    #[command(flatten)]
    pub strangers: Strangers,
}

/// Where programs are that are not the project's own.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Strangers {
    /// A stranger's program, such as tailscaled=/opt/tailscaled, or another build of one of ours
    #[arg(long = "peer", value_name = "NAME=PATH", value_parser = parse_peer)]
    pub peer: Vec<(String, PathBuf)>,
    /// A folder with strangers' programs
    #[arg(long, value_name = "DIR")]
    pub peers: Option<PathBuf>,
}

fn parse_peer(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("it must look like tailscaled=/opt/tailscaled")?;
    Ok((name.to_owned(), path.into()))
}

/// Runs a scenario as often as asked.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    run_folder(&arguments.scenario, &arguments.options)
}

/// Runs a scenario of `benches/`, by its bare name or as [`run`] does.
pub fn bench(arguments: &BenchArguments) -> Result<ExitCode> {
    let path = PathBuf::from(&arguments.name);
    let folder = if arguments.name.contains('/') { path } else { project()?.join("benches").join(path) };
    run_folder(&folder, &arguments.options)
}

/// The project that this program was built in.
pub fn project() -> Result<PathBuf> {
    let own = std::env::current_exe().context("where is this program?")?;
    let project = own.ancestors().nth(3).map(Path::to_owned);
    project.context("this program is in no target folder: say where the scenario is by its path")
}

fn run_folder(folder: &Path, arguments: &Options) -> Result<ExitCode> {
    let topology = Topology::load(folder)?;
    let Some(scenario) = Scenario::prepare(folder, topology, &arguments.strangers)? else {
        return Ok(ExitCode::SUCCESS);
    };
    let name = &scenario.plan.name;
    println!("{name}: {}\n\n{}", scenario.plan.description, scenario.plan.drawing);
    let how = How { keep: arguments.keep, verbose: arguments.verbose, ..How::default() };
    for number in 1..=arguments.runs {
        let Outcome { status, seconds, logs } = scenario.once(number, &how)?;
        let of =
            if arguments.runs > 1 { format!(" (run {number} of {})", arguments.runs) } else { String::new() };
        if status != 0 {
            println!("FAILED {name}{of} after {seconds:.1} s; logs: {}", logs.display());
            return Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)));
        }
        println!("PASSED {name}{of} in {seconds:.1} s");
        let _ = fs::remove_dir_all(&logs);
    }
    Ok(ExitCode::SUCCESS)
}

/// A scenario with everything that it needs found and planned.
#[derive(Debug)]
pub struct Scenario {
    /// What will be built.
    pub plan: Plan,
    own: PathBuf,
    bin_dir: PathBuf,
    folder: PathBuf,
    programs: BTreeMap<String, PathBuf>,
    names_by_dns: bool,
    expect: Option<Expect>,
}

/// How one run is made.
#[derive(Debug, Default)]
pub struct How {
    /// Leave everything up after the script.
    pub keep: bool,
    /// Print every command of the script.
    pub verbose: bool,
    /// Keep standard output free: what the run says goes to standard error.
    pub aside: bool,
    /// Variables that the script finds in its environment.
    pub environment: Vec<(&'static str, String)>,
}

/// How one run went.
#[derive(Debug)]
pub struct Outcome {
    /// The script's exit code; 0 if all is well.
    pub status: i32,
    /// How long it took.
    pub seconds: f64,
    /// Where its logs are.
    pub logs: PathBuf,
}

impl Scenario {
    /// Finds programs and plans addresses for a folder's script and a topology, which need not be the folder's own.
    /// Without a program that is neither the project's nor every machine's, optional hosts are left out; says
    /// `SKIPPED` and gives nothing if one is missing even so.
    pub fn prepare(folder: &Path, mut topology: Topology, strangers: &Strangers) -> Result<Option<Self>> {
        let folder =
            fs::canonicalize(folder).with_context(|| format!("there is no scenario {}", folder.display()))?;
        let name = folder
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .context("the scenario has no name")?;
        let script = folder.join("test.py");
        ensure!(script.is_file(), "{} is missing", script.display());
        let own = std::env::current_exe().context("where is this program?")?;
        let bin_dir = own.parent().context("this program is in no folder")?.to_owned();

        extend_path();
        let peers = find_strangers(strangers, &topology)?;
        let all = topology.services();
        let left_out = topology.leave_out(|service| missing_for(service, &peers).next().is_some());
        if !left_out.is_empty() {
            let missing: Vec<String> = all.iter().flat_map(|service| missing_for(*service, &peers)).collect();
            println!("without {}: needs {}", left_out.join(", "), missing.join(", "));
        }
        let missing = missing(&topology, &peers);
        if !missing.is_empty() {
            println!("SKIPPED {name}: needs {}", missing.join(", "));
            return Ok(None);
        }
        check_system(&topology)?;
        let mut programs = own_programs(&bin_dir, &topology, &peers)?;
        programs.insert("lacis-lab".to_owned(), own.clone());
        programs.extend(peers);
        programs.extend(build_programs(&folder, &topology)?);
        let plan = Plan::new(&name, &topology)?;
        let (names_by_dns, expect) = (topology.names_by_dns, topology.expect);
        Ok(Some(Self { plan, own, bin_dir, folder, programs, names_by_dns, expect }))
    }

    /// What the script is to measure against.
    pub fn expect(&self) -> Option<&Expect> {
        self.expect.as_ref()
    }

    /// Runs the script on a fresh network.
    pub fn once(&self, number: u32, how: &How) -> Result<Outcome> {
        let logs = log_folder(&self.bin_dir, &self.plan.name, number)?;
        let job = Job {
            plan: self.plan.clone(),
            programs: self.programs.clone(),
            folder: self.folder.clone(),
            logs: logs.clone(),
            names_by_dns: self.names_by_dns,
            expect: self.expect.clone(),
            keep: how.keep,
            verbose: how.verbose,
        };
        let started = Instant::now();
        let status = confined(&self.own, &job, how)?;
        Ok(Outcome { status, seconds: started.elapsed().as_secs_f64(), logs })
    }
}

/// Strangers' programs by name: all that were given one by one, and those of the topology's services that there are.
fn find_strangers(strangers: &Strangers, topology: &Topology) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for (name, path) in &strangers.peer {
        let path = fs::canonicalize(path).with_context(|| format!("--peer {name}={}", path.display()))?;
        found.insert(name.clone(), path);
    }
    let folder = match &strangers.peers {
        Some(folder) => {
            Some(fs::canonicalize(folder).with_context(|| format!("--peers {}", folder.display()))?)
        }
        None => None,
    };
    for service in topology.services() {
        let given = service.peer_programs().iter().map(|program| {
            (program, folder.as_ref().map(|folder| folder.join(program)).filter(|path| path.is_file()))
        });
        let installed = service.system_programs().iter().map(|(program, _)| (program, find_tool(program)));
        for (program, path) in given.chain(installed) {
            if let Some(path) = path {
                found.entry((*program).to_owned()).or_insert(path);
            }
        }
    }
    Ok(found)
}

/// What a service needs and was not found, in words.
fn missing_for(service: Service, found: &BTreeMap<String, PathBuf>) -> impl Iterator<Item = String> {
    let given = service
        .peer_programs()
        .iter()
        .map(|program| (*program, format!("{program} (--peers DIR, or --peer {program}=PATH)")));
    let installed = service.system_programs().iter().map(|(program, package)| {
        (*program, format!("{program} (./scripts/setup; Debian package {package})"))
    });
    given.chain(installed).filter(|(program, _)| !found.contains_key(*program)).map(|(_, words)| words)
}

/// What a scenario needs and was not found, in words.
fn missing(topology: &Topology, found: &BTreeMap<String, PathBuf>) -> Vec<String> {
    let services = topology.services().into_iter().flat_map(|service| missing_for(service, found));
    let needs = topology.needs.iter().filter(|program| find_tool(program).is_none());
    services.chain(needs.map(|program| format!("{program} (Debian package {})", package(program)))).collect()
}

/// The Debian package of a program.
fn package(program: &str) -> &str {
    if program == "wg" { "wireguard-tools" } else { program }
}

/// The project's programs, from where this one was built; another build may be given as a peer.
fn own_programs(
    bin_dir: &Path,
    topology: &Topology,
    given: &BTreeMap<String, PathBuf>,
) -> Result<BTreeMap<String, PathBuf>> {
    let mut programs = BTreeMap::new();
    let wanted = topology.services().into_iter().flat_map(|service| service.own_programs());
    for program in wanted.filter(|program| !given.contains_key(**program)) {
        let path = bin_dir.join(program);
        ensure!(path.is_file(), "{} is not built: ./scripts/lab builds it, or cargo build", path.display());
        programs.insert((*program).to_owned(), path);
    }
    Ok(programs)
}

fn build_programs(folder: &Path, topology: &Topology) -> Result<BTreeMap<String, PathBuf>> {
    let mut programs = BTreeMap::new();
    for (name, program) in &topology.programs {
        println!("building {name}: {}", program.build);
        let status = Command::new("sh").arg("-ec").arg(&program.build).current_dir(folder).status()?;
        ensure!(status.success(), "building {name} failed: {}", program.build);
        let path = folder.join(&program.path);
        ensure!(path.is_file(), "building {name} made no {}", path.display());
        programs.insert(name.clone(), path);
    }
    Ok(programs)
}

fn extend_path() {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut folders: Vec<&str> = path.split(':').collect();
    folders.extend(SYSTEM_PATHS.iter().filter(|folder| !path.split(':').any(|known| known == **folder)));
    sys::set_path(&folders.join(":"));
}

/// Where a program of the system is.
fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').map(|folder| Path::new(folder).join(name)).find(|path| path.is_file())
}

fn check_system(topology: &Topology) -> Result<()> {
    for (tool, package) in TOOLS {
        if find_tool(tool).is_none() {
            bail!(
                "{tool} is not installed: ./scripts/setup installs what the lab needs (Debian package {package})"
            );
        }
    }
    let tun =
        [Service::Lacisd, Service::Tailscaled].iter().any(|service| topology.services().contains(service));
    if tun {
        fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").context(
            "cannot open /dev/net/tun, which the clients need (in a container: --device /dev/net/tun)",
        )?;
    }
    Ok(())
}

/// `target/lab`, or a folder of the user's own where that is somebody else's.
fn log_folder(bin_dir: &Path, name: &str, number: u32) -> Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let own = format!("lacis-lab-{}", rustix::process::getuid().as_raw());
    let bases = [bin_dir.parent().unwrap_or(bin_dir).join("lab"), std::env::temp_dir().join(own)];
    let mut failures = Vec::new();
    for base in bases {
        let folder = base.join(format!("{name}-{seconds}-{}-{number}", std::process::id()));
        match fs::create_dir_all(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) => failures.push(format!("{}: {error}", folder.display())),
        }
    }
    bail!("there is no place for logs: {}", failures.join("; "))
}

/// Runs a job in namespaces of its own; the exit code of its script.
fn confined(own: &Path, job: &Job, how: &How) -> Result<i32> {
    let path = job.logs.join("job.json");
    fs::write(&path, serde_json::to_vec_pretty(job)?)?;
    // A process of its own does it, so that this one stays where it is.
    let mut outer = Command::new(own);
    outer.arg("confine").arg(&path).envs(how.environment.iter().map(|(name, value)| (name, value)));
    if how.aside {
        outer.stdout(std::io::stderr());
    }
    let mut outer = sys::die_with_parent(&mut outer).spawn().context("cannot start the run")?;
    let status = sys::wait_forwarding(&mut outer)?;
    Ok(status.code().unwrap_or(1))
}

/// Makes the namespaces of a run and starts its first process in them.
pub fn confine(job: &Path) -> Result<ExitCode> {
    let own = std::env::current_exe()?;
    let everything =
        libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWPID;
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    if user == 0 {
        sys::unshare(everything).context(
            "this root may not make namespaces (a container without CAP_SYS_ADMIN?): \
             run the lab on the machine itself, or give the container --privileged",
        )?;
    } else {
        sys::unshare(everything | libc::CLONE_NEWUSER).context(
            "ordinary users may not make namespaces here: run the lab as root, or allow them \
             (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, \
             user.max_user_namespaces above 0)",
        )?;
        fs::write("/proc/self/setgroups", "deny").context("cannot set up a user namespace")?;
        fs::write("/proc/self/uid_map", format!("0 {user} 1"))
            .context("cannot become root of a user namespace")?;
        fs::write("/proc/self/gid_map", format!("0 {group} 1"))
            .context("cannot become root of a user namespace")?;
    }
    let mut first = Command::new(own);
    first.arg("inside").arg(job);
    std::os::unix::process::CommandExt::process_group(&mut first, 0);
    let mut first =
        sys::die_with_parent(&mut first).spawn().context("cannot start the run's first process")?;
    fs::write(job.with_file_name("pid"), first.id().to_string())?;
    let status = sys::wait_forwarding(&mut first)?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}
