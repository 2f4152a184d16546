//! What can go wrong between a control URL and a working session, each in one clear line.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use super::ProxyError;
use crate::noise::NoiseError;

/// Why a control server could not be reached, or is none.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The URL itself is not usable.
    #[error("the control URL {url:?} is not usable: {why}")]
    Url {
        /// As it was given.
        url: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The host's name gives no address.
    #[error(
        "cannot resolve the control server's name {host:?}: {source} (check the URL and this host's DNS)"
    )]
    Resolve {
        /// The name.
        host: String,
        /// From the resolver.
        source: io::Error,
    },
    /// No address accepts a connection.
    #[error(
        "cannot connect to the control server at {address}: {source} (is it running, and reachable from here?)"
    )]
    Connect {
        /// The address that was tried last.
        address: SocketAddr,
        /// From the kernel.
        source: io::Error,
    },
    /// The proxy that leads there cannot be used.
    #[error("{0}")]
    Proxy(#[source] ProxyError),
    /// Something took too long.
    #[error("the control server {host} did not answer within {after:?} while {doing}")]
    Timeout {
        /// The host of the URL.
        host: String,
        /// What was being done.
        doing: &'static str,
        /// How long it was waited.
        after: Duration,
    },
    /// The system has no root certificates.
    #[error(
        "no root certificates to verify servers with: {why} (install the package ca-certificates, or set SSL_CERT_FILE)"
    )]
    NoRoots {
        /// The first error, or that there are none.
        why: String,
    },
    /// rustls refuses the configuration.
    #[error("TLS cannot be set up: {source}")]
    TlsSetup {
        /// From rustls.
        source: rustls::Error,
    },
    /// The certificate is not valid at the time that this host's clock shows.
    #[error(
        "the certificate of {host} is {state} by this host's clock, which shows {now} (is the clock right?)"
    )]
    Clock {
        /// The host of the URL.
        host: String,
        /// `expired` or `not valid yet`.
        state: &'static str,
        /// The date by this host's clock.
        now: String,
    },
    /// The certificate does not verify, or TLS fails otherwise.
    #[error("TLS with {host} failed: {why}")]
    Tls {
        /// The host of the URL.
        host: String,
        /// In words.
        why: String,
    },
    /// The server answers, but not as a control server does.
    #[error("{url} is not a Lacis or Headscale server: {what} (check the URL)")]
    NotControl {
        /// The control URL.
        url: String,
        /// What it did instead.
        what: String,
    },
    /// The server refused the upgrade to Noise.
    #[error("{url} refused the upgrade to the control protocol with status {status}{} (a proxy in front must pass `Upgrade: tailscale-control-protocol` through)", if text.is_empty() { String::new() } else { format!(": {text}") })]
    Upgrade {
        /// The control URL.
        url: String,
        /// HTTP status.
        status: u16,
        /// The beginning of the body.
        text: String,
    },
    /// HTTP failed below the level of a status.
    #[error("the HTTP exchange with {url} failed while {doing}: {source}")]
    Http {
        /// The control URL.
        url: String,
        /// What was being done.
        doing: &'static str,
        /// From hyper.
        source: hyper::Error,
    },
    /// The connection ended or failed during the Noise handshake.
    #[error(
        "{url} closed the connection during the Noise handshake: {source} (its version may be too different from ours)"
    )]
    Broken {
        /// The control URL.
        url: String,
        /// From the stream.
        source: io::Error,
    },
    /// The Noise handshake was refused or does not verify.
    #[error("Noise handshake with {url} failed: {source}")]
    Noise {
        /// The control URL.
        url: String,
        /// From the handshake.
        source: NoiseError,
    },
    /// Over plain HTTP the server does not prove to have the key that is known of it.
    #[error(
        "{url} does not prove that it is the server this node knows: {source}. Over http a new key is not believed, since anybody on the way can send one; if the server was set up again, accept its key with `lacis up --force-reauth`"
    )]
    KeyUnproven {
        /// The control URL.
        url: String,
        /// What went wrong with the known key.
        source: Box<DialError>,
    },
}

impl DialError {
    /// Whether the server may have another key than the one it was dialled with.
    pub fn suspects_key(&self) -> bool {
        // A server cannot read a handshake that is meant for another key, which some servers say by a status.
        matches!(self, Self::Noise { .. } | Self::Broken { .. } | Self::Upgrade { status: 400, .. })
    }
}

/// Puts a failed TLS handshake into words: the certificate's dates point to the clock.
pub fn tls_error(host: &str, error: &io::Error) -> DialError {
    use rustls::CertificateError as Bad;
    let host = host.to_owned();
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let why = match inner {
        Some(rustls::Error::InvalidCertificate(bad)) => match bad {
            Bad::Expired | Bad::ExpiredContext { .. } => return clock(host, "expired"),
            Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
                return clock(host, "not valid yet");
            }
            Bad::UnknownIssuer => "its certificate is signed by an authority that this host does not \
                trust (install that authority's certificate, or name it in SSL_CERT_FILE)"
                .to_owned(),
            Bad::NotValidForName | Bad::NotValidForNameContext { .. } => {
                format!("its certificate is for another name ({bad})")
            }
            other => format!("its certificate does not verify: {other}"),
        },
        Some(rustls::Error::InvalidMessage(_)) => {
            "it does not speak TLS there (an http:// URL, or another port?)".to_owned()
        }
        Some(other) => other.to_string(),
        None => error.to_string(),
    };
    DialError::Tls { host, why }
}

fn clock(host: String, state: &'static str) -> DialError {
    let now = time::OffsetDateTime::now_utc();
    DialError::Clock { host, state, now: format!("{} {:02}:{:02} UTC", now.date(), now.hour(), now.minute()) }
}
