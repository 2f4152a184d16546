//! PCP (RFC 6887) and its predecessor NAT-PMP (RFC 6886): both ask the router on UDP port 5351 in a few bytes.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::{LEASE, Refused, Router};
use crate::marked;

/// How long each of the requests waits for its answer before the next is sent; routers are near.
const PATIENCE: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(300)];
const UDP: u8 = 17;
/// Set in the operation code of answers.
const ANSWER: u8 = 0x80;
const PCP: u8 = 2;
const PCP_ANNOUNCE: u8 = 0;
const PCP_MAP: u8 = 1;
const PCP_MAP_LEN: usize = 60;
const PMP: u8 = 0;
const PMP_ADDRESS: u8 = 0;
const PMP_MAP_UDP: u8 = 1;

/// What a router granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Granted {
    pub(super) external: SocketAddrV4,
    pub(super) lifetime: Duration,
}

/// What comes back, as far as it is an answer at all.
type Answer<T> = Option<Result<T, Refused>>;

/// A name for one mapping, by which the router knows its owner again.
pub(super) type Nonce = [u8; 12];

fn bytes<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..)?.first_chunk().copied()
}

fn seconds(data: &[u8], at: usize) -> Option<Duration> {
    Some(Duration::from_secs(u32::from_be_bytes(bytes(data, at)?).into()))
}

fn lease(lifetime: Duration) -> [u8; 4] {
    u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX).to_be_bytes()
}

/// The 24 bytes that every PCP request begins with.
fn pcp_head(operation: u8, lifetime: Duration, own: Ipv4Addr) -> Vec<u8> {
    let mut out = vec![PCP, operation, 0, 0];
    out.extend(lease(lifetime));
    out.extend(own.to_ipv6_mapped().octets());
    out
}

fn pcp_map(
    own: Ipv4Addr,
    nonce: &Nonce,
    port: u16,
    wish: Option<SocketAddrV4>,
    lifetime: Duration,
) -> Vec<u8> {
    let wish = wish.unwrap_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    let mut out = pcp_head(PCP_MAP, lifetime, own);
    out.extend(nonce);
    out.extend([UDP, 0, 0, 0]);
    out.extend(port.to_be_bytes());
    out.extend(wish.port().to_be_bytes());
    out.extend(wish.ip().to_ipv6_mapped().octets());
    out
}

fn pcp_answer(data: &[u8], operation: u8) -> Answer<()> {
    match *data {
        [PCP, code, _, result, ..] if code == operation | ANSWER && data.len() >= 24 => {
            Some(if result == 0 { Ok(()) } else { Err(Refused(result.into())) })
        }
        // A router that speaks NAT-PMP only answers in that: "unsupported version".
        [PMP, code, ..] if code & ANSWER != 0 => Some(Err(Refused(1))),
        _ => None,
    }
}

pub(super) fn pcp_mapped(data: &[u8], nonce: &Nonce, port: u16) -> Answer<Granted> {
    if let Err(refused) = pcp_answer(data, PCP_MAP)? {
        return Some(Err(refused));
    }
    let ours = data.len() >= PCP_MAP_LEN
        && bytes(data, 24) == Some(*nonce)
        && data[36] == UDP
        && bytes(data, 40) == Some(port.to_be_bytes());
    let external_port = u16::from_be_bytes(bytes(data, 42)?);
    let external = std::net::Ipv6Addr::from(bytes::<16>(data, 44)?).to_ipv4_mapped()?;
    let granted =
        Granted { external: SocketAddrV4::new(external, external_port), lifetime: seconds(data, 4)? };
    ours.then_some(Ok(granted))
}

fn pmp_map(port: u16, wish: u16, lifetime: Duration) -> Vec<u8> {
    let mut out = vec![PMP, PMP_MAP_UDP, 0, 0];
    out.extend(port.to_be_bytes());
    out.extend(wish.to_be_bytes());
    out.extend(lease(lifetime));
    out
}

fn pmp_answer(data: &[u8], operation: u8) -> Answer<()> {
    let [PMP, code, high, low, ..] = *data else { return None };
    let result = u16::from_be_bytes([high, low]);
    (code == operation | ANSWER).then_some(if result == 0 { Ok(()) } else { Err(Refused(result)) })
}

pub(super) fn pmp_address(data: &[u8]) -> Answer<Ipv4Addr> {
    match pmp_answer(data, PMP_ADDRESS)? {
        Ok(()) => Some(Ok(Ipv4Addr::from(bytes::<4>(data, 8)?))),
        Err(refused) => Some(Err(refused)),
    }
}

/// The external port, and for how long.
pub(super) fn pmp_mapped(data: &[u8], port: u16) -> Answer<(u16, Duration)> {
    if let Err(refused) = pmp_answer(data, PMP_MAP_UDP)? {
        return Some(Err(refused));
    }
    let ours = bytes(data, 8)? == port.to_be_bytes();
    let granted = (u16::from_be_bytes(bytes(data, 10)?), seconds(data, 12)?);
    ours.then_some(Ok(granted))
}

/// Talks to one router.
pub(super) struct Client {
    socket: UdpSocket,
    router: Router,
}

impl Client {
    pub(super) async fn new(router: Router, fwmark: Option<u32>) -> io::Result<Self> {
        let socket = marked::udp(SocketAddrV4::new(router.own, 0).into(), fwmark)?;
        socket.connect(SocketAddrV4::new(router.address, router.pcp_port)).await?;
        Ok(Self { socket, router })
    }

    async fn ask<T>(&self, request: &[u8], read: impl Fn(&[u8]) -> Answer<T>) -> io::Result<T> {
        let mut buffer = [0; 1100];
        for patience in PATIENCE {
            self.socket.send(request).await?;
            let answer = timeout(patience, async {
                loop {
                    let len = self.socket.recv(&mut buffer).await?;
                    if let Some(answer) = read(&buffer[..len]) {
                        return Ok::<_, io::Error>(answer);
                    }
                }
            });
            if let Ok(answer) = answer.await {
                return answer?.map_err(io::Error::other);
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Does the router speak PCP, for us?
    pub(super) async fn has_pcp(&self) -> bool {
        let request = pcp_head(PCP_ANNOUNCE, Duration::ZERO, self.router.own);
        self.ask(&request, |data| pcp_answer(data, PCP_ANNOUNCE)).await.is_ok()
    }

    /// Does the router speak NAT-PMP?
    pub(super) async fn has_pmp(&self) -> bool {
        self.ask(&[PMP, PMP_ADDRESS], pmp_address).await.is_ok()
    }

    /// A mapping by PCP; the same nonce renews it.
    pub(super) async fn map_pcp(
        &self,
        nonce: &Nonce,
        port: u16,
        wish: Option<SocketAddrV4>,
    ) -> io::Result<Granted> {
        let request = pcp_map(self.router.own, nonce, port, wish, LEASE);
        self.ask(&request, |data| pcp_mapped(data, nonce, port)).await
    }

    pub(super) async fn unmap_pcp(&self, nonce: &Nonce, port: u16) -> io::Result<()> {
        let request = pcp_map(self.router.own, nonce, port, None, Duration::ZERO);
        self.ask(&request, |data| pcp_answer(data, PCP_MAP)).await
    }

    /// A mapping by NAT-PMP; `wish` is the external port that there was before.
    pub(super) async fn map_pmp(&self, port: u16, wish: Option<SocketAddrV4>) -> io::Result<Granted> {
        let request = pmp_map(port, wish.map_or(0, |wish| wish.port()), LEASE);
        let (external_port, lifetime) = self.ask(&request, |data| pmp_mapped(data, port)).await?;
        let external = self.ask(&[PMP, PMP_ADDRESS], pmp_address).await?;
        Ok(Granted { external: SocketAddrV4::new(external, external_port), lifetime })
    }

    pub(super) async fn unmap_pmp(&self, port: u16) -> io::Result<()> {
        let request = pmp_map(port, 0, Duration::ZERO);
        self.ask(&request, |data| pmp_answer(data, PMP_MAP_UDP)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: Nonce = [7; 12];
    const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 7);
    const EXTERNAL: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

    fn pcp_granted(port: u16) -> Vec<u8> {
        let mut answer =
            pcp_map(OWN, &NONCE, port, Some(SocketAddrV4::new(EXTERNAL, 7777)), Duration::from_mins(10));
        answer[1] |= ANSWER;
        answer[2..4].fill(0);
        answer
    }

    #[test]
    fn requests_have_the_bytes_of_the_standards() {
        let map = pcp_map(OWN, &NONCE, 0x0102, None, LEASE);
        assert_eq!(map.len(), PCP_MAP_LEN);
        assert_eq!(map[..8], [2, 1, 0, 0, 0, 0, 0x1c, 0x20]);
        assert_eq!(map[18..24], [0xff, 0xff, 192, 168, 1, 7]);
        assert_eq!(map[24..36], NONCE);
        assert_eq!(map[36..44], [17, 0, 0, 0, 1, 2, 0, 0]);
        assert_eq!(map[54..], [0xff, 0xff, 0, 0, 0, 0]);
        assert_eq!(pcp_head(PCP_ANNOUNCE, Duration::ZERO, OWN).len(), 24);
        assert_eq!(pmp_map(0x0102, 0x0304, LEASE), [0, 1, 0, 0, 1, 2, 3, 4, 0, 0, 0x1c, 0x20]);
    }

    #[test]
    fn a_pcp_grant_is_read_and_must_be_ours() {
        let answer = pcp_granted(41641);
        let granted =
            Granted { external: SocketAddrV4::new(EXTERNAL, 7777), lifetime: Duration::from_mins(10) };
        assert_eq!(pcp_mapped(&answer, &NONCE, 41641), Some(Ok(granted)));
        assert_eq!(pcp_mapped(&answer, &NONCE, 41642), None);
        assert_eq!(pcp_mapped(&answer, &[8; 12], 41641), None);
        assert_eq!(pcp_mapped(&answer[..50], &NONCE, 41641), None);
    }

    #[test]
    fn refusals_are_told() {
        let mut answer = pcp_granted(41641);
        answer[3] = 2;
        assert_eq!(pcp_mapped(&answer, &NONCE, 41641), Some(Err(Refused(2))));
        // a router without PCP
        assert_eq!(pcp_answer(&[0, 0x81, 0, 1, 0, 0, 0, 0], PCP_MAP), Some(Err(Refused(1))));
        assert_eq!(pmp_address(&[0, 0x80, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0]), Some(Err(Refused(3))));
    }

    #[test]
    fn pmp_answers_are_read() {
        assert_eq!(pmp_address(&[0, 0x80, 0, 0, 0, 0, 0, 9, 198, 51, 100, 1]), Some(Ok(EXTERNAL)));
        let mapped = [0, 0x81, 0, 0, 0, 0, 0, 9, 1, 2, 3, 4, 0, 0, 0, 60];
        assert_eq!(pmp_mapped(&mapped, 0x0102), Some(Ok((0x0304, Duration::from_mins(1)))));
        assert_eq!(pmp_mapped(&mapped, 0x0103), None);
        assert_eq!(pmp_mapped(&mapped[..12], 0x0102), None);
        assert_eq!(pmp_answer(&[], PMP_ADDRESS), None);
    }

    #[tokio::test]
    async fn a_lost_request_is_sent_again() {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let router = Router {
            address: Ipv4Addr::LOCALHOST,
            own: Ipv4Addr::LOCALHOST,
            pcp_port: server.local_addr().unwrap().port(),
        };
        let answering = tokio::spawn(async move {
            let mut buffer = [0; 100];
            server.recv_from(&mut buffer).await.unwrap();
            let (len, from) = server.recv_from(&mut buffer).await.unwrap();
            let mut answer = buffer[..len].to_vec();
            answer[1] |= ANSWER;
            answer[42..44].copy_from_slice(&7777_u16.to_be_bytes());
            answer[56..60].copy_from_slice(&EXTERNAL.octets());
            server.send_to(&answer, from).await.unwrap();
        });
        let client = Client::new(router, None).await.unwrap();
        let granted = client.map_pcp(&NONCE, 41641, None).await.unwrap();
        assert_eq!(granted, Granted { external: SocketAddrV4::new(EXTERNAL, 7777), lifetime: LEASE });
        answering.await.unwrap();
    }
}
