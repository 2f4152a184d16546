//! The local API: HTTP on a Unix socket, as Tailscale's clients know it (the client dossier, section 12).
//!
//! Everybody on the host may connect and read; changing something needs root, this daemon's own user or the operator
//! that root has named. Requests that a browser could make (`Origin`, `Referer`, another `Host`) are refused. Handlers
//! ask the engine and decide nothing.

mod handlers;
mod watch;

use std::path::Path;

use axum::Router;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use lacis_serve::call;
use lacis_serve::unix::{BindError, UnixSocket, is_trusted};
use lacis_wire::local::HOST;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::engine::{Command, EngineHandle};

/// Connecting is for everybody; what they may do is decided for each request.
const SOCKET_MODE: u32 = 0o666;
const CAPABILITY: HeaderName = HeaderName::from_static("tailscale-cap");

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
struct Peer {
    uid: Option<u32>,
}

/// May the request change something? Known to handlers that answer differently.
#[derive(Clone, Copy, Debug)]
struct MayWrite(bool);

/// The socket, bound, and removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Socket(UnixSocket);

impl Socket {
    /// Binds the socket. One that a crashed daemon left is replaced, one that answers is not.
    pub(crate) async fn bind(path: &Path) -> Result<Self, Error> {
        let path = path.to_owned();
        match UnixSocket::bind(&path, SOCKET_MODE).await {
            Ok(socket) => Ok(Self(socket)),
            Err(BindError::InUse) => Err(Error::SocketInUse { path }),
            Err(BindError::NotASocket) => Err(Error::NoSocket { path }),
            Err(BindError::Io(source)) => Err(Error::Socket { path, source }),
        }
    }

    /// Serves until told to stop.
    pub(crate) async fn serve(self, engine: EngineHandle, device: String, stop: CancellationToken) {
        let router = router(engine, device, stop.clone());
        let service = move |stream: &UnixStream| {
            let peer = Peer { uid: stream.peer_cred().ok().map(|cred| cred.uid()) };
            let router = router.clone();
            hyper::service::service_fn(move |request| call(router.clone(), peer, request))
        };
        self.0.serve(service, stop).await;
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
    Extension(peer): Extension<Peer>,
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
    if is_trusted(uid) {
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

    #[test]
    fn an_operator_is_a_local_user_or_a_number() {
        assert_eq!(user_id("root"), Some(0));
        assert_eq!(user_id("1234"), Some(1234));
        assert_eq!(user_id(""), None);
        assert_eq!(user_id("no such user"), None);
    }
}
