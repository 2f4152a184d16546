//! Pre-auth keys: `lacis-auth-ID-SECRET`. The id may be shown and finds the key; of the secret only its SHA-256 is
//! kept, which is enough for 192 random bits.

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

const PREFIX: &str = "lacis-auth-";
const ID_BYTES: usize = 6;
const SECRET_BYTES: usize = 24;

/// A key that was just made.
pub struct NewKey {
    pub id: String,
    pub hash: [u8; 32],
    /// The whole key. It is told once.
    pub text: Zeroizing<String>,
}

impl std::fmt::Debug for NewKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Makes a key.
///
/// # Errors
/// When the system has no randomness.
pub fn generate() -> Result<NewKey, getrandom::Error> {
    let mut id = [0; ID_BYTES];
    let mut secret = Zeroizing::new([0; SECRET_BYTES]);
    getrandom::fill(&mut id)?;
    getrandom::fill(&mut secret[..])?;
    let id = hex::encode(id);
    let secret = Zeroizing::new(hex::encode(&secret[..]));
    Ok(NewKey { hash: hash(&secret), text: Zeroizing::new(format!("{PREFIX}{id}-{}", *secret)), id })
}

/// Splits a key into id and secret; `None` when it is no key of ours.
pub fn parse(text: &str) -> Option<(&str, &str)> {
    let (id, secret) = text.trim().strip_prefix(PREFIX)?.split_once('-')?;
    let hexadecimal =
        |text: &str, bytes: usize| text.len() == 2 * bytes && text.bytes().all(|b| b.is_ascii_hexdigit());
    (hexadecimal(id, ID_BYTES) && hexadecimal(secret, SECRET_BYTES)).then_some((id, secret))
}

/// Is this the secret of that hash? Takes the same time whatever differs.
pub fn matches(secret: &str, expected: &[u8; 32]) -> bool {
    hash(secret).ct_eq(expected).into()
}

fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_is_recognised_and_another_is_not() {
        let key = generate().unwrap();
        let (id, secret) = parse(&key.text).unwrap();
        assert_eq!(id, key.id);
        assert!(matches(secret, &key.hash));
        assert!(!matches(&secret.replace(&secret[..1], "x"), &key.hash));
        assert!(!format!("{key:?}").contains(secret));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for text in ["", "lacis-auth-", "lacis-auth-abc-def", "tskey-auth-xyz", "lacis-auth-ffffffffffff"] {
            assert!(parse(text).is_none(), "{text}");
        }
    }
}
