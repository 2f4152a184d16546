//! `watch-ipn-bus`: the stream of events, a JSON object a line.

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use lacis_wire::local::{Notify, watch};
use serde::Deserialize;
use tokio::sync::broadcast::error::RecvError;

use super::Api;
use super::handlers::ask;
use crate::engine::Command;

#[derive(Debug, Deserialize)]
pub(super) struct Mask {
    #[serde(default)]
    mask: u64,
}

pub(super) async fn bus(State(api): State<Api>, Query(Mask { mask }): Query<Mask>) -> Response {
    let peer_bits = mask >> 12 & 0b1111;
    if mask & watch::IN_PROCESS != 0 || (mask & watch::RATE_LIMIT != 0 && peer_bits != 0) {
        return (StatusCode::BAD_REQUEST, "this mask cannot be watched").into_response();
    }
    // First listen, then ask for the state: an event between the two is seen twice rather than never.
    let events = api.engine.bus.watch();
    let initial = match ask(&api, |reply| Command::Initial { mask, reply }).await {
        Ok(initial) => initial,
        Err(refused) => return refused,
    };
    let first = (initial != Notify::default()).then(|| line(&initial));
    let stop = api.stop.clone();
    let later = stream::unfold((events, stop), move |(mut events, stop)| async move {
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = stop.cancelled() => return None,
            };
            match event {
                Ok(notify) => {
                    if let Some(shown) = visible(&notify, mask) {
                        return Some((line(&shown), (events, stop)));
                    }
                }
                // A slow reader: it has lost events, the next ones still count.
                Err(RecvError::Lagged(lost)) => tracing::warn!(lost, "a watcher of the bus is too slow"),
                Err(RecvError::Closed) => return None,
            }
        }
    });
    use futures_util::StreamExt as _;
    let all = stream::iter(first).chain(later).map(Ok::<_, std::convert::Infallible>);
    Body::from_stream(all).into_response()
}

/// Peers are told only to those who asked for them.
fn visible(notify: &Notify, mask: u64) -> Option<Notify> {
    let mut shown = notify.clone();
    if mask & watch::PEER_CHANGES == 0 {
        shown.peers_changed.clear();
        shown.peers_removed.clear();
    }
    (shown != Notify::default()).then_some(shown)
}

fn line(notify: &Notify) -> Bytes {
    let mut line = lacis_wire::control::to_json(notify);
    line.push(b'\n');
    line.into()
}
