//! Two tunnels in two network namespaces whose relay outputs are glued to each other: for the integration test and
//! the throughput example.

#![allow(unsafe_code)] // unshare
#![allow(dead_code)] // not every user needs all of it
#![allow(unreachable_pub, missing_debug_implementations, clippy::unwrap_used, clippy::print_stderr)] // a part of tests

use std::io;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path as FsPath;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use etherparse::{NetHeaders, PacketBuilder, TransportHeader};
use ipnet::IpNet;
use lacis_tunnel::{Event, Filter, Path, PeerConfig, RelayOutput, Tunnel, TunnelConfig, UdpIn};
use lacis_wire::control::FilterRule;
use lacis_wire::key::{NodeKey, NodePrivateKey};

/// Why such a test cannot run here.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".to_owned());
    }
    if !FsPath::new("/dev/net/tun").exists() {
        return Some("there is no /dev/net/tun".to_owned());
    }
    if Command::new("ip").arg("-V").output().is_err() {
        return Some("there is no program `ip`".to_owned());
    }
    Namespace::new().err().map(|error| format!("no network namespaces: {error}"))
}

/// Bytes of the copy: several hundred super-packets.
pub const COPY: usize = 24 << 20;

/// Says aloud that a test is skipped, and why.
pub fn skip(test: &str) -> bool {
    let why = missing();
    if let Some(why) = &why {
        eprintln!("SKIPPED {test}: {why}");
    }
    why.is_some()
}

fn byte(at: usize) -> u8 {
    (at as u32).wrapping_mul(2654435761).to_be_bytes()[0]
}

/// Copies by TCP from `a` to an address of `b` and compares every byte.
pub fn copy(a: &Side, b: &Side, to: IpAddr) {
    let (port, receiver) = b.namespace.run(move || {
        let listener = TcpListener::bind((to, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let receiver = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut data = Vec::new();
            stream.read_to_end(&mut data).unwrap();
            data
        });
        (port, receiver)
    });
    a.namespace.run(move || {
        let mut stream = TcpStream::connect_timeout(&(to, port).into(), Duration::from_secs(10)).unwrap();
        let data: Vec<u8> = (0..COPY).map(byte).collect();
        stream.write_all(&data).unwrap();
    });
    let data = receiver.join().unwrap();
    assert_eq!(data.len(), COPY);
    assert!(data.iter().enumerate().all(|(at, got)| *got == byte(at)));
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace without a name: it lives as long as its thread.
pub struct Namespace {
    jobs: Sender<Job>,
    pub thread_id: i32,
}

impl Namespace {
    pub fn new() -> io::Result<Self> {
        let (jobs, work) = channel::<Job>();
        let (started, result) = channel();
        thread::spawn(move || {
            // SAFETY: only this thread's network namespace changes; nothing else has been done on it yet.
            let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            let failed = unshared != 0;
            let outcome = if failed { Err(io::Error::last_os_error()) } else { Ok(rustix::thread::gettid()) };
            let _ = started.send(outcome);
            if !failed {
                for job in work {
                    job();
                }
            }
        });
        let thread_id = result.recv().map_err(io::Error::other)??.as_raw_nonzero().get();
        Ok(Self { jobs, thread_id })
    }

    /// Runs something inside and waits for it. Threads and processes begun there are inside too.
    pub fn run<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> R {
        self.begin(work).recv().expect("the work did not panic")
    }

    /// Runs something inside on a thread of its own.
    pub fn spawn<R: Send + 'static>(
        &self,
        work: impl FnOnce() -> R + Send + 'static,
    ) -> thread::JoinHandle<R> {
        self.run(move || thread::spawn(work))
    }

    fn begin<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> Receiver<R> {
        let (done, result) = channel();
        let job = Box::new(move || {
            let _ = done.send(work());
        });
        self.jobs.send(job).expect("the namespace's thread lives");
        result
    }

    /// Runs `ip` inside with these words.
    pub fn ip(&self, words: &str) {
        let output = self.command("ip", words);
        assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn command(&self, program: &str, words: &str) -> Output {
        let (program, words) = (program.to_owned(), words.to_owned());
        self.run(move || {
            Command::new(program).args(words.split_whitespace()).output().expect("the program runs")
        })
    }
}

/// One node.
pub struct Side {
    pub namespace: Namespace,
    pub tunnel: Tunnel,
    pub key: NodeKey,
    pub v4: IpAddr,
    pub v6: IpAddr,
    pub relay: Option<RelayOutput>,
    pub events: tokio::sync::mpsc::Receiver<Event>,
    pub udp: tokio::sync::mpsc::Receiver<UdpIn>,
    pub quad100: tokio::sync::mpsc::Receiver<Bytes>,
}

impl Side {
    pub fn new(number: u8) -> Self {
        let namespace = Namespace::new().expect("a namespace");
        let (v4, v6): (IpAddr, IpAddr) = (
            format!("100.64.0.{number}").parse().unwrap(),
            format!("fd7a:115c:a1e0::{number}").parse().unwrap(),
        );
        let config = TunnelConfig { tun_name: format!("lt{number}"), ..TunnelConfig::default() };
        let (tunnel, outputs) =
            namespace.run(|| Tunnel::start(config, Box::new(at_once))).expect("the tunnel starts");
        let name = tunnel.tun_name().to_owned();
        namespace.ip("link set lo up");
        namespace.ip(&format!("addr add {v4}/32 dev {name}"));
        namespace.ip(&format!("addr add {v6}/128 dev {name} nodad"));
        namespace.ip(&format!("route add 100.64.0.0/10 dev {name}"));
        namespace.ip(&format!("route add fd7a:115c:a1e0::/48 dev {name}"));
        let private = NodePrivateKey::generate();
        let key = private.public();
        tunnel.set_identity(private);
        tunnel.set_local_addresses(vec![v4, v6]);
        let side = Self {
            namespace,
            tunnel,
            key,
            v4,
            v6,
            relay: Some(outputs.relay),
            events: outputs.events,
            udp: outputs.udp,
            quad100: outputs.quad100,
        };
        side.allow(&[FilterRule::allow_all()]);
        side
    }

    pub fn nets(&self) -> Vec<IpNet> {
        vec![self.v4.into(), self.v6.into()]
    }

    pub fn allow(&self, rules: &[FilterRule]) {
        self.tunnel.set_filter(Arc::new(Filter::compile(rules, &self.nets())));
    }

    pub fn peer(&self) -> PeerConfig {
        PeerConfig { key: self.key, allowed_ips: self.nets(), ..PeerConfig::default() }
    }

    /// Waits for an event of the wanted kind; others are left out.
    pub fn expect<R>(&mut self, what: &str, mut wanted: impl FnMut(&Event) -> Option<R>) -> R {
        let deadline = Instant::now() + Duration::from_secs(15);
        loop {
            while let Ok(event) = self.events.try_recv() {
                if let Some(found) = wanted(&event) {
                    return found;
                }
            }
            assert!(Instant::now() < deadline, "no event: {what}; {:?}", self.tunnel.stats());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What questions answered on the packet thread begin with; they come back as they are.
pub const AT_ONCE: &[u8] = b"at once";

fn at_once(packet: &[u8], space: &mut [u8]) -> Option<usize> {
    let asked = etherparse::PacketHeaders::from_ip_slice(packet).ok()?;
    let (Some(NetHeaders::Ipv4(ip, _)), Some(TransportHeader::Udp(udp))) = (asked.net, asked.transport)
    else {
        return None;
    };
    let payload = asked.payload.slice();
    let mut reply = payload.starts_with(AT_ONCE).then(Vec::new)?;
    PacketBuilder::ipv4(ip.destination, ip.source, 64)
        .udp(udp.destination_port, udp.source_port)
        .write(&mut reply, payload)
        .ok()?;
    space.get_mut(..reply.len())?.copy_from_slice(&reply);
    Some(reply.len())
}

/// Two nodes that know each other and have no path yet.
pub fn pair() -> (Side, Side) {
    let (a, b) = (Side::new(1), Side::new(2));
    a.tunnel.set_peers(vec![b.peer()]);
    b.tunnel.set_peers(vec![a.peer()]);
    (a, b)
}

/// Cuts a buffer of `SendPacket` frames apart; checks that they are for `to`.
pub fn frames(mut buffer: Bytes, to: &NodeKey) -> Vec<Bytes> {
    let mut packets = Vec::new();
    while !buffer.is_empty() {
        assert_eq!(buffer.get_u8(), 4, "a SendPacket frame");
        let len = buffer.get_u32() as usize;
        assert_eq!(&buffer[..32], to.as_bytes());
        buffer.advance(32);
        packets.push(buffer.split_to(len - 32));
    }
    packets
}

/// Carries what `relay` gives to `to`, as coming from `from`, until the sending tunnel is gone.
pub fn glue(relay: RelayOutput, from: NodeKey, to: &Tunnel, to_key: NodeKey) {
    glue_if(relay, from, to, to_key, |_| true);
}

/// The same, but only packets that may `pass`.
pub fn glue_if(
    mut relay: RelayOutput,
    from: NodeKey,
    to: &Tunnel,
    to_key: NodeKey,
    mut pass: impl FnMut(&Bytes) -> bool + Send + 'static,
) {
    let to = to.clone();
    thread::spawn(move || {
        while let Some(batch) = relay.blocking_recv() {
            let mut packets = Vec::new();
            let mut next = Some(batch);
            while let Some(batch) = next {
                assert_eq!(batch.key, to_key);
                let passing = frames(batch.frames, &to_key).into_iter().filter(&mut pass);
                packets.extend(passing.map(|packet| (from, packet)));
                next = if packets.len() < 256 { relay.try_recv().ok() } else { None };
            }
            to.relay_in(packets);
        }
    });
}

/// Glues the relays of both and makes the relay their path.
pub fn by_relay(a: &mut Side, b: &mut Side) {
    glue(a.relay.take().unwrap(), a.key, &b.tunnel, b.key);
    glue(b.relay.take().unwrap(), b.key, &a.tunnel, a.key);
    a.tunnel.set_path(b.key, Path::Relay);
    b.tunnel.set_path(a.key, Path::Relay);
}

/// A cable between the two; returns the addresses of their UDP sockets on it.
pub fn cable(a: &Side, b: &Side) -> (SocketAddr, SocketAddr) {
    a.namespace.ip(&format!("link add u0 type veth peer name u0 netns {}", b.namespace.thread_id));
    for (side, addr) in [(a, "192.0.2.1/24"), (b, "192.0.2.2/24")] {
        side.namespace.ip(&format!("addr add {addr} dev u0"));
        side.namespace.ip("link set u0 up");
    }
    (
        SocketAddr::from(([192, 0, 2, 1], a.tunnel.udp_port().0)),
        SocketAddr::from(([192, 0, 2, 2], b.tunnel.udp_port().0)),
    )
}
