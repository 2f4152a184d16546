//! HTTP proxies: which one leads to a server, and a connection through it.
//!
//! [`Proxies::from_env`] reads `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` as curl and Go's
//! `golang.org/x/net/http/httpproxy` do; [`Proxy::connect`] asks for a tunnel with `CONNECT` (RFC 9110, section 9.3.6) and
//! basic authentication (RFC 7617). Credentials are never printed: a proxy is shown as scheme, host and port.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use ipnet::IpNet;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use super::{BoxStream, DialError, client_config, native_roots};

/// No honest answer to `CONNECT` has a longer head.
const MAX_HEAD: usize = 16 << 10;

/// Why a proxy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// A variable that makes no sense. Its value is not shown: it may have a password in it.
    #[error("{variable} is not usable: {why} (it must look like http://[USER:PASSWORD@]HOST[:PORT])")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The proxy's name gives no address.
    #[error("cannot resolve the name of the proxy {proxy}: {source}")]
    Resolve {
        /// Scheme, host and port.
        proxy: String,
        /// From the resolver.
        source: io::Error,
    },
    /// No address of the proxy accepts a connection.
    #[error("cannot connect to the proxy {proxy} at {address}: {source}")]
    Connect {
        /// Scheme, host and port.
        proxy: String,
        /// The address that was tried last.
        address: SocketAddr,
        /// From the kernel.
        source: io::Error,
    },
    /// TLS with the proxy itself.
    #[error("TLS with the proxy {proxy} failed: {source}")]
    Tls {
        /// Scheme, host and port.
        proxy: String,
        /// From TLS.
        source: io::Error,
    },
    /// TLS cannot be set up.
    #[error("TLS with the proxy {proxy} cannot be set up: {source}")]
    TlsSetup {
        /// Scheme, host and port.
        proxy: String,
        /// Of the roots or of rustls.
        source: Box<DialError>,
    },
    /// The connection broke.
    #[error("the connection to the proxy {proxy} broke: {source}")]
    Broken {
        /// Scheme, host and port.
        proxy: String,
        /// From the stream.
        source: io::Error,
    },
    /// It does not speak HTTP.
    #[error("{proxy} is no HTTP proxy: its answer to CONNECT is not HTTP")]
    NotProxy {
        /// Scheme, host and port.
        proxy: String,
    },
    /// It refuses the tunnel.
    #[error("the proxy {proxy} refuses to connect to {target}: {status}{}", hint(*status))]
    Refused {
        /// Scheme, host and port.
        proxy: String,
        /// Host and port that were asked for.
        target: String,
        /// Of its answer.
        status: StatusCode,
    },
}

impl ProxyError {
    /// Can only a person help: by other credentials, or other rules of the proxy?
    pub fn is_hopeless(&self) -> bool {
        matches!(self, Self::Variable { .. } | Self::NotProxy { .. })
            || matches!(self, Self::Refused { status, .. }
                if matches!(*status, StatusCode::PROXY_AUTHENTICATION_REQUIRED | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN))
    }
}

fn hint(status: StatusCode) -> &'static str {
    match status {
        StatusCode::PROXY_AUTHENTICATION_REQUIRED | StatusCode::UNAUTHORIZED => {
            " (check the user name and password in HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT)"
        }
        StatusCode::FORBIDDEN | StatusCode::METHOD_NOT_ALLOWED => {
            " (its rules must allow CONNECT to this host and port)"
        }
        _ => "",
    }
}

/// One HTTP proxy. Prints as scheme, host and port.
#[derive(Clone)]
pub struct Proxy {
    /// Whether the connection to the proxy itself is TLS.
    tls: bool,
    host: String,
    port: u16,
    /// The value of `Proxy-Authorization`.
    authorization: Option<Zeroizing<String>>,
    config: Arc<OnceLock<Arc<ClientConfig>>>,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}", with_port(&self.host, self.port))
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// As in the target of a `CONNECT`.
fn with_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

impl Proxy {
    /// `[SCHEME://][USER[:PASSWORD]@]HOST[:PORT][/]`.
    fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            // The text before a password's "://" may be anything.
            "socks" | "socks4" | "socks4a" | "socks5" | "socks5h" => {
                return Err("SOCKS proxies are not supported, HTTP proxies are".to_owned());
            }
            _ => return Err("its scheme is neither http nor https".to_owned()),
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        // A password with a slash must be percent-encoded; without that the host would be missing its end.
        let (user, place) = match authority.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, authority),
        };
        let default = if tls { 443 } else { 80 };
        let (host, port) = split_port(place);
        let port = match port {
            None | Some("") => default,
            Some(port) => port
                .parse()
                .ok()
                .filter(|port| *port > 0)
                .ok_or("its port is not a number from 1 to 65535")?,
        };
        let address = host.parse::<IpAddr>().is_ok();
        let name =
            !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic() && !b":[]@\\\"".contains(&b));
        if !address && !name {
            return Err("it names no host".to_owned());
        }
        let authorization = user.map(basic).transpose()?;
        Ok(Self { tls, host: host.to_owned(), port, authorization, config: Arc::default() })
    }

    /// The host without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A tunnel to a server, on a connection to this proxy. What the server sends comes out of the stream that is
    /// returned. How long it may take is the caller's business.
    pub async fn connect(&self, stream: BoxStream, host: &str, port: u16) -> Result<BoxStream, ProxyError> {
        let mut stream = if self.tls { self.encrypt(stream).await? } else { stream };
        let target = with_port(host, port);
        let broken = |source| ProxyError::Broken { proxy: self.to_string(), source };
        let mut request = Zeroizing::new(format!(
            "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: lacis/{}\r\n",
            env!("CARGO_PKG_VERSION")
        ));
        if let Some(authorization) = &self.authorization {
            request.push_str("Proxy-Authorization: ");
            request.push_str(authorization);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes()).await.map_err(broken)?;
        stream.flush().await.map_err(broken)?;
        let head = read_head(&mut stream).await.map_err(broken)?;
        let not_proxy = || ProxyError::NotProxy { proxy: self.to_string() };
        let status = head.as_deref().and_then(status).ok_or_else(not_proxy)?;
        if !status.is_success() {
            return Err(ProxyError::Refused { proxy: self.to_string(), target, status });
        }
        Ok(stream)
    }

    async fn encrypt(&self, stream: BoxStream) -> Result<BoxStream, ProxyError> {
        let setup = |source| ProxyError::TlsSetup { proxy: self.to_string(), source: Box::new(source) };
        let failed = |source| ProxyError::Tls { proxy: self.to_string(), source };
        let name =
            ServerName::try_from(self.host.clone()).map_err(|error| failed(io::Error::other(error)))?;
        let config = match self.config.get() {
            Some(config) => Arc::clone(config),
            None => {
                let config = native_roots().and_then(|roots| client_config(roots, &[])).map_err(setup)?;
                Arc::clone(self.config.get_or_init(|| config))
            }
        };
        Ok(Box::new(TlsConnector::from(config).connect(name, stream).await.map_err(failed)?))
    }
}

/// The head of an answer; `None` if it ends early or is no head. By single bytes: what follows is the tunnel's.
async fn read_head(stream: &mut BoxStream) -> io::Result<Option<Vec<u8>>> {
    let mut head = Vec::with_capacity(256);
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= MAX_HEAD || !b"HTTP/1.".starts_with(&head[..head.len().min(7)]) {
            return Ok(None);
        }
        head.push(stream.read_u8().await?);
    }
    Ok(Some(head))
}

fn status(head: &[u8]) -> Option<StatusCode> {
    StatusCode::from_bytes(head.strip_prefix(b"HTTP/1.")?.get(2..5)?).ok()
}

/// `host:port`, `[v6]:port`, a bare IPv6 address or a host: the host without brackets, and the port's text.
fn split_port(text: &str) -> (&str, Option<&str>) {
    if let Some((host, rest)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (host, rest.strip_prefix(':'));
    }
    match text.split_once(':') {
        Some((host, port)) if !port.contains(':') => (host, Some(port)),
        _ => (text, None),
    }
}

/// The value of `Proxy-Authorization` for a URL's userinfo.
fn basic(user: &str) -> Result<Zeroizing<String>, String> {
    let (name, password) = user.split_once(':').unwrap_or((user, ""));
    let wrong = || "its user name or password is not percent-encoded rightly".to_owned();
    let mut pair = percent_decode(name).ok_or_else(wrong)?;
    if pair.contains(&b':') {
        return Err("its user name has a colon, which basic authentication cannot say".to_owned());
    }
    pair.push(b':');
    pair.extend_from_slice(&percent_decode(password).ok_or_else(wrong)?);
    Ok(Zeroizing::new(format!("Basic {}", STANDARD.encode(&*pair))))
}

fn percent_decode(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut out = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        out.push((digit()? * 16 + digit()?) as u8);
    }
    Some(out)
}

/// What `NO_PROXY` excepts.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Exception {
    All,
    Net(IpNet),
    Address(IpAddr, Option<u16>),
    /// The name itself, unless it was given with a dot or `*.` in front, and all names below it.
    Domain {
        name: String,
        below_only: bool,
        port: Option<u16>,
    },
}

impl Exception {
    /// `None` for what says nothing.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_ascii_lowercase();
        if text == "*" {
            return Some(Self::All);
        }
        if let Ok(net) = text.parse() {
            return Some(Self::Net(net));
        }
        let (host, port) = split_port(&text);
        let port = match port {
            Some(port) => Some(port.parse().ok()?),
            None => None,
        };
        if let Ok(address) = host.parse() {
            return Some(Self::Address(address, port));
        }
        let host = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
        let (name, below_only) = host.strip_prefix('.').map_or((host, false), |name| (name, true));
        let name = name.trim_end_matches('.');
        (!name.is_empty()).then(|| Self::Domain { name: name.to_owned(), below_only, port })
    }

    fn covers(&self, host: &str, to: u16) -> bool {
        let address = host.parse::<IpAddr>().map(|address| address.to_canonical());
        match self {
            Self::All => true,
            Self::Net(net) => address.is_ok_and(|address| net.contains(&address)),
            Self::Address(own, port) => {
                address == Ok(own.to_canonical()) && port.is_none_or(|port| port == to)
            }
            Self::Domain { name, below_only, port } => {
                let below = host
                    .strip_suffix(name.as_str())
                    .is_some_and(|front| front.ends_with('.') && front.len() > 1);
                port.is_none_or(|port| port == to) && (below || !below_only && host == name)
            }
        }
    }
}

/// The proxies of an environment; by default there are none.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    https: Option<Arc<Proxy>>,
    http: Option<Arc<Proxy>>,
    exceptions: Vec<Exception>,
}

impl Proxies {
    /// From the variables of an environment, lower case before upper, as curl has it. A variable that is empty is as
    /// good as none.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Self, ProxyError> {
        let first = |names: &[&'static str]| {
            names.iter().find_map(|name| {
                let value = Zeroizing::new(variable(name)?);
                let value = Zeroizing::new(value.trim().to_owned());
                (!value.is_empty()).then_some((*name, value))
            })
        };
        let proxy = |names: &[&'static str]| {
            let Some((variable, value)) = first(names) else { return Ok(None) };
            let proxy = Proxy::parse(&value).map_err(|why| ProxyError::Variable { variable, why })?;
            Ok(Some(Arc::new(proxy)))
        };
        let exceptions = first(&["no_proxy", "NO_PROXY"]).map(|(_, value)| value);
        let exceptions = exceptions.as_deref().map(String::as_str).unwrap_or_default();
        Ok(Self {
            https: proxy(&["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])?,
            http: proxy(&["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])?,
            exceptions: exceptions
                .split(|c: char| c == ',' || c.is_whitespace())
                .filter_map(Exception::parse)
                .collect(),
        })
    }

    /// The proxy that leads to a server, if any does. This host itself is never reached through one.
    pub fn to(&self, https: bool, host: &str, port: u16) -> Option<&Proxy> {
        let proxy = if https { &self.https } else { &self.http }.as_deref()?;
        let host = host.trim_matches(['[', ']']).trim_end_matches('.').to_ascii_lowercase();
        let own = host == "localhost"
            || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
        let direct = own || self.exceptions.iter().any(|exception| exception.covers(&host, port));
        (!direct).then_some(proxy)
    }

    /// The proxy for `https`, whatever is excepted from it.
    pub fn https(&self) -> Option<&Proxy> {
        self.https.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Result<Proxies, ProxyError> {
        Proxies::from_env(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn with(no_proxy: &str) -> Proxies {
        proxies(&[("HTTPS_PROXY", "proxy.example:3128"), ("NO_PROXY", no_proxy)]).unwrap()
    }

    #[test]
    fn a_proxy_is_a_url_or_a_host_and_a_port() {
        let shown = |value| proxies(&[("HTTPS_PROXY", value)]).unwrap().https().unwrap().to_string();
        assert_eq!(shown("http://proxy.example:3128/"), "http://proxy.example:3128");
        assert_eq!(shown("proxy.example:3128"), "http://proxy.example:3128");
        assert_eq!(shown(" HTTP://proxy.example "), "http://proxy.example:80");
        assert_eq!(shown("https://proxy.example"), "https://proxy.example:443");
        assert_eq!(shown("http://[2001:db8::1]:8080"), "http://[2001:db8::1]:8080");
        assert_eq!(shown("192.0.2.1"), "http://192.0.2.1:80");
    }

    #[test]
    fn what_is_no_proxy_is_refused_by_the_name_of_its_variable_and_without_its_value() {
        for value in [
            "socks5://proxy.example:1080",
            "ftp://x",
            "http://",
            "http://:3128",
            "http://x:0",
            "http://x:99999",
            "http://us%er:geheim@x",
            "http://us%3aer:geheim@x",
            "http://user:geheim@",
            "http://a b:1",
        ] {
            let error = proxies(&[("https_proxy", value)]).unwrap_err().to_string();
            assert!(error.starts_with("https_proxy is not usable"), "{error}");
            assert!(!error.contains("geheim"), "{error}");
        }
    }

    #[test]
    fn credentials_are_decoded_sent_and_never_shown() {
        let proxies = proxies(&[("HTTPS_PROXY", "http://us%65r:p%40ss%2Fw:rd@proxy.example:3128")]).unwrap();
        let proxy = proxies.https().unwrap();
        let expected = format!("Basic {}", STANDARD.encode("user:p@ss/w:rd"));
        assert_eq!(proxy.authorization.as_deref(), Some(&expected));
        assert_eq!(format!("{proxies:?} {proxy}").matches("p@ss").count(), 0);
        assert!(!format!("{proxies:?}").contains(&STANDARD.encode("user:p@ss/w:rd")));
    }

    #[test]
    fn each_scheme_has_its_variable_and_all_proxy_stands_in_for_both() {
        let https = |variables: &[_]| {
            proxies(variables).unwrap().to(true, "x.example", 443).map(|proxy| proxy.host().to_owned())
        };
        let http = |variables: &[_]| {
            proxies(variables).unwrap().to(false, "x.example", 80).map(|proxy| proxy.host().to_owned())
        };
        let both = [("http_proxy", "h:1"), ("HTTPS_PROXY", "s:1")];
        assert_eq!((http(&both).as_deref(), https(&both).as_deref()), (Some("h"), Some("s")));
        let all = [("ALL_PROXY", "a:1"), ("HTTPS_PROXY", "")];
        assert_eq!((http(&all).as_deref(), https(&all).as_deref()), (Some("a"), Some("a")));
        assert_eq!(
            https(&[("HTTPS_PROXY", "upper:1"), ("https_proxy", "lower:1")]).as_deref(),
            Some("lower")
        );
        assert_eq!((http(&[]), https(&[])), (None, None));
    }

    #[test]
    fn exceptions_are_names_suffixes_addresses_networks_and_ports() {
        let direct = |no_proxy: &str, host: &str, port| with(no_proxy).to(true, host, port).is_none();
        assert!(!direct("", "mesh.example.org", 443));
        for no_proxy in [
            "*",
            "mesh.example.org",
            "example.org",
            ".example.org",
            "*.example.org",
            "other.example, EXAMPLE.org",
            "other.example example.org",
            "mesh.example.org:443",
        ] {
            assert!(direct(no_proxy, "mesh.example.org", 443), "{no_proxy}");
            assert!(direct(no_proxy, "Mesh.Example.Org.", 443), "{no_proxy}");
        }
        for no_proxy in
            ["ample.org", "mesh.example.org:8443", ".mesh.example.org", "example", "10.0.0.0/8", ",", "x:y"]
        {
            assert!(!direct(no_proxy, "mesh.example.org", 443), "{no_proxy}");
        }
        assert!(direct("10.0.0.0/8", "10.7.0.1", 443) && !direct("10.0.0.0/8", "11.0.0.1", 443));
        assert!(direct("10.0.0.0/8", "[::ffff:10.7.0.1]", 443));
        assert!(direct("2001:db8::/32", "[2001:db8::7]", 443));
        assert!(direct("192.0.2.1", "192.0.2.1", 443) && direct("192.0.2.1:443", "192.0.2.1", 443));
        assert!(!direct("192.0.2.1:80", "192.0.2.1", 443) && direct("[2001:db8::7]:443", "2001:db8::7", 443));
        for own in ["localhost", "127.0.0.1", "::1", "[::1]"] {
            assert!(direct("", own, 443), "{own}");
        }
    }

    async fn answered(answer: &'static [u8]) -> (Result<BoxStream, ProxyError>, String) {
        let (near, mut far) = tokio::io::duplex(4096);
        let asked = tokio::spawn(async move {
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                asked.push(far.read_u8().await.unwrap());
            }
            far.write_all(answer).await.unwrap();
            String::from_utf8(asked).unwrap()
        });
        let proxies = proxies(&[("HTTPS_PROXY", "http://user:geheim@proxy.example:3128")]).unwrap();
        let stream = proxies.https().unwrap().connect(Box::new(near), "2001:db8::7", 443).await;
        (stream, asked.await.unwrap())
    }

    #[tokio::test]
    async fn a_tunnel_begins_right_behind_the_answer() {
        let (stream, asked) = answered(b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nfirst").await;
        assert!(asked.starts_with("CONNECT [2001:db8::7]:443 HTTP/1.1\r\nHost: [2001:db8::7]:443\r\n"));
        assert!(
            asked.contains(&format!("\r\nProxy-Authorization: Basic {}\r\n", STANDARD.encode("user:geheim")))
        );
        let mut first = [0; 5];
        stream.unwrap().read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"first");
    }

    #[tokio::test]
    async fn a_refusal_says_what_to_do_and_no_secret() {
        let error = answered(b"HTTP/1.1 407 x\r\n\r\n").await.0.err().unwrap();
        let text = error.to_string();
        assert!(
            text.contains("http://proxy.example:3128 refuses to connect to [2001:db8::7]:443: 407"),
            "{text}"
        );
        assert!(text.contains("check the user name and password") && !text.contains("geheim"), "{text}");
        assert!(error.is_hopeless());
        assert!(!answered(b"HTTP/1.1 503 x\r\n\r\n").await.0.err().unwrap().is_hopeless());
        for garbage in [&b"SSH-2.0-x\r\n\r\n"[..], b"HTTP/1.1 banana\r\n\r\n"] {
            let error = answered(garbage).await.0.err().unwrap();
            assert!(matches!(error, ProxyError::NotProxy { .. }), "{error}");
        }
        let cut = answered(b"HTTP/1.1 200 OK\r\n").await.0.err().unwrap();
        assert!(matches!(cut, ProxyError::Broken { .. }), "{cut}");
    }
}
