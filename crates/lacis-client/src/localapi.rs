//! The local API: HTTP on a Unix socket, as Tailscale's clients know it (the client dossier, section 12).
//!
//! Everybody on the host may connect and read; changing something needs root, this daemon's own user or the operator
//! that root has named. Requests that a browser could make (`Origin`, `Referer`, another `Host`) are refused. Handlers
//! ask the engine and decide nothing.

mod handlers;
mod watch;

use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::serve::{IncomingStream, Listener};
use lacis_wire::local::HOST;
use rustix::process::getuid;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::engine::{Command, EngineHandle};

/// Connecting is for everybody; what they may do is decided for each request.
const SOCKET_MODE: u32 = 0o666;
const CAPABILITY: HeaderName = HeaderName::from_static("tailscale-cap");

/// Connections of users other than root at a time: nobody on the host may use up the daemon's descriptors.
const CONNECTIONS: usize = 64;

/// Who is at the other end of a connection. Lives as long as that.
#[derive(Clone, Debug)]
struct Peer {
    uid: Option<u32>,
    /// One of the [`CONNECTIONS`].
    _place: Option<Arc<OwnedSemaphorePermit>>,
}

impl Connected<IncomingStream<'_, Door>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Door>) -> Self {
        stream.remote_addr().clone()
    }
}

/// Lets connections in, as many as there are places.
#[derive(Debug)]
struct Door {
    listener: UnixListener,
    places: Arc<Semaphore>,
}

impl Door {
    /// Root is always let in: it must be able to turn off what others have filled.
    fn admit(&self, uid: Option<u32>) -> Option<Peer> {
        let place = match uid {
            Some(uid) if is_root(uid) => None,
            _ => Some(Arc::new(Arc::clone(&self.places).try_acquire_owned().ok()?)),
        };
        Some(Peer { uid, _place: place })
    }
}

impl Listener for Door {
    type Io = UnixStream;
    type Addr = Peer;

    async fn accept(&mut self) -> (UnixStream, Peer) {
        loop {
            let (stream, _) = Listener::accept(&mut self.listener).await;
            let uid = stream.peer_cred().ok().map(|cred| cred.uid());
            // Whoever is one too many is hung up on. Left waiting, it would keep root out as well.
            match self.admit(uid) {
                Some(peer) => return (stream, peer),
                None => tracing::debug!(?uid, "too many connections to the local API: one is closed"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Peer> {
        Ok(Peer { uid: None, _place: None })
    }
}

/// Root, or whom this daemon runs as.
fn is_root(uid: u32) -> bool {
    uid == 0 || uid == getuid().as_raw()
}

/// May the request change something? Known to handlers that answer differently.
#[derive(Clone, Copy, Debug)]
struct MayWrite(bool);

/// The socket, bound, and removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: UnixListener,
    file: SocketFile,
}

/// The socket's name in the file system, which nobody else removes.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::debug!(%error, path = %self.0.display(), "the socket is not removed");
        }
    }
}

impl Socket {
    /// Binds the socket. One that a crashed daemon left is replaced, one that answers is not.
    pub(crate) async fn bind(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Socket { path: path.to_owned(), source };
        if UnixStream::connect(path).await.is_ok() {
            return Err(Error::SocketInUse { path: path.to_owned() });
        }
        match std::fs::symlink_metadata(path) {
            Ok(file) if file.file_type().is_socket() => std::fs::remove_file(path).map_err(failed)?,
            // A wrong path must not cost anybody a file.
            Ok(_) => return Err(Error::NoSocket { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        let file = SocketFile(path.to_owned());
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
        Ok(Self { listener, file })
    }

    /// Serves until told to stop.
    pub(crate) async fn serve(self, engine: EngineHandle, device: String, stop: CancellationToken) {
        let service = router(engine, device, stop.clone()).into_make_service_with_connect_info::<Peer>();
        // Removed when this ends, also when it is aborted.
        let _file = self.file;
        let door = Door { listener: self.listener, places: Arc::new(Semaphore::new(CONNECTIONS)) };
        let serving = axum::serve(door, service).with_graceful_shutdown(stop.cancelled_owned());
        if let Err(error) = serving.await {
            tracing::error!(%error, "the local API has ended");
        }
    }
}

#[derive(Clone, Debug)]
struct Api {
    engine: EngineHandle,
    /// The mesh's device.
    device: String,
    stop: CancellationToken,
}

fn router(engine: EngineHandle, device: String, stop: CancellationToken) -> Router {
    let api = Api { engine, device, stop };
    let stock = Router::new()
        .route("/status", get(handlers::status))
        .route("/prefs", get(handlers::prefs).patch(handlers::edit_prefs))
        .route("/check-prefs", post(handlers::check_prefs))
        .route("/start", post(handlers::start))
        .route("/login-interactive", post(handlers::login_interactive))
        .route("/logout", post(handlers::logout))
        .route("/watch-ipn-bus", get(watch::bus))
        .route("/whois", get(handlers::who_is))
        .route("/ping", post(handlers::ping))
        .route("/derpmap", get(handlers::derp_map))
        .route("/dns-config", get(handlers::dns_config))
        .route("/profiles/", get(handlers::profiles).put(handlers::new_profile))
        .route("/profiles/current", get(handlers::current_profile))
        .route("/serve-config", get(handlers::serve_config))
        .route("/check-ip-forwarding", get(handlers::check_ip_forwarding))
        .route("/suggest-exit-node", get(handlers::suggest_exit_node).post(handlers::suggest_exit_node))
        .route("/check-udp-gro-forwarding", get(handlers::no_warning))
        .route("/check-so-mark-in-use", get(handlers::check_so_mark))
        .route("/services", get(handlers::no_services));
    let own = Router::new().route("/netcheck", post(handlers::netcheck)).route("/why", get(handlers::why));
    Router::new()
        .nest("/localapi/v0", stock)
        .nest("/lacis/v0", own)
        .fallback(handlers::not_found)
        .layer(middleware::from_fn_with_state(api.clone(), guard))
        .with_state(api)
}

/// Refuses what a browser could send and what this user may not do.
async fn guard(
    State(api): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    let headers = request.headers();
    let host = headers.get(header::HOST).map_or("", |host| host.to_str().unwrap_or("?"));
    if !(host.is_empty() || host == HOST) {
        return refusal("this Host is not served here");
    }
    if headers.contains_key(header::ORIGIN) || headers.contains_key(header::REFERER) {
        return refusal("requests of web pages are not served here");
    }
    let may_write = may_write(&api, peer.uid).await;
    let reads = request.method() == http::Method::GET || request.uri().path() == "/localapi/v0/check-prefs";
    let asks = ["/ping", "/netcheck", "/suggest-exit-node"];
    let harmless = reads || asks.iter().any(|end| request.uri().path().ends_with(end));
    if !harmless && !may_write {
        return refusal("access denied: use root, or let root name you with `lacis set --operator=USER`");
    }
    request.extensions_mut().insert(MayWrite(may_write));
    let mut response = next.run(request).await;
    let version = HeaderValue::from(lacis_wire::CURRENT_CAPABILITY_VERSION);
    response.headers_mut().insert(CAPABILITY, version);
    response
}

fn refusal(text: &'static str) -> Response {
    (StatusCode::FORBIDDEN, text).into_response()
}

async fn may_write(api: &Api, uid: Option<u32>) -> bool {
    let Some(uid) = uid else { return false };
    if is_root(uid) {
        return true;
    }
    let (reply, prefs) = tokio::sync::oneshot::channel();
    if api.engine.commands.send(Command::Prefs { reply }).await.is_err() {
        return false;
    }
    prefs.await.is_ok_and(|prefs| user_id(&prefs.operator_user) == Some(uid))
}

/// The number of a local user, from the user database's file. Users of directory services give their number.
fn user_id(name: &str) -> Option<u32> {
    if name.is_empty() {
        return None;
    }
    if let Ok(uid) = name.parse() {
        return Some(uid);
    }
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_goes_with_its_owner_and_other_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        drop(Socket::bind(&path).await.unwrap());
        assert!(!path.exists());
        let first = Socket::bind(&path).await.unwrap();
        let error = Socket::bind(&path).await.unwrap_err();
        assert!(matches!(error, Error::SocketInUse { .. }), "{error}");
        drop(first);
        std::fs::write(&path, "somebody's").unwrap();
        let error = Socket::bind(&path).await.unwrap_err();
        assert!(matches!(error, Error::NoSocket { .. }), "{error}");
        assert!(path.exists());
    }

    #[tokio::test]
    async fn others_have_so_many_places_and_root_always_one() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s.sock")).unwrap();
        let door = Door { listener, places: Arc::new(Semaphore::new(CONNECTIONS)) };
        let somebody = Some(u32::MAX - 1);
        let mut inside: Vec<_> = (0..CONNECTIONS).map(|_| door.admit(somebody).unwrap()).collect();
        // Each request has a copy; only the last to go gives the place back.
        let request = inside[0].clone();
        inside.swap_remove(0);
        assert!(door.admit(somebody).is_none());
        assert!(door.admit(None).is_none());
        assert!(door.admit(Some(0)).is_some());
        drop(request);
        assert!(door.admit(somebody).is_some());
    }

    #[test]
    fn an_operator_is_a_local_user_or_a_number() {
        assert_eq!(user_id("root"), Some(0));
        assert_eq!(user_id("1234"), Some(1234));
        assert_eq!(user_id(""), None);
        assert_eq!(user_id("no such user"), None);
    }
}
