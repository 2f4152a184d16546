//! The control server's pings: it asks whether this node is there, or hands it a small HTTP request.
//!
//! Section 7.4 of the control dossier. The answer goes over the Noise session or, where the server wants it on its
//! public address, there and nowhere else; pings of peers on the server's behalf are not made.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::Method;
use lacis_wire::control::PingRequest;
use lacis_wire::io::{ControlClient, ControlDialer};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Duration, timeout};

use lacis_serve::log::chain;

const BAD_REQUEST: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 20\r\n\r\nunknown c2n request\n";

/// An answer that takes longer is of no use to the server.
const LIMIT: Duration = Duration::from_secs(15);
/// Bytes of the base64 of a request; the answer repeats what is in it.
const MAX_PAYLOAD: usize = 64 << 10;

/// Answers; `_place` is free again afterwards.
pub(super) async fn answer(
    client: ControlClient,
    dialer: ControlDialer,
    request: PingRequest,
    _place: OwnedSemaphorePermit,
) {
    let Ok(url) = request.url.parse::<http::Uri>() else { return };
    let path = url.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let over_noise = |sent: Result<_, hyper::Error>| sent.map(drop).map_err(|error| chain(&error));
    let work = async {
        match request.types.as_str() {
            "" if request.url_is_noise => over_noise(client.request(Method::HEAD, path, "").await),
            "" => dialer.head(&request.url).await.map(drop).map_err(|error| chain(&error)),
            "c2n" => over_noise(client.post(path, reply(&request.payload)).await),
            other => Err(format!("pings of type {other:?} are not known")),
        }
    };
    match timeout(LIMIT, work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the answer to a ping of the control server was not sent"),
        Err(_) => tracing::debug!("the control server does not take the answer to its ping"),
    }
}

/// The HTTP/1.1 response to the request inside a `c2n` ping. Only `/echo` is known.
fn reply(payload: &str) -> Vec<u8> {
    if payload.len() > MAX_PAYLOAD {
        return BAD_REQUEST.to_vec();
    }
    let Ok(request) = STANDARD.decode(payload) else { return BAD_REQUEST.to_vec() };
    let Some(end) = request.windows(4).position(|four| four == b"\r\n\r\n") else {
        return BAD_REQUEST.to_vec();
    };
    let (head, body) = (&request[..end], &request[end + 4..]);
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    if line.split(|byte| *byte == b' ').nth(1) != Some(b"/echo") {
        return BAD_REQUEST.to_vec();
    }
    let mut reply = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
    reply.extend_from_slice(body);
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_is_answered_and_anything_else_is_refused() {
        let echo = STANDARD.encode("POST /echo HTTP/1.1\r\nHost: x\r\n\r\nhello");
        assert_eq!(reply(&echo), b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
        assert_eq!(reply(&STANDARD.encode("GET /debug HTTP/1.1\r\n\r\n")), BAD_REQUEST);
        assert_eq!(reply("%"), BAD_REQUEST);
        assert_eq!(reply(&STANDARD.encode("half a head")), BAD_REQUEST);
        let long = format!("POST /echo HTTP/1.1\r\n\r\n{}", "x".repeat(MAX_PAYLOAD));
        assert_eq!(reply(&STANDARD.encode(long)), BAD_REQUEST);
    }
}
