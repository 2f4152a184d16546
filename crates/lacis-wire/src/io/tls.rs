//! TLS for clients: the system's root certificates, rustls with ring.

use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};

use super::DialError;

/// The system's roots; with `SSL_CERT_FILE` (or `SSL_CERT_DIR`) set, those of that file instead.
///
/// Certificates that cannot be parsed are left out; only having none at all is an error.
pub fn native_roots() -> Result<RootCertStore, DialError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, ignored) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        return Err(DialError::NoRoots {
            why: found.errors.first().map_or_else(|| "none found".to_owned(), ToString::to_string),
        });
    }
    tracing::debug!(added, ignored, "root certificates loaded");
    Ok(roots)
}

/// A client configuration with these roots and these ALPN protocols (none: the extension is left out).
///
/// The control connection needs HTTP/1.1 and offers no ALPN, as the stock clients do.
pub fn client_config(roots: RootCertStore, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, DialError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|source| DialError::TlsSetup { source })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}
