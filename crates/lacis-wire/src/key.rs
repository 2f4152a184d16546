//! Typed keys: machine, node, disco, relay, challenge and tailnet-lock keys.
//!
//! All are 32 bytes of Curve25519 (the tailnet-lock key is Ed25519 and opaque here); each kind is a
//! type of its own, so that a key cannot be used in another kind's place. Public keys are small
//! `Copy` values with a text form of prefix and 64 hex digits. Private keys print as `[redacted]`
//! and are wiped on drop. Text forms: the control protocol's key table (machine `mkey:`, node
//! `nodekey:`, disco `discokey:`, challenge `chalpub:`, lock `nlpub:`, relay bare hex).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use x25519_dalek::{PublicKey, StaticSecret, x25519};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes of every key, public or private.
pub const KEY_LEN: usize = 32;

/// The text prefix that all private keys share.
pub const PRIVATE_PREFIX: &str = "privkey:";

/// Why a text is not a key of the wanted kind.
///
/// The text itself is never part of the error: it may be a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The prefix that tells the kinds apart is another one or missing.
    #[error("not a {kind}: it must begin with `{prefix}`")]
    Prefix {
        /// What was wanted, such as `node key`.
        kind: &'static str,
        /// The prefix of that kind.
        prefix: &'static str,
    },
    /// Not exactly 64 digits after the prefix.
    #[error("not a {kind}: {found} characters where 64 hex digits are expected")]
    Length {
        /// What was wanted.
        kind: &'static str,
        /// How many characters there are after the prefix.
        found: usize,
    },
    /// A character that is no hex digit.
    #[error("not a {kind}: a character is not a hex digit")]
    Digit {
        /// What was wanted.
        kind: &'static str,
    },
}

fn parse_hex(kind: &'static str, prefix: &'static str, text: &str) -> Result<[u8; KEY_LEN], KeyError> {
    let digits = text.strip_prefix(prefix).ok_or(KeyError::Prefix { kind, prefix })?;
    if digits.len() != 2 * KEY_LEN {
        return Err(KeyError::Length { kind, found: digits.chars().count() });
    }
    let mut bytes = [0; KEY_LEN];
    hex::decode_to_slice(digits, &mut bytes).map_err(|_| KeyError::Digit { kind })?;
    Ok(bytes)
}

/// Sets the bits that X25519 fixes in every private key, as all clients do when they make one.
fn clamp(bytes: &mut [u8; KEY_LEN]) {
    bytes[0] &= 0xf8;
    bytes[31] = (bytes[31] & 0x7f) | 0x40;
}

/// X25519, refusing the all-zero result that a low-order public key gives.
///
/// `None` means that `public` is of low order: whoever sent it could have computed the shared
/// secret without any private key, so it proves nothing.
pub fn diffie_hellman(private: &[u8; KEY_LEN], public: &[u8; KEY_LEN]) -> Option<Zeroizing<[u8; KEY_LEN]>> {
    let shared = Zeroizing::new(x25519(*private, *public));
    let zero: bool = subtle::ConstantTimeEq::ct_eq(&shared[..], &[0; KEY_LEN][..]).into();
    (!zero).then_some(shared)
}

macro_rules! public_key {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name([u8; KEY_LEN]);

        impl $name {
            /// What the text form begins with.
            pub const PREFIX: &'static str = $prefix;

            /// The key with these raw bytes.
            pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
                Self(bytes)
            }

            /// The raw bytes.
            pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
                &self.0
            }

            /// Whether all bytes are zero: the wire's way to say "no key". Never an identity.
            pub fn is_zero(&self) -> bool {
                self.0 == [0; KEY_LEN]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut digits = [0; 2 * KEY_LEN];
                // The buffer is exactly large enough, so encoding cannot fail.
                hex::encode_to_slice(self.0, &mut digits).map_err(|_| fmt::Error)?;
                f.write_str(Self::PREFIX)?;
                f.write_str(std::str::from_utf8(&digits).map_err(|_| fmt::Error)?)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = KeyError;

            fn from_str(text: &str) -> Result<Self, KeyError> {
                parse_hex($kind, $prefix, text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl serde::de::Visitor<'_> for Text {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str(concat!("a ", $kind, " (`", $prefix, "` and 64 hex digits)"))
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        // Go writes an absent key of some kinds as an empty text.
                        if text.is_empty() {
                            return Ok($name::default());
                        }
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Text)
            }
        }
    };
}

macro_rules! private_key {
    ($(#[$doc:meta])* $name:ident => $public:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
        pub struct $name([u8; KEY_LEN]);

        impl $name {
            /// A fresh key from the system's random numbers, clamped.
            ///
            /// # Panics
            /// When the system has no random numbers to give: nothing safe can be done then.
            pub fn generate() -> Self {
                let mut key = Self([0; KEY_LEN]);
                getrandom::fill(&mut key.0).expect("the system gives random numbers");
                clamp(&mut key.0);
                key
            }

            /// The key with these raw bytes, taken as they are.
            pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
                Self(bytes)
            }

            /// A copy of the raw bytes that wipes itself.
            pub fn to_bytes(&self) -> Zeroizing<[u8; KEY_LEN]> {
                Zeroizing::new(self.0)
            }

            /// The public key that belongs to it.
            pub fn public(&self) -> $public {
                let secret = StaticSecret::from(self.0);
                $public(PublicKey::from(&secret).to_bytes())
            }

            /// The text form, `privkey:` and 64 hex digits, which wipes itself.
            pub fn to_text(&self) -> Zeroizing<String> {
                let mut text = Zeroizing::new(String::with_capacity(PRIVATE_PREFIX.len() + 2 * KEY_LEN));
                text.push_str(PRIVATE_PREFIX);
                for byte in self.0 {
                    for nibble in [byte >> 4, byte & 15] {
                        text.push(char::from_digit(u32::from(nibble), 16).unwrap_or('0'));
                    }
                }
                text
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("[redacted]")
            }
        }

        impl FromStr for $name {
            type Err = KeyError;

            fn from_str(text: &str) -> Result<Self, KeyError> {
                parse_hex($kind, PRIVATE_PREFIX, text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.to_text())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = Zeroizing::new(String::deserialize(deserializer)?);
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

public_key!(
    /// A device's Noise identity; the control server's own key is of this kind too.
    MachineKey, "machine key", "mkey:"
);
public_key!(
    /// WireGuard and DERP identity of a node; changes when it logs in anew.
    NodeKey, "node key", "nodekey:"
);
public_key!(
    /// Signs path-discovery messages; lives as long as the client's process, or longer.
    DiscoKey, "disco key", "discokey:"
);
public_key!(
    /// A DERP server's key; its text form has no prefix (`Derp-Public-Key` header).
    RelayKey, "relay key", ""
);
public_key!(
    /// A challenge of the early payload, fresh for each connection.
    ChallengeKey, "challenge key", "chalpub:"
);
public_key!(
    /// A tailnet-lock key, carried without being understood.
    LockKey, "tailnet-lock key", "nlpub:"
);

private_key!(
    /// The private half of a [`MachineKey`].
    MachinePrivateKey => MachineKey, "private machine key"
);
private_key!(
    /// The private half of a [`NodeKey`].
    NodePrivateKey => NodeKey, "private node key"
);
private_key!(
    /// The private half of a [`DiscoKey`].
    DiscoPrivateKey => DiscoKey, "private disco key"
);
private_key!(
    /// The private half of a [`RelayKey`].
    RelayPrivateKey => RelayKey, "private relay key"
);
private_key!(
    /// The private half of a [`ChallengeKey`].
    ChallengePrivateKey => ChallengeKey, "private challenge key"
);

impl NodeKey {
    /// The form that people compare keys by: the first five characters of the base64 in brackets.
    pub fn short(&self) -> String {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.encode(self.0);
        format!("[{}]", &text[..5])
    }
}

impl DiscoKey {
    /// The form that people compare keys by: `d:` and the first 16 hex digits.
    pub fn short(&self) -> String {
        format!("d:{}", hex::encode(&self.0[..8]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_forms_have_the_lengths_of_the_protocol() {
        assert_eq!(MachineKey::default().to_string().len(), 69);
        assert_eq!(NodeKey::default().to_string().len(), 72);
        assert_eq!(DiscoKey::default().to_string().len(), 73);
        assert_eq!(ChallengeKey::default().to_string().len(), 72);
        assert_eq!(LockKey::default().to_string().len(), 70);
        assert_eq!(RelayKey::default().to_string().len(), 64);
        assert_eq!(NodePrivateKey::generate().to_text().len(), 72);
    }

    #[test]
    fn the_public_key_is_the_one_of_the_published_vector() {
        let key = MachinePrivateKey::from_bytes([1; 32]);
        assert_eq!(
            key.public().to_string(),
            "mkey:a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209"
        );
    }

    #[test]
    fn generated_keys_are_clamped_and_differ() {
        let one = NodePrivateKey::generate();
        let bytes = one.to_bytes();
        assert_eq!(bytes[0] & 7, 0);
        assert_eq!(bytes[31] & 0xc0, 0x40);
        assert_ne!(one, NodePrivateKey::generate());
    }

    #[test]
    fn private_keys_never_print() {
        let key = NodePrivateKey::generate();
        assert_eq!(format!("{key:?}"), "[redacted]");
        let text = key.to_text();
        assert_eq!(text.parse::<NodePrivateKey>().unwrap(), key);
    }

    #[test]
    fn another_kinds_prefix_is_refused_and_upper_case_digits_are_not() {
        let text = NodeKey::from_bytes([0xab; 32]).to_string();
        assert_eq!(
            text.parse::<MachineKey>().unwrap_err().to_string(),
            "not a machine key: it must begin with `mkey:`"
        );
        let upper = format!("nodekey:{}", "AB".repeat(32));
        assert_eq!(upper.parse::<NodeKey>().unwrap(), NodeKey::from_bytes([0xab; 32]));
        assert!(format!("NODEKEY:{}", "ab".repeat(32)).parse::<NodeKey>().is_err());
        assert!(format!("nodekey:{}", "ab".repeat(31)).parse::<NodeKey>().is_err());
        assert!(format!("nodekey:{}g", "a".repeat(63)).parse::<NodeKey>().is_err());
    }

    #[test]
    fn low_order_points_give_no_shared_secret() {
        let private = MachinePrivateKey::generate().to_bytes();
        assert!(diffie_hellman(&private, &[0; 32]).is_none());
        let mut one = [0; 32];
        one[0] = 1;
        assert!(diffie_hellman(&private, &one).is_none());
        let peer = MachinePrivateKey::generate();
        assert!(diffie_hellman(&private, peer.public().as_bytes()).is_some());
    }

    #[test]
    fn keys_work_as_json_map_keys_and_values() {
        let key = NodeKey::from_bytes([7; 32]);
        let map = std::collections::BTreeMap::from([(key, key)]);
        let text = serde_json::to_string(&map).unwrap();
        assert_eq!(serde_json::from_str::<std::collections::BTreeMap<NodeKey, NodeKey>>(&text).unwrap(), map);
        assert_eq!(serde_json::from_str::<NodeKey>("\"\"").unwrap(), NodeKey::default());
    }

    proptest! {
        #[test]
        fn public_keys_survive_their_text_form(bytes: [u8; 32]) {
            let key = DiscoKey::from_bytes(bytes);
            prop_assert_eq!(key.to_string().parse::<DiscoKey>().unwrap(), key);
            prop_assert_eq!(serde_json::from_str::<DiscoKey>(&serde_json::to_string(&key).unwrap()).unwrap(), key);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,90}") {
            let _ = text.parse::<NodeKey>();
            let _ = text.parse::<RelayKey>();
            let _ = text.parse::<NodePrivateKey>();
            let _ = format!("nodekey:{text}").parse::<NodeKey>();
        }
    }
}
