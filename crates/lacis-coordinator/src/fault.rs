//! Answers that say that the fault is the server's (5xx): each has its cause in the log, a few a minute of a kind.

use std::error::Error;
use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use lacis_serve::log::{LogLimiter, chain};

/// An extension of a response: why it is one.
#[derive(Clone, Debug)]
struct Cause(Arc<str>);

/// An answer whose cause is logged by [`log`].
pub(crate) fn because(cause: &dyn Error, status: StatusCode, body: impl IntoResponse) -> Response {
    with_cause(chain(cause), (status, body))
}

/// The same for a cause that is no error of a type.
pub(crate) fn with_cause(cause: impl Into<Arc<str>>, answer: impl IntoResponse) -> Response {
    let mut response = answer.into_response();
    response.extensions_mut().insert(Cause(cause.into()));
    response
}

/// Middleware around all routes.
pub(crate) async fn log(State(limiter): State<Arc<LogLimiter>>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    // As the router has it: what a stranger put into it is no matter.
    let path = request.extensions().get::<MatchedPath>().cloned();
    let answer = next.run(request).await;
    let status = answer.status();
    if status.is_server_error() {
        let path = path.as_ref().map_or("-", MatchedPath::as_str);
        if let Some(suppressed) = limiter.allow("answered with a fault", (path, status.as_u16())) {
            let cause = answer.extensions().get::<Cause>().map_or("not known", |cause| &cause.0);
            let status = status.as_u16();
            if status == StatusCode::NOT_IMPLEMENTED.as_u16() {
                tracing::info!(%method, path, status, cause, suppressed, "a request that this server does not know");
            } else {
                tracing::error!(%method, path, status, cause, suppressed, "a request failed");
            }
        }
    }
    answer
}
