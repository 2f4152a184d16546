//! STUN: the two messages a mesh client and its relay exchange to learn the client's public address.
//!
//! Used by the relay's STUN server (strict: it answers only clients of this kind, so it is no reflector for
//! others) and by the client's netcheck. RFC 8489 framing; no sockets, the transaction id comes in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The default UDP port of a relay's STUN server.
pub const DEFAULT_PORT: u16 = 3478;
/// Size of a request as [`request`] builds it.
pub const REQUEST_LEN: usize = 40;
/// Size of the largest answer (IPv6).
pub const MAX_RESPONSE_LEN: usize = 44;

/// The longest datagram that is taken for STUN: any response with an address and some attributes that nobody needs.
pub const MAX_LEN: usize = 1280;

const HEADER_LEN: usize = 20;
const BINDING_REQUEST: u16 = 0x0001;
const BINDING_SUCCESS: u16 = 0x0101;
const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const ATTR_MAPPED_ADDRESS: u16 = 0x0001;
const ATTR_XOR_MAPPED_ADDRESS: u16 = 0x0020;
/// The code an early draft used; some servers still send it.
const ATTR_XOR_MAPPED_ADDRESS_DRAFT: u16 = 0x8020;
const ATTR_SOFTWARE: u16 = 0x8022;
const ATTR_FINGERPRINT: u16 = 0x8028;
/// What every client of this family calls itself.
const SOFTWARE: &[u8; 8] = b"tailnode";
/// RFC 8489 §14.7: keeps the CRC apart from other users of CRC-32.
const FINGERPRINT_XOR: u32 = 0x5354_554e;

/// A transaction id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TxId(pub [u8; 12]);

impl TxId {
    /// A fresh random one.
    ///
    /// # Panics
    /// If the system has no randomness.
    pub fn random() -> Self {
        let mut id = [0; 12];
        getrandom::fill(&mut id).expect("the system gives randomness");
        Self(id)
    }
}

/// Why a datagram is not the message wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not STUN at all.
    #[error("not a STUN message")]
    NotStun,
    /// Another message type.
    #[error("a STUN message of another type")]
    WrongType,
    /// Ends before its parts do.
    #[error("a STUN message that ends too early")]
    Truncated,
    /// A request without the SOFTWARE value of mesh clients.
    #[error("a STUN request from other software")]
    WrongSoftware,
    /// A request without a FINGERPRINT at its end.
    #[error("a STUN request without a fingerprint at its end")]
    NoFingerprint,
    /// A fingerprint that does not fit.
    #[error("a STUN request with a wrong fingerprint")]
    WrongFingerprint,
    /// A response without an address.
    #[error("a STUN response without an address")]
    NoAddress,
}

/// Whether a datagram on a socket shared with WireGuard and disco is STUN.
pub fn looks_like(datagram: &[u8]) -> bool {
    (HEADER_LEN..=MAX_LEN).contains(&datagram.len()) && datagram[0] & 0xc0 == 0 && datagram[4..8] == COOKIE
}

/// The 40 bytes of a binding request.
pub fn request(id: TxId) -> [u8; REQUEST_LEN] {
    let mut out = [0; REQUEST_LEN];
    out[..2].copy_from_slice(&BINDING_REQUEST.to_be_bytes());
    out[2..4].copy_from_slice(&((REQUEST_LEN - HEADER_LEN) as u16).to_be_bytes());
    out[4..8].copy_from_slice(&COOKIE);
    out[8..20].copy_from_slice(&id.0);
    out[20..22].copy_from_slice(&ATTR_SOFTWARE.to_be_bytes());
    out[22..24].copy_from_slice(&(SOFTWARE.len() as u16).to_be_bytes());
    out[24..32].copy_from_slice(SOFTWARE);
    let fingerprint = fingerprint(&out[..32]);
    out[32..34].copy_from_slice(&ATTR_FINGERPRINT.to_be_bytes());
    out[34..36].copy_from_slice(&4_u16.to_be_bytes());
    out[36..].copy_from_slice(&fingerprint.to_be_bytes());
    out
}

/// Reads a request as a server must: the right software, an intact fingerprint as last attribute. Whatever is
/// not that gets no answer.
pub fn parse_request(datagram: &[u8]) -> Result<TxId, Error> {
    let message = Message::parse(datagram)?;
    if message.kind != BINDING_REQUEST {
        return Err(Error::WrongType);
    }
    if message.body.len() != message.declared {
        return Err(Error::Truncated);
    }
    let (mut software, mut last) = (false, None);
    for attribute in message.attributes() {
        let attribute = attribute?;
        software |= attribute.kind == ATTR_SOFTWARE && attribute.value == SOFTWARE;
        last = Some(attribute);
    }
    let Some(Attribute { kind: ATTR_FINGERPRINT, value, offset }) = last else {
        return Err(Error::NoFingerprint);
    };
    if !software {
        return Err(Error::WrongSoftware);
    }
    if value != fingerprint(&datagram[..HEADER_LEN + offset]).to_be_bytes() {
        return Err(Error::WrongFingerprint);
    }
    Ok(message.id)
}

/// A success response: 32 bytes for IPv4 (also when it comes as `::ffff:a.b.c.d`), 44 for IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    bytes: [u8; MAX_RESPONSE_LEN],
    len: usize,
}

impl Response {
    /// The answer that tells `client` its own address.
    pub fn new(id: TxId, client: SocketAddr) -> Self {
        let mut bytes = [0; MAX_RESPONSE_LEN];
        let mask = mask(id);
        let (family, ip_len) = match client.ip().to_canonical() {
            IpAddr::V4(ip) => {
                for (out, (byte, mask)) in bytes[28..32].iter_mut().zip(ip.octets().iter().zip(mask)) {
                    *out = byte ^ mask;
                }
                (1, 4)
            }
            IpAddr::V6(ip) => {
                for (out, (byte, mask)) in bytes[28..44].iter_mut().zip(ip.octets().iter().zip(mask)) {
                    *out = byte ^ mask;
                }
                (2, 16)
            }
        };
        bytes[..2].copy_from_slice(&BINDING_SUCCESS.to_be_bytes());
        bytes[2..4].copy_from_slice(&(8 + ip_len as u16).to_be_bytes());
        bytes[4..8].copy_from_slice(&COOKIE);
        bytes[8..20].copy_from_slice(&id.0);
        bytes[20..22].copy_from_slice(&ATTR_XOR_MAPPED_ADDRESS.to_be_bytes());
        bytes[22..24].copy_from_slice(&(4 + ip_len as u16).to_be_bytes());
        bytes[25] = family;
        bytes[26..28].copy_from_slice(&(client.port() ^ 0x2112).to_be_bytes());
        Self { bytes, len: 28 + ip_len }
    }

    /// The datagram.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Reads a response as a client does: any of the three address attributes, the XOR forms first; bytes beyond
/// the stated length are tolerated.
pub fn parse_response(datagram: &[u8]) -> Result<(TxId, SocketAddr), Error> {
    let message = Message::parse(datagram)?;
    if message.kind != BINDING_SUCCESS {
        return Err(Error::WrongType);
    }
    let (mut xored, mut plain) = (None, None);
    for attribute in message.attributes() {
        let attribute = attribute?;
        match attribute.kind {
            ATTR_XOR_MAPPED_ADDRESS | ATTR_XOR_MAPPED_ADDRESS_DRAFT => {
                xored = xored.or_else(|| address(attribute.value, Some(mask(message.id))));
            }
            ATTR_MAPPED_ADDRESS => plain = plain.or_else(|| address(attribute.value, None)),
            _ => {}
        }
    }
    Ok((message.id, xored.or(plain).ok_or(Error::NoAddress)?))
}

fn mask(id: TxId) -> [u8; 16] {
    let mut mask = [0; 16];
    mask[..4].copy_from_slice(&COOKIE);
    mask[4..].copy_from_slice(&id.0);
    mask
}

fn address(value: &[u8], mask: Option<[u8; 16]>) -> Option<SocketAddr> {
    let port_mask = if mask.is_some() { 0x2112 } else { 0 };
    let mask = mask.unwrap_or_default();
    let (&[_, family, high, low], ip) = value.split_first_chunk::<4>()?;
    let ip = match family {
        1 => {
            let ip: [u8; 4] = *ip.first_chunk()?;
            IpAddr::V4(Ipv4Addr::from(std::array::from_fn::<u8, 4, _>(|i| ip[i] ^ mask[i])))
        }
        2 => {
            let ip: [u8; 16] = *ip.first_chunk()?;
            IpAddr::V6(Ipv6Addr::from(std::array::from_fn::<u8, 16, _>(|i| ip[i] ^ mask[i])))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), u16::from_be_bytes([high, low]) ^ port_mask))
}

fn fingerprint(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes) ^ FINGERPRINT_XOR
}

struct Message<'a> {
    kind: u16,
    id: TxId,
    /// The length field.
    declared: usize,
    /// At most `declared` bytes after the header.
    body: &'a [u8],
}

struct Attribute<'a> {
    kind: u16,
    value: &'a [u8],
    /// Where the attribute starts in the body.
    offset: usize,
}

impl<'a> Message<'a> {
    fn parse(datagram: &'a [u8]) -> Result<Self, Error> {
        if !looks_like(datagram) {
            return Err(Error::NotStun);
        }
        let declared = usize::from(u16::from_be_bytes([datagram[2], datagram[3]]));
        let mut id = [0; 12];
        id.copy_from_slice(&datagram[8..HEADER_LEN]);
        let body = &datagram[HEADER_LEN..];
        if body.len() < declared {
            return Err(Error::Truncated);
        }
        let kind = u16::from_be_bytes([datagram[0], datagram[1]]);
        Ok(Self { kind, id: TxId(id), declared, body: &body[..declared] })
    }

    fn attributes(&self) -> impl Iterator<Item = Result<Attribute<'a>, Error>> + use<'a> {
        let body = self.body;
        let mut offset = 0;
        std::iter::from_fn(move || {
            let rest = body.get(offset..).filter(|rest| !rest.is_empty())?;
            let Some((&[k0, k1, l0, l1], rest)) = rest.split_first_chunk::<4>() else {
                offset = body.len();
                return Some(Err(Error::Truncated));
            };
            let len = usize::from(u16::from_be_bytes([l0, l1]));
            let Some(value) = rest.get(..len) else {
                offset = body.len();
                return Some(Err(Error::Truncated));
            };
            let attribute = Attribute { kind: u16::from_be_bytes([k0, k1]), value, offset };
            // values are padded to four bytes
            offset += 4 + len.next_multiple_of(4);
            Some(Ok(attribute))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: TxId = TxId([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);

    #[test]
    fn a_request_has_the_bytes_of_the_protocol() {
        let bytes = request(ID);
        assert_eq!(
            hex::encode(&bytes[..36]),
            "000100142112a4420102030405060708090a0b0c802200087461696c6e6f646580280004"
        );
        assert_eq!(bytes[36..], (crc32fast::hash(&bytes[..32]) ^ 0x5354_554e).to_be_bytes());
        assert_eq!(parse_request(&bytes), Ok(ID));
    }

    #[test]
    fn an_ipv4_client_gets_32_bytes_also_through_a_dual_stack_socket() {
        let plain = Response::new(ID, "192.0.2.1:32853".parse().unwrap());
        assert_eq!(
            hex::encode(plain.as_bytes()),
            "0101000c2112a4420102030405060708090a0b0c002000080001a147e112a643"
        );
        let mapped = Response::new(ID, "[::ffff:192.0.2.1]:32853".parse().unwrap());
        assert_eq!(plain, mapped);
    }

    #[test]
    fn a_foreign_request_gets_no_answer() {
        let mut other = request(ID);
        other[24..32].copy_from_slice(b"othersw!");
        assert_eq!(parse_request(&other), Err(Error::WrongSoftware));
        let mut damaged = request(ID);
        damaged[39] ^= 1;
        assert_eq!(parse_request(&damaged), Err(Error::WrongFingerprint));
        let mut bare = request(ID)[..20].to_vec();
        bare[2..4].copy_from_slice(&[0, 0]);
        assert_eq!(parse_request(&bare), Err(Error::NoFingerprint));
        let mut trailing = request(ID).to_vec();
        trailing.push(0);
        assert!(
            parse_request(&trailing).is_ok(),
            "bytes beyond the stated length are not part of the message"
        );
    }

    #[test]
    fn the_draft_and_the_plain_attribute_are_understood() {
        let client: SocketAddr = "192.0.2.1:32853".parse().unwrap();
        let mut draft = Response::new(ID, client).as_bytes().to_vec();
        draft[20..22].copy_from_slice(&0x8020_u16.to_be_bytes());
        assert_eq!(parse_response(&draft), Ok((ID, client)));
        let mut plain = draft[..20].to_vec();
        plain.extend_from_slice(&[0, 1, 0, 8, 0, 1, 0x80, 0x55, 192, 0, 2, 1]);
        assert_eq!(parse_response(&plain), Ok((ID, client)));
    }

    #[test]
    fn a_response_is_no_request_and_the_other_way_round() {
        assert_eq!(parse_response(&request(ID)), Err(Error::WrongType));
        let response = Response::new(ID, "192.0.2.1:1".parse().unwrap());
        assert_eq!(parse_request(response.as_bytes()), Err(Error::WrongType));
    }

    proptest! {
        #[test]
        fn every_address_comes_back(id: [u8; 12], ip: IpAddr, port: u16, extra in 0_usize..5) {
            let mut bytes = Response::new(TxId(id), SocketAddr::new(ip, port)).as_bytes().to_vec();
            bytes.resize(bytes.len() + extra, 0);
            let (got, address) = parse_response(&bytes).unwrap();
            prop_assert_eq!(got, TxId(id));
            prop_assert_eq!(address, SocketAddr::new(ip.to_canonical(), port));
        }

        #[test]
        fn a_truncated_message_is_refused(id: [u8; 12], cut in 0_usize..REQUEST_LEN) {
            prop_assert!(parse_request(&request(TxId(id))[..cut]).is_err());
            let response = Response::new(TxId(id), "192.0.2.7:1".parse().unwrap());
            prop_assert!(parse_response(&response.as_bytes()[..cut.min(31)]).is_err());
        }

        #[test]
        fn noise_never_panics(mut bytes: Vec<u8>, stun: bool) {
            if stun && bytes.len() >= 8 { bytes[0] &= 1; bytes[4..8].copy_from_slice(&COOKIE); }
            let _ = parse_request(&bytes);
            let _ = parse_response(&bytes);
        }
    }
}
