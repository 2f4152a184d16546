//! What a client may ask inside a Noise session. Nothing here is reachable without one: the outer router does not
//! know these paths.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Extension, Path, Query, State};
use axum::http::StatusCode;
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, head, post};
use axum::{Json, Router};
use lacis_wire::MIN_CAPABILITY_VERSION;
use lacis_wire::control::{MAX_TEXT, MapRequest, NodeId, RegisterRequest, decode_request, display_text};
use lacis_wire::key::MachineKey;
use serde_json::json;

use crate::core::Core;
use crate::{fault, map, register};

/// Any machine key can send one. A client's has some 1 KiB, and 46 KiB with all the routes that a node can offer.
pub(crate) const MAX_REGISTER_BODY: usize = 64 << 10;
/// Only nodes' are taken over. With all that a node can say of itself it has some 150 KiB.
pub(crate) const MAX_MAP_BODY: usize = 256 << 10;

/// Who is at the other end of a Noise session.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// Proven by the handshake.
    pub machine: MachineKey,
    pub version: u16,
    pub remote: SocketAddr,
    /// No other session has it.
    pub number: u64,
}

/// The router behind Noise. Requests carry a [`Session`] extension.
pub fn router(core: Core) -> Router {
    let faults = middleware::from_fn_with_state(Arc::clone(core.log()), fault::log);
    Router::new()
        .route("/machine/register", post(register))
        .route("/machine/map", post(map).layer(DefaultBodyLimit::max(MAX_MAP_BODY)))
        .route("/machine/whoami", get(whoami))
        .route("/machine/ping-response", head(ping_response))
        .route("/machine/ssh/action/{from}/to/{to}", get(ssh_action))
        // Clients post these and go on whatever the answer; an empty object is the friendliest.
        .route("/machine/update-health", post(accepted))
        .route("/machine/audit-log", post(accepted))
        .route("/machine/set-dns", post(unsupported))
        .route("/machine/id-token", post(unsupported))
        .route("/machine/feature/query", post(unsupported))
        .route("/machine/set-device-attr", any(unsupported))
        .route("/machine/c2n", post(unsupported))
        .fallback(not_found)
        .layer(DefaultBodyLimit::max(MAX_REGISTER_BODY))
        .layer(faults)
        .with_state(core)
}

/// The body is gone afterwards: an answer may take minutes.
fn decode<T: serde::de::DeserializeOwned>(body: Bytes) -> Result<T, (StatusCode, String)> {
    decode_request(&body).map_err(|error| {
        let error = display_text(&error.to_string());
        (
            StatusCode::BAD_REQUEST,
            format!("bad request: {}", error.chars().take(MAX_TEXT).collect::<String>()),
        )
    })
}

/// The version in a request decides what the client understands of the answer.
fn check_version(version: u16) -> Result<(), (StatusCode, String)> {
    if version < MIN_CAPABILITY_VERSION {
        let text = format!(
            "unsupported client version {version}: update the client (at least {MIN_CAPABILITY_VERSION})"
        );
        return Err((StatusCode::BAD_REQUEST, text));
    }
    Ok(())
}

async fn register(
    State(core): State<Core>,
    Extension(session): Extension<Session>,
    body: Bytes,
) -> Result<Response, (StatusCode, String)> {
    let request: RegisterRequest = decode(body)?;
    check_version(request.version)?;
    Ok(Json(register::register(&core, &session, request).await).into_response())
}

async fn map(
    State(core): State<Core>,
    Extension(session): Extension<Session>,
    body: Bytes,
) -> Result<Response, (StatusCode, String)> {
    let request: MapRequest = decode(body)?;
    check_version(request.version)?;
    Ok(map::map(&core, &session, request))
}

async fn whoami(Extension(session): Extension<Session>) -> String {
    format!("machine {} from {}, version {}\n", session.machine, session.remote, session.version)
}

#[derive(Debug, serde::Deserialize)]
struct Question {
    #[serde(default)]
    id: String,
}

/// The answer to a question whether the client is still there.
async fn ping_response(
    State(core): State<Core>,
    Extension(session): Extension<Session>,
    Query(question): Query<Question>,
) -> StatusCode {
    if core.ping_response(&question.id, &session.machine) { StatusCode::OK } else { StatusCode::NOT_FOUND }
}

#[derive(Debug, serde::Deserialize)]
struct SshSession {
    #[serde(default)]
    local_user: String,
    check: Option<String>,
}

/// A node asks what to do with an SSH session to it that a rule wants checked.
async fn ssh_action(
    State(core): State<Core>,
    Extension(session): Extension<Session>,
    Path((from, to)): Path<(i64, i64)>,
    Query(asked): Query<SshSession>,
) -> Response {
    // A session that waits keeps it, and no system has a longer one.
    if asked.local_user.len() > MAX_TEXT {
        return StatusCode::NOT_FOUND.into_response();
    }
    let check = asked.check.as_deref();
    let action = core.ssh_action(&session.machine, NodeId(from), NodeId(to), &asked.local_user, check).await;
    match action {
        Ok(Some(action)) => Json(action).into_response(),
        Ok(None) => StatusCode::NOT_FOUND.into_response(),
        Err(error) => fault::because(&error, StatusCode::INTERNAL_SERVER_ERROR, ()),
    }
}

async fn accepted() -> Response {
    Json(json!({})).into_response()
}

async fn unsupported() -> Response {
    let text = "not supported by this server";
    fault::with_cause(text, (StatusCode::NOT_IMPLEMENTED, text))
}

async fn not_found() -> Response {
    (StatusCode::NOT_FOUND, "not found").into_response()
}
