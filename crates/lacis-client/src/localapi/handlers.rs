//! The requests of the local API, each turned into a command for the engine.
#![allow(clippy::result_large_err, reason = "a refusal is a response, made once and sent at once")]

use std::net::{IpAddr, SocketAddr};

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use lacis_wire::local::{ApiError, ForwardingCheck, MaskedPrefs, Prefs, StartOptions};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::oneshot;

use super::{Api, MayWrite};
use crate::engine::{Command, PingKind, Who};
use crate::host::forwarding;

/// Asks the engine.
pub(super) async fn ask<T>(
    api: &Api,
    command: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> Result<T, Response> {
    let stopping = || (StatusCode::SERVICE_UNAVAILABLE, "lacisd is stopping").into_response();
    let (reply, answer) = oneshot::channel();
    api.engine.commands.send(command(reply)).await.map_err(|_| stopping())?;
    answer.await.map_err(|_| stopping())
}

fn error(status: StatusCode, text: impl Into<String>) -> Response {
    (status, Json(ApiError { error: text.into() })).into_response()
}

fn body<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, Response> {
    serde_json::from_slice(bytes)
        .map_err(|why| error(StatusCode::BAD_REQUEST, format!("the request's body makes no sense: {why}")))
}

#[derive(Debug, Deserialize)]
pub(super) struct StatusQuery {
    peers: Option<String>,
}

pub(super) async fn status(
    State(api): State<Api>,
    Query(query): Query<StatusQuery>,
) -> Result<Response, Response> {
    let peers = query.peers.as_deref() != Some("false");
    Ok(Json(ask(&api, |reply| Command::Status { peers, reply }).await?).into_response())
}

pub(super) async fn prefs(State(api): State<Api>) -> Result<Response, Response> {
    Ok(Json(ask(&api, |reply| Command::Prefs { reply }).await?).into_response())
}

pub(super) async fn edit_prefs(State(api): State<Api>, bytes: Bytes) -> Result<Response, Response> {
    let change: MaskedPrefs = body(&bytes)?;
    match ask(&api, |reply| Command::EditPrefs { change, reply }).await? {
        Ok(prefs) => Ok(Json(prefs).into_response()),
        Err(why) => Err((StatusCode::BAD_REQUEST, Json(json!({ "Error": why }))).into_response()),
    }
}

pub(super) async fn check_prefs(State(api): State<Api>, bytes: Bytes) -> Result<Response, Response> {
    let prefs: Prefs = body(&bytes)?;
    let checked = ask(&api, |reply| Command::CheckPrefs { prefs: Box::new(prefs), reply }).await?;
    Ok(Json(checked.map_or_else(|why| json!({ "Error": why }), |()| json!({}))).into_response())
}

pub(super) async fn start(State(api): State<Api>, bytes: Bytes) -> Result<Response, Response> {
    let options: StartOptions = body(&bytes)?;
    let started = ask(&api, |reply| Command::Start { options: Box::new(options), reply }).await?;
    started.map_err(|why| error(StatusCode::BAD_REQUEST, why))?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn login_interactive(State(api): State<Api>) -> Result<Response, Response> {
    let done = ask(&api, |reply| Command::LoginInteractive { reply }).await?;
    done.map_err(|why| error(StatusCode::BAD_REQUEST, why))?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn logout(State(api): State<Api>) -> Result<Response, Response> {
    let done = ask(&api, |reply| Command::Logout { reply }).await?;
    done.map_err(|why| error(StatusCode::INTERNAL_SERVER_ERROR, why))?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[derive(Debug, Deserialize)]
pub(super) struct WhoQuery {
    #[serde(default)]
    addr: String,
}

/// An address, with or without a port, or a node key.
fn parse_who(text: &str) -> Option<Who> {
    let address = || text.parse::<IpAddr>().ok().or_else(|| Some(text.parse::<SocketAddr>().ok()?.ip()));
    text.parse().ok().map(Who::Key).or_else(|| address().map(Who::Address))
}

pub(super) async fn who_is(
    State(api): State<Api>,
    Query(query): Query<WhoQuery>,
) -> Result<Response, Response> {
    let Some(who) = parse_who(&query.addr) else {
        return Err((StatusCode::BAD_REQUEST, "addr is neither ip, ip:port nor a node key").into_response());
    };
    match ask(&api, |reply| Command::WhoIs { who, reply }).await? {
        Some(found) => Ok(Json(found).into_response()),
        None => Err((StatusCode::NOT_FOUND, "no match for IP:port").into_response()),
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct PingQuery {
    #[serde(default)]
    ip: String,
    #[serde(default)]
    r#type: String,
}

pub(super) async fn ping(
    State(api): State<Api>,
    Query(query): Query<PingQuery>,
) -> Result<Response, Response> {
    let Ok(ip) = query.ip.parse() else { return Err(error(StatusCode::BAD_REQUEST, "ip is no address")) };
    let kind = match query.r#type.as_str() {
        "disco" | "" => PingKind::Disco,
        "TSMP" => PingKind::Tsmp,
        "ICMP" => PingKind::Icmp,
        _ => return Err(error(StatusCode::BAD_REQUEST, "the type of ping is disco, TSMP or ICMP")),
    };
    Ok(Json(ask(&api, |reply| Command::Ping { ip, kind, reply }).await?).into_response())
}

#[derive(Debug, Deserialize)]
pub(super) struct WhyQuery {
    ip: IpAddr,
}

pub(super) async fn why(State(api): State<Api>, Query(query): Query<WhyQuery>) -> Result<Response, Response> {
    let report = ask(&api, |reply| Command::Why { ip: query.ip, reply }).await?;
    Ok(Json(report.map_err(|why| error(StatusCode::NOT_FOUND, &why))?).into_response())
}

pub(super) async fn netcheck(State(api): State<Api>) -> Result<Response, Response> {
    let report = ask(&api, |reply| Command::Netcheck { reply }).await?;
    Ok(Json(report.map_err(|why| error(StatusCode::SERVICE_UNAVAILABLE, why))?).into_response())
}

pub(super) async fn derp_map(State(api): State<Api>) -> Result<Response, Response> {
    Ok(Json(ask(&api, |reply| Command::DerpMap { reply }).await?).into_response())
}

pub(super) async fn dns_config(State(api): State<Api>) -> Result<Response, Response> {
    match ask(&api, |reply| Command::DnsConfig { reply }).await? {
        Some(config) => Ok(Json(config).into_response()),
        None => Err((StatusCode::SERVICE_UNAVAILABLE, "no network map yet").into_response()),
    }
}

/// There is one profile, this node's login.
async fn profile(api: &Api) -> Result<serde_json::Value, Response> {
    let prefs = ask(api, |reply| Command::Prefs { reply }).await?;
    let identity = prefs.identity.unwrap_or_default();
    if identity.node_id.is_empty() {
        return Ok(json!({ "ID": "", "Name": "", "Key": "" }));
    }
    Ok(json!({
        "ID": "main",
        "Name": identity.user_profile.login_name,
        "Key": "profile-main",
        "UserProfile": identity.user_profile,
        "NodeID": identity.node_id,
        "ControlURL": prefs.control_url,
    }))
}

fn need_write(may: MayWrite) -> Result<(), Response> {
    if may.0 { Ok(()) } else { Err((StatusCode::FORBIDDEN, "access denied").into_response()) }
}

pub(super) async fn current_profile(
    State(api): State<Api>,
    Extension(may): Extension<MayWrite>,
) -> Result<Response, Response> {
    need_write(may)?;
    Ok(Json(profile(&api).await?).into_response())
}

pub(super) async fn profiles(
    State(api): State<Api>,
    Extension(may): Extension<MayWrite>,
) -> Result<Response, Response> {
    need_write(may)?;
    let one = profile(&api).await?;
    let known = one["ID"] != "";
    Ok(Json(if known { vec![one] } else { Vec::new() }).into_response())
}

pub(super) async fn new_profile() -> Response {
    let text = "lacisd has one login at a time: run `lacis logout` first, or a second lacisd with another --state-dir";
    error(StatusCode::NOT_IMPLEMENTED, text)
}

/// Nothing is served to others; `null` is the empty configuration.
pub(super) async fn serve_config() -> Response {
    Json(serde_json::Value::Null).into_response()
}

pub(super) async fn no_services() -> Response {
    Json(json!({})).into_response()
}

pub(super) async fn no_warning() -> Response {
    Json(json!({ "Warning": "" })).into_response()
}

pub(super) async fn check_so_mark() -> Response {
    Json(json!({ "UseSOMark": true })).into_response()
}

#[derive(Debug, Deserialize)]
pub(super) struct ForwardingQuery {
    /// Whether IPv6 is asked about too.
    ipv6: Option<String>,
}

/// Subnet routers and exit nodes need it; the daemon does not switch it on by itself. Whoever may change nothing is
/// told nothing of the firewall.
pub(super) async fn check_ip_forwarding(
    State(api): State<Api>,
    Extension(may): Extension<MayWrite>,
    Query(query): Query<ForwardingQuery>,
) -> Response {
    let ipv6 = query.ipv6.as_deref() != Some("false");
    let missing = if may.0 {
        forwarding::obstacles(&api.device, true, ipv6).await
    } else {
        forwarding::switched_off(true, ipv6, forwarding::read_sysctl)
    };
    Json(ForwardingCheck { warning: missing.join("\n") }).into_response()
}

pub(super) async fn suggest_exit_node(State(api): State<Api>) -> Result<Response, Response> {
    match ask(&api, |reply| Command::SuggestExitNode { reply }).await? {
        Some(found) => Ok(Json(found).into_response()),
        None => Err(error(StatusCode::NOT_FOUND, "no exit node is online")),
    }
}

pub(super) async fn not_found() -> Response {
    (StatusCode::NOT_FOUND, "404 not found").into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_asks_by_address_with_or_without_port_or_by_key() {
        assert!(matches!(parse_who("100.64.0.1"), Some(Who::Address(_))));
        assert!(matches!(parse_who("[fd7a::1]:80"), Some(Who::Address(_))));
        assert!(matches!(parse_who(&format!("nodekey:{}", "0a".repeat(32))), Some(Who::Key(_))));
        assert!(parse_who("bob").is_none());
    }
}
