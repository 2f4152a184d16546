//! Certificate checks that are not the plain "a known authority vouches for the host name".

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};

use super::region::CertCheck;

/// The TLS settings for one kind of check.
pub(super) fn client_config(check: &CertCheck, roots: &Arc<RootCertStore>) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let check = match check {
        CertCheck::HostName => {
            return Ok(builder.with_root_certificates(Arc::clone(roots)).with_no_client_auth());
        }
        CertCheck::Name(name) => {
            let webpki =
                WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(&provider))
                    .build()
                    .map_err(|error| Error::General(error.to_string()))?;
            let name = ServerName::try_from(name.clone())
                .map_err(|_| Error::General(format!("the certificate name {name} is no host name")))?;
            Check::Name(webpki, name)
        }
        CertCheck::Pin(digest) => Check::Pin(*digest),
        CertCheck::Insecure => Check::Nothing,
    };
    let verifier = Arc::new(Verifier { check, provider });
    Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

#[derive(Debug)]
enum Check {
    Name(Arc<WebPkiServerVerifier>, ServerName<'static>),
    Pin([u8; 32]),
    Nothing,
}

#[derive(Debug)]
struct Verifier {
    check: Check,
    provider: Arc<CryptoProvider>,
}

/// Common name prefix of the extra certificate by which stock relays announce their DERP key.
const META_PREFIX: &[u8] = b"derpkey";

impl Verifier {
    /// The pinned certificate must be the only one (but for the announcement of a DERP key), within its dates, and
    /// made for the host unless that is an address.
    fn verify_pin(
        &self,
        pin: &[u8; 32],
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let rejected = || Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        if Sha256::digest(leaf)[..] != pin[..] {
            return Err(rejected());
        }
        if others.iter().any(|other| !other.windows(META_PREFIX.len()).any(|window| window == META_PREFIX)) {
            return Err(rejected());
        }
        if !matches!(host, ServerName::IpAddress(_)) {
            verify_server_name(&ParsedCertificate::try_from(leaf)?, host)?;
        }
        // with itself as the root, whatever else it complains about, the library has looked at the dates first
        let mut roots = RootCertStore::empty();
        roots.add(leaf.clone().into_owned())?;
        let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        match webpki.verify_server_cert(leaf, &[], host, &[], now) {
            Err(Error::InvalidCertificate(
                error @ (CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. }),
            )) => Err(Error::InvalidCertificate(error)),
            _ => Ok(()),
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match &self.check {
            Check::Name(webpki, name) => webpki.verify_server_cert(leaf, others, name, ocsp, now),
            Check::Pin(pin) => {
                self.verify_pin(pin, leaf, others, host, now)?;
                Ok(ServerCertVerified::assertion())
            }
            Check::Nothing => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
