//! What anybody may ask, over ordinary HTTP: the server's key, the way into Noise, the relay, health.
//!
//! Nothing here knows a node's identity; `/machine/register` and `/machine/map` exist only in the inner
//! router, which is reached through Noise.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, head, post};
use http::header::{ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderName, StatusCode};
use lacis_wire::control::{DerpMap, OverTlsKeys, VerifyRequest, VerifyResponse, decode_request, to_json};
use lacis_wire::key::MachineKey;
use tokio::sync::Mutex;

use crate::core::{Core, names};
use crate::fault;
use crate::ts2021::{self, Noise};

/// Below this version `/key` gives nothing, as the protocol has it: such clients know no Noise.
const FIRST_NOISE_VERSION: u32 = 39;
/// The request is one key and one address.
const MAX_VERIFY: usize = 4 << 10;
/// How long the relays' resolved addresses are handed out before they are looked up again.
const BOOTSTRAP_AGE: Duration = Duration::from_mins(10);
/// The same while some relay's name cannot be looked up.
const BOOTSTRAP_RETRY: Duration = Duration::from_secs(10);
/// How long the lookups may take together.
const BOOTSTRAP_TIMEOUT: Duration = Duration::from_secs(5);

type Json = ([(HeaderName, &'static str); 1], Vec<u8>);

fn json(body: Vec<u8>) -> Json {
    ([(CONTENT_TYPE, "application/json")], body)
}

/// The outer router, without the relay's routes.
pub fn router(core: Core, noise: Noise, noise_key: MachineKey, derp_map: Arc<DerpMap>) -> Router {
    let keys = to_json(&OverTlsKeys { legacy_public_key: MachineKey::default(), public_key: noise_key });
    let bootstrap = Arc::new(Bootstrap { derp_map, cache: Mutex::default() });
    Router::new()
        .route("/", get(|| async { blank() }))
        .route("/robots.txt", get(|| async { "User-agent: *\nDisallow: /\n" }))
        .route("/key", get(move |query| key(query, keys.clone())))
        .route("/version", get(|| async { json(version()) }))
        .route("/bootstrap-dns", get(move || bootstrap_dns(Arc::clone(&bootstrap))))
        .merge(Router::new().route("/ts2021", get(ts2021::get).post(ts2021::post)).with_state(noise))
        .merge(
            Router::new()
                .route("/health", get(health))
                .route("/verify", post(verify).layer(DefaultBodyLimit::max(MAX_VERIFY)))
                .route("/machine/ping-response", head(ping_response))
                .route("/register/{id}", get(registration))
                .with_state(core),
        )
}

/// There is nothing to see for people who try the URL in a browser; they see that it is reachable.
fn blank() -> Response {
    page("<p>This is a Lacis coordinator.</p>".to_owned())
}

/// Where a client sends its user when it came without a key. Who may decide is whoever may use the admin socket.
async fn registration(State(core): State<Core>, Path(id): Path<String>) -> Response {
    let Some(host) = core.pending_host(&id) else {
        let text = "<p>Nobody waits here: the registration is done, or older than 15 minutes. Try again on the device.</p>";
        return (StatusCode::NOT_FOUND, page(text.to_owned())).into_response();
    };
    // Strangers choose the host's name, so it is shown as a node's name would be. The id is one of ours.
    let host = names::label(&host);
    // Their names are not for strangers; the command says them where NETWORK is left as it is.
    let several = core.tailnets().nth(1).is_some();
    let (flag, network) = if several {
        (" --tailnet NETWORK", "NETWORK is the network that it shall join and ")
    } else {
        ("", "")
    };
    page(format!(
        "<p>The device <b>{host}</b> waits for approval. An administrator lets it join with</p>\n\
         <pre>lacis admin registrations approve {id}{flag} --user NAME</pre>\n\
         <p>on the coordinator's host, where {network}NAME is the user that it shall belong to.</p>"
    ))
}

fn page(body: String) -> Response {
    let page = format!("<!doctype html><meta charset=\"utf-8\"><title>Lacis</title>{body}\n");
    let headers = [
        ("content-type", "text/html; charset=utf-8"),
        ("x-frame-options", "DENY"),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-store"),
    ];
    (headers, page).into_response()
}

#[derive(Debug, serde::Deserialize)]
struct KeyQuery {
    v: Option<String>,
}

async fn key(Query(query): Query<KeyQuery>, keys: Vec<u8>) -> Response {
    match query.v.as_deref().map(str::parse::<u32>) {
        // Clients in browsers come from pages of any origin; the key is no secret.
        Some(Ok(version)) if version >= FIRST_NOISE_VERSION => {
            ([(ACCESS_CONTROL_ALLOW_ORIGIN, "*")], json(keys)).into_response()
        }
        Some(Ok(_)) => StatusCode::OK.into_response(),
        _ => (StatusCode::BAD_REQUEST, "the version is missing: /key?v=NUMBER\n").into_response(),
    }
}

fn version() -> Vec<u8> {
    let info = serde_json::json!({
        "name": "lacis-coordinator",
        "version": env!("CARGO_PKG_VERSION"),
        "minCapabilityVersion": lacis_wire::MIN_CAPABILITY_VERSION,
    });
    to_json(&info)
}

async fn health(State(core): State<Core>) -> Response {
    let headers = [(CONTENT_TYPE, "application/health+json"), (CACHE_CONTROL, "no-store")];
    match core.health().await {
        Ok(()) => (headers, "{\"status\":\"pass\"}").into_response(),
        Err(error) => {
            fault::because(&error, StatusCode::INTERNAL_SERVER_ERROR, (headers, "{\"status\":\"fail\"}"))
        }
    }
}

/// Relays ask whether a node may use them.
async fn verify(State(core): State<Core>, body: Bytes) -> Response {
    match decode_request::<VerifyRequest>(&body) {
        Ok(request) => {
            let allow = !request.node_public.is_zero() && core.may_relay(&request.node_public);
            json(to_json(&VerifyResponse { allow })).into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

#[derive(Debug, serde::Deserialize)]
struct PingQuery {
    #[serde(default)]
    id: String,
}

/// Where clients of this protocol answer some pings. Ours are answered over Noise: none is known here.
async fn ping_response(Query(query): Query<PingQuery>) -> StatusCode {
    if query.id.is_empty() { StatusCode::BAD_REQUEST } else { StatusCode::NOT_FOUND }
}

type Addresses = BTreeMap<String, Vec<IpAddr>>;

/// The relays' names and addresses, for clients whose own DNS does not work.
#[derive(Debug)]
struct Bootstrap {
    derp_map: Arc<DerpMap>,
    /// An answer, and until when it is good.
    cache: Mutex<Option<(Instant, Vec<u8>)>>,
}

async fn bootstrap_dns(bootstrap: Arc<Bootstrap>) -> Json {
    // Held while looking up: however many ask, the names are asked for once.
    let mut cache = bootstrap.cache.lock().await;
    if let Some((until, body)) = &*cache
        && Instant::now() < *until
    {
        return json(body.clone());
    }
    let found = addresses(&bootstrap.derp_map).await;
    let mut nodes = bootstrap.derp_map.regions.values().flat_map(|region| &region.nodes);
    let complete = nodes.all(|node| found.contains_key(&node.host_name));
    let age = if complete { BOOTSTRAP_AGE } else { BOOTSTRAP_RETRY };
    let body = to_json(&found);
    *cache = Some((Instant::now() + age, body.clone()));
    json(body)
}

async fn addresses(derp_map: &DerpMap) -> Addresses {
    let mut found = Addresses::new();
    let nodes = derp_map.regions.values().flat_map(|region| &region.nodes);
    let lookups = nodes.map(|node| async move {
        let fixed: Vec<IpAddr> =
            [&node.ipv4, &node.ipv6].into_iter().filter_map(|ip| ip.parse().ok()).collect();
        if !fixed.is_empty() {
            return (node.host_name.clone(), fixed);
        }
        let looked_up = tokio::net::lookup_host((node.host_name.as_str(), 443));
        let addresses = match tokio::time::timeout(BOOTSTRAP_TIMEOUT, looked_up).await {
            Ok(Ok(addresses)) => addresses.map(|address| address.ip()).collect(),
            _ => Vec::new(),
        };
        (node.host_name.clone(), addresses)
    });
    for (name, mut addresses) in futures_util::future::join_all(lookups).await {
        if !addresses.is_empty() {
            found.entry(name).or_default().append(&mut addresses);
        }
    }
    for addresses in found.values_mut() {
        addresses.sort_unstable();
        addresses.dedup();
    }
    found
}
