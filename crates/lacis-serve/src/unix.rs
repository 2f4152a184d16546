//! HTTP on a Unix socket: whose connections are counted by user, as the kernel names it.
//!
//! Root and the user that the program runs as are not counted: they must be able to end what others have filled.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::response::Response;
use http::Request;
use hyper::body::Incoming;
use hyper::service::Service;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http1::{self, Deadlines};
use crate::listener::ACCEPT_PAUSE;
use crate::places::{Capacity, SharedPlaces};

const DIRECTORY_MODE: u32 = 0o755;
/// For the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For running requests at a stop.
const GRACE: Duration = Duration::from_secs(30);
/// Connections of users that are not counted as the program's own.
const CONNECTIONS: Capacity = Capacity { total: 256, each: 32 };
/// Counted together: users whom the kernel does not name.
const UNKNOWN_USER: u32 = u32::MAX;

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A program answers on it.
    #[error("another program answers on it")]
    InUse,
    /// A file of another kind has its name.
    #[error("there is a file that is no socket")]
    NotASocket,
    /// From the system.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A bound socket. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    file: SocketFile,
}

#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::debug!(%error, path = %self.0.display(), "the socket is not removed");
        }
    }
}

impl UnixSocket {
    /// Binds the socket with these permission bits, and makes its directory. A socket that a crashed program left is
    /// replaced, one that answers is not, and neither is any other file: a wrong path must not cost one.
    pub async fn bind(path: &Path, mode: u32) -> Result<Self, BindError> {
        if UnixStream::connect(path).await.is_ok() {
            return Err(BindError::InUse);
        }
        match std::fs::symlink_metadata(path) {
            Ok(file) if file.file_type().is_socket() => std::fs::remove_file(path)?,
            Ok(_) => return Err(BindError::NotASocket),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(directory) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(directory)?;
        }
        let listener = UnixListener::bind(path)?;
        let file = SocketFile(path.to_owned());
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        Ok(Self { listener, file })
    }

    /// The next connection, for protocols other than HTTP. Cancel safe.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    /// Accepts until `stop`, then lets running requests end. `service` makes what answers the requests of one
    /// connection.
    pub async fn serve<M, S>(self, service: M, stop: CancellationToken)
    where
        M: Fn(&UnixStream) -> S,
        S: Service<Request<Incoming>, Response = Response, Error = Infallible> + Send + 'static,
        S::Future: Send,
    {
        let (places, connections) = (SharedPlaces::new(CONNECTIONS), TaskTracker::new());
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let service = service(&stream);
                    connections.spawn(connection(stream, service, places.clone(), stop.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, path = %self.file.0.display(), "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        connections.close();
        connections.wait().await;
    }
}

async fn connection<S>(stream: UnixStream, service: S, places: SharedPlaces<u32>, stop: CancellationToken)
where
    S: Service<Request<Incoming>, Response = Response, Error = Infallible>,
{
    let user = stream.peer_cred().map_or(UNKNOWN_USER, |peer| peer.uid());
    let deadlines = Deadlines { head: HEAD_TIMEOUT, age: None, grace: GRACE };
    let served = http1::serve(stream, service, deadlines, &stop);
    let ended = if is_trusted(user) {
        served.await
    } else {
        let place = places.enter(user);
        tokio::select! {
            biased;
            () = place.evicted() => Err("this user has too many connections".into()),
            ended = served => ended,
        }
    };
    if let Err(error) = ended {
        tracing::debug!(
            user,
            error = &*error as &dyn std::error::Error,
            "connection on the Unix socket ended"
        );
    }
}

/// Whether this is root, or the user that the program runs as.
pub fn is_trusted(user: u32) -> bool {
    user == 0 || user == rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_goes_with_its_owner_and_other_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made/s.sock");
        drop(UnixSocket::bind(&path, 0o660).await.unwrap());
        assert!(!path.exists());
        let first = UnixSocket::bind(&path, 0o660).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(UnixSocket::bind(&path, 0o660).await, Err(BindError::InUse)));
        drop(first);
        std::fs::write(&path, "another's").unwrap();
        assert!(matches!(UnixSocket::bind(&path, 0o660).await, Err(BindError::NotASocket)));
        assert!(path.exists());
    }

    #[tokio::test]
    async fn one_user_with_many_connections_takes_no_place_of_another_and_root_needs_none() {
        let places = SharedPlaces::new(CONNECTIONS);
        let honest = places.enter(1001);
        let greedy: Vec<_> = (0..CONNECTIONS.total * 2).map(|_| places.enter(1000)).collect();
        assert_eq!(places.len(), CONNECTIONS.each + 1);
        greedy[0].evicted().await;
        let gone = tokio::time::timeout(Duration::from_millis(10), honest.evicted()).await;
        assert!(gone.is_err(), "the other user's stays");
        assert!(is_trusted(0) && !is_trusted(1000 + u32::from(is_trusted(1000))));
    }
}
