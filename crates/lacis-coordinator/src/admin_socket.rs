//! The Unix socket of `lacis admin`: mode 0660, and the peer's credentials decide.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::response::IntoResponse as _;
use http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::Error;
use crate::admin::AdminPeer;
use crate::http1::call;
use crate::unix_peer::{GROUP, group_id, may_administrate};

const SOCKET_MODE: u32 = 0o660;
const DIRECTORY_MODE: u32 = 0o755;
/// For the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after the system could not give a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound admin socket; dropping it removes the file.
#[derive(Debug)]
pub(crate) struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
    group: Option<u32>,
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl AdminSocket {
    /// Binds the socket, replacing what a coordinator that is gone left behind.
    pub(crate) async fn bind(path: &Path) -> Result<Self, Error> {
        let wrong = |source| Error::AdminSocket { path: path.to_owned(), source };
        if UnixStream::connect(path).await.is_ok() {
            return Err(Error::Running { path: path.to_owned() });
        }
        let bind = || -> io::Result<Self> {
            if let Some(directory) = path.parent()
                && !directory.exists()
            {
                std::fs::DirBuilder::new().mode(DIRECTORY_MODE).create(directory)?;
            }
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
            let group = group_id(GROUP);
            if let Some(gid) = group {
                // Without the right to give it away, the credentials' check still knows the group.
                let _ = std::os::unix::fs::chown(path, None, Some(gid));
            }
            Ok(Self { listener, path: path.to_owned(), group })
        };
        bind().map_err(wrong)
    }

    /// Serves `router` until `stop`, then lets running requests end.
    pub(crate) async fn serve(self, router: axum::Router, stop: CancellationToken) {
        let connections = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, self.group, router.clone(), stop.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an administrator's connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        connections.close();
        connections.wait().await;
    }
}

async fn connection(stream: UnixStream, group: Option<u32>, router: axum::Router, stop: CancellationToken) {
    let peer = match (may_administrate(&stream, group), stream.peer_cred()) {
        (Ok(allowed), Ok(peer)) => {
            let peer = AdminPeer { uid: peer.uid(), gid: peer.gid() };
            if allowed {
                Ok(peer)
            } else {
                tracing::warn!(
                    uid = peer.uid,
                    gid = peer.gid,
                    "a user without the right to administrate was refused"
                );
                Err(())
            }
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "cannot tell who asks on the admin socket");
            Err(())
        }
    };
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let router = router.clone();
        async move {
            match peer {
                // In a task of its own: what was begun is done, even if whoever asked goes away meanwhile.
                Ok(peer) => match tokio::spawn(call(router, peer, request)).await {
                    Ok(answer) => answer,
                    Err(_) => Ok(http::StatusCode::INTERNAL_SERVER_ERROR.into_response()),
                },
                Err(()) => Ok(forbidden()),
            }
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "admin connection ended");
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
