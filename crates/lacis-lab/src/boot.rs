//! The inside of a run: what happens once the lab has namespaces of its own.
//!
//! [`inside`] is the first process of the run's PID namespace: it stages programs, builds the network, lays out each
//! host's `/etc` and hands over to the driver; when it ends, the kernel ends everything that it started. [`host`]
//! boots one host: it enters the host's network namespace, gives it its own `/etc`, `/run`, `/tmp`, `/var/lib`, name
//! and processes, and stays until the host is shut down.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::expect::Expect;
use crate::pki::Authority;
use crate::plan::{Node, Plan, RESOLVER, Role};
use crate::{net, sys, units};

/// Where a run keeps its things; a tmpfs of its own.
pub const LAB: &str = "/run/lab";

/// The scripts that make up the driver.
const DRIVER: [(&str, &str); 4] = [
    ("driver.py", include_str!("../driver/driver.py")),
    ("machine.py", include_str!("../driver/machine.py")),
    ("services.py", include_str!("../driver/services.py")),
    ("nameserver.py", include_str!("../driver/nameserver.py")),
];

/// `sh /run/lab/enter HOST [COMMAND…]`: onto a host, from within the run's namespaces.
const ENTER: &str = r#"host=$1; shift
process=$(cat "/run/lab/hosts/$host/pid") || { echo "$host is not up" >&2; exit 1; }
[ $# -gt 0 ] || set -- bash --norc
exec nsenter -t "$process" -a -- env PATH="/run/lab/bin:$PATH" HOME=/tmp SSL_CERT_FILE=/run/lab/ca.pem PS1="$host# " "$@"
"#;

/// `journalctl -u UNIT`: what a unit of this host has said.
const JOURNAL: &str = r#"#!/bin/sh
unit=
while [ $# -gt 0 ]; do
  case $1 in -u|--unit) unit=$2; shift ;; --unit=*) unit=${1#--unit=} ;; -u*) unit=${1#-u} ;; esac
  shift
done
exec cat "/run/lab/logs/$(hostname)-${unit%.service}.log"
"#;

/// Everything that one run needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// What to build.
    pub plan: Plan,
    /// Programs by name and where they are.
    pub programs: BTreeMap<String, PathBuf>,
    /// The scenario's folder.
    pub folder: PathBuf,
    /// Where logs go.
    pub logs: PathBuf,
    /// Whether names are only in the DNS, not in `/etc/hosts`.
    pub names_by_dns: bool,
    /// What the script is to measure against, if the topology says.
    pub expect: Option<Expect>,
    /// Whether to leave all up after the script.
    pub keep: bool,
    /// Whether to print every command of the script.
    pub verbose: bool,
}

impl Job {
    /// Reads a job's file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not a job", path.display()))
    }
}

/// Runs a job, as the first process of its own namespaces.
pub fn inside(job: &Path) -> Result<ExitCode> {
    let job = Job::load(job)?;
    let nowhere = Path::new("none");
    sys::mount(nowhere, Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE, "")
        .context("cannot keep mounts to ourselves")?;
    sys::mount(Path::new("proc"), Path::new("/proc"), "proc", 0, "").context(
        "cannot mount /proc for processes of our own (a container that hides parts of /proc forbids it)",
    )?;
    sys::mount(Path::new("lab"), Path::new("/run"), "tmpfs", 0, "mode=755")
        .context("cannot mount a tmpfs on /run")?;
    let lab = Path::new(LAB);
    for folder in ["bin", "hosts", "driver", "logs"] {
        fs::create_dir_all(lab.join(folder))?;
    }
    fs::write(lab.join("job.json"), serde_json::to_vec(&job)?)?;
    for (name, text) in DRIVER {
        fs::write(lab.join("driver").join(name), text)?;
    }
    fs::write(lab.join("enter"), ENTER)?;
    let journal = Path::new(units::PROGRAMS).join("journalctl");
    fs::write(&journal, JOURNAL)?;
    fs::set_permissions(&journal, fs::Permissions::from_mode(0o755))?;
    sys::bind(&job.logs, &lab.join("logs")).context("cannot bring the log folder in")?;
    for (name, path) in &job.programs {
        let target = Path::new(units::PROGRAMS).join(name);
        fs::write(&target, "")?;
        sys::bind(path, &target).with_context(|| format!("cannot bring {} in", path.display()))?;
    }
    net::build(&job.plan)?;
    let authority = Authority::new()?;
    fs::write(lab.join("ca.pem"), authority.certificate())?;
    for (name, node) in &job.plan.nodes {
        lay_out(name, node, &job, &authority).with_context(|| format!("cannot lay {name} out"))?;
    }
    let mut driver = Command::new("python3");
    // No bytecode beside the scenario.
    driver.arg("-B").arg(lab.join("driver/driver.py")).arg(lab.join("job.json"));
    let mut driver = sys::die_with_parent(&mut driver).spawn().context("cannot run python3")?;
    let status = sys::wait_forwarding(&mut driver)?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

/// A host's folder.
fn home(name: &str) -> PathBuf {
    Path::new(LAB).join("hosts").join(name)
}

/// Lays out what a host finds on its disk.
fn lay_out(name: &str, node: &Node, job: &Job, authority: &Authority) -> Result<()> {
    let home = home(name);
    let etc = home.join("etc");
    for folder in ["etc", "run", "tmp", "var-lib"] {
        fs::create_dir_all(home.join(folder))?;
    }
    // What an ordinary user may not read is not needed.
    let _ = Command::new("cp").args(["-a", "/etc/."]).arg(&etc).stderr(Stdio::null()).status()?;
    let names = job
        .plan
        .names
        .iter()
        .flat_map(|(name, addresses)| addresses.iter().map(move |a| (name.as_str(), *a)));
    let names = names.filter(|_| !job.names_by_dns);
    replace(&etc.join("hosts"), &units::hosts_file(name, names))?;
    replace(&etc.join("hostname"), &format!("{name}\n"))?;
    replace(&etc.join("resolv.conf"), &format!("nameserver {RESOLVER}\n"))?;
    let switch = fs::read_to_string(etc.join("nsswitch.conf")).unwrap_or_default();
    let others: Vec<&str> = switch.lines().filter(|line| !line.starts_with("hosts:")).collect();
    replace(&etc.join("nsswitch.conf"), &format!("{}\nhosts: files dns\n", others.join("\n")))?;
    let bundle = etc.join("ssl/certs/ca-certificates.crt");
    let known = fs::read_to_string(&bundle).unwrap_or_default();
    replace(&bundle, &format!("{known}\n{}", authority.certificate()))?;
    if node.role == Role::Host {
        let mut subjects = node.names.clone();
        subjects.push(name.to_owned());
        subjects.extend(node.addresses().iter().map(ToString::to_string));
        let identity = authority.issue(subjects)?;
        let tls = etc.join("lacis/tls");
        replace(&tls.join("cert.pem"), &identity.certificate)?;
        replace(&tls.join("key.pem"), &identity.key)?;
        // derper looks for files of its host name.
        for stem in &node.names {
            replace(&tls.join(format!("{stem}.crt")), &identity.certificate)?;
            replace(&tls.join(format!("{stem}.key")), &identity.key)?;
        }
    }
    for (path, text) in &node.files {
        let relative = path.trim_start_matches('/');
        let target = match relative.strip_prefix("var/lib/") {
            Some(rest) => home.join("var-lib").join(rest),
            None if relative.starts_with("etc/") => home.join(relative),
            None => bail!("{path}: files of a topology go below /etc or /var/lib"),
        };
        replace(&target, text)?;
    }
    Ok(())
}

/// Writes a file where there may be a link to something else.
fn replace(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let _ = fs::remove_file(path);
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Boots a host and stays until it is shut down. Says `up PID` on standard output; the PID is that of the host's
/// first process.
pub fn host(name: &str, again: bool) -> Result<ExitCode> {
    let job = Job::load(&Path::new(LAB).join("job.json"))?;
    let node = job.plan.nodes.get(name).with_context(|| format!("there is no node {name}"))?;
    if again && node.role == Role::Host {
        net::rebuild(&job.plan, name)?;
    }
    let namespace = fs::File::open(Path::new("/run/netns").join(name))
        .with_context(|| format!("{name} has no network namespace"))?;
    sys::setns(std::os::fd::AsFd::as_fd(&namespace), libc::CLONE_NEWNET)?;
    sys::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWPID)?;
    sys::set_hostname(name)?;
    let nowhere = Path::new("none");
    sys::mount(nowhere, Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE, "")?;
    // /sys shows the interfaces of the namespace that it was mounted in.
    if sys::mount(Path::new("sysfs"), Path::new("/sys"), "sysfs", 0, "").is_err() {
        tracing::debug!(name, "/sys still shows the machine's interfaces");
    }
    let home = home(name);
    for folder in ["run", "tmp"] {
        let _ = fs::remove_dir_all(home.join(folder));
        fs::create_dir_all(home.join(folder))?;
    }
    fs::create_dir_all(home.join("run/lab"))?;
    sys::bind(Path::new(LAB), &home.join("run/lab"))?;
    for (source, target) in [("etc", "/etc"), ("var-lib", "/var/lib"), ("tmp", "/tmp"), ("run", "/run")] {
        sys::bind(&home.join(source), Path::new(target))
            .with_context(|| format!("cannot lay out {target}"))?;
    }
    let mut first = Command::new(Path::new(units::PROGRAMS).join("lacis-lab"));
    first.arg("first-process").stdout(Stdio::piped()).stdin(Stdio::null());
    let mut first =
        sys::die_with_parent(&mut first).spawn().context("cannot start the host's first process")?;
    let mut said = String::new();
    if let Some(stdout) = first.stdout.take() {
        BufReader::new(stdout).read_line(&mut said)?;
    }
    if said.trim() != "ready" {
        bail!("{name} did not boot");
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "up {}", first.id())?;
    out.flush()?;
    drop(out);
    let _ = sys::wait_forwarding(&mut first)?;
    Ok(ExitCode::SUCCESS)
}

/// A host's first process: shows the host its own processes, then only reaps.
pub fn first_process() -> Result<ExitCode> {
    sys::mount(Path::new("proc"), Path::new("/proc"), "proc", 0, "").context("cannot mount /proc")?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready")?;
    out.flush()?;
    drop(out);
    sys::reap_for_ever()
}
