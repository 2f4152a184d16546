//! `/metrics`, as Prometheus asks for it.

use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use http::header::CONTENT_TYPE;
use prometheus_client::registry::Registry;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves what is registered, at `/metrics`.
pub fn router(registry: Arc<Registry>) -> Router {
    Router::new().route("/metrics", get(move || metrics(Arc::clone(&registry))))
}

async fn metrics(registry: Arc<Registry>) -> ([(http::HeaderName, &'static str); 1], String) {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    ([(CONTENT_TYPE, OPEN_METRICS)], text)
}
