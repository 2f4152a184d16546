//! The interface for WireGuard's own tools: `wg show lacis0` works as with any other interface. What they ask is text on
//! a Unix socket below `/run/wireguard` (<https://www.wireguard.com/xplatform/>). It is for root and for reading: the
//! network map decides what is there, so nothing can be set, and the private key is not shown.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lacis_serve::unix::{BindError, UnixSocket, is_trusted};
use lacis_tunnel::{PeerConfig, PeerStats};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::engine::Command;

/// Where the tools look; `/var/run` is the same.
const DIRECTORY: &str = "/run/wireguard";
const SOCKET_MODE: u32 = 0o600;
/// Connections at a time; more are closed at once.
const MAX_CONNECTIONS: usize = 16;
/// For a request, and for taking its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest request: a configuration that is refused is read to its end, so that its sender gets the answer.
const MAX_REQUEST: u64 = 1 << 20;
/// Between two attempts to accept, when one failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// The interface.
#[derive(Debug, Default)]
pub(crate) struct Device {
    pub listen_port: u16,
    /// The mark of the sockets.
    pub fwmark: Option<u32>,
    pub peers: Vec<Peer>,
}

#[derive(Debug)]
pub(crate) struct Peer {
    pub config: PeerConfig,
    /// `None` while it is reached by relay, or not at all.
    pub endpoint: Option<SocketAddr>,
    pub stats: PeerStats,
}

/// The socket, bound, and removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Socket(UnixSocket);

impl Socket {
    /// Without it the mesh works, so a failure is only logged.
    pub(crate) async fn bind(interface: &str) -> Option<Self> {
        let path = PathBuf::from(DIRECTORY).join(format!("{interface}.sock"));
        Self::bind_at(&path)
            .await
            .inspect_err(
                |error| tracing::warn!(path = %path.display(), %error, "`wg show` does not work for this interface"),
            )
            .ok()
    }

    async fn bind_at(path: &Path) -> Result<Self, BindError> {
        UnixSocket::bind(path, SOCKET_MODE).await.map(Self)
    }

    /// Answers until `stop`.
    pub(crate) async fn serve(self, engine: mpsc::Sender<Command>, stop: CancellationToken) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = self.0.accept() => accepted,
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection of a WireGuard tool");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // The socket's mode comes after its name, so who it is is asked, too.
            let trusted = stream.peer_cred().is_ok_and(|peer| is_trusted(peer.uid()));
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
            if trusted {
                let (engine, stop) = (engine.clone(), stop.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = connection(stream, &engine) => {}
                    }
                    drop(place);
                });
            }
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Get,
    Set,
    Other,
}

/// One request after the other, until the other end has enough.
async fn connection(mut stream: UnixStream, engine: &mpsc::Sender<Command>) {
    let (reading, mut writing) = stream.split();
    let mut reading = BufReader::new(reading);
    while let Ok(Some(request)) = timeout(PATIENCE, read(&mut reading)).await {
        let answer = match request {
            Request::Get => {
                let (reply, device) = oneshot::channel();
                if engine.send(Command::WireGuard { reply }).await.is_err() {
                    return;
                }
                let Ok(device) = device.await else { return };
                format!("{}errno=0\n\n", text(&device))
            }
            Request::Set => refusal(libc::EPERM),
            Request::Other => refusal(libc::EINVAL),
        };
        let written = timeout(PATIENCE, writing.write_all(answer.as_bytes())).await;
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
    }
}

fn refusal(errno: i32) -> String {
    format!("errno={errno}\n\n")
}

/// Reads a request up to its empty line; `None` at the end, and for what is too long or no text.
async fn read(reading: &mut (impl AsyncBufRead + Unpin)) -> Option<Request> {
    let mut lines = reading.take(MAX_REQUEST);
    let mut request = None;
    let mut line = String::new();
    loop {
        line.clear();
        let length = lines.read_line(&mut line).await.ok()?;
        if length == 0 || !line.ends_with('\n') {
            return None;
        }
        match line.trim_end() {
            "" => return request,
            "get=1" if request.is_none() => request = Some(Request::Get),
            "set=1" if request.is_none() => request = Some(Request::Set),
            _ if request == Some(Request::Set) => {}
            _ => request = Some(Request::Other),
        }
    }
}

struct Hex<'a>(&'a [u8; 32]);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The interface's keys and values, a line each.
fn text(device: &Device) -> String {
    let mut text = String::new();
    let mut put = |key: &str, value: &dyn std::fmt::Display| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{key}={value}");
    };
    put("listen_port", &device.listen_port);
    if let Some(fwmark) = device.fwmark {
        put("fwmark", &fwmark);
    }
    for Peer { config, endpoint, stats } in &device.peers {
        put("public_key", &Hex(config.key.as_bytes()));
        if let Some(endpoint) = endpoint {
            put("endpoint", endpoint);
        }
        let handshake = stats.last_handshake.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        let handshake = handshake.unwrap_or_default();
        put("last_handshake_time_sec", &handshake.as_secs());
        put("last_handshake_time_nsec", &handshake.subsec_nanos());
        put("tx_bytes", &stats.tx_bytes);
        put("rx_bytes", &stats.rx_bytes);
        put("persistent_keepalive_interval", &config.persistent_keepalive.unwrap_or(0));
        for net in &config.allowed_ips {
            put("allowed_ip", net);
        }
        put("protocol_version", &1);
    }
    text
}

#[cfg(test)]
mod tests {
    use lacis_wire::key::NodeKey;

    use super::*;

    fn device() -> Device {
        let config = PeerConfig {
            key: NodeKey::from_bytes([0xab; 32]),
            allowed_ips: vec!["100.64.0.2/32".parse().unwrap(), "10.1.0.0/16".parse().unwrap()],
            persistent_keepalive: Some(25),
            ..PeerConfig::default()
        };
        let stats = PeerStats {
            rx_bytes: 7,
            tx_bytes: 9,
            last_handshake: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1_500)),
            ..PeerStats::default()
        };
        let relayed = PeerConfig { key: NodeKey::from_bytes([1; 32]), ..PeerConfig::default() };
        Device {
            listen_port: 41641,
            fwmark: Some(0x80000),
            peers: vec![
                Peer { config, endpoint: Some("[2001:db8::1]:9".parse().unwrap()), stats },
                Peer { config: relayed, endpoint: None, stats: PeerStats::default() },
            ],
        }
    }

    #[test]
    fn an_interface_is_written_as_the_tools_read_it() {
        let expected = format!(
            "listen_port=41641\nfwmark=524288\npublic_key={}\nendpoint=[2001:db8::1]:9\nlast_handshake_time_sec=1\n\
             last_handshake_time_nsec=500000000\ntx_bytes=9\nrx_bytes=7\npersistent_keepalive_interval=25\n\
             allowed_ip=100.64.0.2/32\nallowed_ip=10.1.0.0/16\nprotocol_version=1\npublic_key={}\n\
             last_handshake_time_sec=0\nlast_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=0\n\
             persistent_keepalive_interval=0\nprotocol_version=1\n",
            "ab".repeat(32),
            "01".repeat(32),
        );
        assert_eq!(text(&device()), expected);
    }

    /// Sends all of this on one connection and returns all that comes back.
    async fn exchange(requests: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lacis0.sock");
        let (commands, mut inbox) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let serving = tokio::spawn(Socket::bind_at(&path).await.unwrap().serve(commands, stop.clone()));
        tokio::spawn(async move {
            while let Some(Command::WireGuard { reply }) = inbox.recv().await {
                reply.send(device()).unwrap();
            }
        });
        let mut stream = UnixStream::connect(&path).await.unwrap();
        let mut answers = String::new();
        // The other end may have closed already.
        let _ = stream.write_all(requests).await;
        let _ = stream.shutdown().await;
        let _ = stream.read_to_string(&mut answers).await;
        stop.cancel();
        serving.await.unwrap();
        assert!(!path.exists(), "the socket is removed at the end");
        answers
    }

    #[tokio::test]
    async fn reading_is_answered_as_often_as_it_is_asked_and_setting_is_refused() {
        let whole = format!("{}errno=0\n\n", text(&device()));
        assert_eq!(exchange(b"get=1\n\nget=1\n\n").await, whole.repeat(2));
        assert_eq!(exchange(b"set=1\nlisten_port=1\n\nget=1\n\n").await, format!("errno=1\n\n{whole}"));
        assert_eq!(exchange(b"get=2\n\n").await, "errno=22\n\n");
        assert_eq!(exchange(b"get=1\nmore=1\n\n").await, "errno=22\n\n");
    }

    #[tokio::test]
    async fn what_is_no_request_ends_the_connection() {
        for nothing in [&b""[..], b"\n", b"get=1", b"get=1\n", b"\xff\xfe\n\n"] {
            assert_eq!(exchange(nothing).await, "", "{nothing:?}");
        }
        assert_eq!(exchange(&vec![b'a'; 2 << 20]).await, "");
        let endless: Vec<u8> = b"set=1\n".iter().chain(&b"a=b\n".repeat(1 << 19)).copied().collect();
        assert_eq!(exchange(&endless).await, "");
    }
}
