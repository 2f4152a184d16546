//! DNS over TLS: questions with their lengths in front, many at once on one connection, answered in any order (RFC 7858,
//! RFC 7766).

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::codec::LengthDelimitedCodec;

use super::{ANSWER, IDLE, MAX_MESSAGE, SecureError};
use crate::forward::{answers, id_of, random_id, with_id};

/// Questions that wait for answers on one connection, and as many again for their turn.
const MAX_WAITING: usize = 256;

#[derive(Debug)]
struct Exchange {
    query: Vec<u8>,
    answer: oneshot::Sender<Vec<u8>>,
}

#[derive(Clone, Debug)]
pub(super) struct Client(mpsc::Sender<Exchange>);

impl Client {
    pub(super) fn new(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let (sender, exchanges) = mpsc::channel(MAX_WAITING);
        tokio::spawn(serve(stream, exchanges));
        Self(sender)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    pub(super) async fn ask(&self, query: &[u8]) -> Result<Vec<u8>, SecureError> {
        let ended = || SecureError::Broken("it has ended".to_owned());
        let (sender, answer) = oneshot::channel();
        let exchange = Exchange { query: query.to_vec(), answer: sender };
        self.0.send(exchange).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())
    }
}

/// Carries questions and answers until the connection ends, nobody can ask any more, or nothing happens for a while.
async fn serve(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    mut exchanges: mpsc::Receiver<Exchange>,
) {
    let codec =
        LengthDelimitedCodec::builder().length_field_type::<u16>().max_frame_length(MAX_MESSAGE).new_codec();
    let mut stream = tokio_util::codec::Framed::new(stream, codec);
    let mut waiting: HashMap<u16, Exchange> = HashMap::new();
    loop {
        tokio::select! {
            exchange = exchanges.recv(), if waiting.len() < MAX_WAITING => {
                let Some(exchange) = exchange else { return };
                let id = random_id();
                // Two with one id are rare enough that the second one may be asked again elsewhere.
                let Entry::Vacant(place) = waiting.entry(id) else { continue };
                let framed = Bytes::from(with_id(&exchange.query, id));
                place.insert(exchange);
                match timeout(ANSWER, stream.send(framed)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => return tracing::debug!(%error, "a connection for DNS over TLS has ended"),
                    // It takes nothing any more.
                    Err(_) => return,
                }
            }
            frame = stream.next() => match frame {
                Some(Ok(frame)) => {
                    let id = id_of(&frame);
                    let Entry::Occupied(place) = waiting.entry(id) else { continue };
                    if answers(&place.get().query, &frame, id) {
                        let Exchange { query, answer } = place.remove();
                        // Whoever asked may have an answer from elsewhere.
                        let _ = answer.send(with_id(&frame, id_of(&query)));
                    }
                }
                Some(Err(error)) => return tracing::debug!(%error, "a connection for DNS over TLS has ended"),
                None => return,
            },
            () = sleep(IDLE) => return,
        }
        waiting.retain(|_, exchange| !exchange.answer.is_closed());
    }
}
