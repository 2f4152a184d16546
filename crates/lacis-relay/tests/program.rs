//! `lacis-relay` as its users meet it: files in, exit codes and sockets out.
#![allow(clippy::unwrap_used)] // helpers of tests

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use lacis_wire::stun;

/// Far above what a loaded machine needs; only a failing test waits it out.
const PATIENCE: Duration = Duration::from_secs(20);

fn program(command: &str, config: &Path) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_lacis-relay"));
    program.args([command, "--config"]).arg(config).env_remove("RUST_LOG").env_remove("NOTIFY_SOCKET");
    program
}

fn write(directory: &Path, text: &str) -> std::path::PathBuf {
    let path = directory.join("relay.yaml");
    std::fs::write(&path, text).unwrap();
    path
}

fn one_line(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

struct Running {
    child: Child,
    listen: SocketAddr,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The soft limit of open files may be 1024.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
}

/// Starts the program and reads from its log where it listens.
fn serve(config: &Path) -> Running {
    let mut child = program("serve", config).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line =
        lines.find_map(|line| line.ok().filter(|line| line.contains("relay ready"))).expect("it starts");
    let listen = line.split_once("listen=[").unwrap().1.split_once(']').unwrap().0.parse().unwrap();
    // keep reading, or the program would stop at a full pipe
    std::thread::spawn(move || lines.for_each(drop));
    Running { child, listen }
}

fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn it_serves_derp_and_stun_keeps_its_key_private_and_ends_cleanly_when_told() {
    let directory = tempfile::tempdir().unwrap();
    let stun_at = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let state = directory.path().join("state");
    let config = write(
        directory.path(),
        &format!(
            "listen: 127.0.0.1:0\nstun: \"{stun_at}\"\nstate_dir: {}\nadmission: open\n",
            state.display()
        ),
    );
    let mut running = serve(&config);
    assert!(get(running.listen, "/derp/latency-check").starts_with("HTTP/1.1 200"));
    assert!(get(running.listen, "/derp").starts_with("HTTP/1.1 426"));

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let id = stun::TxId::random();
    socket.send_to(&stun::request(id), stun_at).unwrap();
    let mut buffer = [0; 64];
    let len = socket.recv(&mut buffer).unwrap();
    assert_eq!(stun::parse_response(&buffer[..len]), Ok((id, socket.local_addr().unwrap())));

    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state), 0o700);
    assert_eq!(mode(&state.join("relay.key")), 0o600);
    let key = std::fs::read(state.join("relay.key")).unwrap();

    let pid = running.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(running.child.wait().unwrap().success());
    drop(running);

    let again = serve(&config);
    assert!(get(again.listen, "/generate_204").starts_with("HTTP/1.1 204"));
    assert_eq!(std::fs::read(state.join("relay.key")).unwrap(), key, "the key stays over a restart");
}

#[test]
fn silent_connections_of_one_address_leave_a_place_for_another() {
    raise_descriptor_limit();
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let text = format!("listen: 127.0.0.1:0\nstun: []\nstate_dir: {}\nadmission: open\n", state.display());
    let running = serve(&write(directory.path(), &text));
    let silent: Vec<_> = (0..4096).map(|_| TcpStream::connect(running.listen).unwrap()).collect();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 2], 0)).into()).unwrap();
    socket.connect(&running.listen.into()).unwrap();
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET /derp/probe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    drop(silent);
}

#[test]
fn a_bad_configuration_is_one_clear_line_and_exit_78() {
    let directory = tempfile::tempdir().unwrap();
    for (text, want) in [
        ("admission: open\nlisten: nowhere\n", "an address such as"),
        ("admission: open\nlistn: 1\n", "unknown field `listn`"),
        ("listen: \"127.0.0.1:0\"\n", "admission is missing"),
        ("admission: [\n", "line"),
    ] {
        let config = write(directory.path(), text);
        for command in ["check", "serve"] {
            let output = program(command, &config).output().unwrap();
            let line = one_line(&output);
            assert!(line.contains(want), "{text}: {line}");
            assert_eq!(output.status.code(), Some(78), "{command}: {line}");
        }
    }
    let output = program("serve", Path::new("/nonexistent.yaml")).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    assert!(one_line(&output).contains("/nonexistent.yaml"));
}

#[test]
fn a_port_in_use_a_damaged_key_and_an_unusable_state_directory_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let state = directory.path().join("state");
    let text = |listen: SocketAddr, state: &Path| {
        format!("listen: {listen}\nstun: []\nstate_dir: {}\nadmission: open\n", state.display())
    };
    let config = write(directory.path(), &text(taken.local_addr().unwrap(), &state));
    let output = program("serve", &config).output().unwrap();
    // Before it, that a key was made.
    let lines = String::from_utf8_lossy(&output.stderr);
    let last = lines.lines().last().unwrap();
    assert!(last.contains("another program has that port"), "{lines}");
    assert_eq!(output.status.code(), Some(1));

    let key = state.join("relay.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let output = program("serve", &config).output().unwrap();
    let line = one_line(&output);
    assert!(line.contains(&format!("chmod 600 {}", key.display())), "{line}");
    assert_eq!(output.status.code(), Some(78));

    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&key, "privkey:123").unwrap();
    let output = program("serve", &config).output().unwrap();
    let line = one_line(&output);
    assert!(line.contains("does not hold a private key") && !line.contains("123"), "{line}");
    assert_eq!(output.status.code(), Some(78));

    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let config = write(directory.path(), &text("127.0.0.1:0".parse().unwrap(), &file));
    let output = program("serve", &config).output().unwrap();
    assert!(one_line(&output).contains(&*file.to_string_lossy()));
    assert_ne!(output.status.code(), Some(0));
}

#[test]
fn a_good_configuration_is_checked_without_being_used() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let config = write(
        directory.path(),
        &format!(
            "state_dir: {}\nadmission: open\ntls: {{ cert_file: /nonexistent, key_file: /nonexistent }}\n",
            state.display()
        ),
    );
    let output = program("check", &config).output().unwrap();
    assert!(output.status.success());
    assert!(!state.exists());

    let output = program("serve", &config).output().unwrap();
    assert!(one_line(&output).contains("/nonexistent"));
    assert_eq!(
        output.status.code(),
        Some(1),
        "the certificate may still come: the service manager tries again"
    );
}
