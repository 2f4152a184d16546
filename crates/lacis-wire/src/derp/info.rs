//! The two sealed JSON documents of the login, and the NaCl box they travel in.
//!
//! Keys on the wire are exactly Go's. Decoding ignores case and unknown keys, as Go does; `mesh_key`, which
//! one client family sends, is an unknown key and not `meshKey`.

use bytes::{BufMut, Bytes, BytesMut};
use crypto_box::SalsaBox;
use crypto_box::aead::Aead;
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use subtle::ConstantTimeEq;
use zeroize::ZeroizeOnDrop;

use super::{Error, NONCE_LEN, PROTOCOL_VERSION, TAG_LEN};
use crate::key::{NodeKey, NodePrivateKey, RelayKey, RelayPrivateKey};

/// 24 fresh random bytes.
///
/// # Panics
/// If the system has no randomness, where nothing else is safe to do.
pub fn random_nonce() -> [u8; NONCE_LEN] {
    let mut nonce = [0; NONCE_LEN];
    getrandom::fill(&mut nonce).expect("the system gives randomness");
    nonce
}

/// The shared secret of one (node, relay) pair. Making it costs one X25519: make it once a login.
pub struct LoginBox(SalsaBox);

impl std::fmt::Debug for LoginBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LoginBox([redacted])")
    }
}

impl LoginBox {
    /// The client's side.
    pub fn client(node: &NodePrivateKey, relay: &RelayKey) -> Self {
        Self::new(*node.to_bytes(), *relay.as_bytes())
    }

    /// The relay's side.
    pub fn server(relay: &RelayPrivateKey, node: &NodeKey) -> Self {
        Self::new(*relay.to_bytes(), *node.as_bytes())
    }

    fn new(private: [u8; 32], public: [u8; 32]) -> Self {
        let private = crypto_box::SecretKey::from(private);
        Self(SalsaBox::new(&crypto_box::PublicKey::from(public), &private))
    }

    /// Any document, sealed: nonce ‖ tag ‖ ciphertext. [`ClientInfo::seal`] and [`ServerInfo::seal`] make the two of the protocol.
    pub fn seal_document(&self, nonce: [u8; NONCE_LEN], plain: &[u8]) -> Bytes {
        // XSalsa20-Poly1305 refuses only messages beyond its 256 GiB limit
        let sealed = self.0.encrypt((&nonce).into(), plain).unwrap_or_default();
        let mut out = BytesMut::with_capacity(NONCE_LEN + sealed.len());
        out.put_slice(&nonce);
        out.put_slice(&sealed);
        out.freeze()
    }

    pub(super) fn open(&self, sealed: &[u8]) -> Result<Vec<u8>, Error> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(Error::Box)?;
        if sealed.len() < TAG_LEN {
            return Err(Error::Box);
        }
        self.0.decrypt(nonce.into(), sealed).map_err(|_| Error::Box)
    }
}

/// The secret that relays of one region share. Compared in constant time, never printed.
#[derive(Clone, ZeroizeOnDrop)]
pub struct MeshKey([u8; 32]);

impl MeshKey {
    /// From its 64 hex digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut key = [0; 32];
        hex::decode_to_slice(text, &mut key).ok()?;
        Some(Self(key))
    }
}

impl PartialEq for MeshKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for MeshKey {}

impl std::fmt::Debug for MeshKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MeshKey([redacted])")
    }
}

/// What a client says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientInfo {
    /// Shown by another relay of the region.
    pub mesh_key: Option<MeshKey>,
    /// Protocol version, 2.
    pub version: i64,
    /// Answers `Ping` with `Pong`.
    pub can_ack_pings: bool,
    /// A monitoring client.
    pub is_prober: bool,
    /// The application that embeds the client; often empty.
    pub app_name: String,
}

impl Default for ClientInfo {
    fn default() -> Self {
        Self {
            mesh_key: None,
            version: PROTOCOL_VERSION.into(),
            can_ack_pings: true,
            is_prober: false,
            app_name: String::new(),
        }
    }
}

impl ClientInfo {
    /// The body of a `ClientInfo` frame after the key.
    pub fn seal(&self, login: &LoginBox, nonce: [u8; NONCE_LEN]) -> Bytes {
        let mut object = Map::new();
        if let Some(key) = &self.mesh_key {
            object.insert("meshKey".into(), hex::encode(key.0).into());
        }
        object.insert("version".into(), self.version.into());
        object.insert("CanAckPings".into(), self.can_ack_pings.into());
        object.insert("IsProber".into(), self.is_prober.into());
        if !self.app_name.is_empty() {
            object.insert("AppName".into(), self.app_name.clone().into());
        }
        login.seal_document(nonce, Value::Object(object).to_string().as_bytes())
    }

    /// Opens what [`Self::seal`] or a stock client made.
    pub fn open(login: &LoginBox, sealed: &[u8]) -> Result<Self, Error> {
        let object = Object::parse(&login.open(sealed)?)?;
        let mesh_key = match object.text("meshKey")? {
            "" => None,
            text => Some(
                MeshKey::from_hex(text).ok_or_else(|| Error::Json("meshKey is not 64 hex digits".into()))?,
            ),
        };
        Ok(Self {
            mesh_key,
            version: object.int("version")?,
            can_ack_pings: object.bool("CanAckPings")?,
            is_prober: object.bool("IsProber")?,
            app_name: object.text("AppName")?.to_owned(),
        })
    }
}

/// What a relay says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerInfo {
    /// Protocol version, 2. Always sent: one client family refuses a relay without it.
    pub version: i64,
    /// The rate the client shall keep, 0 for none.
    pub bytes_per_second: i64,
    /// How much it may send at once.
    pub bytes_burst: i64,
}

impl Default for ServerInfo {
    fn default() -> Self {
        Self { version: PROTOCOL_VERSION.into(), bytes_per_second: 0, bytes_burst: 0 }
    }
}

impl ServerInfo {
    /// The body of a `ServerInfo` frame.
    pub fn seal(&self, login: &LoginBox, nonce: [u8; NONCE_LEN]) -> Bytes {
        let mut object = Map::new();
        object.insert("version".into(), self.version.into());
        if self.bytes_per_second != 0 {
            object.insert("TokenBucketBytesPerSecond".into(), self.bytes_per_second.into());
        }
        if self.bytes_burst != 0 {
            object.insert("TokenBucketBytesBurst".into(), self.bytes_burst.into());
        }
        login.seal_document(nonce, Value::Object(object).to_string().as_bytes())
    }

    /// Opens what [`Self::seal`] or a stock relay made.
    pub fn open(login: &LoginBox, sealed: &[u8]) -> Result<Self, Error> {
        let object = Object::parse(&login.open(sealed)?)?;
        Ok(Self {
            version: object.int("version")?,
            bytes_per_second: object.int("TokenBucketBytesPerSecond")?,
            bytes_burst: object.int("TokenBucketBytesBurst")?,
        })
    }
}

/// The members that the two documents have. Of what the other side writes nothing else is kept: a document of `{}` and
/// commas would be ninety times as large in memory as on the wire.
const MEMBERS: [&str; 7] = [
    "meshKey",
    "version",
    "CanAckPings",
    "IsProber",
    "AppName",
    "TokenBucketBytesPerSecond",
    "TokenBucketBytesBurst",
];

/// A JSON object read the way Go reads one: key case is ignored, null and absent mean the zero value, the last one of
/// a name counts.
#[derive(Debug)]
struct Object([Option<Scalar>; MEMBERS.len()]);

#[derive(Debug, PartialEq, Eq)]
enum Scalar {
    Bool(bool),
    Int(i64),
    Text(String),
    /// Something that no member may be.
    Other,
}

impl Object {
    fn parse(json: &[u8]) -> Result<Self, Error> {
        serde_json::from_slice(json).map_err(|error| Error::Json(error.to_string()))
    }

    fn get(&self, name: &str) -> Option<&Scalar> {
        let at = MEMBERS.iter().position(|member| *member == name)?;
        self.0[at].as_ref()
    }

    fn int(&self, name: &str) -> Result<i64, Error> {
        match self.get(name) {
            None => Ok(0),
            Some(Scalar::Int(value)) => Ok(*value),
            Some(_) => Err(Error::Json(format!("{name} is not a whole number"))),
        }
    }

    fn bool(&self, name: &str) -> Result<bool, Error> {
        match self.get(name) {
            None => Ok(false),
            Some(Scalar::Bool(value)) => Ok(*value),
            Some(_) => Err(Error::Json(format!("{name} is not true or false"))),
        }
    }

    fn text(&self, name: &str) -> Result<&str, Error> {
        match self.get(name) {
            None => Ok(""),
            Some(Scalar::Text(value)) => Ok(value),
            Some(_) => Err(Error::Json(format!("{name} is not text"))),
        }
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Object;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut object = Object(Default::default());
                while let Some(key) = map.next_key::<String>()? {
                    match MEMBERS.iter().position(|member| key.eq_ignore_ascii_case(member)) {
                        Some(at) => {
                            object.0[at] = map.next_value::<Option<Scalar>>()?.or(object.0[at].take());
                        }
                        None => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(object)
            }
        }

        deserializer.deserialize_map(Members)
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Scalar;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("any value")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Scalar, E> {
                Ok(Scalar::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Scalar, E> {
                Ok(Scalar::Int(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Scalar, E> {
                Ok(i64::try_from(value).map_or(Scalar::Other, Scalar::Int))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Scalar, E> {
                Ok(Scalar::Other)
            }

            fn visit_str<E>(self, value: &str) -> Result<Scalar, E> {
                Ok(Scalar::Text(value.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Scalar, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scalar, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other)
            }
        }

        deserializer.deserialize_any(Any)
    }
}
