//! The Unix socket of `lacis admin`: mode 0660, and the peer's credentials decide.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::response::IntoResponse as _;
use http::Request;
use hyper::body::Incoming;
use lacis_serve::call;
use lacis_serve::log::LogLimiter;
use lacis_serve::unix::{BindError, UnixSocket};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::admin::AdminPeer;
use crate::unix_peer::{GROUP, group_id, may_administrate};

const SOCKET_MODE: u32 = 0o660;

/// A bound admin socket; dropping it removes the file.
#[derive(Debug)]
pub(crate) struct AdminSocket {
    socket: UnixSocket,
    path: PathBuf,
    group: Option<u32>,
}

impl AdminSocket {
    /// Binds the socket, replacing what a coordinator that is gone left behind.
    pub(crate) async fn bind(path: &Path) -> Result<Self, Error> {
        let path = path.to_owned();
        let socket = match UnixSocket::bind(&path, SOCKET_MODE).await {
            Ok(socket) => socket,
            Err(BindError::InUse) => return Err(Error::Running { path }),
            Err(BindError::Io(source)) => return Err(Error::AdminSocket { path, source }),
            Err(error @ BindError::NotASocket) => {
                return Err(Error::AdminSocket { path, source: io::Error::other(error) });
            }
        };
        let group = group_id(GROUP);
        if let Some(gid) = group {
            // Without the right to give it away, the credentials' check still knows the group.
            let _ = std::os::unix::fs::chown(&path, None, Some(gid));
        }
        Ok(Self { socket, path, group })
    }

    /// Serves `router` until `stop`, then lets running requests end.
    pub(crate) async fn serve(self, router: axum::Router, log: Arc<LogLimiter>, stop: CancellationToken) {
        let (group, path) = (self.group, self.path);
        let service = move |stream: &UnixStream| {
            let peer = administrator(stream, group, &log, &path);
            let router = router.clone();
            hyper::service::service_fn(move |request: Request<Incoming>| {
                let router = router.clone();
                async move {
                    let Some(peer) = peer else { return Ok(forbidden()) };
                    // In a task of its own: what was begun is done, even if whoever asked goes away meanwhile.
                    match tokio::spawn(call(router, peer, request)).await {
                        Ok(answer) => answer,
                        Err(error) => {
                            tracing::error!(%error, "an administrator's command failed");
                            Ok(http::StatusCode::INTERNAL_SERVER_ERROR.into_response())
                        }
                    }
                }
            })
        };
        self.socket.serve(service, stop).await;
    }
}

/// Who is at the other end, if they may administrate.
fn administrator(
    stream: &UnixStream,
    group: Option<u32>,
    log: &LogLimiter,
    path: &Path,
) -> Option<AdminPeer> {
    match (may_administrate(stream, group), stream.peer_cred()) {
        (Ok(allowed), Ok(peer)) => {
            let peer = AdminPeer { uid: peer.uid(), gid: peer.gid() };
            if !allowed && let Some(suppressed) = log.allow("not an administrator", peer.uid) {
                tracing::warn!(
                    uid = peer.uid,
                    gid = peer.gid,
                    suppressed,
                    "a user without the right to administrate was refused"
                );
            }
            allowed.then_some(peer)
        }
        (Err(error), _) | (_, Err(error)) => {
            if let Some(suppressed) = log.allow("administrator unknown", ()) {
                tracing::warn!(%error, suppressed, path = %path.display(), "the kernel does not name the peer");
            }
            None
        }
    }
}

fn forbidden() -> axum::response::Response {
    let error = lacis_wire::admin::ApiError {
        error: "only root, the coordinator's own user and members of the group lacis may administrate"
            .to_owned(),
        hint: Some("run it with sudo, or add your user to the group lacis".to_owned()),
    };
    (http::StatusCode::FORBIDDEN, axum::Json(error)).into_response()
}
