//! One connection that speaks HTTP/1.1, from its first byte to its end or its upgrade.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::Request;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// The largest head of any client is about 1 KiB.
const MAX_HEAD: usize = 16 << 10;

/// Calls a router with something added to the request's extensions.
///
/// Cheaper for a connection than a layer, which would copy the router's table.
pub async fn call<T: Clone + Send + Sync + 'static>(
    router: axum::Router,
    extension: T,
    request: Request<Incoming>,
) -> Result<Response, Infallible> {
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(extension);
    router.oneshot(request).await
}

/// How long a connection may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines {
    /// For the whole head of a request, counted from the end of the one before: also for an idle connection.
    pub(crate) head: Duration,
    /// For a connection that is not upgraded, however busy it is.
    pub(crate) age: Option<Duration>,
    /// To end after `age` or the stop.
    pub(crate) grace: Duration,
}

/// Answers requests until the connection ends or is upgraded, or a deadline or `stop` ends it.
pub(crate) async fn serve<I, S>(
    stream: I,
    service: S,
    deadlines: Deadlines,
    stop: &CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    S: Service<Request<Incoming>, Response = Response, Error = Infallible>,
{
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // Of the whole head: hyper sets it once, and further bytes do not move it.
        .header_read_timeout(deadlines.head)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let too_old = async {
        match deadlines.age {
            Some(age) => tokio::time::sleep(age).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = &mut connection => return Ok(ended?),
        () = too_old => {}
        () = stop.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    match tokio::time::timeout(deadlines.grace, connection).await {
        Ok(ended) => Ok(ended?),
        Err(_) => Err("it did not end in time".into()),
    }
}
