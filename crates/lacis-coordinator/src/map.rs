//! `POST /machine/map`: long polls, lite updates and single maps.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::Stream;
use lacis_wire::control::{KEEP_ALIVE_JSON, MapRequest};
use lacis_wire::mapframe::{self, Compression};
use tokio::sync::mpsc;

use crate::core::{Core, Next, Origin, Subscription};
use crate::fault;
use crate::inner::Session;

/// Clients give up after 120 s without a frame, and proxies often after 60 or 50.
const KEEP_ALIVE: Duration = Duration::from_secs(40);
/// So that many streams that began together do not wake together.
const KEEP_ALIVE_SPREAD_MS: u64 = 5_000;
/// Frames between the stream's task and the connection. A client that reads slowly is sent fewer, larger ones.
const FRAMES_AHEAD: usize = 2;

/// Answers a map request.
pub fn map(core: &Core, session: &Session, request: MapRequest) -> Response {
    let not_found = || (StatusCode::NOT_FOUND, "node not found").into_response();
    let key = request.node_key;
    let Some((tailnet, node)) = core.find_for(&key, &session.machine) else { return not_found() };
    let compression = Compression::requested(&request.compress);
    let (stream, omit_peers, read_only) = (request.stream, request.omit_peers, request.read_only);
    if !read_only {
        core.update(&tailnet, &node, request);
    }
    // What was just stored is in the map that follows.
    let Some((_, node)) = core.find_for(&key, &session.machine) else { return not_found() };
    let origin = Origin { session: session.number, address: session.remote.ip() };
    let frames = match (stream, omit_peers) {
        (true, _) => core.subscribe(&tailnet, &node, origin, compression).map(|subscribed| {
            subscribed.map(|(subscription, first)| {
                let (send, frames) = mpsc::channel(FRAMES_AHEAD);
                tokio::spawn(feed(subscription, first, compression, send));
                Body::from_stream(Frames(frames))
            })
        }),
        (false, true) if !read_only => Ok(Some(Body::empty())),
        (false, _) => {
            core.whole_map(&tailnet, &node, !omit_peers, compression).map(|frame| Some(Body::from(frame)))
        }
    };
    match frames {
        Ok(None) => not_found(),
        Ok(Some(body)) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => {
            let text = "the network map could not be encoded";
            fault::with_cause(
                format!("{text} for {}: {}", node.name, lacis_serve::log::chain(&error)),
                (StatusCode::INTERNAL_SERVER_ERROR, text),
            )
        }
    }
}

/// Sends frames until the client is gone or the node is.
async fn feed(
    mut subscription: Subscription,
    first: Bytes,
    compression: Compression,
    send: mpsc::Sender<Bytes>,
) {
    let Ok(keep_alive) = mapframe::encode(KEEP_ALIVE_JSON, compression) else { return };
    let mut random = [0; 8];
    // Without randomness they wake together, which only costs a moment.
    let _ = getrandom::fill(&mut random);
    let period = KEEP_ALIVE + Duration::from_millis(u64::from_le_bytes(random) % KEEP_ALIVE_SPREAD_MS);
    if send.send(first).await.is_err() {
        return;
    }
    loop {
        let frame = tokio::select! {
            next = tokio::time::timeout(period, subscription.next()) => match next {
                Ok(Ok(Next::Frame(frame))) => frame,
                Ok(Ok(Next::End)) => return,
                Ok(Err(error)) => {
                    tracing::error!(%error, "a map frame could not be encoded");
                    return;
                }
                Err(_) => keep_alive.clone(),
            },
            () = send.closed() => return,
        };
        if send.send(frame).await.is_err() {
            return;
        }
    }
}

/// A channel as a body.
struct Frames(mpsc::Receiver<Bytes>);

impl Stream for Frames {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|frame| frame.map(Ok))
    }
}
