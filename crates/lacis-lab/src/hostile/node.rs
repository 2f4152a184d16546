//! What a node of the network can do to the others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use http_body_util::BodyExt as _;
use lacis_relay::client::{
    Batch, DialOptions, RegionId, RelayClient, RelayClientConfig, RelayEvent, RelayHandler, RelayRegion,
    SEND_QUEUE_BYTES,
};
use lacis_wire::control::{DerpMap, MapRequest, to_json};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{endpoint, say};
use crate::node::{self, Node};

/// Just below what serde_json reads: the same inside a map is above it.
const DEPTH: usize = 124;
/// As many as fit a request of 1 MiB.
const MANY_ENDPOINTS: usize = 116_000;
const MANY_ENDPOINTS_TIMES: u16 = 50;
/// How long endpoints change as fast as the server answers.
const FAST: Duration = Duration::from_secs(5);
/// Between two attempts that are no race.
const PAUSE: Duration = Duration::from_millis(500);

/// Starts the map stream; its messages come through the channel, which ends with it.
async fn stream(node: &Node) -> Result<mpsc::UnboundedReceiver<Value>> {
    let body = node.stream(endpoint(1)).await?;
    let (send, messages) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let each = |message: &[u8]| {
            let message = serde_json::from_slice(message)
                .unwrap_or_else(|error: serde_json::Error| json!({ "unreadable": error.to_string() }));
            let _ = send.send(message);
        };
        if let Err(error) = node::read(body, |_| (), each).await {
            tracing::debug!(%error, "the map stream failed");
        }
    });
    Ok(messages)
}

/// Reads its map for ever, so that the server takes it for a node that is online.
async fn stay_online(node: &Node) -> Result<()> {
    let mut messages = stream(node).await?;
    messages.recv().await.context("the map stream ended before its first map")?;
    tokio::spawn(async move { while messages.recv().await.is_some() {} });
    Ok(())
}

/// A request that only reports, with some members as given.
fn report(node: &Node, members: Value) -> Result<Vec<u8>> {
    let mut request = serde_json::to_value(node.map_request(endpoint(1), true))?;
    let (Some(request_members), Value::Object(members)) = (request.as_object_mut(), members) else {
        bail!("a map request is an object");
    };
    request_members.extend(members);
    Ok(to_json(&request))
}

fn peers(message: &Value) -> impl Iterator<Item = &Value> {
    ["Peers", "PeersChanged"].iter().filter_map(|list| message[list].as_array()).flatten()
}

/// Says for each peer that is in a message: its name and host facts, and how many endpoints and the last of them.
pub(super) async fn watch(node: Node) -> Result<()> {
    let mut messages = stream(&node).await?;
    while let Some(message) = messages.recv().await {
        if message.get("unreadable").is_some() {
            say(&message);
        }
        let patches = message["PeersChangedPatch"].as_array().into_iter().flatten();
        for peer in peers(&message).chain(patches) {
            let endpoints = peer["Endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
            say(&json!({
                "id": peer.get("ID").or(peer.get("NodeID")),
                "name": peer["Name"],
                "hostinfo": peer["Hostinfo"],
                "disco": peer["DiscoKey"],
                "endpoints": endpoints.len(),
                "last": endpoints.last(),
            }));
        }
    }
    bail!("the map stream ended");
}

fn nested(depth: usize) -> Value {
    (0..depth).fold(json!(0), |inner, _| json!([inner]))
}

/// Host facts that are nested, of another type than in Go, too long, too many, or meant for a terminal.
fn bad_hostinfos() -> Vec<(&'static str, Value)> {
    let long = "x".repeat(200_000);
    let services: Vec<Value> =
        (0..1_000).map(|port| json!({ "Proto": "tcp", "Port": port, "Description": "d" })).collect();
    let routes: Vec<String> = (0..2_000).map(|n| format!("10.{}.{}.0/24", n / 256 % 256, n % 256)).collect();
    vec![
        ("nested", json!({ "Nested": nested(DEPTH) })),
        ("nested where anything may be", json!({ "Location": { "City": nested(DEPTH - 1) } })),
        ("ShareeNode a text", json!({ "ShareeNode": "x" })),
        ("sharednode in capitals", json!({ "SHAREENODE": "x", "shareenode": [] })),
        ("Location a text", json!({ "Location": "x" })),
        ("TPM a number", json!({ "TPM": 1 })),
        ("WoLMACs an object", json!({ "WoLMACs": { "a": 1 } })),
        ("GoArchVar a list", json!({ "GoArchVar": [1] })),
        ("IngressEnabled a number", json!({ "IngressEnabled": 7, "WireIngress": "no", "AllowsUpdate": {} })),
        ("ServicesHash a list", json!({ "ServicesHash": [], "PushDeviceToken": 1, "Cloud": {} })),
        ("a long text", json!({ "OSVersion": long })),
        ("a long unknown member", json!({ "Unknown": long })),
        ("for a terminal", json!({ "OS": "\u{1b}]0;owned\u{7}\u{1b}[2J", "DeviceModel": "\u{202e}lacis" })),
        ("many services", json!({ "Services": services })),
        ("many routes", json!({ "RoutableIPs": routes })),
        ("the worst, which stay", json!({ "Nested": nested(DEPTH), "ShareeNode": "x", "OSVersion": long })),
    ]
}

pub(super) async fn hostinfo(node: Node) -> Result<()> {
    stay_online(&node).await?;
    let plain = serde_json::to_value(node.map_request(endpoint(1), true))?["Hostinfo"].clone();
    for (what, members) in bad_hostinfos() {
        let mut hostinfo = plain.clone();
        if let (Some(all), Value::Object(members)) = (hostinfo.as_object_mut(), members) {
            all.extend(members);
        }
        let status = node.status("/machine/map", report(&node, json!({ "Hostinfo": hostinfo }))?).await?;
        say(&json!({ "hostinfo": what, "status": status.as_u16() }));
        tokio::time::sleep(PAUSE / 2).await;
    }
    say(&json!({ "done": true }));
    std::future::pending().await
}

pub(super) async fn endpoints(node: Node) -> Result<()> {
    stay_online(&node).await?;
    let mut many = MANY_ENDPOINTS;
    for number in 1..=MANY_ENDPOINTS_TIMES {
        loop {
            let endpoints = vec![format!("[::]:{}", number % 10); many];
            let status =
                node.status("/machine/map", report(&node, json!({ "Endpoints": endpoints }))?).await?;
            if number == 1 {
                say(&json!({ "endpoints": many, "status": status.as_u16() }));
            }
            // Refused as too long: as many as are taken, then.
            if !status.is_client_error() || many == 1 {
                break;
            }
            many /= 2;
        }
    }
    let (began, mut changes) = (Instant::now(), 0_u16);
    while began.elapsed() < FAST {
        changes = changes.wrapping_add(1);
        let few = [endpoint(changes), endpoint(changes.wrapping_add(1))];
        node.status("/machine/map", report(&node, json!({ "Endpoints": few }))?).await?;
    }
    let last = endpoint(4242);
    node.status("/machine/map", report(&node, json!({ "Endpoints": [last] }))?).await?;
    say(&json!({ "done": true, "changes": changes, "last": last }));
    std::future::pending().await
}

pub(super) async fn disco(node: Node, victim: &str) -> Result<()> {
    let first = stream(&node).await?.recv().await.context("the map stream ended before its first map")?;
    stay_online(&node).await?;
    let is_victim =
        |peer: &&Value| peer["Name"].as_str().is_some_and(|name| name.split('.').next() == Some(victim));
    let copied = peers(&first).find(is_victim).context("no such peer")?["DiscoKey"].clone();
    loop {
        let status = node.status("/machine/map", report(&node, json!({ "DiscoKey": copied }))?).await?;
        say(&json!({ "disco": copied, "status": status.as_u16() }));
        tokio::time::sleep(2 * PAUSE).await;
    }
}

/// Says when a relay takes it and when it no longer does.
#[derive(Debug)]
struct Says;

impl RelayHandler for Says {
    fn packets(&self, _: RegionId, _: Batch) -> Option<futures_util::future::BoxFuture<'static, ()>> {
        None
    }

    fn event(&self, region: RegionId, event: RelayEvent) {
        let connected = match event {
            RelayEvent::Connected { .. } => true,
            RelayEvent::Disconnected { .. } => false,
            _ => return,
        };
        say(&json!({ "relay": region, "connected": connected }));
    }
}

pub(super) async fn stay(node: Node) -> Result<()> {
    let mut messages = stream(&node).await?;
    let first = messages.recv().await.context("the map stream ended before its first map")?;
    let map: DerpMap = serde_json::from_value(first["DERPMap"].clone())?;
    let start = |region| {
        let config = RelayClientConfig {
            region: RelayRegion::from(region),
            node_key: node.key().clone(),
            home: true,
            dial: DialOptions::default(),
            send_queue_bytes: SEND_QUEUE_BYTES,
        };
        RelayClient::start(config, Arc::new(Says))
    };
    let _relays: Vec<RelayClient> = map.regions.values().map(start).collect();
    say(&json!({ "stream": true, "peers": peers(&first).count() }));
    tokio::spawn(async move {
        while let Some(message) = messages.recv().await {
            if peers(&message).next().is_some() {
                say(&json!({ "sent": peers(&message).map(|peer| &peer["Name"]).collect::<Vec<_>>() }));
            }
        }
        say(&json!({ "stream": false }));
    });
    // Whole maps, again and again: what does the server still give it?
    let whole = MapRequest { compress: String::new(), ..node.map_request(endpoint(1), false) };
    loop {
        let response = node.post("/machine/map", to_json(&whole)).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        // One block: a length and the message.
        let map: Value = body.get(4..).and_then(|json| serde_json::from_slice(json).ok()).unwrap_or_default();
        say(&json!({ "map": status.as_u16(), "peers": peers(&map).count() }));
        tokio::time::sleep(PAUSE).await;
    }
}
