//! The login: our key, who they are, may they. What follows is the session's.

use std::net::SocketAddr;

use bytes::BytesMut;
use lacis_serve::places::prefix;
use lacis_wire::derp::{self, ClientInfo, Decoder, Frame, LoginBox, Role, ServerInfo};
use lacis_wire::key::NodeKey;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::metrics::Refusal;
use super::{Inner, Verdict};

/// A `ClientInfo` of every known client fits at once.
const FIRST_READ: usize = 1024;
/// Stock relays take more; what clients send is a few hundred bytes.
const MAX_LOGIN: usize = 16 << 10;

/// Who logged in, and what has been read beyond the login.
pub(super) struct LoggedIn {
    pub(super) key: NodeKey,
    pub(super) info: ClientInfo,
    /// The `ServerInfo` frame, which must be the next thing the client gets.
    pub(super) server_info: Vec<u8>,
    pub(super) rest: BytesMut,
}

/// Why there was no login.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoginError {
    #[error("the client broke the protocol")]
    Protocol(#[from] derp::Error),
    #[error("the connection failed during the login")]
    Io(#[from] std::io::Error),
    #[error("the client left before it logged in")]
    Left,
    #[error("no login within the time allowed")]
    Late,
    #[error("{0} may not use this relay")]
    Denied(NodeKey),
    #[error("the login is longer than {MAX_LOGIN} bytes")]
    TooLong,
    #[error("too many connections wait for their login")]
    Crowded,
}

impl LoginError {
    pub(super) fn refusal(&self) -> Refusal {
        match self {
            Self::Protocol(_) | Self::TooLong => Refusal::Protocol,
            Self::Io(_) | Self::Left | Self::Late => Refusal::Incomplete,
            Self::Denied(_) => Refusal::Denied,
            Self::Crowded => Refusal::Crowded,
        }
    }
}

/// Runs the login within the time allowed for it, the question to the admission included.
pub(super) async fn login<S: AsyncRead + AsyncWrite + Unpin>(
    relay: &Inner,
    stream: &mut S,
    remote: SocketAddr,
) -> Result<LoggedIn, LoginError> {
    let place = relay.logins.enter(prefix(remote.ip()));
    let exchange = tokio::time::timeout(relay.limits.login_timeout, exchange(relay, stream, remote));
    tokio::select! {
        biased;
        () = place.evicted() => Err(LoginError::Crowded),
        done = exchange => done.unwrap_or(Err(LoginError::Late)),
    }
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    relay: &Inner,
    stream: &mut S,
    remote: SocketAddr,
) -> Result<LoggedIn, LoginError> {
    stream.write_all(&Frame::ServerKey(relay.public).to_bytes()).await?;
    stream.flush().await?;

    let mut decoder = Decoder::new(Role::ServerLogin);
    let mut rest = BytesMut::with_capacity(FIRST_READ);
    let (key, sealed) = loop {
        match decoder.decode(&mut rest)? {
            Some(Frame::ClientInfo { key, sealed }) => break (key, sealed),
            Some(_) => return Err(derp::Error::Box.into()),
            None => {}
        }
        if rest.len() > MAX_LOGIN {
            return Err(LoginError::TooLong);
        }
        rest.reserve(FIRST_READ);
        if stream.read_buf(&mut rest).await? == 0 {
            return Err(LoginError::Left);
        }
    };
    if key.is_zero() {
        return Err(derp::Error::Box.into());
    }
    let login = LoginBox::server(&relay.key, &key);
    let info = ClientInfo::open(&login, &sealed)?;
    match relay.admission.admit(key, remote.ip().to_canonical()).await {
        Verdict::Allow => {}
        Verdict::Deny | Verdict::Unknown => return Err(LoginError::Denied(key)),
    }
    let sealed = ServerInfo::default().seal(&login, derp::random_nonce());
    Ok(LoggedIn { key, info, server_info: Frame::ServerInfo(sealed).to_bytes().into(), rest })
}
