//! From a region to a byte stream on which DERP is spoken: TCP (both families raced), a proxy where one leads there, TLS,
//! the HTTP upgrade.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lacis_wire::io::{BoxStream, DialError, Proxies, Proxy, ProxyError, native_roots};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use super::region::{CertCheck, Family, RelayNode, RelayRegion};
use super::verifier;
use lacis_serve::readahead::ReadAhead;

/// For DNS, TCP, TLS and the upgrade of one region, as the stock client has it.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// What a node that is not the last may take of it: one that accepts connections and then says nothing must not keep the
/// others from being tried.
const NODE_TIMEOUT: Duration = Duration::from_secs(4);
/// For TCP to one node, as the stock client has it.
const TCP_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long IPv6 may keep IPv4 waiting.
const IPV6_HEAD_START: Duration = Duration::from_millis(200);
/// A connection whose far side acknowledges nothing for this long has ended: without it a path that broke silently would be
/// noticed only when nothing is heard for two minutes.
#[cfg(target_os = "linux")]
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(15);
/// No honest answer has a longer head.
const MAX_HEAD: usize = 16 << 10;

/// How connections are made.
#[derive(Debug, Clone, Default)]
pub struct DialOptions {
    /// Firewall mark of the sockets, so that they do not go through the tunnel they carry.
    pub fwmark: Option<u32>,
    /// The proxies that lead out of this host's network.
    pub proxies: Arc<Proxies>,
    /// The authorities trusted; the system's (`SSL_CERT_FILE` honoured) if none are given.
    pub roots: Option<Arc<RootCertStore>>,
    /// All nodes in cleartext, whatever they say. Labs and tests only.
    pub plain_http: bool,
}

/// Why a region could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The region has no node that relays.
    #[error("the region has no relay that can be dialled")]
    NoNodes,
    /// The name has no address of a wanted family.
    #[error("{host} has no address that can be dialled")]
    NoAddress {
        /// The name.
        host: String,
    },
    /// The name could not be resolved.
    #[error("cannot resolve {host}")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// No TCP connection.
    #[error("cannot connect to {host} at {address}")]
    Tcp {
        /// The node.
        host: String,
        /// The address tried last.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The proxy that leads to the relay cannot be reached.
    #[error("cannot reach {host} by the proxy {proxy}")]
    ProxyAway {
        /// The node.
        host: String,
        /// The proxy.
        proxy: String,
        /// What went wrong on the way to it.
        source: Box<ConnectError>,
    },
    /// The proxy that leads to the relay does not connect to it.
    #[error("cannot connect to {host}")]
    Proxy {
        /// The node.
        host: String,
        /// What the proxy said.
        source: ProxyError,
    },
    /// No root certificates.
    #[error("no authorities to trust")]
    Roots(#[from] DialError),
    /// TLS settings that cannot be.
    #[error("TLS cannot be set up for {host}")]
    TlsSetup {
        /// The node.
        host: String,
        /// What the library said.
        source: rustls::Error,
    },
    /// The TLS handshake failed.
    #[error("no TLS with {host}")]
    Tls {
        /// The node.
        host: String,
        /// What the library said: most often about the certificate.
        source: io::Error,
    },
    /// The far side is no relay.
    #[error("{host} is no DERP relay: it answered {answer:?}")]
    NotRelay {
        /// The node.
        host: String,
        /// The start of its answer.
        answer: String,
    },
    /// The connection broke.
    #[error("the connection to {host} failed")]
    Io {
        /// The node.
        host: String,
        /// What the system said.
        source: io::Error,
    },
    /// It took too long.
    #[error("no connection within {DIAL_TIMEOUT:?}")]
    Late,
}

/// A connection on which the upgrade is done.
pub(super) struct Dialed {
    pub(super) stream: BoxStream,
    pub(super) node: String,
    /// Where the TCP connection leads: to the relay, or to a proxy.
    pub(super) remote: SocketAddr,
    /// What came behind the answer's head.
    pub(super) rest: Vec<u8>,
}

/// Keeps the TLS settings (and with them the sessions to resume) between attempts.
pub(super) struct Dialer {
    options: DialOptions,
    tls: Mutex<HashMap<String, (CertCheck, Arc<ClientConfig>)>>,
}

impl Dialer {
    pub(super) fn new(options: DialOptions) -> Self {
        Self { options, tls: Mutex::default() }
    }

    /// Dials the nodes in order until one upgrades.
    pub(super) async fn derp(&self, region: &RelayRegion) -> Result<Dialed, ConnectError> {
        timeout(DIAL_TIMEOUT, async {
            let mut last = ConnectError::NoNodes;
            for (i, node) in region.nodes.iter().enumerate() {
                // the relay counts clients that are not where they would like to be
                let ideal = if i > 0 { region.nodes.first().map(|first| first.name.as_str()) } else { None };
                let limit = if i + 1 < region.nodes.len() { NODE_TIMEOUT } else { DIAL_TIMEOUT };
                match timeout(limit, self.upgrade(node, ideal)).await {
                    Ok(Ok(dialed)) => return Ok(dialed),
                    Ok(Err(error)) => last = error,
                    Err(_) => last = ConnectError::Late,
                }
            }
            Err(last)
        })
        .await
        .unwrap_or(Err(ConnectError::Late))
    }

    async fn upgrade(&self, node: &RelayNode, ideal: Option<&str>) -> Result<Dialed, ConnectError> {
        let (mut stream, remote) = self.connect(node).await?;
        let ideal = ideal_node(ideal);
        let request = format!(
            "GET /derp HTTP/1.1\r\nHost: {}\r\nUser-Agent: lacis/{}\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n{ideal}\r\n",
            node.authority(),
            env!("CARGO_PKG_VERSION"),
        );
        let (head, rest) = exchange(&mut stream, &request, &node.host).await?;
        if status(&head) != Some(101) {
            return Err(not_relay(node, &head));
        }
        Ok(Dialed { stream, node: node.name.clone(), remote, rest })
    }

    /// TCP, the proxy where there is one, and TLS.
    async fn connect(&self, node: &RelayNode) -> Result<(BoxStream, SocketAddr), ConnectError> {
        if !is_token(&node.host) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not the name of a host");
            return Err(ConnectError::Resolve { host: node.host.clone(), source });
        }
        let plain = node.plain_http || self.options.plain_http;
        let (stream, remote): (BoxStream, _) = match self.options.proxies.to(!plain, &node.host, node.port) {
            Some(proxy) => self.through(proxy, node).await?,
            None => {
                let (tcp, remote) = self.tcp(node).await?;
                (Box::new(tcp), remote)
            }
        };
        if plain {
            return Ok((stream, remote));
        }
        let host = node.host.trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host).map_err(|error| ConnectError::TlsSetup {
            host: node.host.clone(),
            source: rustls::Error::General(error.to_string()),
        })?;
        let connector = TlsConnector::from(self.tls_config(node)?);
        let tls = connector
            .connect(name, ReadAhead::new(stream))
            .await
            .map_err(|source| ConnectError::Tls { host: node.host.clone(), source })?;
        Ok((Box::new(tls), remote))
    }

    fn tls_config(&self, node: &RelayNode) -> Result<Arc<ClientConfig>, ConnectError> {
        let mut known = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((check, config)) = known.get(&node.name)
            && *check == node.cert
        {
            return Ok(Arc::clone(config));
        }
        let roots = match (&self.options.roots, &node.cert) {
            (Some(roots), _) => Arc::clone(roots),
            (None, CertCheck::HostName | CertCheck::Name(_)) => Arc::new(native_roots()?),
            (None, CertCheck::Pin(_) | CertCheck::Insecure) => Arc::new(RootCertStore::empty()),
        };
        let config = verifier::client_config(&node.cert, &roots)
            .map_err(|source| ConnectError::TlsSetup { host: node.host.clone(), source })?;
        let config = Arc::new(config);
        known.insert(node.name.clone(), (node.cert.clone(), Arc::clone(&config)));
        Ok(config)
    }

    /// A tunnel through a proxy. It is asked for the node's name, since its rules may be about names, and for the
    /// addresses of the map where it cannot connect to that.
    async fn through(
        &self,
        proxy: &Proxy,
        node: &RelayNode,
    ) -> Result<(BoxStream, SocketAddr), ConnectError> {
        let name = node.host.trim_matches(['[', ']']).to_owned();
        let mut targets = vec![name];
        if let Family::At(ip) = node.ipv4 {
            targets.push(ip.to_string());
        }
        if let Family::At(ip) = node.ipv6 {
            targets.push(ip.to_string());
        }
        targets.dedup();
        let mut first = None;
        for target in targets {
            let (tcp, remote) =
                self.tcp(&RelayNode::new(proxy.host(), proxy.port())).await.map_err(|source| {
                    let source = Box::new(source);
                    ConnectError::ProxyAway { host: node.host.clone(), proxy: proxy.to_string(), source }
                })?;
            match proxy.connect(Box::new(tcp), &target, node.port).await {
                Ok(stream) => return Ok((stream, remote)),
                Err(source) => {
                    let hopeless = source.is_hopeless();
                    first.get_or_insert(ConnectError::Proxy { host: node.host.clone(), source });
                    if hopeless {
                        break;
                    }
                }
            }
        }
        Err(first.unwrap_or(ConnectError::NoNodes))
    }

    async fn tcp(&self, node: &RelayNode) -> Result<(TcpStream, SocketAddr), ConnectError> {
        let mut v6 = Vec::new();
        let mut v4 = Vec::new();
        if let Family::At(ip) = node.ipv6 {
            v6.push(SocketAddr::new(ip.into(), node.port));
        }
        if let Family::At(ip) = node.ipv4 {
            v4.push(SocketAddr::new(ip.into(), node.port));
        }
        let (resolve4, resolve6) = (node.ipv4 == Family::Resolve, node.ipv6 == Family::Resolve);
        // with a literal of one family at hand there is no need to wait for DNS
        if v4.is_empty() && v6.is_empty() && (resolve4 || resolve6) {
            let host = node.host.trim_matches(['[', ']']);
            let found = tokio::net::lookup_host((host, node.port))
                .await
                .map_err(|source| ConnectError::Resolve { host: node.host.clone(), source })?;
            for address in found {
                match address.ip() {
                    IpAddr::V4(_) if resolve4 => v4.push(address),
                    IpAddr::V6(_) if resolve6 => v6.push(address),
                    IpAddr::V4(_) | IpAddr::V6(_) => {}
                }
            }
        }
        let head_start = if v6.is_empty() { Duration::ZERO } else { IPV6_HEAD_START };
        let six_failed = Notify::new();
        let (six, four) = (self.tcp_any(node, v6), async {
            // a host without IPv6 knows at once that there is nothing to wait for
            tokio::select! {
                () = tokio::time::sleep(head_start) => {}
                () = six_failed.notified() => {}
            }
            self.tcp_any(node, v4).await
        });
        tokio::pin!(six, four);
        let (first, second) = tokio::select! {
            result = &mut six => match result {
                Ok(found) => return Ok(found),
                Err(error) => {
                    six_failed.notify_one();
                    (error, four.await)
                }
            },
            result = &mut four => match result {
                Ok(found) => return Ok(found),
                Err(error) => (error, six.await),
            },
        };
        second.map_err(|second| if matches!(second, ConnectError::NoAddress { .. }) { first } else { second })
    }

    async fn tcp_any(
        &self,
        node: &RelayNode,
        addresses: Vec<SocketAddr>,
    ) -> Result<(TcpStream, SocketAddr), ConnectError> {
        let mut last = ConnectError::NoAddress { host: node.host.clone() };
        for address in addresses {
            match timeout(TCP_TIMEOUT, self.tcp_one(address))
                .await
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            {
                Ok(stream) => return Ok((stream, address)),
                Err(source) => last = ConnectError::Tcp { host: node.host.clone(), address, source },
            }
        }
        Err(last)
    }

    async fn tcp_one(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        #[cfg(target_os = "linux")]
        {
            let socket = socket2::SockRef::from(&socket);
            if let Some(mark) = self.options.fwmark {
                socket.set_mark(mark)?;
            }
            socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT))?;
        }
        let stream = socket.connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Sends a request and reads the head of the answer; returns it and what came behind it.
async fn exchange(
    stream: &mut BoxStream,
    request: &str,
    host: &str,
) -> Result<(Vec<u8>, Vec<u8>), ConnectError> {
    let failed = |source| ConnectError::Io { host: host.to_owned(), source };
    stream.write_all(request.as_bytes()).await.map_err(failed)?;
    stream.flush().await.map_err(failed)?;
    let mut head = Vec::with_capacity(1024);
    loop {
        if let Some(end) = head.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = head.split_off(end + 4);
            return Ok((head, rest));
        }
        if head.len() > MAX_HEAD || stream.read_buf(&mut head).await.map_err(failed)? == 0 {
            return Err(ConnectError::NotRelay { host: host.to_owned(), answer: first_line(&head) });
        }
    }
}

/// Whether a name from the network map can stand in a header: a line break would begin another one.
fn is_token(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The header by which a relay counts clients that would rather be at another node; none for a name that cannot be sent.
fn ideal_node(name: Option<&str>) -> String {
    name.filter(|name| !name.is_empty() && is_token(name))
        .map(|name| format!("Ideal-Node: {name}\r\n"))
        .unwrap_or_default()
}

fn status(head: &[u8]) -> Option<u16> {
    let line = head.strip_prefix(b"HTTP/1.1 ").or_else(|| head.strip_prefix(b"HTTP/1.0 "))?;
    std::str::from_utf8(line.get(..3)?).ok()?.parse().ok()
}

fn first_line(head: &[u8]) -> String {
    let line = head.split(|byte| *byte == b'\r' || *byte == b'\n').next().unwrap_or_default();
    String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned()
}

fn not_relay(node: &RelayNode, head: &[u8]) -> ConnectError {
    ConnectError::NotRelay { host: node.host.clone(), answer: first_line(head) }
}

/// The round trip of `GET /derp/latency-check`, timed once TLS is up: what netcheck falls back to without UDP.
pub async fn latency_check(node: &RelayNode, options: DialOptions) -> Result<Duration, ConnectError> {
    timeout(DIAL_TIMEOUT, async {
        let (mut stream, _) = Dialer::new(options).connect(node).await?;
        let request = format!(
            "GET /derp/latency-check HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            node.authority()
        );
        let started = Instant::now();
        let (head, _) = exchange(&mut stream, &request, &node.host).await?;
        let took = started.elapsed();
        if status(&head) != Some(200) {
            return Err(not_relay(node, &head));
        }
        Ok(took)
    })
    .await
    .unwrap_or(Err(ConnectError::Late))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_a_header_begins_no_other_header() {
        assert_eq!(ideal_node(Some("900a")), "Ideal-Node: 900a\r\n");
        for name in ["a\r\nX-Other: 1", "a\nb", "a b", "", "\u{e9}", "a\0"] {
            assert_eq!(ideal_node(Some(name)), "", "{name:?}");
        }
        assert_eq!(ideal_node(None), "");
    }

    #[tokio::test]
    async fn a_host_that_is_no_name_is_not_dialled() {
        let node = RelayNode { plain_http: true, ..RelayNode::new("x\r\nX-Other: 1", 80) };
        let error = Dialer::new(DialOptions::default()).connect(&node).await.err();
        assert!(matches!(error, Some(ConnectError::Resolve { .. })));
    }
}
