//! TLS for the listener: certificate files that may change while it runs.
//!
//! HTTP/1.1 only, as `/derp` cannot be upgraded over HTTP/2. A new certificate that cannot be used is reported and the
//! old one kept.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_util::sync::CancellationToken;

use crate::Error;

/// How often the files are looked at.
const CHECK_EVERY: Duration = Duration::from_secs(10);

/// The permission bit.
const READ_BY_OTHERS: u32 = 0o004;

/// A certificate that follows its files.
#[derive(Debug)]
pub struct Certificate {
    cert_file: PathBuf,
    key_file: PathBuf,
    current: ArcSwap<CertifiedKey>,
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

impl Certificate {
    /// Reads both files.
    pub fn load(cert_file: &Path, key_file: &Path) -> Result<Arc<Self>, Error> {
        let current = ArcSwap::from_pointee(read(cert_file, key_file)?);
        Ok(Arc::new(Self { cert_file: cert_file.to_owned(), key_file: key_file.to_owned(), current }))
    }

    /// Whether the certificate is for a host name.
    pub fn is_for(&self, host: &str) -> Result<bool, Error> {
        let bad = |message: String| Error::Certificate { path: self.cert_file.clone(), message };
        let name = ServerName::try_from(host.to_owned()).map_err(|error| bad(error.to_string()))?;
        let current = self.current.load();
        let leaf = current.cert.first().ok_or_else(|| bad("it is empty".to_owned()))?;
        let parsed = ParsedCertificate::try_from(leaf).map_err(|error| bad(error.to_string()))?;
        Ok(rustls::client::verify_server_name(&parsed, &name).is_ok())
    }

    /// The settings of a listener that presents it.
    pub fn server_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // clients reconnect seldom; tickets they would not use cost a write each
        config.send_tls13_tickets = 1;
        Ok(Arc::new(config))
    }

    /// Reads the files again now.
    pub fn reload(&self) -> Result<(), Error> {
        self.current.store(Arc::new(read(&self.cert_file, &self.key_file)?));
        Ok(())
    }

    /// Looks at the files now and then, and reads them when they have changed, until `stop`.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut seen = self.changed_at();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(CHECK_EVERY) => {}
            }
            let now = self.changed_at();
            if now == seen {
                continue;
            }
            match self.reload() {
                Ok(()) => tracing::info!(path = %self.cert_file.display(), "certificate read again"),
                // both files may not have been replaced yet: look again next time
                Err(error) => {
                    tracing::warn!(%error, "the new certificate cannot be used, the old one stays");
                    continue;
                }
            }
            seen = now;
        }
    }

    fn changed_at(&self) -> [Option<SystemTime>; 2] {
        [&self.cert_file, &self.key_file]
            .map(|path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok())
    }
}

fn read(cert_file: &Path, key_file: &Path) -> Result<CertifiedKey, Error> {
    // No error: who issues certificates often gives the key to a group, and tests to everybody.
    if std::fs::metadata(key_file).is_ok_and(|file| file.permissions().mode() & READ_BY_OTHERS != 0) {
        let path = key_file.display();
        tracing::warn!("the certificate's key {path} may be read by everybody: `chmod o-r {path}`");
    }
    let read =
        |path: &Path| std::fs::read(path).map_err(|error| Error::Read { path: path.to_owned(), error });
    let bad = |path: &Path, message: String| Error::Certificate { path: path.to_owned(), message };
    let chain = CertificateDer::pem_slice_iter(&read(cert_file)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| bad(cert_file, error.to_string()))?;
    if chain.is_empty() {
        return Err(bad(cert_file, "it holds no certificate in PEM form".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_slice(&read(key_file)?)
        .map_err(|error| bad(key_file, format!("it holds no private key in PEM form ({error})")))?;
    let key = rustls::crypto::ring::sign::any_supported_type(&key)
        .map_err(|error| bad(key_file, error.to_string()))?;
    let certified = CertifiedKey::new(chain, key);
    certified
        .keys_match()
        .map_err(|_| bad(cert_file, format!("it does not belong to the key in {}", key_file.display())))?;
    Ok(certified)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(directory: &Path, name: &str) -> (PathBuf, PathBuf) {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let (cert, key) = (directory.join("c.pem"), directory.join("k.pem"));
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        (cert, key)
    }

    #[test]
    fn a_replaced_certificate_is_used_after_a_reload() {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = write(directory.path(), "one.example");
        let certificate = Certificate::load(&cert, &key).unwrap();
        assert!(certificate.is_for("one.example").unwrap());
        write(directory.path(), "two.example");
        certificate.reload().unwrap();
        assert!(certificate.is_for("two.example").unwrap() && !certificate.is_for("one.example").unwrap());
        std::fs::write(&cert, "garbage").unwrap();
        assert!(certificate.reload().is_err());
        assert!(certificate.is_for("two.example").unwrap(), "the old one stays");
    }

    #[test]
    fn a_key_of_another_certificate_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let (cert, _) = write(directory.path(), "one.example");
        let other = tempfile::tempdir().unwrap();
        let (_, key) = write(other.path(), "one.example");
        let error = Certificate::load(&cert, &key).unwrap_err().to_string();
        assert!(error.contains("does not belong"), "{error}");
    }
}
