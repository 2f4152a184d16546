//! The system calls of the lab that need care: namespaces, mounts, parent death, forwarding of signals.
//!
//! Leaf module: everything unsafe of this crate is here.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicI32, Ordering};

/// The process that signals are handed to; 0 for none.
static CHILD: AtomicI32 = AtomicI32::new(0);

/// Descriptors that a process needs besides one for each connection.
const SPARE_DESCRIPTORS: u64 = 256;

fn checked(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Namespaces of one's own: `CLONE_NEW…` flags.
pub fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is involved; the process has one thread wherever this is called.
    checked(unsafe { libc::unshare(flags) })
}

/// Enters the namespace behind a descriptor.
pub fn setns(namespace: BorrowedFd<'_>, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call.
    checked(unsafe { libc::setns(namespace.as_raw_fd(), kind) })
}

/// The name that programs see as the machine's.
pub fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length are those of one string.
    checked(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt as _;
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// `mount(2)`; `source` and `kind` may be empty where the flags make them meaningless.
pub fn mount(source: &Path, target: &Path, kind: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    let source = c_path(source)?;
    let target = c_path(target)?;
    let kind = CString::new(kind).map_err(io::Error::other)?;
    let data = CString::new(data).map_err(io::Error::other)?;
    // SAFETY: all four are NUL-terminated strings that outlive the call.
    checked(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
    })
}

/// Makes `target` show what is at `source`, with all mounts below it.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    mount(source, target, "", libc::MS_BIND | libc::MS_REC, "")
}

/// Makes a child die with the process that starts it.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    // SAFETY: prctl is async-signal-safe and touches only the child.
    unsafe {
        command.pre_exec(|| checked(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)));
    }
    command
}

extern "C" fn hand_on(signal: libc::c_int) {
    let child = CHILD.load(Ordering::Relaxed);
    if child > 0 {
        // SAFETY: kill is async-signal-safe.
        unsafe {
            libc::kill(child, signal);
        }
    }
}

/// Waits for a child while SIGINT, SIGTERM and SIGHUP go to it instead of ending this process, and while orphans
/// that ended are reaped (this process may be the first of its PID namespace).
pub fn wait_forwarding(child: &mut Child) -> io::Result<ExitStatus> {
    use std::os::unix::process::ExitStatusExt as _;
    let id = child.id() as libc::pid_t;
    CHILD.store(id, Ordering::Relaxed);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only calls async-signal-safe functions.
        unsafe {
            libc::signal(signal, hand_on as *const () as libc::sighandler_t);
        }
    }
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call. Any child is waited for; the one that counts ends the loop.
        let reaped = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if reaped == id {
            CHILD.store(0, Ordering::Relaxed);
            return Ok(ExitStatus::from_raw(status));
        }
        if reaped < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// Reaps children until there are none left to come: for the first process of a PID namespace, which never ends by
/// itself.
pub fn reap_for_ever() -> ! {
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let reaped = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if reaped < 0 {
            // No child now: orphans come by themselves, so look again a little later.
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    }
}

/// Sets PATH for this process and those that it starts.
pub fn set_path(path: &str) {
    // SAFETY: the process has one thread wherever this is called.
    unsafe { std::env::set_var("PATH", path) }
}

/// Ticks a second of the times in /proc.
pub fn clock_ticks() -> i64 {
    // SAFETY: no memory is involved.
    unsafe { libc::sysconf(libc::_SC_CLK_TCK) }
}

/// Lets this process open so many connections.
pub fn raise_descriptors(connections: u64) -> anyhow::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let have = getrlimit(Resource::Nofile);
    let needed = connections + SPARE_DESCRIPTORS;
    if have.current.is_some_and(|current| current < needed) {
        anyhow::ensure!(
            have.maximum.is_none_or(|maximum| maximum >= needed),
            "{connections} connections need {needed} file descriptors: raise the limit (ulimit -Hn)"
        );
        setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum: have.maximum })?;
    }
    Ok(())
}

/// Lets a reader that has gone away (`| head`) end this process, as it ends other programs, instead of making it panic.
pub fn end_with_reader() {
    // SAFETY: the default action needs no handler and no memory; the process has one thread wherever this is called.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
