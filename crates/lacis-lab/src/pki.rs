//! A throw-away certificate authority and certificates for the hosts' names, so that TLS in the lab is real.
//!
//! Programs trust it through `SSL_CERT_FILE` and through each host's own `/etc/ssl/certs`.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

/// The authority of one run.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

/// A certificate and its key, in PEM form.
#[derive(Clone)]
pub struct Identity {
    /// The certificate, with the authority's after it.
    pub certificate: String,
    /// The private key.
    pub key: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity([redacted])")
    }
}

impl Authority {
    /// Makes a new authority.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "lab authority, of one run");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer =
            CertifiedIssuer::self_signed(params, KeyPair::generate()?).context("cannot make an authority")?;
        Ok(Self { issuer })
    }

    /// Its own certificate.
    pub fn certificate(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for names and addresses.
    pub fn issue(&self, names: Vec<String>) -> Result<Identity> {
        let common = names.first().cloned().unwrap_or_default();
        let mut params = CertificateParams::new(names).context("not names that a certificate can have")?;
        params.distinguished_name.push(DnType::CommonName, common);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Identity { certificate: certificate.pem() + &self.issuer.pem(), key: key.serialize_pem() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_gets_a_certificate_with_its_issuer_after_it() {
        let authority = Authority::new().unwrap();
        let identity = authority.issue(vec!["mesh.example.org".into(), "198.51.100.10".into()]).unwrap();
        assert_eq!(identity.certificate.matches("BEGIN CERTIFICATE").count(), 2);
        assert!(identity.certificate.ends_with(&authority.certificate()));
        assert!(identity.key.contains("PRIVATE KEY"));
    }
}
