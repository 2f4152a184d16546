//! The relay's HTTP routes. `/derp` turns a request into a byte stream; the others answer at once.

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State, WebSocketUpgrade};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use http::header::{ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONNECTION, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use hyper_util::rt::TokioIo;
use lacis_serve::listener::RemoteAddr;
use lacis_wire::derp::{self, PROTOCOL_VERSION};

use super::websocket::WebSocketStream;
use super::{Relay, UNKNOWN_REMOTE};

const DERP_VERSION: HeaderName = HeaderName::from_static("derp-version");
const DERP_PUBLIC_KEY: HeaderName = HeaderName::from_static("derp-public-key");
const CHALLENGE: HeaderName = HeaderName::from_static("x-tailscale-challenge");
const CHALLENGE_RESPONSE: HeaderName = HeaderName::from_static("x-tailscale-response");
/// Longer challenges are not answered: the header must not carry whatever somebody likes.
const MAX_CHALLENGE: usize = 64;
/// Of one WebSocket message: the longest frame of the protocol, so that nobody makes the relay hold more.
const MAX_MESSAGE: usize = derp::MAX_FRAME;
/// Of one WebSocket, allocated as long as it is open.
const READ_BUFFER: usize = 16 << 10;

pub(super) fn router(relay: Relay) -> Router {
    Router::new()
        .route("/derp", any(derp))
        .route("/derp/probe", get(probe))
        .route("/derp/latency-check", get(probe))
        .route("/generate_204", any(generate_204))
        .with_state(relay)
}

/// Any method: one client family uses POST. The method, the host and other headers decide nothing.
async fn derp(State(relay): State<Relay>, mut request: Request) -> Response {
    let remote = request.extensions().get::<RemoteAddr>().map_or(UNKNOWN_REMOTE, |remote| remote.0);
    let upgrade = request.headers().get(UPGRADE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if upgrade.eq_ignore_ascii_case("websocket") && offers_derp(request.headers()) {
        return websocket(relay, request, remote).await;
    }
    // very old clients asked for a WebSocket and then spoke raw DERP
    if !upgrade.eq_ignore_ascii_case("derp") && !upgrade.eq_ignore_ascii_case("websocket") {
        return (StatusCode::UPGRADE_REQUIRED, "This is a DERP relay: it needs the header Upgrade: DERP.\n")
            .into_response();
    }
    let upgrading = hyper::upgrade::on(&mut request);
    let public = relay.public_key();
    let handle = relay.clone();
    relay.spawn(async move {
        let login_time = handle.inner.limits.login_timeout;
        match tokio::time::timeout(login_time, upgrading).await {
            Ok(Ok(upgraded)) => handle.serve(TokioIo::new(upgraded), remote).await,
            Ok(Err(error)) => {
                tracing::debug!(%remote, error = &error as &dyn std::error::Error, "no upgrade");
            }
            Err(_) => tracing::debug!(%remote, "no upgrade in time"),
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(UPGRADE, HeaderValue::from_static("DERP"));
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(DERP_VERSION, HeaderValue::from(PROTOCOL_VERSION));
    if let Ok(key) = HeaderValue::try_from(public.to_string()) {
        headers.insert(DERP_PUBLIC_KEY, key);
    }
    response
}

fn offers_derp(headers: &HeaderMap) -> bool {
    headers
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|protocol| protocol.trim().eq_ignore_ascii_case("derp"))
}

/// Browsers: the same byte stream inside binary messages, whose boundaries mean nothing.
async fn websocket(relay: Relay, request: Request, remote: std::net::SocketAddr) -> Response {
    let (mut parts, _) = request.into_parts();
    match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => {
            let upgrade = upgrade
                .max_message_size(MAX_MESSAGE)
                .max_frame_size(MAX_MESSAGE)
                .read_buffer_size(READ_BUFFER);
            upgrade.protocols(["derp"]).on_upgrade(move |socket| {
                relay.inner.metrics.websocket_accepts.inc();
                let sessions = relay.inner.sessions.clone();
                sessions.track_future(async move { relay.serve(WebSocketStream::new(socket), remote).await })
            })
        }
        Err(rejection) => rejection.into_response(),
    }
}

/// Clients measure the way to the relay with it.
async fn probe() -> impl IntoResponse {
    [(ACCESS_CONTROL_ALLOW_ORIGIN, "*")]
}

/// Clients find captive portals with it: only the real relay can answer the challenge.
async fn generate_204(headers: HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    response.headers_mut().insert(
        CACHE_CONTROL,
        HeaderValue::from_static("no-cache, no-store, must-revalidate, no-transform, max-age=0"),
    );
    if let Some(challenge) = headers.get(CHALLENGE).and_then(|value| value.to_str().ok())
        && !challenge.is_empty()
        && challenge.len() <= MAX_CHALLENGE
        && challenge.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte))
        && let Ok(answer) = HeaderValue::try_from(format!("response {challenge}"))
    {
        response.headers_mut().insert(CHALLENGE_RESPONSE, answer);
    }
    response
}
